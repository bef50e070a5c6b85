"""The command `python -m pose.search`: divisors of the rotary frequencies for `rope=searched` (docs/ROPE.md)."""

from pose.app.search import main

if __name__ == "__main__":
    main()
