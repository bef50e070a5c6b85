"""The options of an evaluation, and what is made ready, refused and measured."""

import copy
import gzip
import hashlib
import json
import math
import re
import sys

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig

from pose.data.heldout import SetAside
from pose.data.tokenizer import train_tokenizer
from pose.errors import ConfigError, DataError
from pose.evaluation.memo import Outcomes
from pose.evaluation.options import EvalOptions
from pose.evaluation.scoring import Scorer
from pose.evaluation.suite import Suite, default_lengths, out_of_reach, values
from pose.evaluation.task import Estimate, describe
from pose.files import Memo
from pose.modeling.load import build_model
from pose.tasks.passkey import FILLER, INTRODUCTION, KEY_LINE, QUESTION

TEXT = INTRODUCTION + FILLER + KEY_LINE.format(key="0123456789") + QUESTION
WORDS = ("grass", "sky", "sun", "green", "blue", "yellow", "there", "back", "again")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT] * 3, 500, 256)


@pytest.fixture(scope="module")
def texts():
    """From short to long."""
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, n)) for n in (10, 30, 60, 160)]


@pytest.fixture(scope="module")
def token_lengths(tokenizer, texts):
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    assert sorted(set(lengths)) == lengths
    return lengths


@pytest.fixture(scope="module")
def documents(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("documents") / "few.jsonl.gz"
    with gzip.open(path, "wt") as file:
        for i, text in enumerate(texts):
            file.write(json.dumps({"id": f"d{i}", "text": text}) + "\n")
    return path


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, initializer_range=0.2,
    )  # fmt: skip
    return build_model(config, None, "sdpa")


@pytest.fixture
def suite(tokenizer, documents, tmp_path):
    """Builds a Suite from options alone."""

    def build(**options):
        options = {"tasks": ["perplexity"], "documents": str(documents), "lengths": [8, 16]} | options
        return Suite(EvalOptions(**options), tokenizer, options["documents"], tmp_path / "cache")

    return build


@pytest.mark.parametrize("task", ["ruler/nope", "passkey"])
def test_documents_are_read_after_all_else_is_checked(suite, task):
    """Which may take hours. The tasks keep their order."""
    with pytest.raises(ConfigError, match=r"nope|a passkey prompt of 16 tokens"):
        suite(tasks=["perplexity", task], documents="nowhere.jsonl", lengths=[16])
    names = [one.name for one in suite(tasks=["perplexity", "passkey"], lengths=[100, 110]).tasks]
    assert names == ["perplexity", "passkey"]


def test_windows_begin_with_bos_where_the_tokenizer_adds_one(tokenizer, documents, tmp_path):
    adding = copy.deepcopy(tokenizer)
    bos, token = adding.bos_token_id, adding.bos_token
    adding.backend_tokenizer.post_processor = TemplateProcessing(single=f"{token} $A", special_tokens=[(token, bos)])
    for each, add_bos, wanted in ((adding, None, bos), (adding, False, None), (tokenizer, None, None)):
        options = EvalOptions(tasks=["perplexity"], lengths=[8], add_bos=add_bos)
        assert Suite(options, each, str(documents), tmp_path / "cache").bos_id == wanted


@pytest.mark.parametrize("stride, accepted", [(7, True), (8, False), (20, False)])
def test_stride_must_leave_no_token_unscored(suite, stride, accepted):
    if accepted:
        suite(stride=stride)
    else:
        with pytest.raises(ConfigError, match=rf"eval.stride={stride} .* window of 8: give at most 7"):
            suite(stride=stride)


@pytest.mark.parametrize("tokens, accepted", [(16, True), (15, False)])
def test_sliding_tokens_hold_the_longest_window(suite, tokens, accepted):
    if accepted:
        suite(sliding_tokens=tokens)
    else:
        with pytest.raises(ConfigError, match=rf"eval.sliding_tokens={tokens} .* at least 16"):
            suite(sliding_tokens=tokens)


