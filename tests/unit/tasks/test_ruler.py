"""RULER's prompts: exact lengths, answers found again by other means, and parameters as published."""

import ast
import importlib.util
import re
import time
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruler_texts import HAYSTACK, shipped
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pose.errors import ConfigError
from pose.tasks import ruler as made
from pose.tasks.haystack import NOISE, ExactTexts, split_sentences, word_list
from pose.tasks.ruler import NEEDLES, TASKS, RulerPrompts


@cache
def characters():
    """A token for every byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(["<s>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


@cache
def llamas_kind():
    """An underline stands before every text and for each space, and tokens may reach across words."""
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("i", "s"), ("▁", "is"), ("e", "r"), ("a", "n"), ("an", "d")]
    merges += [(".", "▁"), ("o", "n"), ("▁", "a"), ("i", "n"), ("in", "g"), ("a", "l"), ("s", "▁the")]
    tokens = ["<s>", "▁", "\n", *map(chr, range(33, 127)), *(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


TOKENIZERS = {"shipped": shipped, "characters": characters, "llama": llamas_kind}


def count(tokenizer, text) -> int:
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


@cache
def shortest(task, name="shipped", num_added=0) -> int:
    """As the message says it, of trials 0 and 1."""
    with pytest.raises(ConfigError, match=rf"ruler/{task} with 5 tokens is not possible.*shortest has \d+$") as caught:
        RulerPrompts(task, TOKENIZERS[name](), HAYSTACK, num_added=num_added).check(0, 5, 2)
    return int(str(caught.value).rsplit(" ", 1)[1])


@cache
def sample(task, length=3000, trial=0, depth=None):
    depths = None if depth is None else [depth]
    return RulerPrompts(task, shipped(), HAYSTACK, depths=depths).sample(0, length, trial)


def context(task, prompt) -> str:
    """What stands between the instruction and the question, of the last of them."""
    head, question = {
        "vt": ("following text.\n\n", "\nQuestion:"),
        "cwe": ("appear most often.\n", "\nQuestion:"),
        "fwe": ("coded words. ", "\nQuestion:"),
    }.get(task, ("afterwards.\n", "\nWhat "))
    return prompt.text.rpartition(head)[2].rpartition(question)[0]


# Lengths


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("task", TASKS)
def test_every_length_is_exact(task, name):
    tokenizer, least = TOKENIZERS[name](), shortest(task, name)
    prompts = RulerPrompts(task, tokenizer, HAYSTACK)
    for length in (*range(least, least + 12), least + 61, least + 333, 4095, 4097):
        if length >= least:
            assert count(tokenizer, prompts.sample(0, length, 1).text) == length


@pytest.mark.parametrize("task", ["niah_single_2", "niah_multikey_1"])
def test_a_haystack_without_spaces_takes_seconds(task):
    """Its sentences are single words of hundreds of tokens."""
    rng = np.random.default_rng(0)
    letters = [chr(code) for code in rng.integers(0x4E00, 0x9FA5, 300)]
    haystack = "".join("".join(rng.choice(letters, 190)) + "。" for _ in range(60))
    begin, prompts = time.perf_counter(), RulerPrompts(task, shipped(), haystack)
    assert count(shipped(), prompts.sample(0, 2048, 0).text) == 2048
    assert time.perf_counter() - begin < 30


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(TASKS), st.integers(0, 3000), st.integers(0, 1000), st.integers(0, 10**6))
def test_any_length_is_exact(task, more, trial, seed):
    length = 1000 + more if task != "cwe" else 1100 + more
    text = RulerPrompts(task, shipped(), HAYSTACK).sample(seed, length, trial).text
    assert count(shipped(), text) == length


@pytest.mark.parametrize("task", TASKS)
def test_a_long_one_is_exact(task):
    """Longer than the haystack, and for cwe with more words than there are."""
    assert count(shipped(), RulerPrompts(task, shipped(), HAYSTACK).sample(0, 20_011, 0).text) == 20_011


def test_more_common_words_than_english_has():
    draft = made.CommonWords((0,), 5000, RulerPrompts("cwe", shipped(), HAYSTACK).texts)
    words = draft._words(12_000)
    assert len(set(words)) == 12_000 and all("-" in word for word in words[8166:])
    assert "".join(draft.parts(12_000)).count(words[11_999]) == draft.repeats.uncommon


@pytest.mark.parametrize("task", TASKS)
def test_too_short_names_the_shortest(task):
    least = shortest(task)
    prompts = RulerPrompts(task, shipped(), HAYSTACK)
    prompts.check(0, least, 2)
    with pytest.raises(ConfigError, match=rf"with {least - 1} tokens .*shortest has {least}$"):
        prompts.check(0, least - 1, 2)
    with pytest.raises(ConfigError, match=r"with 60 tokens .*shortest has"):
        prompts.sample(0, 60, 0)
    assert shortest(task, num_added=1) == least + 1
    with_bos = RulerPrompts(task, shipped(), HAYSTACK, num_added=1).sample(0, least + 31, 0)
    assert count(shipped(), with_bos.text) == least + 30


def test_what_cannot_be_reached_is_an_error_and_not_another_length():
    """A tokenizer of which every word has two tokens: odd numbers are out of reach."""

    class Doubles:
        def __call__(self, text, **options):
            double = lambda one: {"input_ids": [0] * (2 * len(one.split()))}  # noqa: E731
            if isinstance(text, str):
                return double(text)
            return {"input_ids": [double(one)["input_ids"] for one in text]}

    prompts = RulerPrompts("niah_single_1", Doubles(), HAYSTACK)
    assert count(Doubles(), prompts.sample(0, 400, 0).text) == 400
    with pytest.raises(ConfigError, match="exactly 401 tokens was found"):
        prompts.sample(0, 401, 0)


def test_the_whole_text_is_counted_and_not_only_what_is_around_the_filling():
    """A tokenizer that adds up to four tokens by the number of all characters: a part does not show how many."""

    class Whimsical:
        def __call__(self, text, **options):
            ids = lambda one: [0] * (len(one.split()) + len(one) % 5)  # noqa: E731
            return {"input_ids": ids(text) if isinstance(text, str) else [ids(one) for one in text]}

    for task in ("niah_single_2", "niah_multikey_2", "cwe", "fwe"):
        prompts, made_all = RulerPrompts(task, Whimsical(), HAYSTACK), 0
        for length in range(1000, 1020):
            try:
                assert count(Whimsical(), prompts.sample(0, length, 0).text) == length
                made_all += 1
            except ConfigError as error:
                assert f"exactly {length} tokens" in str(error)
        assert made_all > 10


# What the prompts hold


@pytest.mark.parametrize("task", TASKS)
def test_prompts_are_pure(task):
    prompts = RulerPrompts(task, shipped(), HAYSTACK)
    first = prompts.sample(3, 1500, 4)
    prompts.sample(3, 1500, 5)
    assert RulerPrompts(task, shipped(), HAYSTACK).sample(3, 1500, 4) == first
    others = [prompts.sample(*key) for key in ((4, 1500, 4), (3, 1500, 5))]
    assert len({tuple(prompt.answers) for prompt in [first, *others]}) == 3
    assert prompts.sample(3, 1600, 4).answers == first.answers


@pytest.mark.parametrize("task", NEEDLES)
def test_needles_and_their_question(task):
    needles, prompt = NEEDLES[task], sample(task)
    kind, many = needles.values, needles.num_values * needles.num_queries > 1
    line = rf"One of the special magic {kind}s for (\S+(?: \S+)*?) is: (\S+?)\."
    pairs = re.findall(line, context(task, prompt))
    question = re.search(
        rf"\nWhat (?:are all|is) the special magic {kind}s? for (.+) mentioned in the provided text\? "
        rf"The special magic {kind}s? for (.+) mentioned in the provided text (are|is)$",
        prompt.text,
    )
    assert question[1] == question[2] and (question[3] == "are") is many
    queries = question[1].replace(", and ", ", ").split(", ")
    assert len(queries) == needles.num_queries
    for query in queries:
        assert len([value for key, value in pairs if key == query]) == needles.num_values
    assert sorted(value for key, value in pairs if key in queries) == sorted(prompt.answers)
    expected = needles.num_keys * needles.num_values
    assert len(pairs) > 20 if needles.haystack == "needle" else len(pairs) == expected
    form = r"\d{7}" if kind == "number" else r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
    assert all(re.fullmatch(form, value) for _, value in pairs)
    if needles.keys == "word":
        adjective, _, noun = pairs[0][0].partition("-")
        assert any(adjective.startswith(word) or word.startswith(adjective) for word in word_list("adjective")) and noun
    if needles.haystack == "repeat":
        assert set(context(task, prompt).split("\n")) >= {NOISE}


def test_no_distractor_has_the_key_or_the_value_that_is_asked_for(monkeypatch):
    """Of six keys and six numbers."""

    def draw(self, kind, rng=None):
        drawn = (rng or self.rng).integers(6)
        return f"100000{drawn}" if kind == "number" else f"key-{drawn}"

    monkeypatch.setattr(made.NeedleDraft, "_draw", draw)
    for trial in range(3):
        prompt = RulerPrompts("niah_multikey_2", shipped(), HAYSTACK).sample(0, 2000, trial)
        pairs = re.findall(r"for (\S+) is: (\d+)\.", context("niah_multikey_2", prompt))
        (asked,) = (pair for pair in pairs if pair[1] == prompt.answers[0])
        assert len(pairs) > 20 and [pair for pair in pairs if asked[0] == pair[0] or asked[1] == pair[1]] == [asked]


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("task", NEEDLES)
def test_needles_are_at_their_depth_within_a_sentence(task, depth):
    """Sentences are counted by their marks, in a haystack that has no other ones."""
    for trial in range(2):
        prompt = sample(task, 2500 + trial, trial, depth)
        text = context(task, prompt)
        for answer in prompt.answers:
            found = re.search(rf"One of the special magic \w+ for [^.]+ is: {answer}\.", text)
            unit = r"[.?!](?:\s|$)" if NEEDLES[task].haystack == "essay" else r"\n|$"
            before = len(re.findall(unit, text[: found.start()]))
            total = len(re.findall(unit, text.rstrip()))
            others = len(prompt.depths) - 1  # needles that are counted as sentences too
            assert abs(before - depth * (total - 1 - others)) <= 1 + others
            assert depth in prompt.depths
            if depth < 1:  # the last sentence of an essay is cut
                assert text[: found.start()].endswith((". ", "? ", "! ", "\n")) or found.start() == 0


def test_several_depths_are_taken_in_turn_or_together():
    depths = [0.9, 0.1, 0.4, 0.6, 0.2]
    single = RulerPrompts("niah_single_2", shipped(), HAYSTACK, depths=depths)
    assert [single.sample(0, 900, trial).depths for trial in range(6)] == [[d] for d in [*depths, 0.9]]
    several = RulerPrompts("niah_multivalue", shipped(), HAYSTACK, depths=depths)
    drawn = [several.sample(0, 900, trial).depths for trial in range(12)]
    assert all(d == sorted(d) and len(set(d)) == 4 and set(d) <= set(depths) for d in drawn)
    assert len({tuple(d) for d in drawn}) > 2
    free = [sample("niah_multikey_1", 900, trial).depths for trial in range(20)]
    assert {d for ds in free for d in ds} <= {round(d) / 100 for d in np.linspace(0, 100, 40)}
    assert len({d for ds in free for d in ds}) > 25


def test_it_is_the_needle_asked_for_that_lies_at_the_given_depth():
    prompts = RulerPrompts("niah_multikey_1", shipped(), HAYSTACK, depths=[0.0])
    for trial in range(8):
        prompt = prompts.sample(0, 900, trial)
        first = re.match(r"One of the special magic numbers for [^.]+ is: (\d+)\.", context("niah_multikey_1", prompt))
        assert [first[1]] == prompt.answers


def test_needles_do_not_lie_in_the_order_of_the_answers():
    for task in ("niah_multivalue", "niah_multiquery"):
        drawn = [sample(task, 900, trial) for trial in range(6)]
        orders = [sorted(range(4), key=lambda i, p=prompt: p.text.index(p.answers[i])) for prompt in drawn]
        assert len({tuple(order) for order in orders}) > 2


def chain(text: str, value: str) -> list[str]:
    """All variables with a value, by running the assignments wherever they can be run."""
    pairs = re.findall(r"VAR ([A-Z]+) = (?:VAR )?([A-Z]+|\d+)", text)
    known: dict[str, str] = {}
    for _ in pairs:
        known |= {name: known.get(of, of) for name, of in pairs if of.isdigit() or of in known}
    return [name for name, v in known.items() if v == value]


@pytest.mark.parametrize("length", [700, 1200, 3000])
def test_variables_are_those_of_the_chain(length):
    for trial in range(4):
        prompt = RulerPrompts("vt", shipped(), HAYSTACK).sample(0, length, trial)
        text, value = context("vt", prompt), re.search(r"assgined the value (\d+), they are:$", prompt.text)[1]
        assert chain(text, value) == prompt.answers
        assert not re.search(r"VAR \w+ = (VAR )?\w+ *VAR", text)  # noise stands between any two
        assert [len(name) for name in prompt.answers] == [5] * 5 and 10_000 <= int(value) < 99_999
        example, _, rest = prompt.text.partition("\n\n\n\n")
        names = example.rpartition("they are: ")[2].split(" ")
        assert chain(example, re.search(r"value (\d+)", example)[1]) == names and [len(n) for n in names] == [3] * 5
        assert rest.startswith("Memorize and track")
        assert not set(re.findall(r"\w+", text)) - set(re.findall(r"\w+", NOISE)) - {"VAR", value, *prompt.answers}


def test_the_example_of_variables_is_as_long_as_rulers():
    example = sample("vt").text.partition("\n\n\n\n")[0] + "\n\n\n\n"
    assert example.count("The grass is green.") % 5 == 0
    one = count(shipped(), NOISE + "\n ")
    assert count(shipped(), example) + 30 <= 500 < count(shipped(), example) + 30 + 5 * (one + 1)


def test_the_example_of_variables_is_the_same_with_bos():
    for length in range(700, 1000, 2):
        with_bos, without = (made.VariableTracking((0,), length, ExactTexts(shipped(), num)).example for num in (1, 0))
        assert with_bos == without


@pytest.mark.parametrize(("length", "common", "uncommon"), [(1200, 6, 1), (3000, 6, 1), (4095, 6, 1), (6000, 30, 3)])
def test_common_words_are_the_ten_most_common(length, common, uncommon):
    prompt = sample("cwe", length)
    entries = re.split(r" ?\d+\. ", context("cwe", prompt))[1:]
    counts = Counter(entries)
    assert {word for word, _ in counts.most_common(10)} == set(prompt.answers)
    assert [counts[word] for word in prompt.answers] == [common] * 10
    rest = Counter(n for word, n in counts.items() if word not in prompt.answers)
    assert rest[uncommon] >= 1 and max(rest) < common
    assert sum(times for n, times in rest.items() if n != uncommon) <= 8  # words that fill up the length
    numbers = [int(n) for n in re.findall(r"(\d+)\. ", context("cwe", prompt))]
    assert numbers == list(range(1, len(entries) + 1))
    example = prompt.text.partition("they are:")[0].partition("\nBelow is")[0]
    listed = Counter(re.split(r" ?\d+\. ", example.partition("most often.\n")[2].partition("\nQuestion")[0])[1:])
    assert sorted(set(listed.values())) == ([3, 10] if length >= 4096 else [1, 3])
    assert not set(listed) & set(entries)


def test_where_the_list_of_common_words_becomes_long():
    class Words:
        def __call__(self, text, **options):
            return {"input_ids": text.split()}

    texts = ExactTexts(Words())
    assert made.CommonWords((0,), 4095, texts).repeats == made.CWE_SHORT
    assert made.CommonWords((0,), 4096, texts).repeats == made.CWE_LONG


@pytest.mark.parametrize("length", [300, 333, 400, 600, 1500, 4000])
def test_frequent_words_are_the_three_most_frequent(length):
    for trial in range(3):
        prompt = RulerPrompts("fwe", shipped(), HAYSTACK).sample(0, length, trial)
        counts = Counter(word for word in context("fwe", prompt).split(" ") if word.strip("."))
        top = counts.most_common(4)
        assert {word for word, _ in top[:3]} == set(prompt.answers)
        assert len(top) == 3 or top[2][1] > top[3][1]
        assert all(re.fullmatch("[a-z]{6}", word) for word in counts)


def test_frequencies_are_those_of_the_zeta_law():
    from scipy.special import zeta

    draft = made.FrequentWords((0,), 100_000)
    assert len(draft.vocabulary) == 2000
    for size in range(made.FrequentWords.smallest, 3000):
        counts, law = draft.counts(size), (size * draft.shares).astype(int)
        assert counts[3] > counts[4] and (law[3] == law[4] or np.array_equal(counts, law))
    assert draft.counts(30_000).tolist() == [int(30_000 * k**-2.0 / zeta(2.0)) for k in range(1, 2001)]


def test_sentences():
    text = 'It was "odd." Mr. Brown left!  Why?\nNobody knew. 3 men (all old.) came, e.g. by car. "Yes," he said.'
    assert split_sentences(text) == [
        'It was "odd."', "Mr. Brown left!", "Why?", "Nobody knew.", "3 men (all old.) came, e.g. by car.",
        '"Yes," he said.',
    ]  # fmt: skip


def test_texts_without_sentences_are_cut_all_the_same():
    """Paragraphs, full-width marks, and at last words, or characters where there are no words."""
    assert split_sentences("CHAPTER I\n \nit rained\nall\n\n\nThe end") == ["CHAPTER I", "it rained all", "The end"]
    assert split_sentences("天冷了。「好吗？」他问 她！ 没有人") == ["天冷了。", "「好吗？」", "他问 她！", "没有人"]
    words = [f"word{i}" for i in range(1000)]
    pieces = split_sentences(" ".join(words))
    assert " ".join(pieces).split() == words and 13 < len(pieces) < 17 and max(map(len, pieces)) <= 600
    assert list(map(len, split_sentences("x" * 1500))) == [600, 600, 300]


def test_unknown_tasks_and_empty_haystacks():
    with pytest.raises(ConfigError, match=r"no task 'niah', choose from niah_single_1, .*fwe"):
        RulerPrompts("niah", shipped(), HAYSTACK)
    with pytest.raises(ConfigError, match=r"no task 'qa_1' \(qa_1 and qa_2 need SQuAD and HotpotQA"):
        RulerPrompts("qa_1", shipped(), HAYSTACK)
    with pytest.raises(ConfigError, match=r"eval\.haystack is empty"):
        RulerPrompts("niah_single_2", shipped(), "\n")


class Deaf:
    """A tokenizer that knows digits and nothing else."""

    def __call__(self, text, **options):
        ids = lambda one: [int(c) for c in one if c.isdigit()]  # noqa: E731
        return {"input_ids": ids(text) if isinstance(text, str) else [ids(one) for one in text]}


def test_a_haystack_without_tokens_is_refused_and_no_search_for_a_length_is_endless():
    with pytest.raises(ConfigError, match=r"eval\.haystack has no text that this tokenizer has tokens for"):
        RulerPrompts("niah_single_2", Deaf(), "No digits here. None at all!")
    for task in ("niah_single_1", "vt", "fwe"):  # whose noise has none
        with pytest.raises(ConfigError, match=r"exactly 300 tokens was found"):
            RulerPrompts(task, Deaf(), HAYSTACK).sample(0, 300, 0)


# The public definition


def published(name: str) -> ast.Module:
    """A module of lm-evaluation-harness's port of RULER, read and not run: it would download."""
    folder = importlib.util.find_spec("lm_eval")
    return ast.parse((Path(folder.submodule_search_locations[0]) / "tasks" / "ruler" / f"{name}.py").read_text())


