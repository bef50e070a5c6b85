"""The command `python -m pose.modeling.checkpoints.gguf SOURCE FOLDER`: a GGUF file as an ordinary folder."""

import argparse
import logging

from pose.app import command

log = logging.getLogger("pose.app.gguf")


def main():
    """Converts the file that the arguments name."""
    parser = argparse.ArgumentParser(
        prog="python -m pose.modeling.checkpoints.gguf", description=__doc__.splitlines()[0]
    )
    parser.add_argument("source", type=command.path, help="a .gguf file, or an installed package that carries one")
    parser.add_argument("folder", type=command.path, help="to write to; must not be there yet")
    arguments = parser.parse_args()
    with command.running():
        from pose.modeling.checkpoints.gguf import convert, describe, find_gguf

        file = find_gguf(arguments.source)
        convert(file, arguments.folder)
        log.info(f"{arguments.folder}: {describe(file)}")


if __name__ == "__main__":
    main()
