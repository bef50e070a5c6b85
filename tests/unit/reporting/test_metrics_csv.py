"""metrics.csv is read as far as it is whole."""

import pytest

from pose.reporting.metrics_csv import logged_rows

HEAD = "epoch,step,train/loss,val/passkey@64"
WHOLE = ["0,9,3.5,", ",-1,,0.5", "0,19,nan,1e-3"]
ROWS = [
    {"epoch": "0", "step": "9", "train/loss": "3.5"},
    {"step": "-1", "val/passkey@64": "0.5"},
    {"epoch": "0", "step": "19", "train/loss": "nan", "val/passkey@64": "1e-3"},
]


def test_rows_have_what_was_logged_as_it_was_written(tmp_path, capsys):
    for end in ("\n", "\r\n"):  # as Lightning ends lines
        (tmp_path / "metrics.csv").write_bytes(end.join([HEAD, *WHOLE, ""]).encode())
        assert logged_rows(tmp_path / "metrics.csv") == ROWS
    assert logged_rows(tmp_path / "none.csv") == [] and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "damage",
    [b"0,29,3.x,", b"0,29,3.5", b"0,29,3.5,1,2", b"0,2.5,3.5,1", b"0,,3.5,1", b'"0,29,3.5,1', b"\0\0\0\0", b"",
     b"\xff\xfe,1,2,3", b"0,\xc2\xb2,3.5,1", b"0,29,1" + b"0" * 200_000 + b"x,1"],
)  # fmt: skip
@pytest.mark.parametrize("place", [0, 1, 3])
def test_damaged_rows_are_left_out_and_counted(tmp_path, capsys, damage, place):
    """A number that is none too, which stopped every later start of the run; the others stay."""
    lines = [line.encode() for line in WHOLE]
    (tmp_path / "metrics.csv").write_bytes(b"\n".join([HEAD.encode(), *lines[:place], damage, *lines[place:], b"0,29"]))
    assert logged_rows(tmp_path / "metrics.csv") == ROWS
    assert f"2 rows of {tmp_path}/metrics.csv are damaged" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff" * 100, b"epoch,loss\n1,2\n", b'"' + b"x" * 200_000 + b"\n1\n"])
def test_a_file_without_steps_has_no_rows(tmp_path, content):
    (tmp_path / "metrics.csv").write_bytes(content)
    assert logged_rows(tmp_path / "metrics.csv") == []
