"""Who may import whom (docs/ARCHITECTURE.md)."""

import ast
import re
from pathlib import Path

import pytest

POSE = Path(__file__).resolve().parents[2] / "pose"
# From the bottom to the top: a room may use those of lower floors, and its own.
FLOORS = [
    {"errors"},
    {"files"},
    {"positions", "rope"},
    {"coverage", "plan", "divisors"},
    {"tasks"},
    {"data"},
    {"modeling"},
    {"evaluation"},
    {"training"},
    {"reporting"},
    {"app"},
    {"export", "engines", "search", "report", "wandb_workspace"},  # commands under short names
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MODULES = sorted(POSE.rglob("*.py"))
# Beside app/: what asks Hydra how the job was started.
KNOW_HYDRA = {"training/launch.py", "training/resume.py"}


def name_of(file: Path) -> str:
    parts = file.relative_to(POSE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(file): file for file in MODULES}


def imports(file: Path) -> set[str]:
    """The modules that a file imports, at any place; of a package's name, the module that it is."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in inner if name in NAMES} or {node.module}
    return found


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_room_has_a_floor():
    assert {room_of(name) for name in NAMES} - {""} == set(FLOOR)


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(POSE)))
def test_nothing_points_upward(file):
    room = room_of(name_of(file))
    ours = {name for name in imports(file) if name in NAMES and name != "pose"}
    if room:
        stray = {name for name in ours if room_of(name) != room and FLOOR[room_of(name)] >= FLOOR[room]}
        assert not stray, f"{file.relative_to(POSE)} must not import {stray}"
    else:
        assert not ours, "pose/__init__.py imports nothing"
    if room != "app" and str(file.relative_to(POSE)) not in KNOW_HYDRA:
        assert not {name for name in imports(file) if name.split(".")[0] in ("hydra", "omegaconf")}
    if room in ("positions", "coverage", "plan", "rope", "divisors"):
        outside = {name.split(".")[0] for name in imports(file)} - {"pose", "numpy", "torch"}
        assert not outside & {"transformers", "lightning", "datasets", "pandas"}


# What `python -m` starts under this name is in app/
LEND_THEIR_NAME = {
    "coverage.py", "plan.py", "data/tokenizer.py", "evaluation/ruler.py", "modeling/legacy.py",
    "modeling/checkpoints/gguf.py",
}  # fmt: skip


def test_commands_of_app_are_started_by_their_name_alone():
    """A module that `runpy` runs is a text, which `imports` does not see."""
    for file in MODULES:
        name, tree = str(file.relative_to(POSE)), ast.parse(file.read_text())
        calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
        runs = {call for call in calls if "run_module" in ast.unparse(call.func)}
        branches = (node for node in tree.body if isinstance(node, ast.If))
        as_main = [branch for branch in branches if ast.unparse(branch.test) == "__name__ == '__main__'"]
        assert bool(runs) == (name in LEND_THEIR_NAME), name
        assert runs <= {node for one in as_main for node in ast.walk(one)}, f"{name} runs another when it is imported"


def test_only_who_must_knows_hydra():
    for name in KNOW_HYDRA:
        assert "hydra" in {module.split(".")[0] for module in imports(POSE / name)}


def test_the_way_from_config_to_objects_is_short():
    assert len((POSE / "app" / "build.py").read_text().splitlines()) <= 250


# One line of JSON, for a script to read; beside Hydra's message, before there is a log
PRINTS = {"app/plan.py", "app/hints.py"}


def test_nothing_prints():
    for file in MODULES:
        if str(file.relative_to(POSE)) in PRINTS:
            continue
        calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        lines = [node.lineno for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"]
        assert not lines, f"{file.relative_to(POSE)} prints at lines {lines}: its log file would not have it"


def test_every_file_that_is_named_exists():
    """In configs and docs: `pose/....py`."""
    root = POSE.parent
    texts = [*root.glob("conf/**/*.yaml"), *root.glob("docs/*.md"), root / "README.md"]
    named = {(name, text.name) for text in texts for name in re.findall(r"pose/[\w/]+\.py", text.read_text())}
    assert named and not [(name, text) for name, text in named if not (root / name).is_file()]


def test_there_is_no_circle():
    graph = {name: {other for other in imports(file) if other in NAMES} for name, file in NAMES.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]):
        assert name not in path, f"a circle of imports: {' -> '.join([*path[path.index(name) :], name])}"
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())
