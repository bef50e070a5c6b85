"""Tokenizers that are a sentencepiece model, Baichuan's without its code among them, against sentencepiece itself."""

import gzip
import io
import json
import random

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pose.errors import CheckpointError
from pose.modeling.checkpoints.spm_tokenizer import load_spm_tokenizer
from pose.modeling.load import load_tokenizer

sentencepiece = pytest.importorskip("sentencepiece")

SETTINGS = {
    "tokenizer_class": "BaichuanTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_baichuan.BaichuanTokenizer", None]},
    "add_bos_token": False,
    "add_eos_token": False,
    "model_max_length": 4096,
    "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": True, "rstrip": False},
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<unk>",
}
KEEP = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
CHINESE = "我们参考学术界方案使用 12345 个词, 百川智能发布 2023 年 9 月 6 日的模型"
TEXTS = ["", " ", "  two  spaces ", "3.14159 and 2,048", "我们 2023年", "tab\tand\nlines\n\n", "é🙂\u3000▁", CHINESE]


@pytest.fixture(scope="module")
def lines():
    with gzip.open("assets/corpora/books.heldout.jsonl.gz", "rt", encoding="utf8") as file:
        text = json.loads(next(file))["text"][10_000:40_000]
    return [line for line in text.split("\n") if line.strip()] + [CHINESE, "aaa aaaa aaaaaaa hahaha"] * 20


def train(lines, folder, **options):
    """A sentencepiece model with Baichuan's alphabet of options, in a folder with its settings."""
    defaults = {
        "model_type": "bpe",
        "vocab_size": 600,
        "byte_fallback": True,
        "split_digits": True,
        "unk_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "pad_id": -1,
        "minloglevel": 2,
    }
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=out, **defaults | options)
    (folder / "tokenizer.model").write_bytes(out.getvalue())
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS))
    (folder / "tokenization_baichuan.py").write_text("raise SystemExit('remote code ran')")
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def sample(rng, lines):
    """A piece of text, or letters, digits, spaces, Chinese and rare characters at random."""
    if rng.random() < 0.4:
        return " " * rng.randint(0, 2) + rng.choice(lines)
    alphabet = rng.choice(["ab ha 12\n", "我们百川 的是1 2 3aé\u3000\t，🙂 ", "".join(map(chr, range(32, 700)))])
    return "".join(rng.choice(alphabet) for _ in range(rng.randint(1, 40)))


@pytest.mark.parametrize(
    "options",
    [
        KEEP | {"add_dummy_prefix": False},
        KEEP | {"add_dummy_prefix": True},
        {},
        {"normalization_rule_name": "identity"},
    ],
    ids=["as it is", "prefix", "normalised", "spaces removed"],
)
def test_ids_are_sentencepieces_own(tmp_path, lines, options):
    """And so is the text that they give back, whatever spaces and prefix the model asks for."""
    own = train(lines, tmp_path, **options)
    tokenizer = load_tokenizer(str(tmp_path))
    rng = random.Random(0)
    for text in TEXTS + [sample(rng, lines) for _ in range(400)]:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids == own.encode(text), repr(text)
        assert tokenizer.decode(ids) == own.decode(ids), repr(text)
        if options == KEEP | {"add_dummy_prefix": False} and "▁" not in text:
            assert tokenizer.decode(ids) == text


def test_user_defined_pieces_and_special_tokens(tmp_path, lines):
    own = train(
        lines, tmp_path, **KEEP, add_dummy_prefix=False, user_defined_symbols=["<reserved_1>"], control_symbols=["<c>"]
    )
    tokenizer = load_tokenizer(str(tmp_path))
    for text in ("<reserved_1>我们", "two <reserved_1> and<reserved_1>"):
        assert tokenizer(text, add_special_tokens=False).input_ids == own.encode(text)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert tokenizer("a<c></s>").input_ids[-2:] == [own.piece_to_id("<c>"), 2]
    assert tokenizer("a").input_ids == own.encode("a")  # no BOS: its settings say so
    assert tokenizer.vocab_size == own.vocab_size()


