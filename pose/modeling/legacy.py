"""The command `python -m pose.modeling.legacy SRC DST`; see `pose.modeling.checkpoints.legacy`."""

from pose.modeling.checkpoints.legacy import import_folder, main, modernise

__all__ = ["import_folder", "modernise"]

if __name__ == "__main__":
    main()
