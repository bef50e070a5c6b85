"""A model with rescaled RoPE and nothing trained: python -m benchmarks.scaled MODEL FOLDER --target-len N

train.py measures this model by itself (eval.before); the folder is for evaluate.py, where the two have to be apart.
YaRN alone, since that is what experiment=smollm2_32k takes.
"""

import argparse
from pathlib import Path


def main(arguments: list[str] | None = None):
    """Writes the folder.

    Args:
        arguments: of the command line; None takes those of the process.
    """
    parser = argparse.ArgumentParser(
        "python -m benchmarks.scaled", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a Hugging Face folder or a .gguf file")
    parser.add_argument("folder", type=Path, help="to write to; must not be there yet")
    parser.add_argument("--target-len", type=int, required=True, help="the new window, in tokens")
    args = parser.parse_args(arguments)
    if args.folder.exists():
        parser.error(f"{args.folder} is there already")

    import shutil

    from pose.errors import PoseError
    from pose.files import atomic_folder, locate
    from pose.modeling.checkpoints.gguf import convert
    from pose.modeling.load import load_config, scale_config
    from pose.rope import Yarn

    try:
        with atomic_folder(args.folder) as partial:
            if args.model.endswith(".gguf"):
                convert(args.model, partial)
            else:
                shutil.copytree(locate(args.model), partial, dirs_exist_ok=True)
            config = load_config(str(partial))
            scale_config(config, Yarn(), args.target_len)
            config.save_pretrained(partial)
    except (PoseError, OSError) as error:
        raise SystemExit(f"{args.model}: {error}") from error
    print(f"{args.folder}: {config.rope_parameters}")


if __name__ == "__main__":
    main()
