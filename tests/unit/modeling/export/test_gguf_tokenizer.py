"""llama.cpp cuts texts into the tokens of the folder's tokenizer; rules that it does not know are refused."""

import io
import json
import subprocess

import pytest
from engine_pythons import interpreter
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pose.errors import CheckpointError
from pose.modeling.checkpoints.spm_tokenizer import load_spm_tokenizer
from pose.modeling.export.gguf import write_gguf
from pose.modeling.export.gguf_tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, read_vocabulary

# Of llama.cpp's own check (get_vocab_base_pre), shortened, and what the rules differ in.
TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n🚀 (normal) 😶\u200d🌫️ ✅ 🦙🦙 3 33 333 3333 33333 3.3 3..3 កាន់តែ "
    "?我想在apple工作1314151天～ ---=== нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told "
    "he's there, 'RE you sure? 'M not sure I'll make it, 'D you like some tea? We'Ve a'lL  the end of it   "
)
WORDS = [TEXT, "I'll be there, we've seen 1234 of 56 and 7 places. " * 20, "the end of it: the tea, the place\n\n" * 20]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)


def split(pattern):
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


RULES = {
    "gpt-2": BYTES,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES]),
    "llama-bpe": split(LLAMA3),
    "qwen2": split(LLAMA3.replace("{1,3}", "")),
}


def make_tokenizer(rules="smollm", bos=False, normaliser=None, added=(), **options):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = RULES.get(rules, rules), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|begin|>", "<|end|>"]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(WORDS, trainer)
    model = json.loads(tokenizer.to_str())
    model["model"]["ignore_merges"] = rules == "llama-bpe"
    tokenizer = Tokenizer.from_str(json.dumps(model))
    if normaliser is not None:
        tokenizer.normalizer = normaliser
    tokenizer.add_tokens(list(added))
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing("<|begin|> $A", None, [("<|begin|>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        clean_up_tokenization_spaces=False,
        **options,
    )


def make_spm(tmp_path, **settings):
    sentencepiece = pytest.importorskip("sentencepiece")
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in WORDS for line in text.splitlines() if line.strip()]),
        model_writer=out, model_type="bpe", vocab_size=420, byte_fallback=True, character_coverage=0.99, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(out.getvalue())
    return load_spm_tokenizer(tmp_path / "tokenizer.model", {"add_bos_token": True, **settings})


