"""The command `python -m pose.modeling.checkpoints.gguf SOURCE FOLDER`: a GGUF file as an ordinary folder."""

import argparse
import logging

from pose.app.console import log_to_terminal
from pose.app.runtime import quiet_libraries, readable_errors
from pose.modeling.checkpoints.gguf import convert, describe, find_gguf

log = logging.getLogger("pose.app.gguf")


def main():
    """Converts the file that the arguments name."""
    log_to_terminal()
    quiet_libraries()
    parser = argparse.ArgumentParser(
        prog="python -m pose.modeling.checkpoints.gguf", description=__doc__.splitlines()[0]
    )
    parser.add_argument("source", help="a .gguf file, or an installed package that carries one")
    parser.add_argument("folder", help="to write to; must not be there yet")
    arguments = parser.parse_args()
    with readable_errors():
        file = find_gguf(arguments.source)
        convert(file, arguments.folder)
        log.info(f"{arguments.folder}: {describe(file)}")


if __name__ == "__main__":
    main()
