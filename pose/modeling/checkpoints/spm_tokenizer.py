"""Tokenizers of sentencepiece (tokenizer.model) in the form of the library `tokenizers`, with sentencepiece's own ids.

transformers converts such files too, but by the rules of a class, and where a folder names none, without the space
that LLaMA's models put before a text. Here the file itself says what is done to spaces and characters.
https://github.com/google/sentencepiece
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pose.errors import CheckpointError

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # kinds of pieces
BPE = 2  # of the algorithms
NAMES = ("unk", "bos", "eos", "pad", "sep", "cls", "mask")  # of special tokens


def load_spm_tokenizer(file: str | Path, settings: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Reads a sentencepiece model of BPE.

    The ids are sentencepiece's own, with one exception: beside a user-defined piece inside a text they may not be,
    where the model also puts a space before a text. Special tokens in a text are read as such, as the classes of
    transformers do.

    Args:
        file: tokenizer.model.
        settings: of `merge_settings`: names of special tokens, add_bos_token (true unless it says otherwise),
            add_eos_token, add_prefix_space, model_max_length, added_tokens_decoder, chat_template, and legacy: false
            puts the space before the first word alone, not before each that follows a special token.

    Raises:
        CheckpointError: sentencepiece is not installed, or the file is not one of BPE, or the added tokens do not
            follow on its own.
    """
    proto = _parse(Path(file))
    rules, trainer = proto.normalizer_spec, proto.trainer_spec
    if trainer.model_type != BPE or trainer.treat_whitespace_as_suffix:
        raise CheckpointError(f"{file} is not a sentencepiece model of BPE: give a folder with a tokenizer.json")
    vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    tokenizer = Tokenizer(
        models.BPE(
            vocab,
            _merges(proto.pieces),
            unk_token=trainer.unk_piece,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    )
    steps: list[normalizers.Normalizer] = []
    steps += [normalizers.Precompiled(rules.precompiled_charsmap)] if rules.precompiled_charsmap else []
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    prefix = rules.add_dummy_prefix and settings.get("add_prefix_space") is not False
    first_only = prefix and settings.get("legacy") is False
    if prefix and not first_only:
        steps.append(normalizers.Prepend(" "))
    steps.append(normalizers.Replace(" ", "▁"))
    if rules.remove_extra_whitespaces:  # at the end sentencepiece also removes a ▁ that was in the text
        steps.append(normalizers.Replace(Regex(r"▁+\z"), ""))
    tokenizer.normalizer = normalizers.Sequence(steps)
    if first_only:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    back: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*back, decoders.Strip(" ", left=1)] if prefix else back)
    tokenizer.add_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=piece.type == CONTROL)
            for piece in proto.pieces
            if piece.type in (CONTROL, USER_DEFINED)
        ]
    )
    for i, token in sorted((settings.get("added_tokens_decoder") or {}).items(), key=lambda item: int(item[0])):
        if token["content"] not in vocab or int(i) == vocab[token["content"]]:
            tokenizer.add_tokens([_added(token, token.get("special", False))])
        if tokenizer.token_to_id(token["content"]) != int(i):
            raise CheckpointError(
                f"tokenizer_config.json or added_tokens.json beside {file} gives {token['content']!r} the id {i}, and "
                f"its place is {tokenizer.token_to_id(token['content'])}"
            )
    special = _special_tokens(trainer, settings)
    before = ["bos_token"] if settings.get("add_bos_token", True) and "bos_token" in special else []
    after = ["eos_token"] if settings.get("add_eos_token") and "eos_token" in special else []
    if before or after:
        around = [[special[name].content for name in names] for names in (before, after)]
        single, pair = ([*around[0], text, *around[1]] for text in ("$A", "$B"))
        ids = [(token, tokenizer.token_to_id(token)) for token in {*around[0], *around[1]}]
        tokenizer.post_processor = processors.TemplateProcessing(single, [*single, *pair], ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_max_length=settings.get("model_max_length"),
        chat_template=settings.get("chat_template"),
        **special,
    )


def merge_settings(settings: dict[str, Any], special: dict[str, Any], added: dict[str, int]) -> dict[str, Any]:
    """What the three files beside a tokenizer.model say together, by the rules of transformers.

    Args:
        settings: tokenizer_config.json. Where it has added_tokens_decoder, it says all.
        special: special_tokens_map.json: goes over the settings.
        added: added_tokens.json: the ids of tokens. Those that are named as special are so.
    """
    if settings.get("added_tokens_decoder") is not None:
        return settings
    settings = settings | special
    names = {_content(settings.get(f"{name}_token")) for name in NAMES} | set(map(_content, _extra(settings)))
    tokens = {str(i): {"content": token, "special": token in names} for token, i in added.items()}
    return settings | {"added_tokens_decoder": tokens}


def _parse(file: Path):
    try:
        from sentencepiece import sentencepiece_model_pb2 as messages
    except ImportError as error:
        raise CheckpointError(
            f"reading {file} needs the packages sentencepiece and protobuf: pip install sentencepiece protobuf"
        ) from error
    proto = messages.ModelProto()  # type: ignore[attr-defined]  # made when it is imported
    try:
        content = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
    try:
        proto.ParseFromString(content)
    except Exception as error:  # its class is not public in every version of protobuf
        raise CheckpointError(f"{file} is not a sentencepiece model: give a folder with a tokenizer.json") from error
    return proto


def _merges(pieces) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a third, by its score: sentencepiece stores the pieces alone."""
    normal = {piece.piece: piece.score for piece in pieces if piece.type == NORMAL}
    pairs = [
        (-score, whole[:i], whole[i:])
        for whole, score in normal.items()
        for i in range(1, len(whole))
        if whole[:i] in normal and whole[i:] in normal
    ]
    return [(left, right) for _, left, right in sorted(pairs, key=lambda pair: pair[0])]


def _special_tokens(trainer, settings: dict[str, Any]) -> dict[str, Any]:
    """Those that the settings name, else the file's own; as arguments of a tokenizer of transformers."""
    special: dict[str, Any] = {}
    added = {token["content"]: token for token in (settings.get("added_tokens_decoder") or {}).values()}
    for name in NAMES:
        own = getattr(trainer, f"{name}_piece", None) if getattr(trainer, f"{name}_id", -1) >= 0 else None
        token = settings.get(f"{name}_token") or own
        if token is not None:
            special[f"{name}_token"] = _added(added.get(_content(token), token), special=True)
    extra = [_added(token, special=True) for token in _extra(settings)]
    return special | ({"extra_special_tokens": extra} if extra else {})


def _extra(settings: dict[str, Any]) -> list[str | dict[str, Any]]:
    """Special tokens beside those of NAMES, under their key of transformers 5 or 4."""
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    return list(extra.values()) if isinstance(extra, dict) else extra


def _added(token: str | dict[str, Any], special: bool) -> AddedToken:
    """A token that is matched in the text before it is normalised, as by transformers' slow tokenizers."""
    options = token if isinstance(token, dict) else {}
    strips = {key: bool(options.get(key)) for key in ("lstrip", "rstrip", "single_word")}
    return AddedToken(_content(token), normalized=False, special=special, **strips)


def _content(token: str | dict[str, Any] | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token
