"""The command `python -m pose.modeling.legacy SRC DST`: a folder with an older rope_scaling as a plain one."""

import argparse
import logging

from pose.app.console import log_to_terminal
from pose.app.runtime import quiet_libraries, readable_errors
from pose.modeling.checkpoints.legacy import import_folder

log = logging.getLogger("pose.app.legacy")


def main():
    """Imports the folder that the arguments name."""
    log_to_terminal()
    quiet_libraries()
    parser = argparse.ArgumentParser(prog="python -m pose.modeling.legacy", description=__doc__.splitlines()[0])
    parser.add_argument("src", help="the old folder")
    parser.add_argument("dst", help="the new folder; must not exist")
    parser.add_argument("--yarn", choices=("revised", "standard"), help="what the type yarn means")
    parser.add_argument("--window", type=int, help="the model's own window, in tokens")
    arguments = parser.parse_args()
    with readable_errors():
        import_folder(**vars(arguments))
        log.info(f"{arguments.dst}  (any transformers loads it)")


if __name__ == "__main__":
    main()
