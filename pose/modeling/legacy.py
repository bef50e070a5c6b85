"""The command `python -m pose.modeling.legacy SRC DST`; see `pose.modeling.checkpoints.legacy`."""

if __name__ == "__main__":  # before what takes seconds to import
    import runpy

    runpy.run_module("pose.app.legacy", run_name="__main__")
    raise SystemExit

from pose.modeling.checkpoints.legacy import import_folder, modernise

__all__ = ["import_folder", "modernise"]