def llama_cpp_tokens(tmp_path, tokenizer, texts):
    """What llama.cpp's own server makes of the texts, of a GGUF file with this tokenizer."""
    python = interpreter("llama.cpp")
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 3, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=512,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "x.gguf", "f32")
    script = """if True:
        import json, sys, urllib.request, xllamacpp
        asked = xllamacpp.CommonParams()
        asked.model.path, asked.n_ctx, asked.warmup = sys.argv[1], 512, False
        server = xllamacpp.Server(asked)
        found = []
        for text in json.loads(sys.argv[2]):
            body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
            request = urllib.request.Request(server.listening_address + "/tokenize", body)
            request.add_header("Content-Type", "application/json")
            found.append(json.load(urllib.request.urlopen(request))["tokens"])
        print("\\n" + json.dumps(found))
    """
    done = subprocess.run(
        [python, "-c", script, str(tmp_path / "x.gguf"), json.dumps(texts)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return next(json.loads(line) for line in reversed(done.stdout.splitlines()) if line.startswith("[["))


@pytest.mark.parametrize("rules", RULES)
def test_llama_cpp_cuts_a_text_as_the_tokenizer_does(tmp_path, rules):
    tokenizer = make_tokenizer(rules, bos=rules == "llama-bpe", added=[AddedToken("<|mark|>", normalized=False)])
    texts = [TEXT, "a<|mark|>b<|end|> c", "12345", " x", ""]
    assert llama_cpp_tokens(tmp_path, tokenizer, texts) == [tokenizer(text)["input_ids"] for text in texts]


def test_llama_cpp_cuts_a_text_as_sentencepiece_does(tmp_path):
    tokenizer = make_spm(tmp_path)
    texts = [TEXT, "the  end of it", " the tea", "12345"]
    assert llama_cpp_tokens(tmp_path, tokenizer, texts) == [tokenizer(text)["input_ids"] for text in texts]


@pytest.mark.parametrize("rules", RULES)
def test_the_rules_are_known_by_their_definition(rules):
    vocabulary = read_vocabulary(make_tokenizer(rules), 600)
    assert (vocabulary.model, vocabulary.pre) == ("gpt2", rules)
    assert vocabulary.merges[0].count(" ") == 1


def test_tokens_and_special_ids(tmp_path):
    added = [AddedToken("<|tool|>", special=True), AddedToken("<|user|>", special=False)]
    tokenizer = make_tokenizer(bos=True, added=added, chat_template="{{ messages }}", pad_token="<|tool|>")
    size = len(tokenizer) + 2
    vocabulary = read_vocabulary(tokenizer, size)
    assert [vocabulary.tokens[i] for i in (0, 1, size - 2, size - 1)] == [
        "<|begin|>", "<|end|>", f"[PAD{size - 2}]", f"[PAD{size - 1}]",
    ]  # fmt: skip
    kinds = dict(zip(vocabulary.tokens, vocabulary.kinds, strict=True))
    assert [kinds[name] for name in ("<|begin|>", "<|tool|>", "<|user|>", f"[PAD{size - 1}]", "a")] == [
        CONTROL, CONTROL, USER_DEFINED, UNUSED, NORMAL,
    ]  # fmt: skip
    tool = tokenizer.convert_tokens_to_ids("<|tool|>")
    assert vocabulary.special == {"bos": 0, "eos": 1, "pad": tool}
    assert vocabulary.add == {"bos": True, "eos": False, "space": False}
    assert vocabulary.chat_template == "{{ messages }}"


def test_tokens_beyond_the_model_are_left_out():
    tokenizer = make_tokenizer(added=[AddedToken("<pad>", special=True)], pad_token="<pad>")
    vocabulary = read_vocabulary(tokenizer, len(tokenizer) - 1)
    assert "<pad>" not in vocabulary.tokens and "pad" not in vocabulary.special


def test_sentencepiece_has_scores(tmp_path):
    tokenizer = make_spm(tmp_path)
    vocabulary = read_vocabulary(tokenizer, len(tokenizer))
    assert vocabulary.model == "llama" and not vocabulary.merges
    assert vocabulary.add == {"bos": True, "eos": False, "space": True}
    ids = tokenizer.get_vocab()
    assert [vocabulary.kinds[ids[token]] for token in ("<unk>", "<s>", "<0x0A>", "▁the")] == [
        UNKNOWN, CONTROL, BYTE, NORMAL,
    ]  # fmt: skip
    assert vocabulary.scores[ids["▁t"]] > vocabulary.scores[ids["▁the"]]  # made earlier


def wrap(tokenizer):
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def with_merges(tokenizer, change):
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules["model"]["merges"] = change(rules["model"]["merges"])
    rules["post_processor"] = None
    return wrap(Tokenizer.from_str(json.dumps(rules)))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda _: make_tokenizer(pre_tokenizers.Whitespace()), r"pre_tokenizer is .*Whitespace.* those of gpt-2"),
        (lambda _: make_tokenizer(split(LLAMA3.replace("{1,3}", "{1,4}"))), "and only those of"),
        (lambda _: make_tokenizer(normaliser=normalizers.Lowercase()), "normalizer is .*Lowercase"),
        (lambda _: make_tokenizer(split(LLAMA3)), "ignore_merges is False"),
        (lambda path: with_merges(make_spm(path), sorted), "not those of a sentencepiece"),
        (lambda path: with_merges(make_spm(path), lambda all: all[:-1]), "pieces that no merge makes"),
        (lambda _: wrap(Tokenizer(models.WordLevel({"a": 0}, "a"))), "model is WordLevel"),
    ],
)  # fmt: skip
def test_rules_that_llama_cpp_does_not_know_are_refused(tmp_path, make, words):
    with pytest.raises(CheckpointError, match=words):
        read_vocabulary(make(tmp_path), 600)


def test_more_than_bos_and_eos_around_a_text_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<|end|> $A", None, [("<|end|>", 1)])
    with pytest.raises(CheckpointError, match="more than a BOS and an EOS"):
        read_vocabulary(tokenizer, 600)


def test_what_llama_cpp_does_otherwise_is_said(tmp_path, capsys):
    read_vocabulary(make_tokenizer(added=[AddedToken("<|x|>", rstrip=True)]), 600)
    read_vocabulary(make_tokenizer("qwen2", normaliser=normalizers.NFC()), 600)
    read_vocabulary(make_spm(tmp_path, legacy=False), 600)
    said = capsys.readouterr().out
    assert "<|x|>" in said and "NFC" in said and "after each special token" in said