def test_passkey_lengths_are_checked_beforehand(suite):
    with pytest.raises(ConfigError, match=r"30 tokens is not possible.* the shortest has .*eval.lengths"):
        suite(tasks=["passkey"], lengths=[200, 30])
    suite(tasks=["passkey"], lengths=[200])


def test_no_document_is_long_enough(suite, documents, token_lengths):
    longest = token_lengths[-1]
    assert suite(lengths=[8, longest]).document_ids == ["d3"]
    with pytest.raises(DataError) as error:
        suite(lengths=[8, longest + 1])
    message = str(error.value)
    assert "none of the 4 documents" in message
    assert str(documents) in message
    assert f"has {longest + 1} tokens" in message
    assert message.endswith(f"the longest has {longest}")


def test_missing_documents(suite):
    with pytest.raises(DataError, match=r"^eval\.documents: no documents file at .*nowhere\.jsonl"):
        suite(documents="nowhere.jsonl")
    with pytest.raises(DataError, match=r"^eval\.haystack: no documents file at .*nowhere\.txt"):
        suite(tasks=["needle_gain"], haystack="nowhere.txt")


def test_documents_that_are_long_enough_in_order(suite, tokenizer, texts, token_lengths):
    ready = suite(lengths=[8, token_lengths[1]])
    assert ready.document_ids == ["d1", "d2", "d3"]
    for tokens, text in zip(ready.tasks[0].documents.values(), texts[1:], strict=True):
        assert tokens.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("num, ids", [(1, ["d1"]), (2, ["d1", "d2"]), (9, ["d1", "d2", "d3"])])
def test_max_documents_counts_those_that_are_long_enough(suite, token_lengths, num, ids):
    assert suite(lengths=[token_lengths[0] + 1], max_documents=num).document_ids == ids


def test_lengths_are_sorted_and_single(suite):
    assert suite(lengths=[16, 8, 16]).lengths == [8, 16]


def test_min_tokens_leaves_out_documents_that_every_length_fits(suite, token_lengths):
    assert suite(min_tokens=token_lengths[2]).document_ids == ["d2", "d3"]
    with pytest.raises(DataError, match=rf"has {token_lengths[3] + 1} tokens \(eval.min_tokens\): the longest has"):
        suite(min_tokens=token_lengths[3] + 1)


def test_the_first_documents_are_taken_without_reading_on(suite, tmp_path, texts):
    """Behind the second one stands a line that cannot be read."""
    path = tmp_path / "broken.jsonl"
    lines = [json.dumps({"id": f"d{i}", "text": text}) for i, text in enumerate(texts)]
    path.write_text("\n".join([*lines[:3], "{broken", lines[3]]))
    assert suite(documents=str(path), max_documents=2, min_tokens=1, lengths=[8]).document_ids == ["d0", "d1"]
    with pytest.raises(DataError, match="line 4"):
        suite(documents=str(path), max_documents=2, draw_documents=True, lengths=[8])


def test_no_document_is_long_enough_for_the_first_few(suite):
    for key, options in (("min_tokens", {"min_tokens": 100_000}), ("lengths", {"lengths": [100_000]})):
        with pytest.raises(DataError, match=rf"holds no document of at least 100000 tokens \(eval\.{key}\)") as caught:
            suite(**{"max_documents": 1, "lengths": [8]} | options)
        assert f"(watch.{key})" in str(caught.value.under("watch"))


def test_documents_are_drawn_by_the_seed(suite):
    drawn = [suite(lengths=[8], max_documents=2, draw_documents=True, seed=seed).document_ids for seed in range(12)]
    assert drawn[0] == suite(lengths=[8], max_documents=2, draw_documents=True, seed=0).document_ids
    assert {i for ids in drawn for i in ids} == {"d0", "d1", "d2", "d3"}
    assert all(len(set(ids)) == 2 and ids == sorted(ids) for ids in drawn)


