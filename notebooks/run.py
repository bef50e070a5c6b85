"""Runs the notebooks from top to bottom and keeps their outputs in them: after a change, or with another assets/tiny.

python notebooks/run.py [NAME ...]     such as rope_methods; all of them unless some are named
"""

import base64
import io
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).resolve().parent
# Nothing is fetched; and without ipywidgets tqdm warns, with a path of this machine.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore:IProgress not found"}
NOTEBOOKS = {path.stem: path for path in sorted(FOLDER.glob("*.ipynb"))}


def execute(path: Path, folder: Path = FOLDER, instead: Mapping[str, str] | None = None) -> nbformat.NotebookNode:
    """A notebook with the outputs of a new run, in a kernel of its own.

    Args:
        path: of the notebook.
        folder: that the kernel stands in.
        instead: text of the code, and what is run in its place, such as fewer steps.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell fails; with its traceback.
        ValueError: a text of `instead` is not there.
    """
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for old, new in (instead or {}).items():
        cells = [cell for cell in code if old in cell.source]
        if not cells:
            raise ValueError(f"{path.name} has no {old!r}")
        for cell in cells:
            cell.source = cell.source.replace(old, new)
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", record_timing=False, resources=resources, coalesce_streams=True
    )
    client.execute(env=os.environ | ENVIRONMENT)
    return notebook


def store(notebook: nbformat.NotebookNode, path: Path):
    """Writes a notebook without what differs from machine to machine, its pictures with 128 colours each."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = _smaller(output.data["image/png"])
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    nbformat.write(notebook, path)


def _smaller(png: str) -> str:
    """A PNG in base64 at about a third of its size; lines and text look the same."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    file = io.BytesIO()
    picture.save(file, "png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def main(names: list[str]):
    """Runs the notebooks of these names, or all."""
    if unknown := set(names) - set(NOTEBOOKS):
        raise SystemExit(f"There is no notebook {', '.join(sorted(unknown))}: choose from {', '.join(NOTEBOOKS)}")
    for name in names or NOTEBOOKS:
        store(execute(NOTEBOOKS[name]), NOTEBOOKS[name])


if __name__ == "__main__":
    main(sys.argv[1:])
