"""The package as `pip install .` leaves it, used from another folder, without this repository."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow

PREPARE = """
import sys
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.manual_seed(0)
shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=101)
LlamaForCausalLM(LlamaConfig(max_position_embeddings=64, **shape)).save_pretrained("base")
words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(101)}, unk_token="w0"))
PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0").save_pretrained("base")
folder, target_len = "base", 512
documents = [{"input_ids": torch.randint(101, (100 + i,))} for i in range(4)]
"""
CHECK = """
import pose
assert pose.__file__.startswith(sys.argv[1]), pose.__file__
assert not [name for name in sys.modules if name.split(".")[0] in ("hydra", "omegaconf", "lightning")]
assert batch["position_ids"].shape == (2, 64) and int(batch["position_ids"].max()) < 512
assert all(parameter.grad is not None for parameter in model.parameters())
"""
PLAIN = """
import sys
from transformers import AutoModelForCausalLM
sys.modules["pose"] = None
assert AutoModelForCausalLM.from_pretrained("extended").config.rope_parameters["factor"] == 8
"""


def run(*arguments, cwd, **environment):
    """A process that sees nothing of the repository."""
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    arguments = [sys.executable, *map(str, arguments)]
    result = subprocess.run(
        arguments, cwd=cwd, env=kept | environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:] + result.stdout[-1000:]
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, since setuptools leaves its traces beside pyproject.toml; no network."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    for name in ("pose", "conf"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    run("-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "-w", out, cwd=source)
    (file,) = out.glob("pose-*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    run("-m", "pip", "install", "--no-deps", "--no-index", "--target", folder, wheel, cwd=folder)
    return folder


def test_the_wheel_holds_all_modules_and_configs_and_nothing_else(wheel):
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    modules = {str(file.relative_to(REPOSITORY)) for file in (REPOSITORY / "pose").rglob("*.py")}
    configs = {"pose/" + str(file.relative_to(REPOSITORY)) for file in (REPOSITORY / "conf").rglob("*.yaml")}
    assets = {str(file.relative_to(REPOSITORY)) for file in (REPOSITORY / "pose" / "reporting" / "assets").iterdir()}
    assert len(configs) > 20 and set(names) == modules | configs | assets | {"pose/py.typed"}


def test_what_is_imported_is_required(wheel):
    """Every distribution of requirements.txt that the package itself needs, or an extra does."""
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    fields = Parser().parsestr(archive.read(metadata).decode())
    required = {re.match(r"[\w-]+", entry)[0] for entry in fields.get_all("Requires-Dist")}
    pinned = (REPOSITORY / "requirements.txt").read_text().split("# tests, checks, notebooks")[0]
    assert {re.match(r"[\w-]+", line)[0] for line in pinned.splitlines() if not line.startswith("#")} <= required
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"lora", "gguf", "wandb"} <= set(extras) == set(fields.get_all("Provides-Extra"))


def test_ones_own_loop_as_the_package_describes_it(installed, tmp_path):
    """The lines of `pose.__doc__`, run outside of the repository; the result loads without the package."""
    docstring = run("-c", "import pose; print(pose.__doc__)", cwd=tmp_path, PYTHONPATH=str(installed))
    lines = re.search(r"    from torch.*?\n\n    .*?(?=\n\n)", docstring, re.DOTALL)[0]
    code = "\n".join(line.removeprefix("    ") for line in lines.splitlines())
    assert code.rstrip().splitlines()[-1].startswith("export_model(")
    (tmp_path / "loop.py").write_text(PREPARE + code + CHECK)
    run("loop.py", installed, cwd=tmp_path, PYTHONPATH=str(installed))
    run("-c", PLAIN, cwd=tmp_path)


@pytest.mark.nightly
def test_a_page_finds_its_parts(installed, tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    run("-m", "pose.report", ".", cwd=tmp_path, PYTHONPATH=str(installed))
    assert "vegaEmbed" in (tmp_path / "report.html").read_text()


@pytest.mark.nightly
def test_coverage_finds_its_configs(installed, tmp_path):
    run(
        "-m", "pose.coverage", "pose=pose", "pose.train_len=32", "pose.target_len=128", "hydra.run.dir=out",
        cwd=tmp_path, PYTHONPATH=str(installed),
    )  # fmt: skip
    rows = (tmp_path / "out" / "coverage.csv").read_text().splitlines()
    assert rows[0] == "distance,probability,pair_share" and len(rows) == 128
    assert (tmp_path / "out" / "coverage.png").is_file()