def test_of_documents_that_are_set_aside_the_first_are_taken_too(tokenizer, documents, tmp_path):
    """For every seed of the prompts; drawn where that is asked for."""

    def ids(seed, **options):
        aside = SetAside(str(documents), 0.9, 1, tmp_path / "cache")
        one = EvalOptions(
            tasks=["perplexity"], lengths=[8], windows=1, tail=None, max_documents=1, seed=seed, **options
        )
        return Suite(one, tokenizer, aside, str(tmp_path / "cache"), 64).document_ids

    cache, chosen = SetAside(str(documents), 0.9, 1, tmp_path / "cache").open(tokenizer)
    assert len(chosen) > 1 and [ids(seed) for seed in range(8)] == [[cache.ids[chosen[0]]]] * 8
    assert len({ids(seed, draw_documents=True)[0] for seed in range(8)}) > 1


def test_no_tasks_need_nothing(suite, model):
    assert suite(tasks=[], documents=None).run(model, progress=False) == {}


def test_outcomes_are_kept_and_the_model_is_not_loaded_for_nothing(suite, model, tmp_path):
    ready = suite(tasks=["perplexity", "passkey"], lengths=[100, 120], windows=2, trials=2, tail=10)
    loaded = []

    def load():
        loaded.append(1)
        return model

    def run(ready, under="a", reuse=True):
        return ready.run(load=load, outcomes=Outcomes(tmp_path, reuse), under=under, progress=False)

    first = run(ready)
    assert loaded == [1] and first == ready.run(model, progress=False)
    assert run(ready) == first and loaded == [1]
    assert run(ready, under="another model") == first and loaded == [1, 1]
    assert run(ready, reuse=False) == first and loaded == [1, 1, 1]
    more = suite(tasks=["perplexity", "passkey"], lengths=[100, 120], windows=2, trials=3, tail=10)
    assert run(more)["ppl@120"] == first["ppl@120"] and loaded == [1, 1, 1, 1]
    assert run(more)["passkey@120"].num == 3 and loaded == [1, 1, 1, 1]


def test_documents_can_be_left_out(suite, tmp_path):
    ready = suite(lengths=[8])
    kept = [ready.document_ids[0], ready.document_ids[2]]
    units = ready.tasks[0].units()
    ready.keep_documents({*kept, "another"})
    assert ready.document_ids == kept
    assert ready.tasks[0].units() == {unit: it for unit, it in units.items() if unit.split(":", 1)[1] in kept}


class Fixed:
    """A task whose units depend on themselves alone; notes what is measured, and stops before a unit when told to."""

    def __init__(self, name: str, units: str, stop: str | None = None):
        self.name, self.names, self.stop, self.measured, self.prepared = name, units, stop, [], 0

    def units(self):
        return {unit: {"unit": unit} for unit in self.names}

    def prepare(self):
        self.prepared += 1

    def metrics(self):
        return {name: describe(name) for name in self.summarise(dict.fromkeys(self.names))}

    def accepts(self, unit, outcome):
        return outcome == [self.name, unit]

    def measure(self, scorer, unit):
        if unit == self.stop:
            raise KeyboardInterrupt
        self.measured.append(unit)
        return [self.name, unit]

    def summarise(self, outcomes):
        return {f"{self.name}:{','.join(outcomes)}": Estimate(0.0, num=len(outcomes))} | {
            f"{self.name}/{unit}": Estimate(1.0 * (outcome == [self.name, unit])) for unit, outcome in outcomes.items()
        }