def constant(module: ast.Module, name: str):
    (node,) = (n for n in module.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == name)
    return ast.literal_eval(node.value)


def defaults(module: ast.Module, function: str) -> dict:
    (node,) = (n for n in ast.walk(module) if isinstance(n, ast.FunctionDef) and n.name == function)
    arguments = dict(zip([a.arg for a in node.args.args][::-1], node.args.defaults[::-1], strict=False))
    arguments |= {a.arg: d for a, d in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True) if d is not None}
    return {name: ast.literal_eval(value) for name, value in arguments.items()}


def test_needle_tasks_are_the_published_ones():
    module = published("niah_utils")
    template = constant(module, "TEMPLATE")
    head, question, _ = made.NIAH
    assert head + "{context}" + question == template.replace("type_needle_v", "kind")
    words = {"words": "word", "numbers": "number", "uuids": "uuid"}
    for node in module.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("niah"):
            (call,) = (
                c for c in ast.walk(node) if isinstance(c, ast.Call) and ast.unparse(c.func) == "generate_samples"
            )
            kw = {k.arg: k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)}
            ours = NEEDLES[node.name]
            queries = kw.get("num_needle_q", 1)
            assert ours == (
                kw["type_haystack"], words[kw["type_needle_k"]], words[kw["type_needle_v"]],
                max(kw.get("num_needle_k", 1), queries), kw.get("num_needle_v", 1), queries,
            )  # fmt: skip
    source = published("prepare_niah")
    assert constant(source, "NEEDLE") == made.NEEDLE.replace("{kind}s", "{type_needle_v}")
    assert defaults(source, "generate_samples")["tokens_to_generate"] == made.TOKENS_TO_GENERATE["niah_single_1"]
    assert f'"{NOISE}"' in ast.unparse(source).replace("'", '"')


