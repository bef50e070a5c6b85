"""Tokenizers of sentencepiece (tokenizer.model) in the form of the library `tokenizers`, with sentencepiece's own ids.

transformers converts such files too, but by the rules of a class, and where a folder names none, without the space
that LLaMA's models put before a text. Here the file itself says what is done to spaces and characters.
https://github.com/google/sentencepiece
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from pose.errors import CheckpointError

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # kinds of pieces
BPE = 2  # of the algorithms


def load_spm_tokenizer(file: str | Path, settings: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Reads a sentencepiece model of BPE.

    The ids are sentencepiece's own, with one exception: beside a user-defined piece inside a text they may not be,
    where the model also puts a space before a text. Special tokens in a text are read as such, as the classes of
    transformers do.

    Args:
        file: tokenizer.model.
        settings: tokenizer_config.json: names of special tokens, add_bos_token (true unless it says otherwise),
            model_max_length, added_tokens_decoder, chat_template.

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
    steps = [normalizers.Precompiled(rules.precompiled_charsmap)] if rules.precompiled_charsmap else []
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    steps.append(normalizers.Replace(" ", "▁"))
    if rules.remove_extra_whitespaces:  # at the end sentencepiece also removes a ▁ that was in the text
        steps.append(normalizers.Replace(Regex(r"▁+\z"), ""))
    tokenizer.normalizer = normalizers.Sequence(steps)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", left=1)] * rules.add_dummy_prefix)
    tokenizer.add_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=piece.type == CONTROL)
            for piece in proto.pieces
            if piece.type in (CONTROL, USER_DEFINED)
        ]
    )
    for i, token in sorted(settings.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0])):
        if token["content"] not in vocab:
            tokenizer.add_tokens([AddedToken(token["content"], normalized=False, special=token.get("special", False))])
        if tokenizer.token_to_id(token["content"]) != int(i):
            raise CheckpointError(
                f"the tokenizer_config.json beside {file} gives {token['content']!r} the id {i}, where its place is "
                f"{tokenizer.token_to_id(token['content'])}"
            )
    special = _special_tokens(trainer, settings)
    if settings.get("add_bos_token", True) and "bos_token" in special:
        bos = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, tokenizer.token_to_id(bos))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_max_length=settings.get("model_max_length"),
        chat_template=settings.get("chat_template"),
        **special,
    )


def _parse(file: Path):
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise CheckpointError(
            f"reading {file} needs the packages sentencepiece and protobuf: pip install sentencepiece protobuf"
        ) from error
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(file.read_bytes())
    except Exception as error:  # of a class that not every version of protobuf can be asked for
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


def _special_tokens(trainer, settings: dict[str, Any]) -> dict[str, str]:
    """Those that the settings name, else the file's own."""
    special = {}
    for name in ("unk", "bos", "eos", "pad"):
        own = getattr(trainer, f"{name}_piece") if getattr(trainer, f"{name}_id") >= 0 else None
        token = settings.get(f"{name}_token") or own
        token = token["content"] if isinstance(token, dict) else token
        if token is not None:
            special[f"{name}_token"] = token
    return special
