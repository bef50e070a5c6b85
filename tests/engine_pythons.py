"""Where the tests find serving engines: in environments of their own, since their requirements clash."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

MODULES = {"llama.cpp": "xllamacpp", "vllm": "vllm", "mlx": "mlx_lm", "transformers": "transformers"}
MADE = Path(__file__).resolve().parents[1] / ".engines" / "bin" / "python"  # by `make engines`


@functools.cache
def interpreter(engine: str) -> str:
    """The interpreter that has an engine; the test is skipped where none has it.

    POSE_ENGINES names interpreters, as PATH names folders.
    """
    given = os.environ.get("POSE_ENGINES", "").split(os.pathsep)
    look = f"import importlib.util as u, sys; sys.exit(u.find_spec({MODULES[engine]!r}) is None)"
    for python in (*filter(None, given), str(MADE), sys.executable):
        if Path(python).is_file() and subprocess.run([python, "-c", look], check=False).returncode == 0:
            return python
    pytest.skip(f"no interpreter has {MODULES[engine]}: `make engines`, or name some in POSE_ENGINES")
