"""The command `python -m pose.export RUN gguf [dtype=f16]`: a trained model in a form for other engines."""

import argparse
import logging
from pathlib import Path

from pose.app import command

log = logging.getLogger("pose.app.export")

USAGE = """\
A run's model as one file for llama.cpp, Ollama and what else is built on them (docs/SERVING.md). It is compared with
the model by `python -m pose.engines RUN --engines llama.cpp`.

  python -m pose.export outputs/RUN gguf
  python -m pose.export outputs/RUN/best gguf dtype=q8_0 out=best.gguf"""
SETTINGS = {"dtype": "f16", "out": None}


def setting(text: str) -> tuple[str, str]:
    """The argparse type of key=value.

    Raises:
        argparse.ArgumentTypeError: it is none, or of another key.
    """
    key, equals, value = text.partition("=")
    if not equals or key not in SETTINGS:
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted: give dtype=f16, dtype=f32, dtype=q8_0 or out=FILE")
    return key, command.path(value)


def main(arguments: list[str] | None = None):
    """Writes the file that the arguments name.

    Args:
        arguments: of the command line; None takes those of the process.
    """
    parser = argparse.ArgumentParser(
        "python -m pose.export", description=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=command.path, help="run folder (its RUN/model), RUN/best, or another model folder")
    parser.add_argument("form", choices=("gguf",), help="the form to write")
    parser.add_argument(
        "settings", nargs="*", type=setting, metavar="key=value",
        help="dtype=f16|f32|q8_0: of the matrices (default: f16); out=FILE (default: beside the model's folder)",
    )  # fmt: skip
    given = parser.parse_args(arguments)
    settings = SETTINGS | dict(given.settings)
    with command.running():
        from pose.app.models import open_local
        from pose.modeling.export.gguf import write_gguf

        folder = open_local(given.run, "RUN")
        dtype = str(settings["dtype"])
        file = Path(settings["out"] or folder.with_name(f"{folder.name}-{dtype}.gguf"))
        log.info(f"Writing {file} ...")
        write_gguf(folder, file, dtype)
        log.info(f"{file}  ({file.stat().st_size / 1e9:.3g} GB, {dtype}; docs/SERVING.md says how it is served)")


if __name__ == "__main__":
    main()