MAKERS = {"vt": "sys_vartrack_w_noise_random", "cwe": "sys_word_pair_random", "fwe": "sys_kwext"}


def test_tracking_and_counting_tasks_are_the_published_ones():
    vt = published("vt_utils")
    config = constant(vt, "CONFIG")["variable_tracking"]
    assert config["template"] == (made.VT[0] + "{context}" + made.VT[1]).replace("value}", "query}")
    assert config["answer_prefix"].rstrip() == made.VT[2].replace("value}", "query}").replace("{num}", "{num_v}")
    options = defaults(vt, "sys_vartrack_w_noise_random")
    assert (options["num_chains"], options["num_hops"]) == (made.VT_CHAINS, made.VT_HOPS)
    cwe = published("cwe_utils")
    config = constant(cwe, "CONFIG")
    assert config["template"] == made.CWE[0] + "{context}" + made.CWE[1] and config["answer_prefix"] == made.CWE[2]
    options = defaults(cwe, "generate_input_output")
    assert (options["freq_cw"], options["freq_ucw"], options["num_cw"]) == (*made.CWE_LONG[:2], made.CWE_COMMON)
    body = ast.unparse(cwe)
    assert "get_example(20, 3, 1, num_cw)" in body and made.CWE_SHORT[2:] == (20, 3, 1)
    assert "get_example(num_words, 6, 1, num_cw)" in body and made.CWE_SHORT[:2] == (6, 1)
    assert "get_example(40, 10, 3, num_cw)" in body and made.CWE_LONG[2:] == (40, 10, 3)
    fwe = published("fwe_utils")
    config = constant(fwe, "CONFIG")
    assert config["template"] == made.FWE[0] + "{context}" + made.FWE[1] and config["answer_prefix"] == made.FWE[2]
    options = defaults(fwe, "generate_input_output")
    assert (options["coded_wordlen"], options["alpha"]) == (made.FWE_LETTERS, made.FWE_ALPHA)
    for name, module in (("vt", vt), ("cwe", cwe), ("fwe", fwe)):
        assert defaults(module, MAKERS[name])["tokens_to_generate"] == made.TOKENS_TO_GENERATE[name]


def test_words_are_those_of_the_package():
    wonderwords = pytest.importorskip("wonderwords")
    lists = wonderwords.RandomWord()._categories
    for kind in ("noun", "adjective", "verb"):
        assert set(word_list(kind)) == set(lists[kind])
