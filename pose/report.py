"""The command `python -m pose.report RUN_OR_SWEEP_OR_EVALUATION ...`: what was found, on one page (docs/REPORTS.md)."""

from pose.app.report import main

if __name__ == "__main__":
    main()
