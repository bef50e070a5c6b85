"""A tokenizer in the form that llama.cpp reads: a list of tokens, and the name of the rules that it knows in code.

llama.cpp cuts a text before its pieces are merged by rules that a file can only name. They are recognised here by their
definition, so that a new vocabulary with known rules needs no entry anywhere; unknown rules are an error, since a wrong
name gives other tokens without a word.
"""

import json
import logging
from dataclasses import dataclass, field
from typing import Any

from pose.errors import CheckpointError
from pose.modeling.weights import listed

log = logging.getLogger(__name__)

# Kinds of tokens in a GGUF.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_BYTES: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


def _cut_by(digits: str) -> list[dict[str, Any]]:
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    rest = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    pattern = {"Regex": words + digits + rest}
    return [
        {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False},
        _BYTES | {"use_regex": False},
    ]


# llama.cpp's name of the rules (llama-vocab.cpp), and how the library `tokenizers` writes them.
RULES: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_BYTES],
    "smollm": [{"type": "Digits", "individual_digits": True}, _BYTES],
    "llama-bpe": _cut_by(r"\p{N}{1,3}"),
    "qwen2": _cut_by(r"\p{N}"),
}


@dataclass
class Vocabulary:
    """What a GGUF says of a tokenizer.

    Attributes:
        model: "gpt2" for byte-level BPE, "llama" for BPE as sentencepiece has it.
        pre: the name of the rules that cut a text.
        tokens: by id, as many as the model has.
        kinds: of each.
        merges: of byte-level BPE, "left right"; sentencepiece's have scores instead, one a token.
        scores: the higher, the earlier two pieces are joined to the token.
        special: ids by the names that a GGUF has for them.
        add: whether a BOS, an EOS, or a space is put around a text, by name.
        chat_template: of Jinja.
    """

    model: str
    pre: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    special: dict[str, int] = field(default_factory=dict)
    add: dict[str, bool] = field(default_factory=dict)
    chat_template: str | None = None

    def write(self, writer):
        """Adds it to a `gguf.GGUFWriter`."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        if self.model == "gpt2":
            writer.add_token_merges(self.merges)
        else:
            writer.add_token_scores(self.scores)
        for name, i in self.special.items():
            getattr(writer, f"add_{name}_token_id")(i)
        writer.add_add_bos_token(self.add["bos"])
        writer.add_add_eos_token(self.add["eos"])
        writer.add_add_space_prefix(self.add["space"])
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(tokenizer, size: int) -> Vocabulary:
    """A tokenizer of transformers in llama.cpp's form.

    Args:
        tokenizer: a fast one.
        size: tokens of the model; ids of the tokenizer beyond are left out, and ids that it lacks are marked as unused.

    Raises:
        CheckpointError: it does what llama.cpp cannot be told; says what.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise _refused(f"it is a {type(tokenizer).__name__}, without a tokenizer.json")
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    model = rules["model"]
    if model.get("type") != "BPE":
        raise _refused(f"its model is {model.get('type')}, and only BPE is written")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise _refused(f"its {key} is {model[key]!r}")
    found = {i: token for token, i in tokenizer.get_vocab().items() if i < size}
    vocabulary = Vocabulary(
        model="gpt2",
        pre="default",
        tokens=[found.get(i, f"[PAD{i}]") for i in range(size)],
        kinds=[NORMAL if i in found else UNUSED for i in range(size)],
        special=_special(tokenizer, size),
        chat_template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
    )
    vocabulary.add = _added_around(tokenizer, vocabulary.special)
    odd = []
    for i, token in tokenizer.added_tokens_decoder.items():
        if i < size:
            vocabulary.kinds[i] = CONTROL if token.special else USER_DEFINED
            odd += [token.content] * (token.lstrip or token.rstrip or token.single_word)
    if odd:
        log.warning(f"llama.cpp finds tokens with lstrip, rstrip or single_word by other rules: {listed(odd)}")
    if isinstance(tokenizer.chat_template, dict):
        vocabulary.chat_template = tokenizer.chat_template.get("default")
    if model.get("byte_fallback"):
        _as_sentencepiece(rules, vocabulary)
    else:
        _as_bytes(rules, vocabulary)
    return vocabulary


