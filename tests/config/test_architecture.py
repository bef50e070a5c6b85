"""Who may import whom (docs/ARCHITECTURE.md)."""

import ast
from pathlib import Path

import pytest

POSE = Path(__file__).resolve().parents[2] / "pose"
ALLOWED = {
    "errors": set(),
    "network": set(),
    "positions": {"errors"},
    "coverage": {"positions", "errors"},
    "rope": {"errors"},
    "data": {"data", "positions", "errors", "network"},
    "modeling": {"modeling", "rope", "errors", "network", "data.examples"},
    "evaluation": {"evaluation", "data", "modeling", "errors"},
    "module": {"modeling", "rope", "errors"},
    "strategies": {"modeling", "errors"},
    "callbacks": {"modeling"},
    "watch": {"callbacks", "evaluation", "modeling", "errors"},
    "checkpoints": {"errors", "network"},
    "report": {"coverage", "evaluation.task"},
    "launch": {"errors"},
}
KNOW_HYDRA = {"schema", "runtime", "build", "compare", "outcome", "report", "launch", "resume", "loggers"}


def imports(file: Path) -> set[str]:
    """Names of imported modules, but for those of a command (`if __name__ == "__main__":`): no importer has those."""
    found, module = set(), ast.parse(file.read_text())
    commands = [node for node in module.body if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)]
    module.body = [node for node in module.body if node not in commands]
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


@pytest.mark.parametrize("file", sorted(POSE.rglob("*.py")), ids=lambda file: str(file.relative_to(POSE)))
def test_imports_stay_in_their_lane(file):
    room = file.relative_to(POSE).with_suffix("").parts[0]
    modules = imports(file)
    if room in ALLOWED:
        ours = {name.removeprefix("pose.") for name in modules if name.startswith("pose.")}
        stray = {name for name in ours if name not in ALLOWED[room] and name.split(".")[0] not in ALLOWED[room]}
        assert not stray, f"{room} must not import {stray}"
    if room not in KNOW_HYDRA:
        assert not {name for name in modules if name.split(".")[0] in ("hydra", "omegaconf")}
    if room in ("positions", "coverage", "rope"):
        outside = {name.split(".")[0] for name in modules} - {"pose", "numpy", "torch"}
        assert not outside & {"transformers", "lightning", "datasets", "pandas"}