def test_bos_where_the_settings_ask_for_it(tmp_path, lines):
    own = train(lines, tmp_path, **KEEP)
    tokenizer = load_spm_tokenizer(tmp_path / "tokenizer.model", SETTINGS | {"add_bos_token": True})
    assert tokenizer("and").input_ids == [1, *own.encode("and")]


def test_saved_again_it_is_a_plain_tokenizer(tmp_path, lines):
    """In a folder of a LLaMA, by AutoTokenizer, without sentencepiece's file and without auto_map."""
    own = train(lines, tmp_path, **KEEP, add_dummy_prefix=False)
    config = LlamaConfig(vocab_size=600, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "out")
    load_tokenizer(str(tmp_path)).save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.model").exists()
    assert "auto_map" not in (tmp_path / "out" / "tokenizer_config.json").read_text()
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in TEXTS:
        assert again(text).input_ids == own.encode(text)
    assert torch.tensor(again(CHINESE).input_ids).max() < 600


def test_what_is_no_bpe_model_is_refused(tmp_path, lines):
    train(lines, tmp_path, model_type="unigram", vocab_size=500)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model is not a sentencepiece model of BPE"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.model").write_bytes(b"\x00 not a model")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model is not a sentencepiece model"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match=rf"the tokenizer of {tmp_path} needs code of its own"):
        load_tokenizer(str(tmp_path))


CHAT = [
    "<|im_start|>user\nand then<|im_end|>",
    "a <|im_start|> b",
    "<|im_end|> x",
    "a  <|im_end|>  b",
    "and<x>the <x> b",
]
ADDED = {"<|im_start|>": 600, "<|im_end|>": 601}
LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "legacy": False}
DECODER = {str(i): {"content": token, "special": True, "rstrip": i == 600} for token, i in ADDED.items()}
PAD = {"content": "<|im_end|>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
# tokenizer_config.json, special_tokens_map.json, added_tokens.json; and the ids of EOS and PAD
BESIDE = {
    "as chat models have it": (LLAMA | {"eos_token": "<|im_end|>"}, None, ADDED, 601, None),
    "the map goes over the settings": (
        LLAMA | {"eos_token": "</s>"}, {"eos_token": "<|im_end|>", "pad_token": PAD}, ADDED, 601, 601,
    ),
    "an added token that is not special": (LLAMA | {"eos_token": "<|im_end|>"}, None, ADDED | {"<x>": 602}, 601, None),
    "added_tokens_decoder says all": (
        LLAMA | {"eos_token": "<|im_end|>", "added_tokens_decoder": DECODER}, {"eos_token": "</s>"}, {"<x>": 602},
        601, None,
    ),
    "a special token without an id": (LLAMA | {"eos_token": "<|im_end|>"}, None, None, 600, None),
    "no space before a text": (LLAMA | {"eos_token": "</s>", "add_prefix_space": False}, None, ADDED, 2, None),
}  # fmt: skip


def write_beside(folder, settings, special=None, added=None):
    """The three JSON files, and a config."""
    LlamaConfig(vocab_size=610).save_pretrained(folder)
    contents = {"tokenizer_config": settings, "special_tokens_map": special, "added_tokens": added}
    for name, content in contents.items():
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))


@pytest.mark.parametrize("name", BESIDE)
def test_the_files_beside_it_are_read_as_transformers_reads_them(tmp_path, lines, name):
    """Ids and splits, by transformers' own class, of a model that is in LLaMA's form."""
    *files, eos, pad = BESIDE[name]
    train(lines, tmp_path, **KEEP)
    write_beside(tmp_path, *files)
    own, ours = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))
    assert (ours.eos_token_id, ours.pad_token_id) == (own.eos_token_id, own.pad_token_id) == (eos, pad)
    assert len(ours) == len(own) and ours.special_tokens_map == own.special_tokens_map
    rng = random.Random(0)
    for text in TEXTS + CHAT + [sample(rng, lines) + rng.choice(CHAT) for _ in range(50)]:
        ids = own(text, add_special_tokens=False).input_ids
        assert ours(text, add_special_tokens=False).input_ids == ids, repr(text)
        if "▁" not in text:
            assert ours.decode(ids) == own.decode(ids), repr(text)
    ours.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again.eos_token_id == eos and all(again(text).input_ids == ours(text).input_ids for text in CHAT)