def _as_bytes(rules: dict[str, Any], vocabulary: Vocabulary):
    steps = _steps(rules["pre_tokenizer"], "pretokenizers")
    name = next((name for name, known in RULES.items() if known == steps), None)
    if name is None:
        raise _refused(
            f"its pre_tokenizer is {json.dumps(rules['pre_tokenizer'])}, and only those of {', '.join(RULES)} are known"
        )
    normaliser = rules["normalizer"]
    if name == "qwen2" and normaliser == {"type": "NFC"}:
        log.warning("llama.cpp does not normalise texts (NFC), as this tokenizer does")
    elif normaliser is not None:
        raise _refused(f"its normalizer is {json.dumps(normaliser)}, and llama.cpp has none for byte-level BPE")
    if bool(rules["model"].get("ignore_merges")) != (name == "llama-bpe"):
        raise _refused(
            f"its ignore_merges is {rules['model'].get('ignore_merges')}, and llama.cpp takes {name} for the other"
        )
    vocabulary.pre = name
    vocabulary.merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in rules["model"]["merges"]]


def _as_sentencepiece(rules: dict[str, Any], vocabulary: Vocabulary):
    """llama.cpp joins the two neighbours that make the token of the highest score; a tokenizer.json says which two."""
    model = rules["model"]
    pieces = {
        token
        for i, token in enumerate(vocabulary.tokens)
        if vocabulary.kinds[i] == NORMAL and not _is_byte(token) and token != model.get("unk_token")
    }
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    pairs = {(p[:i], p[i:]) for p in ranks for i in range(1, len(p)) if p[:i] in pieces and p[i:] in pieces}
    order = [ranks[left + right] for left, right in merges]
    if pairs != set(merges) or order != sorted(order):
        raise _refused("its merges are not those of a sentencepiece model, which has a score for each token")
    if stray := [piece for piece in pieces if len(piece) > 1 and piece not in ranks]:
        raise _refused(f"it has pieces that no merge makes: {listed(stray)}")
    before = _steps(rules["normalizer"], "normalizers")
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = [step for step in before if step in ({"type": "Prepend", "prepend": s} for s in ("▁", " "))]
    metaspace = [step for step in _steps(rules["pre_tokenizer"], "pretokenizers") if step["type"] == "Metaspace"]
    known = [step for step in before if step not in prepend and step != spaces] == [] and (
        _steps(rules["pre_tokenizer"], "pretokenizers") == metaspace and len(metaspace) < 2
    )
    scheme = metaspace[0].get("prepend_scheme") if metaspace else None
    if not known or not (metaspace or spaces in before) or (metaspace and metaspace[0].get("replacement") != "▁"):
        raise _refused(
            f"its normalizer {json.dumps(rules['normalizer'])} and pre_tokenizer {json.dumps(rules['pre_tokenizer'])} "
            "are not those of LLaMA's tokenizers"
        )
    if scheme == "first":
        log.warning("llama.cpp puts a space after each special token in a text, and this tokenizer before a text alone")
    vocabulary.model = "llama"
    vocabulary.add["space"] = bool(prepend) or scheme in ("first", "always")
    vocabulary.scores = [-float(ranks.get(token, len(ranks))) for token in vocabulary.tokens]
    for i, token in enumerate(vocabulary.tokens):
        if vocabulary.kinds[i] == NORMAL and _is_byte(token):
            vocabulary.kinds[i] = BYTE
    if (unknown := model.get("unk_token")) in vocabulary.tokens:
        vocabulary.kinds[vocabulary.tokens.index(unknown)] = UNKNOWN


def _steps(rule: dict[str, Any] | None, parts: str) -> list[dict[str, Any]]:
    """A rule of the library `tokenizers` as a flat list, without what only says where in the text a token was."""
    if rule is None:
        return []
    if rule["type"] == "Sequence":
        return [step for part in rule[parts] for step in _steps(part, parts)]
    return [{key: value for key, value in rule.items() if key != "trim_offsets"}]


def _special(tokenizer, size: int) -> dict[str, int]:
    names = {"bos": "bos", "eos": "eos", "unk": "unk", "pad": "pad"}
    ids = {theirs: getattr(tokenizer, f"{ours}_token_id", None) for ours, theirs in names.items()}
    return {name: i for name, i in ids.items() if i is not None and i < size}


def _added_around(tokenizer, special: dict[str, int]) -> dict[str, bool]:
    """Whether BOS and EOS are put around a text; found by trying, since several settings say it."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for bos in (False, True):
        for eos in (False, True):
            ids = [special.get("bos")] * bos + bare + [special.get("eos")] * eos
            if ids == whole:
                return {"bos": bos, "eos": eos, "space": False}
    raise _refused(f"it puts more than a BOS and an EOS around a text: {bare} becomes {whole}")


def _is_byte(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def _refused(why: str) -> CheckpointError:
    return CheckpointError(f"the tokenizer has no form that llama.cpp would read right: {why}")
