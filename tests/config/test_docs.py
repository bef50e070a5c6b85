"""What the documentation says one can type, and where it leads: commands are accepted, links arrive, plans hold."""

import contextlib
import dataclasses
import importlib
import re
import shlex
from itertools import chain
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from pose.app import build, command, preflight, schema
from pose.app import plan as planner
from pose.app.shapes import SHAPES
from pose.plan import GIB, GPUS

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"
PAGES = sorted([REPOSITORY / "README.md", *DOCS.rglob("*.md"), *REPOSITORY.glob("assets/**/*.md")])
BLOCK = re.compile(r"^ *```\w*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)  # of a list too
PROGRAM = re.compile(r"(?:python\S* |torchrun .*|^(?=\S+ \S+=))(train\.py|evaluate\.py|-m pose\.[\w.]+)(?: |$)")
COMPOSED = {
    "train.py": ("train", schema.TrainConfig),
    "evaluate.py": ("evaluate", schema.EvaluateConfig),
    "pose.coverage": ("coverage", schema.CoverageConfig),
    "pose.search": ("search", schema.SearchConfig),
    "pose.plan": ("train", schema.TrainConfig),
}
WINDOWS = {name: shape["max_position_embeddings"] for name, shape in SHAPES.items()} | {"assets/tiny": 256}
schema.register()


def filled(word: str) -> str:
    """With something in place of what a reader fills in: a number for N, a folder for {name}."""
    return re.sub(r"\{[\w.]+\}", "FOLDER", re.sub("=N$", "=1", word))


def commands(text: str) -> list[tuple[str, tuple[str, ...]]]:
    """Program and arguments of each command in blocks of code, and in code within a sentence.

    `$name` of a loop is its first value. What stands for more to be filled in is left out. So are commands with options
    of Hydra's own.
    """
    lines = []
    for block in BLOCK.findall(text):
        for name, value in re.findall(r"for (\w+) in (\S+)", block):
            block = block.replace(f"${name}", value)
        lines += block.replace("\\\n", " ").splitlines()
    lines += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", BLOCK.sub("", text))]
    found = []
    for line in lines:
        if named := PROGRAM.search(line):
            words = shlex.split(line[named.end() :], comments=True)
            ends = [i for i, word in enumerate(words) if word in ("&&", "|", ";") or word.startswith("[")]
            words = [word for word in words[: min(ends, default=len(words))] if not re.search(r"^\.\.\.|=NAME$", word)]
            program, words = named[1].removeprefix("-m "), [filled(word) for word in words]
            if program.startswith("pose.") or not any(word.startswith("--") for word in words):
                found.append((program, tuple(words)))
    return found


COMMANDS = list(dict.fromkeys((page.name, *found) for page in PAGES for found in commands(page.read_text())))


@contextlib.contextmanager
def after_parsing():
    """In place of `command.running`: the arguments stand, and nothing more is done."""
    raise EOFError("the arguments stand")
    yield


def parse(program: str, arguments: tuple[str, ...], monkeypatch):
    """Lets the program, a module of pose/app by the last part of its name, take the arguments, and do no more."""
    monkeypatch.setattr(command, "running", after_parsing)
    monkeypatch.setattr("sys.argv", [program, *arguments])
    with pytest.raises(EOFError, match="the arguments stand"):
        importlib.import_module(f"pose.app.{program.rpartition('.')[2]}").main()


def check_overrides(name: str, kind: type, arguments: tuple[str, ...]):
    """Composes each job of the arguments, and checks what is checked without reading a file."""
    overrides = OverridesParser.create().parse_overrides([word for word in arguments if word != "-m"])
    hydra = [override.input_line for override in overrides if override.is_hydra_override()]
    task = [override for override in overrides if not override.is_hydra_override()]
    for job in chain(*BasicSweeper.split_arguments(task, None)):
        cfg = compose(name, [*job, *hydra], return_hydra_config=True)
        del cfg.hydra
        preflight.check_config(cfg, kind)
        for field in dataclasses.fields(kind):
            if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
                schema.to_options(cfg[field.name], field.type)
        if "pose" in cfg:
            lengths = cfg.pose.get("train_len")
            window = WINDOWS.get(cfg.model.path) if "model" in cfg else None
            if window or lengths:
                build.build_sampler(cfg.pose, window)
        if "rope" in cfg and "factors" not in cfg.rope:
            build.build_scaling(cfg.rope)


def test_commands_are_found():
    """In every form that the pages use."""
    text = "So `train.py seed=1` and\n`python -m pose.report\nRUN`, not `python -m other`.\n"
    text += "```bash\nfor a in x y; do\n  python train.py rope=$a \\\n    seed=2 # three\ndone\n"
    text += "torchrun --nproc 2 train.py ... seed=N [more of them]\n"
    text += ".venv/bin/python evaluate.py 'ckpt={a:b}' x={a.b}/c && x\n"
    text += "train.py  evaluate.py  compose\npython train.py --help\n```\n"
    assert commands(text) == [
        ("train.py", ("rope=x", "seed=2")),
        ("train.py", ("seed=1",)),
        ("evaluate.py", ("ckpt={a:b}", "x=FOLDER/c")),
        ("train.py", ("seed=1",)),
        ("pose.report", ("RUN",)),
    ]
    assert {program for _, program, _ in COMMANDS} > {*COMPOSED, "pose.report", "pose.modeling.legacy"}


@pytest.mark.parametrize(("page", "program", "arguments"), COMMANDS, ids=lambda v: v if isinstance(v, str) else None)
def test_every_command_is_accepted(page, program, arguments, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # no command is right because of what lies in the repository's root
    (tmp_path / "FOLDER").mkdir()
    if program not in COMPOSED:
        return parse(program, arguments, monkeypatch)
    arguments = tuple(word for word in arguments if not (program == "pose.plan" and word.startswith("--")))
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        check_overrides(*COMPOSED[program], arguments)


# Links


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_link_arrives(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", page.read_text())):
        if re.match(r"https?:", target):
            continue
        name, _, anchor = target.partition("#")
        leads_to = (page.parent / name).resolve() if name else page
        assert leads_to.exists(), f"{target}: no such file"
        if anchor:
            assert anchor in anchors(leads_to), f"{target}: no such heading"


def test_what_programs_say_of_pages_is_there():
    """Messages, configs and comments name pages as docs/NAME.md#heading."""
    sources = chain(
        *(REPOSITORY.glob(f"{folder}/**/*.{kind}") for folder in ("pose", "conf") for kind in ("py", "yaml"))
    )
    named = {
        name for source in sources for name in re.findall(r"(?<![\w/])docs/[\w/]+\.md(?:#[\w-]+)?", source.read_text())
    }
    assert named
    for name in named:
        page, _, anchor = name.partition("#")
        assert (REPOSITORY / page).is_file() and (not anchor or anchor in anchors(REPOSITORY / page)), name


def test_the_index_names_every_page():
    linked = set(re.findall(r"\]\(([\w/]+\.md)", (DOCS / "README.md").read_text()))
    assert {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")} - {"README.md"} <= linked


# Memory and hours that the how-tos claim


def plans(text: str) -> list[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    """Rows of the tables whose head is `python -m pose.plan ...`: all overrides, the head's cells, and the row's."""
    rows, head = [], None
    for line in text.splitlines():
        cells = tuple(cell.strip() for cell in line.strip().strip("|").split("|")) if line.startswith("|") else None
        if cells and cells[0].startswith("`python -m pose.plan"):
            head = cells
        elif cells and head and not cells[0].startswith("---"):
            rows.append((head[0].strip("`").partition("pose.plan")[2] + " " + cells[0].strip("`"), head, cells))
        elif not cells:
            head = None
    return rows


PLANS = [row for page in PAGES for row in plans(page.read_text())]


@pytest.mark.parametrize(("overrides", "head", "cells"), PLANS, ids=[row[0] for row in PLANS])
def test_plans_are_those_of_the_planner(overrides, head, cells):
    training = planner.plan(planner.compose_config(shlex.split(overrides)))
    for name, cell in zip(head[1:], cells[1:], strict=True):
        if name.startswith("GiB"):
            one = training.full_length() if "full length" in name else training
            assert float(cell) == pytest.approx(one.memory["total"] / GIB, abs=0.051)
        else:
            (gpu,) = (gpu for gpu in GPUS if gpu.name == name.removeprefix("hours, "))
            assert float(cell) == pytest.approx(training.hours(gpu), rel=0.05)


def test_there_are_plans():
    assert len(PLANS) >= 8
