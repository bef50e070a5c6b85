"""The command `python -m pose.modeling.legacy SRC DST`; see `pose.modeling.checkpoints.legacy`."""

if __name__ == "__main__":
    import runpy

    runpy.run_module("pose.app.legacy", run_name="__main__")
