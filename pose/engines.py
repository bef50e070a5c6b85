"""The command `python -m pose.engines RUN`: what each serving engine makes of a model (docs/SERVING.md)."""

from pose.app.engines import main

if __name__ == "__main__":
    main()
