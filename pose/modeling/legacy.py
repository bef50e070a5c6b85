"""The command `python -m pose.modeling.legacy SRC DST`; see `pose.modeling.checkpoints.legacy`."""

import runpy

from pose.modeling.checkpoints.legacy import import_folder, modernise

__all__ = ["import_folder", "modernise"]

if __name__ == "__main__":
    runpy.run_module("pose.app.legacy", run_name="__main__")
