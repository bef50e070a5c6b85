"""Every notebook runs from top to bottom and offline; what is stored of it was run in order, and knows no machine."""

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

from notebooks.run import NOTEBOOKS, execute, main, store  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[2]
FEWER = {  # of the code, and what a test runs in its place
    "extend_your_model": {"STEPS = 64": "STEPS = 5"},
    "reading_results": {"trainer.max_steps=24": "trainer.max_steps=4", "eval.max_documents=10": "eval.max_documents=2"},
}
DAILY = ("what_pose_does",)
IN_THE_REPOSITORY = ("rope_methods", "extend_your_model")  # the kernels of the others stand in notebooks/
ABSOLUTE = re.compile(r"(?<![\w.:/@)\]])(?:/(?:[\w.~+-]+/)+[\w.~+-]*|/(?:root|home|tmp)\b|[A-Za-z]:\\\w+)")


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def texts(output):
    """All that an output says in words."""
    return [output.get("text", "")] + [
        str(value) for kind, value in output.get("data", {}).items() if not kind.startswith("image/")
    ]


@pytest.mark.parametrize("text", ["Run folder  /home/me/run", "in '/tmp'", "at=/a/b.py:3", r"C:\Users\x", "\n/home"])
def test_an_absolute_path_is_seen(text):
    assert ABSOLUTE.search(text)


@pytest.mark.parametrize(
    "text",
    ["https://arxiv.org/abs/2309.10400", "train/loss and/or val/x/y", "../docs/ROPE.md", "3.1 tokens/s", "1 / 2"],
)
def test_what_is_no_absolute_path_is_not(text):
    assert not ABSOLUTE.search(text)


def test_there_are_notebooks():
    assert set(NOTEBOOKS) == {"extend_your_model", "reading_results", "rope_methods", "what_pose_does"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in DAILY else pytest.mark.nightly) for name in NOTEBOOKS]
)
def test_notebook_runs(name, tmp_path, monkeypatch):
    """Raises CellExecutionError, with the cell's traceback, where a cell fails. What runs leave is not in outputs/."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    folder = REPOSITORY if name in IN_THE_REPOSITORY else NOTEBOOKS[name].parent
    instead = FEWER.get(name, {})
    if "outputs/notebooks" in NOTEBOOKS[name].read_text():
        instead = instead | {"outputs/notebooks": str(tmp_path)}
    notebook = execute(NOTEBOOKS[name], folder, instead)
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    stored = nbformat.read(NOTEBOOKS[name], as_version=4)
    assert [output.output_type for output in outputs(notebook)] == [output.output_type for output in outputs(stored)]


def test_text_to_be_replaced_has_to_be_there():
    with pytest.raises(ValueError, match=r"what_pose_does.ipynb has no 'STEPS = 7'"):
        execute(NOTEBOOKS["what_pose_does"], instead={"STEPS = 7": "STEPS = 1"})


def test_an_unknown_name_is_refused():
    with pytest.raises(SystemExit, match="no notebook rope_method: choose from extend_your_model, reading_results"):
        main(["rope_method"])


def test_what_is_stored_is_smaller_and_without_the_machine(tmp_path):
    """The pictures keep their size in pixels; a notebook that has been stored stays as it is."""
    import base64
    import io

    from matplotlib.figure import Figure
    from PIL import Image

    figure, file = Figure(), io.BytesIO()
    figure.subplots().plot(range(100), color="C1")
    figure.savefig(file, format="png")
    data = {"image/png": base64.b64encode(file.getvalue()).decode()}
    cell = nbformat.v4.new_code_cell("1", outputs=[nbformat.v4.new_output("display_data", data)], execution_count=1)
    notebook = nbformat.v4.new_notebook(
        cells=[cell], metadata={"language_info": {"name": "python", "version": "3.11.7"}}
    )
    store(notebook, tmp_path / "a.ipynb")
    (output,) = outputs(nbformat.read(tmp_path / "a.ipynb", as_version=4))
    png = base64.b64decode(output.data["image/png"])
    assert len(png) < 0.6 * len(file.getvalue())
    before, after = Image.open(file).convert("RGB"), Image.open(io.BytesIO(png)).convert("RGB")
    assert before.size == after.size and before.getpixel((5, 5)) == after.getpixel((5, 5)) == (255, 255, 255)
    assert "3.11.7" not in (tmp_path / "a.ipynb").read_text()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_stored_notebook_was_run_in_order(name):
    """All cells, from top to bottom, in one go, without an error or a warning."""
    notebook = nbformat.read(NOTEBOOKS[name], as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    assert not [output.text for output in outputs(notebook) if output.get("name") == "stderr"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_stored_notebook_is_small_and_knows_no_machine(name):
    """Outputs are stored for reading on the web; they hold no one's folders."""
    path = NOTEBOOKS[name]
    assert path.stat().st_size < 400_000
    text = path.read_text()
    assert str(REPOSITORY) not in text and f"{Path.home()}/" not in text and "site-packages" not in text
    found = [text for output in outputs(nbformat.read(path, as_version=4)) for text in texts(output)]
    assert not [match[0] for text in found for match in ABSOLUTE.finditer(text)]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_links_lead_to_files(name):
    """What the text links to is there: notebooks, docs, pictures."""
    cells = nbformat.read(NOTEBOOKS[name], as_version=4).cells
    links = [
        link for cell in cells if cell.cell_type == "markdown" for link in re.findall(r"\]\(([^)]+)\)", cell.source)
    ]
    local = [link.partition("#")[0] for link in links if "://" not in link]
    assert local and not [link for link in local if not (NOTEBOOKS[name].parent / link).exists()]
