"""A model with rescaled RoPE and nothing trained: python -m benchmarks.scaled MODEL FOLDER --target-len N [rope=...]

train.py measures this model by itself (eval.before); the folder is for evaluate.py, where the two have to be apart.
The method is train.py's: rope=yarn (the default), rope.factor=8, rope.rcd_shift=true and so on, or that of
experiment=NAME.
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
    parser.add_argument("overrides", nargs="*", help="of the group rope, or experiment=NAME, as train.py takes them")
    args = parser.parse_intermixed_args(arguments)
    if args.folder.exists():
        parser.error(f"{args.folder} is there already")

    import shutil

    import torch
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException

    from pose.app import schema
    from pose.app.build import build_scaling
    from pose.errors import PoseError
    from pose.files import CONF, atomic_folder, locate, read_json
    from pose.modeling.checkpoints.gguf import convert
    from pose.modeling.export.folder import export_model
    from pose.modeling.layers import check_layers
    from pose.modeling.load import FORMS, build_model, check_weights, load_config, load_tokenizer, scale_config

    known = ("rope=", "rope.", "experiment=")
    if others := [given for given in args.overrides if not given.lstrip("+").startswith(known)]:
        parser.error(
            f"{' '.join(others)}: the group rope alone has a part in it (rope=NAME, rope.KEY=VALUE, or experiment=NAME)"
        )
    schema.register()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            scaling = build_scaling(compose("train", args.overrides).rope)
    except (PoseError, HydraException) as error:
        raise SystemExit(f"{' '.join(args.overrides)}: {error}") from error

    def scaled_config(folder: str):
        config = load_config(folder)
        scale_config(config, scaling, args.target_len)
        check_layers(config)
        check_weights(config, folder)
        return config

    try:
        source = locate(args.model)
        if read_json(Path(source) / "config.json").get("model_type") in FORMS:  # whose weights are of another form too
            config = scaled_config(source)
            dtype = config.dtype or torch.float32
            export_model(build_model(config, source), load_tokenizer(source), args.folder, dtype)
        else:
            with atomic_folder(args.folder) as partial:
                if args.model.endswith(".gguf"):
                    convert(args.model, partial)
                else:
                    shutil.copytree(source, partial, dirs_exist_ok=True)
                config = scaled_config(str(partial))
                config.save_pretrained(partial)
    except (PoseError, OSError) as error:
        raise SystemExit(f"{args.model}: {error}") from error
    print(f"{args.folder}: {config.rope_parameters}")


if __name__ == "__main__":
    main()
