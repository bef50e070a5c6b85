"""Folders with older forms of `rope_scaling`, the released PoSE code's included, as plain transformers 5 ones.

    python -m pose.modeling.legacy SRC DST [--yarn revised|standard] [--window TOKENS]

| `rope_scaling` of the old config.json | what it computes |
| --- | --- |
| `{"type": "linear", "factor": s}` | position interpolation |
| `{"type": "vanilla_ntk", ...}` (released code), `"ntk"` | static NTK |
| `{"type": "dynamic", ...}` | dynamic NTK from max_position_embeddings on |
| `{"type": "yarn", ..., "original_max_position_embeddings": L0}` | the released code's revised YaRN, or the standard |
| `"llama3"`, `"longrope"`, `"su"` | as transformers |

The released code (dwzhu-pku/PoSE, src/my_configuration_llama.py and src/train_pose.py) writes `type` and `factor`, for
yarn `original_max_position_embeddings` too, and the *scaled* length in max_position_embeddings.
"""

import os
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from pose.errors import CheckpointError, ConfigError
from pose.files import atomic_folder, is_inside, load_json, write_json
from pose.modeling.checkpoints.checks import check_values
from pose.modeling.checkpoints.hub import weight_files
from pose.modeling.export.rope import for_old_readers
from pose.modeling.load import FORMS, check_has_window, scale_config
from pose.modeling.rotary import target_len_of
from pose.rope import NTK, Dynamic, Linear, Llama3, LongRope, RopeScaling, Unscaled, Yarn, YarnRevised

METHODS: dict[str, Any] = {
    "default": Unscaled,
    "linear": Linear,
    "ntk": NTK,
    "vanilla_ntk": NTK,
    "dynamic": Dynamic,
    "yarn": Yarn,
    "llama3": Llama3,
    "longrope": LongRope,
    "su": LongRope,
}
IGNORED = {"type", "rope_type", "original_max_position_embeddings", "finetuned"}
RELEASED = ("vanilla_ntk",)  # types of the released code alone, whose max_position_embeddings is the scaled length
RELEASED_BASE = 10_000.0  # the base that it uses, whatever the config says
WEIGHTS = {".safetensors", ".bin"}
LEFT_BEHIND = {".py", ".pt", ".pth"}  # code, and states of optimizers and generators
STATE = ("training_args", "trainer_state", "optimizer", "scheduler", "rng_state")


def modernise(raw: dict[str, Any], yarn: str | None = None, window: int | None = None) -> PretrainedConfig:
    """The config of transformers 5 that computes what an old one did.

    Args:
        raw: the old config.json.
        yarn: what "yarn" means where it cannot be told: "revised" (the released PoSE code) or "standard".
        window: the model's own, in tokens. None takes it from what the config tells: original_max_position_embeddings,
            max_sequence_length, and of the types that the released code alone writes max_position_embeddings / factor.
            `dynamic` computes from max_position_embeddings, which is its window.

    Returns:
        With exact rope_parameters, the window extended to in max_position_embeddings, and the note `pose`.

    Raises:
        CheckpointError: a form that is not known, lacks something, or can be read in two ways.
    """
    check_values(raw, "config.json")
    if raw.get("rope_parameters"):
        raise CheckpointError("config.json has rope_parameters: it is of transformers 5 already")
    old = raw.get("rope_scaling") or {}
    kind = old.get("rope_type") or old.get("type") or "default"
    if not isinstance(raw.get("model_type"), str | None):
        raise CheckpointError(f"config.json has model_type={raw['model_type']!r}, where a string is expected")
    if raw.get("model_type") in FORMS:
        raise CheckpointError(
            f"a {raw['model_type']} folder cannot be imported, since its weights have a form of their own too: only "
            "models that transformers itself can scale are imported"
        )
    if kind not in METHODS:
        raise CheckpointError(f"rope_scaling has the type {kind!r}, which is not known: {', '.join(METHODS)} are")
    try:
        scaling = _method(kind, old, raw, yarn)
        plain = {k: v for k, v in raw.items() if k not in ("rope_scaling", "auto_map", "transformers_version")}
        config = AutoConfig.for_model(plain.pop("model_type", None), **plain)
        check_has_window(raw, config, "the folder")
        if getattr(config, "max_position_embeddings", None) is None:
            raise ConfigError(f"a {config.model_type} model has no max_position_embeddings, and so no RoPE")
        config.max_position_embeddings, target_len = _lengths(kind, old, raw, config, scaling, window)
        scale_config(config, scaling, target_len)
    except (ConfigError, LookupError, TypeError, ValueError, StrictDataclassError) as error:
        raise CheckpointError(f"the config with rope_scaling={old} cannot be imported: {error}") from error
    return config