def test_outcomes_are_kept_at_once_by_task_and_summarised_in_the_order_of_the_units(suite, model, tmp_path):
    """Killed in the third unit, the first two are there; another task of the same units does not take them over."""
    ready, outcomes = suite(tasks=[]), Outcomes(tmp_path)
    ready.tasks = [Fixed("x", "abc", stop="c")]
    with pytest.raises(KeyboardInterrupt):
        ready.run(model, outcomes=outcomes, progress=False)
    ready.tasks = [Fixed("x", "cab"), Fixed("y", "ab")]
    found = ready.run(model, outcomes=outcomes, progress=False)
    assert [task.measured for task in ready.tasks] == [["c"], ["a", "b"]]
    assert list(found) == ["x:c,a,b", "x/c", "x/a", "x/b", "y:a,b", "y/a", "y/b"]
    assert all(found[f"{name}/{unit}"].value == 1 for name, unit in ("xa", "xb", "xc", "ya", "yb"))
    assert len(ready.took) == 5 and all(took.seconds >= 0 and took.peak_memory_gib > 0.1 for took in ready.took)
    took = list(ready.took)
    ready.run(load=lambda: pytest.fail("nothing is missing"), outcomes=outcomes, progress=False)
    assert ready.took == took and [task.prepared for task in ready.tasks] == [1, 1]


def test_what_is_kept_stands_until_it_is_replaced_in_one_step(tmp_path, monkeypatch):
    memo = Memo(tmp_path)
    memo.set(["key"], [1.0])

    def killed(content, file):
        file.write('{"key": ')
        raise KeyboardInterrupt

    monkeypatch.setattr("pose.files.json.dump", killed)
    with pytest.raises(KeyboardInterrupt):
        memo.set(["key"], [2.0])
    assert memo.get(["key"]) == [1.0]


def test_the_model_runs_with_the_batches_of_the_options(suite, model):
    seen, ready = [], suite(tasks=[], batch_tokens=77)
    ready.tasks = [Fixed("x", "a")]
    ready.tasks[0].measure = lambda scorer, unit: seen.append(scorer.batch_tokens)
    ready.run(load=lambda: model, progress=False)
    ready.run(model, progress=False)
    assert seen == [77, 77] != [Scorer(model).batch_tokens] * 2


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_bar_of_one_unit_moves_on_a_terminal(suite, model, monkeypatch, capsys, is_terminal):
    """A unit may take minutes. A log is left in peace, and the model is as before."""
    monkeypatch.setattr("pose.evaluation.suite.SHOWN_EVERY", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    ready = suite(tasks=[])
    ready.tasks = [Fixed("x", "a")]
    ready.tasks[0].measure = lambda scorer, unit: [scorer.nll(np.ones((1, 40), int), 8).tolist() for _ in range(2)]
    ready.run(model)
    assert ("80 tokens" in capsys.readouterr().err) is is_terminal
    assert not model.get_input_embeddings()._forward_hooks


RETRIEVAL = {"seed": 1, "trials": 3, "depths": [0.5], "add_bos": True}


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        ("perplexity", {"windows": 3, "tail": 5, "bin": 7, "stride": 4, "sliding_tokens": 20, "add_bos": True}),
        ("passkey", RETRIEVAL | {"generate": True}),
        ("needle", RETRIEVAL),
        ("needle_gain", RETRIEVAL | {"trials": 7}),
        ("ruler/niah_single_2", RETRIEVAL),
    ],
)
def test_every_option_reaches_its_task(suite, documents, task, changes):
    """Units have all that an outcome depends on, each option by its own name."""
    base = {"tasks": [task], "lengths": [500] if task != "perplexity" else [8, 16], "haystack": str(documents)}
    plain = next(iter(suite(**base).tasks[0].units().values()))
    for option, value in changes.items():
        found = next(iter(suite(**base, **{option: value}).tasks[0].units().values()))
        names = {"add_bos": {"bos", "bos_id"}}.get(option, {option})
        assert {name for name in found if found[name] != plain[name]} <= names and found != plain, option
        assert option == "add_bos" or found[option] == value