def test_between_special_tokens_ids_are_sentencepieces_own(tmp_path, lines):
    """Where the settings do not say legacy: false, each piece between them is as a text of its own."""
    own = train(lines, tmp_path, **KEEP)
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "<|im_end|>"}
    write_beside(tmp_path, settings, added=ADDED)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.eos_token_id == 601 and len(tokenizer) == 602
    ids = tokenizer("<|im_start|>user\nand<|im_end|> then").input_ids
    assert ids == [1, 600, *own.encode("user\nand"), 601, *own.encode(" then")]


def test_extra_special_tokens_and_eos_where_the_settings_ask_for_them(tmp_path, lines):
    own = train(lines, tmp_path, **KEEP)
    write_beside(tmp_path, LLAMA | {"add_eos_token": True}, {"additional_special_tokens": ["<|im_start|>"]}, ADDED)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer("and").input_ids == [1, *own.encode("and"), 2]
    assert 600 in tokenizer.all_special_ids and 601 not in tokenizer.all_special_ids
    assert tokenizer.decode([600, *own.encode("and"), 601], skip_special_tokens=True) == "and<|im_end|>"


@pytest.mark.parametrize(
    ("added", "words"),
    [
        ({"<x>": 700}, r"gives '<x>' the id 700, and its place is 600"),
        ({"<s>": 7}, r"gives '<s>' the id 7, and its place is 1"),
        ({"<x>": "600"}, r"added_tokens\.json has '600' under '<x>', where the id of the token is expected"),
        ({"<x>": -1}, r"added_tokens\.json has -1 under '<x>'"),
    ],
)
def test_ids_that_cannot_be_are_refused(tmp_path, lines, added, words):
    train(lines, tmp_path, **KEEP)
    write_beside(tmp_path, LLAMA, added=added)
    with pytest.raises(CheckpointError, match=words):
        load_tokenizer(str(tmp_path))


def test_a_model_that_cannot_be_read_is_named_as_that(tmp_path):
    (tmp_path / "tokenizer.model").mkdir()
    with pytest.raises(CheckpointError, match=r"tokenizer\.model cannot be read: Is a directory"):
        load_spm_tokenizer(tmp_path / "tokenizer.model", {})


def test_a_damaged_table_of_characters_is_an_error_when_it_is_loaded(tmp_path, lines):
    train(lines, tmp_path, **KEEP | {"normalization_rule_name": "nmt_nfkc"})
    proto = pytest.importorskip("sentencepiece.sentencepiece_model_pb2").ModelProto()
    proto.ParseFromString((tmp_path / "tokenizer.model").read_bytes())
    table = proto.normalizer_spec.precompiled_charsmap
    size = int.from_bytes(table[:4], "little")
    proto.normalizer_spec.precompiled_charsmap = table[:4] + b"\xff" * size + table[4 + size :]
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    write_beside(tmp_path, LLAMA)
    with pytest.raises(CheckpointError, match=rf"the tokenizer of {tmp_path} cannot be loaded"):
        load_tokenizer(str(tmp_path))


def test_added_tokens_beside_settings_that_say_null_are_read(tmp_path, lines):
    train(lines, tmp_path, **KEEP)
    write_beside(tmp_path, LLAMA | {"added_tokens_decoder": None}, added=ADDED)
    assert load_tokenizer(str(tmp_path)).convert_tokens_to_ids("<|im_start|>") == 600