def import_folder(src: str | Path, dst: str | Path, yarn: str | None = None, window: int | None = None):
    """Writes a plain transformers 5 folder from an old one.

    Weights are hard-linked where the file system allows it and copied elsewhere; code and training state are left
    behind. The new folder appears in one rename, and the old one is not touched.

    Args:
        src: the old folder.
        dst: the new one; must not exist.
        yarn, window: as `modernise`.

    Raises:
        CheckpointError: as `modernise`; or src has no config.json, no weights, or a link that leads out of it, or
            cannot be read; or dst exists, or cannot be written.
    """
    src, dst = Path(src).expanduser(), Path(dst).expanduser()
    try:
        _import(src, dst, yarn, window)
    except OSError as error:
        raise CheckpointError(
            f"{src} cannot be imported to {dst}: {error.strerror or error} ({error.filename or dst})"
        ) from error


def _import(src: Path, dst: Path, yarn: str | None, window: int | None):
    if dst.exists():
        raise CheckpointError(f"{dst} exists: give a new folder")
    raw = load_json(src / "config.json", CheckpointError)
    weights = weight_files(str(src))
    others = [
        file
        for file in sorted(set(src.iterdir()) - set(weights))
        if file.is_file() and file.suffix not in LEFT_BEHIND | WEIGHTS and not file.name.startswith(STATE)
    ]
    for file in (*weights, *others):
        _check_inside(file, src)
    config = modernise(raw, yarn, window)
    with atomic_folder(dst) as partial:
        for file in weights:
            (partial / file.relative_to(src)).parent.mkdir(parents=True, exist_ok=True)
            _link(file, partial / file.relative_to(src))
        for file in others:
            shutil.copy(file, partial / file.name)
        config.save_pretrained(partial)
        for_old_readers(partial)
        tokenizer = partial / "tokenizer_config.json"
        if tokenizer.is_file():
            options = load_json(tokenizer, CheckpointError) | {"model_max_length": target_len_of(config)}
            options.pop("auto_map", None)
            write_json(tokenizer, options)


def _check_inside(file: Path, folder: Path):
    """Refuses a link out of the folder: importing a downloaded one could copy a private file into the new folder.

    A folder of the hub's cache is made of such links, into the blobs beside it.
    """
    snapshot = folder.resolve()
    blobs = snapshot.parents[1] / "blobs" if snapshot.parent.name == "snapshots" else snapshot
    if not is_inside(file, snapshot) and not is_inside(file, blobs):
        raise CheckpointError(f"{file} is a link to {file.resolve()}, outside its folder: put the file itself there")


def _method(kind: str, old: dict, raw: dict, yarn: str | None) -> RopeScaling:
    cls = METHODS[kind]
    if kind == "yarn" and _is_revised(old, raw, yarn):
        cls = YarnRevised
    if (cls is YarnRevised or kind == "vanilla_ntk") and raw.get("rope_theta", RELEASED_BASE) != RELEASED_BASE:
        raise ConfigError(
            f"rope_theta={raw['rope_theta']} is not what the released code computes with, always {RELEASED_BASE:g}: if "
            "it trained this model, set that in a copy of config.json"
        )
    options = {key: value for key, value in old.items() if key not in IGNORED and value is not None}
    if cls not in (Unscaled, LongRope) and "factor" not in options:
        raise ConfigError("it has no factor")
    try:
        return cls(**options)
    except TypeError:
        accepted = ", ".join(key for key in cls.__dataclass_fields__)
        raise ConfigError(f"it has keys beside those that are known ({accepted})") from None


def _is_revised(old: dict, raw: dict, yarn: str | None) -> bool:
    if yarn not in (None, "revised", "standard"):
        raise ConfigError(f"yarn={yarn!r} is not accepted: give revised or standard")
    keys_of_both = {"type", "factor", "original_max_position_embeddings"}
    if yarn is None and set(old) <= keys_of_both and raw.get("model_type") == "llama":
        raise ConfigError(
            "its yarn can be the revised one of the released PoSE code or the standard one, and they differ: say "
            "--yarn revised or --yarn standard"
        )
    return yarn == "revised"


def _lengths(
    kind: str, old: dict, raw: dict, config: PretrainedConfig, scaling: RopeScaling, window: int | None
) -> tuple[int, int]:
    """The model's own window and the one it was extended to, in tokens."""
    longest, factor = config.max_position_embeddings, scaling.factor or 1.0
    if window is not None and window < 1:
        raise ConfigError(f"--window {window} is not accepted: give a number of tokens")
    if kind == "dynamic":
        if window not in (None, longest):
            raise ConfigError(f"its window is max_position_embeddings={longest}, and cannot be {window}")
        return longest, int(longest * factor)
    key = "original_max_position_embeddings"
    window = window or old.get(key) or getattr(config, key, None)
    trained = raw.get("max_sequence_length")  # in LLaMA's first folders, and in those made from them
    if window is None and trained in (longest / factor, longest * factor):
        window = min(trained, longest)
    if window is None and (factor == 1 or kind in RELEASED):
        window = round(longest / factor)
    if window is None:
        raise ConfigError(
            f"it does not tell whether max_position_embeddings={longest} is the model's own window or the one it was "
            f"extended to: say --window {longest} or --window {round(longest / factor)}"
        )
    if kind == "llama3" and longest > window:  # whose factor is how far the slow frequencies are stretched alone
        return window, longest
    return window, max(longest, int(window * factor))


def _link(source: Path, target: Path):
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copy(source, target)