def test_texts_are_read_by_the_key_of_their_source(suite, texts, tmp_path):
    """text_field is of documents: a haystack names its own. Two documents of a haystack do not run together."""
    path, haystack = tmp_path / "body.jsonl", tmp_path / "haystack.jsonl"
    path.write_text("\n".join(json.dumps({"id": f"d{i}", "body": text}) for i, text in enumerate(texts)))
    haystack.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    options = {"documents": str(path), "text_field": "body"}
    ready = suite(tasks=["perplexity"], lengths=[8], **options)
    assert ready.document_ids == ["d0", "d1", "d2", "d3"]
    for source in (str(haystack), {"path": str(path), "text_field": "body"}):
        (needle,) = suite(tasks=["needle"], lengths=[500], haystack=source, **options).tasks
        assert needle.haystack_digest == hashlib.sha256("\n\n".join(texts).encode()).hexdigest()


def test_a_unit_that_was_lost_is_measured_again(suite, model, tmp_path):
    ready = suite(lengths=[8, 16], windows=2, tail=4)
    outcomes = Outcomes(tmp_path)
    first = ready.run(model, outcomes=outcomes, progress=False)
    files = sorted(outcomes.folder.iterdir())
    assert len(files) == len(ready.document_ids)
    files[0].write_text("{")
    files[1].unlink()
    assert ready.run(model, outcomes=outcomes, progress=False) == first


def test_metrics_of_a_run(suite, model):
    metrics = suite(
        tasks=["perplexity", "passkey"], lengths=[100, 120], windows=2, tail=10, bin=64, stride=50, trials=2
    ).run(model, progress=False)
    assert set(metrics) == {
        "ppl@100", "ppl@120", "bits_per_byte@100", "bits_per_byte@120",
        "tail_ppl@100", "tail_ppl@120", "position_ppl@0-64", "position_ppl@64-120",
        "sliding_ppl@100", "sliding_ppl@120", "passkey@100", "passkey@120",
    }  # fmt: skip
    assert all(isinstance(value, float) and math.isfinite(value) for value in values(metrics).values())
    assert all(e.low <= e.value <= e.high for e in metrics.values() if e.low is not None)


@pytest.mark.parametrize("add_bos", [False, True])
def test_perplexity_of_one_whole_document(suite, model, tokenizer, texts, token_lengths, add_bos):
    """One window, as long as the document: exp of transformers' own loss."""
    n = token_lengths[-1]
    metrics = suite(lengths=[n], stride=n // 2, add_bos=add_bos).run(model, progress=False)
    ids = tokenizer(texts[-1], add_special_tokens=False)["input_ids"]
    if add_bos:
        ids[0] = tokenizer.bos_token_id
    ids = torch.tensor([ids])
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids).loss.exp().item()
    assert metrics[f"ppl@{n}"].value == pytest.approx(expected, rel=1e-5)
    assert metrics[f"sliding_ppl@{n}"].value == pytest.approx(expected, rel=1e-5)


def test_sliding_tokens_reach_the_task(suite, model, texts, token_lengths):
    """Cut to one window, sliding perplexity is that of each document's first window."""
    n = token_lengths[2]
    options = {"lengths": [n], "stride": 5, "windows": 1}
    cut = suite(sliding_tokens=n, **options).run(model, progress=False)
    whole = suite(**options).run(model, progress=False)
    assert cut[f"sliding_ppl@{n}"].value == pytest.approx(cut[f"ppl@{n}"].value, rel=1e-9)
    assert whole[f"sliding_ppl@{n}"].value != pytest.approx(cut[f"ppl@{n}"].value, rel=1e-4)


def test_bos_is_part_of_a_passkey_prompts_length(suite, tokenizer):
    for add_bos in (False, True):
        (task,) = suite(tasks=["passkey"], lengths=[120], add_bos=add_bos).tasks
        prompts = task.prompts
        tokens = prompts.sample(np.random.default_rng(0), 120).input_ids
        assert len(tokens) == 120
        assert (tokens[0] == tokenizer.bos_token_id) is np.bool_(add_bos)


@pytest.mark.parametrize(
    "window, target, expected",
    [
        (256, 2048, [256, 512, 1024, 2048]),
        (256, 1500, [256, 512, 1024, 1500]),
        (256, 256, [256]),
        (2048, 2049, [2048, 2049]),
        (4096, 2048, [2048]),
    ],
)
def test_default_lengths(window, target, expected):
    assert default_lengths(window, target) == expected


