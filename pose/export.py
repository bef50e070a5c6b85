"""The command `python -m pose.export RUN gguf`: a trained model as a file for llama.cpp (docs/SERVING.md)."""

from pose.app.export import main

if __name__ == "__main__":
    main()
