"""The command `python -m pose.modeling.legacy SRC DST`: a folder with an older rope_scaling as a plain one."""

import argparse
import logging

from pose.app import command

log = logging.getLogger("pose.app.legacy")


def main():
    """Imports the folder that the arguments name."""
    parser = argparse.ArgumentParser(prog="python -m pose.modeling.legacy", description=__doc__.splitlines()[0])
    parser.add_argument("src", type=command.path, help="the old folder")
    parser.add_argument("dst", type=command.path, help="the new folder; must not exist")
    parser.add_argument("--yarn", choices=("revised", "standard"), help="what the type yarn means")
    parser.add_argument("--window", type=int, help="the model's own window, in tokens")
    arguments = parser.parse_args()
    with command.running():
        from pose.modeling.checkpoints.legacy import import_folder

        import_folder(**vars(arguments))
        log.info(f"{arguments.dst}  (any transformers loads it)")


if __name__ == "__main__":
    main()