def test_what_comes_out_is_what_was_told_before(suite, model):
    options = {"tasks": ["perplexity", "passkey"], "lengths": [100, 120], "windows": 2, "trials": 2, "stride": 50}
    ready = suite(**options, tail=110, bin=64)
    told = ready.metrics()
    assert list(told) == list(ready.run(model, progress=False)) and "tail_ppl@100" not in told
    assert [told[name].higher_is_better for name in ("ppl@100", "passkey@100")] == [False, True]


@pytest.mark.parametrize(
    ("results", "remark"),
    [
        (
            {"needle@256": 0.0, "needle@256/0.5": 0.0, "needle@512": 0.0},
            "needle: 0 at every length inside .* 256 tokens",
        ),
        ({"ruler/vt@128": Estimate(0.0), "ruler/vt@256": Estimate(0.0), "passkey@256": 0.0}, "ruler/vt, passkey: 0 at"),
        ({"ruler/vt@128": Estimate(0.5), "ruler/vt@256": Estimate(0.0)}, None),
        ({"needle@512": 0.0}, None),
        ({"passkey@256": 1.0, "passkey@512": 0.0, "ppl@256": 9.0, "harness/boolq": 0.0}, None),
        ({"ppl@256": 0.0, "bits_per_byte@256": 0.0}, None),
        ({}, None),
    ],
)
def test_what_a_model_cannot_do_at_all_is_said(results, remark):
    """The zeros of a model that never finds a needle look like a failure of its extension."""
    found = out_of_reach(results, 256)
    assert (found is None) if remark is None else re.match(remark, found)


@pytest.mark.parametrize("task", ["perplexity", "needle", "needle_gain", "ruler/niah_single_2"])
def test_a_token_beyond_the_models_embedding_is_found_before_it_is_loaded(tokenizer, texts, tmp_path, task):
    """In the documents that are measured and in the haystack: the token, its id, the rows there are."""
    tokenizer, size = copy.deepcopy(tokenizer), len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[NEW]"]})
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in ["short [NEW]", texts[3], f"[NEW] {texts[3]}"]))
    options = EvalOptions(tasks=[task], lengths=[500 if task != "perplexity" else 16], trials=1, max_documents=1)
    options.documents = options.haystack = str(path)
    build = lambda rows: Suite(options, tokenizer, str(path), tmp_path / "cache", vocab_size=rows)  # noqa: E731
    build(size + 1)
    if task == "perplexity":
        build(size)  # the document with the token comes after the one that is measured
        options.max_documents = None
    where = r"document a\.jsonl:3" if task == "perplexity" else "haystack"
    message = rf"{where} has the token '\[NEW\]' of id {size}, and the model's embedding has {size} rows"
    with pytest.raises(DataError, match=message):
        build(size)


def test_the_longest_is_that_of_the_documents_that_are_set_aside(tokenizer, documents, token_lengths, tmp_path):
    class OneAside(SetAside):
        def of(self, cache):
            return [0]

    aside = OneAside(str(documents), 0.5, 2, tmp_path / "cache")
    with pytest.raises(DataError, match=rf"none of the 1 documents .*the longest has {token_lengths[0]}$"):
        Suite(EvalOptions(tasks=["perplexity"], lengths=[token_lengths[0] + 1]), tokenizer, aside, tmp_path / "cache")


def test_documents_of_the_same_text_are_warned_of(suite, tokenizer, documents, tmp_path, caplog):
    """Perplexity would not change, and its interval would be that of twice as many documents."""
    suite()
    assert "begin as another does" not in caplog.text
    twice = Suite(EvalOptions(tasks=["perplexity"], lengths=[8]), tokenizer, [str(documents)] * 2, tmp_path / "cache")
    assert len(twice.documents) == 8 and "4 of the 8 documents" in caplog.text and "named twice?" in caplog.text
