"""The command `python -m pose.wandb_workspace PROJECT`: the dashboard of a project in W&B (docs/WANDB.md)."""

from pose.app.wandb_workspace import main

if __name__ == "__main__":
    main()
