"""lm-evaluation-harness over local questions, against a plain loop with a stock transformers model."""

import inspect
import json
import os
import random
import sys
import time
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from pose.errors import ConfigError, DataError, WindowError
from pose.evaluation import harness as harness_module
from pose.evaluation import lmeval
from pose.evaluation.harness import FEWSHOT, Harness
from pose.evaluation.hflm import ScorerLM
from pose.evaluation.memo import is_whole
from pose.evaluation.options import EvalOptions
from pose.evaluation.scoring import Scorer
from pose.evaluation.suite import Suite
from pose.evaluation.task import Estimate, Metric
from pose.modeling.load import build_model, load_config
from pose.training.watch import Watch

TINY = str(Path(__file__).resolve().parents[3] / "assets/tiny")
MAX_LENGTH = 256

CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{train: {folder}/train.jsonl, test: {folder}/test.jsonl}}}}
output_type: multiple_choice
training_split: train
test_split: test
fewshot_config: {{sampler: first_n}}
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 3}}
"""
ROLLING = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/test.jsonl}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}]
"""
WRITTEN = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/written.jsonl}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["e"], max_gen_toks: 12}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
GROUP = """
group: {name}
task: [choice, choice_again]
aggregate_metric_list: [{{metric: acc, weight_by_size: true}}]
"""


@pytest.fixture(scope="module")
def model():
    return build_model(load_config(TINY), TINY)


@pytest.fixture(scope="module")
def stock():
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def with_bos(tokenizer):
    """The same tokenizer, which puts BOS before every text as those of LLaMA do."""
    other = AutoTokenizer.from_pretrained(TINY)
    bos = tokenizer.bos_token
    other.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    assert other("a").input_ids[0] == other.bos_token_id != tokenizer("a").input_ids[0]
    return other


def questions(num: int, seed: int) -> list[dict]:
    rng = random.Random(seed)
    endings = [
        "the house",
        "the sea",
        "her sister",
        "a long walk in the evening",
        "great kindness",
        "no more than that",
    ]
    return [
        {
            "question": f"{rng.choice(['Anne', 'Captain Wentworth', 'Mary'])} {rng.choice(['saw', 'thought of'])} "
            + "and then " * rng.randrange(4)
            + rng.choice(["left", "found", "wanted"]),
            "choices": rng.sample(endings, 3),
            "label": rng.randrange(3),
        }
        for _ in range(num)
    ]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, stock, tokenizer):
    """A folder with task YAMLs and their data; half of the texts to be written are what the model writes."""
    folder = tmp_path_factory.mktemp("tasks")
    data = {"train": questions(4, 0), "test": questions(16, 1)}
    data["written"] = [
        {"question": row["question"], "answer": greedy(stock, tokenizer, row["question"]) if i % 2 else "nothing"}
        for i, row in enumerate(data["test"][:8])
    ]
    for name, rows in data.items():
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    choice = CHOICE.format(name="choice", folder=folder)
    yamls = {
        "choice": choice,
        "choice_again": choice.replace("task: choice", "task: choice_again").replace("label", "'0'"),
        "written": WRITTEN.format(name="written", folder=folder),
        "rolling": ROLLING.format(name="rolling", folder=folder),
        "both": GROUP.format(name="both"),
        "apart": GROUP.format(name="apart").split("aggregate")[0],
        "drawn": choice.replace("task: choice", "task: drawn").replace("fewshot_config: {sampler: first_n}\n", ""),
        "fixed": choice.replace("task: choice", "task: fixed\nnum_fewshot: 0"),
        "absent": choice.replace("task: choice", "task: absent").replace("path: json", "path: nobody/nothing"),
        "hub_metric": choice.replace("task: choice", "task: hub_metric").replace("acc}", "acc, hf_evaluate: true}"),
        "runs_code": choice.replace("task: choice", "task: runs_code\nunsafe_code: true"),
        "needs": choice.replace("task: choice", "task: needs").replace("label", "!function needs.label"),
    }  # fmt: skip
    for name, text in yamls.items():
        (folder / f"{name}.yaml").write_text(text)
    (folder / "needs.py").write_text("import a_package_that_is_not_there\n")
    return folder


@pytest.fixture(scope="module", autouse=True)
def dataset_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture
def harness(tasks, tokenizer):
    def make(task, **options):
        return Harness(task, **{"tokenizer": tokenizer, "include_path": str(tasks), "max_length": MAX_LENGTH} | options)

    return make


@pytest.fixture
def own_alone(monkeypatch):
    """Tasks of one's own alone: lm-eval's take seconds to read, for each folder."""
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))


@cache
@torch.no_grad()
def loglikelihood(stock, tokenizer, context: str, answer: str, max_length: int = MAX_LENGTH) -> tuple[float, bool]:
    """log p(answer | context) and whether greedy decoding writes it: one request, full logits, no padding."""
    tokens = tokenizer(context + answer).input_ids
    num = len(tokens) - len(tokenizer(context).input_ids)
    tokens = torch.tensor(tokens[-max_length - 1 :])
    logits = stock(tokens[None, :-1]).logits[0, -num:]
    found = logits.log_softmax(-1)[torch.arange(num), tokens[-num:]].sum().item()
    return found, bool((logits.argmax(-1) == tokens[-num:]).all())


@torch.no_grad()
def greedy(stock, tokenizer, context: str, stop: str = "e", num: int = 12) -> str:
    tokens, start = tokenizer(context).input_ids, len(tokenizer(context).input_ids)
    while len(tokens) < start + num and stop not in tokenizer.decode(tokens[start:]):
        tokens.append(stock(torch.tensor([tokens])).logits[0, -1].argmax().item())
    return tokenizer.decode(tokens[start:]).split(stop)[0]


def expected(stock, tokenizer, shots: int = 0, limit: int | None = None, max_length: int = MAX_LENGTH):
    """acc and acc_norm, question by question, and how many requests are too long."""
    examples = "".join(f"{row['question']} {row['choices'][row['label']]}\n\n" for row in questions(4, 0)[:shots])
    rows, plain, normalised, cut = questions(16, 1)[:limit], 0, 0, 0
    for row in rows:
        context = examples + row["question"]
        scores = [loglikelihood(stock, tokenizer, context, " " + c, max_length)[0] for c in row["choices"]]
        plain += np.argmax(scores) == row["label"]
        normalised += np.argmax([s / len(c) for s, c in zip(scores, row["choices"], strict=True)]) == row["label"]
        cut += sum(len(tokenizer(f"{context} {c}").input_ids) - 1 > max_length for c in row["choices"])
    return plain / len(rows), normalised / len(rows), cut


def requests(pairs):
    return [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]


@pytest.mark.parametrize(
    "options", [{}, {"num_fewshot": 3}, {"limit": 7}, {"num_fewshot": 3, "max_length": 65}], ids=str
)
@pytest.mark.parametrize("kind", ["tokenizer", "with_bos"])
def test_accuracy_is_that_of_a_plain_loop(harness, model, stock, options, kind, request, capsys):
    tokenizer = request.getfixturevalue(kind)
    task = harness("choice", tokenizer=tokenizer, **options)
    outcome = task.measure(Scorer(model, 512), "choice")
    kept = json.loads(json.dumps(outcome))
    assert "longer than the window" not in capsys.readouterr().out
    task.summarise({"choice": kept})  # so that it is said of an outcome that is reused, too
    loop = {"shots" if key == "num_fewshot" else key: value for key, value in options.items()}
    acc, acc_norm, cut = expected(stock, tokenizer, **loop)
    assert outcome["metrics"]["acc,none"]["value"] == pytest.approx(acc)
    assert outcome["metrics"]["acc_norm,none"]["value"] == pytest.approx(acc_norm)
    num = options.get("limit", 16)
    assert (outcome["num"], outcome["requests"], outcome["truncated"]) == (num, 3 * num, cut)
    assert 0 < cut < 3 * num if "max_length" in options else cut == 0
    assert outcome["num_fewshot"] == {"choice": options.get("num_fewshot", 0)} and outcome["versions"] == {"choice": 3}
    printed = capsys.readouterr()
    assert printed.err == ""
    if cut:
        assert f"harness/choice: {cut} of {3 * num} requests are longer than the window of 65 tokens" in printed.out
    else:
        assert printed.out == ""
    stderr = np.sqrt(acc * (1 - acc) / (num - 1))
    estimate = task.summarise({"choice": outcome})["harness/choice"]
    bounds = np.clip([acc - 1.959964 * stderr, acc + 1.959964 * stderr], 0, 1)
    assert estimate == pytest.approx(Estimate(acc, *bounds, num), rel=1e-4)


@pytest.mark.parametrize("batch_tokens", [1, 64, 4096])
@pytest.mark.parametrize("max_length", [12, MAX_LENGTH])
def test_loglikelihoods_are_those_of_one_request_at_a_time(model, stock, tokenizer, batch_tokens, max_length):
    rows = questions(8, 2)
    pairs = [(row["question"], " " + choice) for row in rows for choice in row["choices"]]
    pairs += [(row["question"], greedy_token(stock, tokenizer, row["question"])) for row in rows]
    lm = ScorerLM(Scorer(model, batch_tokens), tokenizer, max_length, "x")
    found = lm.loglikelihood(requests(pairs))
    reference = [loglikelihood(stock, tokenizer, *pair, max_length) for pair in pairs]
    np.testing.assert_allclose([f[0] for f in found], [r[0] for r in reference], atol=2e-4)
    assert [f[1] for f in found] == [r[1] for r in reference]
    assert 0 < sum(r[1] for r in reference) < len(pairs)


def greedy_token(stock, tokenizer, context: str) -> str:
    with torch.no_grad():
        logits = stock(torch.tensor([tokenizer(context).input_ids])).logits[0, -1]
    words = [token for token in logits.argsort(descending=True).tolist() if tokenizer.decode([token])[:1] == " "]
    return tokenizer.decode(words[:1])


def test_logits_exist_for_the_scored_tokens_alone(model, tokenizer, monkeypatch):
    lm, shapes = ScorerLM(Scorer(model, 4096), tokenizer, MAX_LENGTH, "x"), []
    head = lm.scorer.head
    lm.scorer.head = lambda states: shapes.append(states.shape) or head(states)
    lm.loglikelihood(requests([("Anne saw the old house and the sea again", " and went")] * 3))
    assert shapes[0][1] <= 3


@pytest.mark.parametrize("rope", [{"rope_type": "dynamic", "factor": 4.0}, {"rope_type": "default"}], ids=str)
def test_neighbours_in_a_batch_do_not_matter(tokenizer, rope):
    """Frequencies that depend on the length would take the length of the padding."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=8, initializer_range=0.2,
        rope_parameters={"rope_theta": 100.0, **rope},
    )  # fmt: skip
    model = build_model(config, None)
    pairs = [(row["question"], " " + choice) for row in questions(6, 3) for choice in row["choices"]]
    together = ScorerLM(Scorer(model, 4096), tokenizer, 64, "x").loglikelihood(requests(pairs))
    alone = [ScorerLM(Scorer(model, 1), tokenizer, 64, "x").loglikelihood(requests([pair]))[0] for pair in pairs]
    np.testing.assert_allclose([t[0] for t in together], [a[0] for a in alone], rtol=1e-5)


def test_texts_are_written_as_by_greedy_decoding(harness, model):
    task = harness("written")
    own = model.generation_config
    model.generation_config = type(own)(repetition_penalty=5.0, do_sample=True, top_p=0.9)  # a checkpoint's taste
    try:
        outcome = task.measure(Scorer(model, 512), "written")
    finally:
        model.generation_config = own
    assert outcome["metrics"]["exact_match,none"]["value"] == 0.5
    assert (outcome["num"], outcome["requests"], outcome["truncated"]) == (8, 8, 0)
    assert task.summarise({"written": outcome})["harness/written"].value == 0.5  # it has no acc


@pytest.mark.parametrize("rope_type", ["default", "dynamic"])
def test_texts_end_and_keep_a_cache_as_the_model_allows(tokenizer, monkeypatch, rope_type):
    """A cache would keep frequencies of a shorter text, where they depend on the length."""
    rope = {"rope_theta": 100.0, "rope_type": rope_type, **({"factor": 4.0} if rope_type == "dynamic" else {})}
    config = LlamaConfig(
        vocab_size=4096, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, rope_parameters=rope,
    )  # fmt: skip
    model, seen = build_model(config, None), []
    monkeypatch.setattr(model, "generate", lambda context, **kwargs: seen.append(kwargs) or context)
    model.generation_config.eos_token_id = [5, 7]
    lm = ScorerLM(Scorer(model), tokenizer, 64, "x")
    options = {"until": ["e"], "max_gen_toks": 4, "temperature": 0.0, "top_p": 0.9, "top_k": 3}
    lm.generate_until([Instance("generate_until", {}, ("Anne saw", options), 0)])
    (kwargs,) = seen
    assert kwargs["use_cache"] == (rope_type == "default")
    assert kwargs["eos_token_id"] == sorted({tokenizer.eos_token_id, 5, 7})
    assert kwargs["do_sample"] is False and not {"temperature", "top_p", "top_k"} & set(kwargs)


def test_batches_hold_no_more_tokens_than_asked_for(model, tokenizer, monkeypatch):
    lm, sizes, call = ScorerLM(Scorer(model, 60), tokenizer, MAX_LENGTH, "x"), [], ScorerLM._model_call
    monkeypatch.setattr(ScorerLM, "_model_call", lambda self, inps: sizes.append(inps.shape) or call(self, inps))
    lm.loglikelihood(requests([(row["question"], " " + c) for row in questions(8, 4) for c in row["choices"]]))
    assert all(rows * length <= 60 for rows, length in sizes) and any(rows > 1 for rows, _ in sizes)


def test_log_probabilities_are_fp32_where_the_model_is_not(tokenizer):
    model = build_model(load_config(TINY), TINY, dtype=torch.bfloat16)
    context, answer = "Anne saw the old house", " and the sea"
    found = ScorerLM(Scorer(model, 1), tokenizer, MAX_LENGTH, "x").loglikelihood(requests([(context, answer)]))[0][0]
    num = len(tokenizer(context + answer).input_ids) - len(tokenizer(context).input_ids)
    tokens = torch.tensor([tokenizer(context + answer).input_ids])
    with torch.no_grad():
        logits = model(input_ids=tokens[:, :-1]).logits[0, -num:].double()
    expected = logits.log_softmax(-1)[torch.arange(num), tokens[0, -num:]].sum().item()
    assert found == pytest.approx(expected, abs=1e-4)


def test_an_answer_may_fill_the_window(model, stock, tokenizer):
    """But for the token before it, which is not scored."""
    context, answer = "Anne saw", " a long walk in the evening"
    num = len(tokenizer(context + answer).input_ids) - len(tokenizer(context).input_ids)
    (found,) = ScorerLM(Scorer(model, 64), tokenizer, num, "x").loglikelihood(requests([(context, answer)]))
    assert found == pytest.approx(loglikelihood(stock, tokenizer, context, answer, num), abs=2e-4)
    with pytest.raises(ConfigError, match=f"answer of {num} tokens, and the window is {num - 1}"):
        ScorerLM(Scorer(model, 64), tokenizer, num - 1, "x").loglikelihood(requests([(context, answer)]))


def test_a_task_that_was_added_meanwhile_is_found(own_alone, tasks, tokenizer, tmp_path):
    options = {"include_path": str(tmp_path), "max_length": MAX_LENGTH}
    with pytest.raises(ConfigError, match="does not know"):
        Harness("later", tokenizer, **options)
    (tmp_path / "later.yaml").write_text(CHOICE.format(name="later", folder=tasks))
    assert Harness("later", tokenizer, **options).configs[0]["task"] == "later"


def test_questions_without_room_for_the_answer_are_cut_or_refused(harness, model, tokenizer, capsys):
    sizes = [len(tokenizer(row["question"]).input_ids) for row in questions(16, 1)[:8]]
    window = 11 + sorted(sizes)[4]  # one token short for some
    task = harness("written", max_length=window)
    outcome = task.measure(Scorer(model, 512), "written")
    task.summarise({"written": outcome})
    assert outcome["truncated"] == sum(size + 12 > window for size in sizes) > 0
    assert (
        f"{outcome['truncated']} of 8 requests are longer than the window of {window} tokens" in capsys.readouterr().out
    )
    with pytest.raises(ConfigError, match="harness/written writes up to 12 tokens, and the window is 12"):
        harness("written", max_length=12).measure(Scorer(model, 512), "written")
    with pytest.raises(ConfigError, match=r"harness/choice has an answer of .* tokens, and the window is 2"):
        harness("choice", max_length=2).measure(Scorer(model, 512), "choice")


def test_a_benchmark_without_room_in_one_model_may_be_left_out_of_it(harness, model, tokenizer, tmp_path, capsys):
    """As for the untuned model before its training, which is meant for longer texts."""
    suite = Suite(EvalOptions(lengths=[64]), tokenizer, None, tmp_path)
    suite.tasks = [harness("written", max_length=64), harness("choice", max_length=64)]
    every = suite.run(model, progress=False)
    suite.set_max_length(12)
    assert [task.max_length for task in suite.tasks] == [12, 12]
    with pytest.raises(WindowError, match="harness/written writes up to 12 tokens, and the window is 12"):
        suite.run(model, progress=False)
    capsys.readouterr()
    found = suite.run(model, progress=False, skip_too_long=True)
    assert list(every) == ["harness/written", "harness/choice"] and list(found) == ["harness/choice"]
    printed = capsys.readouterr().out
    assert "harness/written is left out for this model: harness/written writes up to 12 tokens" in printed
    assert "requests are longer than the window of 12 tokens" in printed


def test_a_group_has_the_score_of_all_its_questions(harness, model):
    task = harness("both")
    outcome = task.measure(Scorer(model, 512), "both")
    parts = [outcome["members"][name]["acc,none"]["value"] for name in ("choice", "choice_again")]
    assert parts[0] != parts[1] and outcome["num"] == 32
    assert task.summarise({"both": outcome})["harness/both"].value == pytest.approx(np.mean(parts))


def test_of_a_perplexity_the_lower_is_better_and_it_is_no_percentage(harness, model):
    task = harness("rolling", limit=2)
    assert task.metrics() == {"harness/rolling": Metric("rolling", False, ".3f")}
    watch = Watch(SimpleNamespace(tasks=[task], metrics=task.metrics), 1, best=task.name)
    value = task.summarise({"rolling": task.measure(Scorer(model, 512), "rolling")})[task.name].value
    watch.found = {"value": value}
    assert value > 1
    assert [watch._improves({task.name: value * factor}) for factor in (0.9, 1.0, 1.1)] == [True, False, False]


def test_the_papers_tasks_have_its_examples_and_metrics(tokenizer, tasks):
    assert FEWSHOT | {"arc_challenge": 25, "hellaswag": 10} == FEWSHOT and set(FEWSHOT.values()) == {0, 10, 25}
    metrics = {"acc,none": {"value": 0.1, "stderr": 0.01}, "acc_norm,none": {"value": 0.2, "stderr": None}}
    for name, shots in FEWSHOT.items():
        task = Harness(name, tokenizer, include_path=str(tasks), max_length=64)
        assert task.units()[name]["num_fewshot"] == shots
        (estimate,) = task.summarise({name: {"metrics": metrics, "num": 5}}).values()
        assert estimate == (
            Estimate(0.2, None, None, 5) if name in ("arc_challenge", "hellaswag")
            else pytest.approx(Estimate(0.1, 0.1 - 0.0196, 0.1 + 0.0196, 5), abs=1e-6)
        )  # fmt: skip
        assert Harness(name, tokenizer, num_fewshot=2, include_path=str(tasks), max_length=64).num_fewshot == 2


def test_a_task_may_fix_its_examples_at_none(harness, model, capsys):
    task = harness("fixed", num_fewshot=3, limit=2)
    outcome = task.measure(Scorer(model, 512), "fixed")
    assert outcome["num_fewshot"] == {"fixed": 0}
    task.summarise({"fixed": outcome})
    assert "harness/fixed: the definition fixes 0 examples; num_fewshot=3 is not used" in capsys.readouterr().out
    for num in (0, None):
        task = harness("fixed", num_fewshot=num, limit=2)
        outcome = task.measure(Scorer(model, 512), "fixed")
        task.summarise({"fixed": outcome})
        assert outcome["num_fewshot"] == {"fixed": 0} and capsys.readouterr().out == ""


def test_the_seed_draws_the_examples(harness, model, monkeypatch):
    seen = []

    def loglikelihood(self, requests, disable_tqdm=False):
        seen.append([request.args[0] for request in requests])
        return [(0.0, False)] * len(requests)

    monkeypatch.setattr(ScorerLM, "loglikelihood", loglikelihood)
    for seed in (1, 2, 1):
        harness("drawn", num_fewshot=2, seed=seed).measure(Scorer(model, 512), "drawn")
    assert seen[0] == seen[2] != seen[1]


def test_an_error_that_is_no_number_is_none_and_of_several_filters_the_first_counts(harness):
    values = {
        "em,strict": 0.25,
        "em_stderr,strict": float("nan"),
        "em,loose": 0.5,
        "em_stderr,loose": "N/A",
        "alias": "x",
    }
    metrics = lmeval.reported(values)
    assert metrics == {"em,strict": {"value": 0.25, "stderr": None}, "em,loose": {"value": 0.5, "stderr": None}}
    found = harness("written").summarise({"written": {"metrics": metrics, "num": 4}})
    assert found == {"harness/written": Estimate(0.25, None, None, 4)}


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("hellaswg", "'hellaswg', which lm-eval .* does not know: close are hellaswag"),
        ("chioce", "close are choice"),
        ("apart", r"apart, a set of tasks without a score of its own: give \[choice,choice_again\]"),
        ("ai2_arc", r"ai2_arc, a set of tasks without a score of its own: give \[arc_challenge,arc_easy\]"),
        ("runs_code", "runs_code, which runs code that a model writes"),
        ("humaneval", "humaneval, which runs code that a model writes"),
        ("mmmu_val", "mmmu_val, which asks about images or sound"),
    ],
)
def test_what_cannot_be_run_is_named_before_any_model_is_loaded(harness, task, message):
    with pytest.raises(ConfigError, match=message):
        harness(task)


def test_what_cannot_be_loaded_is_named_at_once(harness, model):
    scorer, begin = Scorer(model, 512), time.monotonic()
    with pytest.raises(DataError, match=r"harness/absent cannot be loaded: .*nobody/nothing.*does not answer"):
        harness("absent").measure(scorer, "absent")
    with pytest.raises(ConfigError, match="harness/hub_metric takes its metric acc from the hub"):
        harness("hub_metric").measure(scorer, "hub_metric")
    with pytest.raises(ConfigError, match="harness/needs needs the package a_package_that_is_not_there: pip install"):
        harness("needs").measure(scorer, "needs")
    assert time.monotonic() - begin < 5


def test_what_cannot_be_loaded_is_named_before_any_other_task_is_measured(harness, tmp_path):
    suite = Suite(EvalOptions(tasks=[], lengths=[8], add_bos=False), None, None, tmp_path)
    suite.tasks = [harness("choice"), harness("absent")]
    with pytest.raises(DataError, match="harness/absent cannot be loaded"):
        suite.run(load=lambda: pytest.fail("a model was loaded"), progress=False)


def test_what_was_prepared_is_measured(harness, model, monkeypatch):
    """Once: a second measurement loads the questions anew."""
    task, scorer = harness("choice", limit=2), Scorer(model, 512)
    expected, loaded, load = task.measure(scorer, "choice"), [], task._load
    monkeypatch.setattr(task, "_load", lambda: loaded.append(1) or load())
    task.prepare()
    assert task.measure(scorer, "choice") == expected and len(loaded) == 1
    assert task.measure(scorer, "choice") == expected and len(loaded) == 2


def test_the_interval_of_a_share_ends_at_0_and_1(harness):
    def bounds(name, value):
        metrics = {f"{name},none": {"value": value, "stderr": 0.3}}
        return harness("written").summarise({"written": {"metrics": metrics, "num": 4}})["harness/written"][1:3]

    assert bounds("acc", 0.25) == (0, pytest.approx(0.25 + 1.959964 * 0.3)) and bounds("exact_match", 0.75)[1] == 1
    assert bounds("word_perplexity", 0.25)[0] < 0


def test_a_missing_package_is_named(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ConfigError, match="pip install lm-eval"):
        Harness("piqa", tokenizer, include_path=str(tmp_path), max_length=64)


def test_a_unit_depends_on_the_questions_and_every_option(harness, tasks, with_bos, monkeypatch):
    def unit(**options):
        return harness("choice", **options).units()["choice"]

    base, others = unit(), {"num_fewshot": 1, "limit": 3, "seed": 1, "max_length": 99, "tokenizer": with_bos}
    assert set(others) | {"task", "include_path"} == set(inspect.signature(Harness).parameters)
    assert all(unit(**{name: value}) != base for name, value in others.items())
    task, file = harness("choice"), tasks / "test.jsonl"
    text = file.read_text()
    file.write_text(text.replace("Anne", "Anna"))
    changed = task.units()["choice"]
    file.write_text(text)
    assert changed["include_path"] != base["include_path"] and changed["data_files"] != base["data_files"]
    assert json.loads(json.dumps(base)) == unit() == base
    monkeypatch.setattr(harness_module, "version", lambda name: f"another {name}")
    assert unit() == base | {"lm_eval": "another lm_eval"}


def test_a_folder_is_told_by_its_files_wherever_it_is(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        (folder / "sub" / "__pycache__").mkdir(parents=True)
        (folder / "sub" / "x.yaml").write_text("a")
    (second / "sub" / "__pycache__" / "x.pyc").write_text("made by Python")
    digest = harness_module._folder_digest
    same = digest(str(first))
    assert digest(str(second)) == same
    (second / "sub" / "x.yaml").write_text("b")
    (first / "sub" / "x.yaml").rename(first / "x.yaml")
    assert len({same, digest(str(first)), digest(str(second))}) == 3


def test_what_lies_behind_a_link_counts_and_a_link_back_ends(tmp_path):
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (folder / "sub").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)
    seen = []
    for text in ("a", "b", "a"):
        (elsewhere / "code.py").write_text(text)
        local = harness_module._local_data([{"dataset_path": str(folder)}])
        seen.append((harness_module._folder_digest(str(folder)), local))
    assert seen[0] == seen[2] and all(a != b for a, b in zip(*seen[:2], strict=True))


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    """One of the questions' folders; one that is not there is none of theirs."""
    (tmp_path / "sub").mkdir()
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(DataError, match=rf"{tmp_path}/sub cannot be read: Permission denied"):
        harness_module._local_data([{"dataset_path": str(tmp_path)}])
    assert harness_module._local_data([{"dataset_path": "json"}]) == harness_module._local_data([])


@pytest.mark.parametrize(
    "config",
    [
        {"dataset_path": "{folder}"},
        {"dataset_path": "json", "dataset_kwargs": {"data_dir": "{folder}"}},
        {"dataset_path": "json", "dataset_kwargs": {"data_files": "{folder}/sub/*.jsonl"}},
        {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": ["{folder}/sub/x.jsonl"]}}},
    ],
    ids=str,
)
def test_local_questions_are_told_by_their_content(tmp_path, config):
    config = json.loads(json.dumps(config).replace("{folder}", str(tmp_path)))
    (tmp_path / "sub").mkdir()
    seen = []
    for text in ("a", "b", "a"):
        (tmp_path / "sub" / "x.jsonl").write_text(text)
        seen.append(harness_module._local_data([config]))
    assert seen[0] == seen[2] != seen[1]


def test_the_options_of_an_evaluation_reach_it(harness, tasks, tokenizer, tmp_path):
    """max_length is the window that a model is meant for, and else the longest of the lengths."""
    given = {"num_fewshot": 1, "limit": 3, "seed": 1}
    own = {"include_path": str(tasks), "trust_tasks": True}
    options = EvalOptions(tasks=["choice"], prefix="harness", lengths=[99, 64], **own, **given)
    for window, max_length in ((None, 99), (128, 128)):
        (task,) = Suite(options, tokenizer, None, tmp_path, window).tasks
        assert task.name == "harness/choice"
        assert task.units() == harness("choice", max_length=max_length, **given).units()


def test_random_generators_and_the_tokenizer_are_left_as_they_were(harness, model):
    def state():
        generators = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        return generators, tokenizer.pad_token, tokenizer.padding_side, model.generation_config

    tokenizer = AutoTokenizer.from_pretrained(TINY, pad_token=None)
    before = state()
    assert tokenizer.pad_token is None
    harness("choice", tokenizer=tokenizer, num_fewshot=2, limit=2).measure(Scorer(model, 512), "choice")
    harness("written", tokenizer=tokenizer, limit=1).measure(Scorer(model, 512), "written")
    assert state() == before


DIRECTIONS = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/test.jsonl}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{metrics}]
"""


@pytest.mark.parametrize(
    ("name", "metric"),
    [
        ("choice", Metric("choice", True, ".1%")),
        ("written", Metric("written", True, ".1%")),
        ("rolling", Metric("rolling", False, ".3f")),
        ("both", Metric("both", True, ".1%")),
        ("boolq", Metric("boolq", True, ".1%")),
        ("hellaswag", Metric("hellaswag", True, ".1%")),
        ("mmlu", Metric("mmlu", True, ".1%")),
        ("wikitext", Metric("wikitext", False, ".3f")),
        ("squadv2", Metric("squadv2", None, ".3f")),  # a class: what it measures is in its code
    ],
)
def test_a_metric_is_known_before_anything_is_loaded(harness, name, metric):
    assert harness(name).metrics() == {f"harness/{name}": metric}


@pytest.mark.parametrize("name", ["choice", "written", "rolling", "both", "fixed"])
def test_what_comes_out_is_what_was_told_before(harness, model, name):
    task = harness(name, limit=2)
    outcome = json.loads(json.dumps(task.measure(Scorer(model, 512), name)))
    assert list(task.metrics()) == list(task.summarise({name: outcome}))
    entry = {"outcome": outcome, "took": [1.0, 1.0]}
    assert is_whole(task, name, entry)
    metric = next(iter(outcome["metrics"]))
    for change in (
        {"num": "2"}, {"num": None}, {"metrics": {}}, {"metrics": []}, {"metrics": {metric: 0.5}},
        {"metrics": {metric: {"value": "x", "stderr": None}}}, {"metrics": {metric: {"value": 0.5}}},
    ):  # fmt: skip
        assert not is_whole(task, name, entry | {"outcome": outcome | change}), change
    assert not any(is_whole(task, name, entry | {"outcome": damaged}) for damaged in (None, 7, [], {}, "x"))


@pytest.mark.parametrize(
    ("metrics", "chosen"),
    [
        ("{metric: brier_score, higher_is_better: false}", Metric("declared", False, ".3f")),
        ("{metric: mcc}, {metric: brier_score}", Metric("declared", True, ".3f")),
        ("{metric: brier_score}, {metric: acc}", Metric("declared", True, ".1%")),
        ("{metric: acc_norm}", Metric("declared", True, ".1%")),
    ],
)
def test_the_metric_is_that_of_the_definition(own_alone, tasks, tokenizer, model, tmp_path, metrics, chosen):
    text = DIRECTIONS.format(name="declared", folder=tasks, metrics=metrics)
    (tmp_path / "declared.yaml").write_text(text)
    task = Harness("declared", tokenizer, include_path=str(tmp_path), limit=4, max_length=MAX_LENGTH)
    assert task.metrics() == {"harness/declared": chosen}
    outcome = task.measure(Scorer(model, 512), "declared")
    shown = {key.split(",")[0]: metric["value"] for key, metric in outcome["metrics"].items()}
    name = "acc" if "acc}" in metrics else metrics.split("metric: ")[1].split(",")[0].split("}")[0]
    assert task.summarise({"declared": outcome})["harness/declared"].value == shown[name]


def test_a_score_of_a_hundred_keeps_its_interval(harness):
    """Which was cut at 1 where the metric is called f1."""
    metrics = {"f1,none": {"value": 45.0, "stderr": 2.0}}
    found = harness("written").summarise({"written": {"metrics": metrics, "num": 4}})["harness/written"]
    assert found[:3] == pytest.approx((45.0, 45 - 2 * 1.959964, 45 + 2 * 1.959964))


@pytest.fixture(scope="module")
def without_ends():
    """The same tokenizer without BOS and EOS."""
    other = AutoTokenizer.from_pretrained(TINY, bos_token=None, eos_token=None, pad_token=None)
    assert other.bos_token_id is other.eos_token_id is other.pad_token_id is None
    return other


@pytest.mark.parametrize("name", ["choice", "written"])
def test_a_tokenizer_may_have_neither_bos_nor_eos(harness, model, without_ends, name):
    """It died in lm-eval. The shipped one puts no BOS, so the figures are the same; and what is written goes on as long
    as it may, since nothing ends it but the model's own end."""
    scorer = Scorer(model, 512)
    expected = harness(name).measure(scorer, name)
    found = harness(name, tokenizer=without_ends).measure(scorer, name)
    assert found == expected


def test_what_needs_a_bos_or_eos_is_refused_before_a_model_is_loaded(own_alone, harness, tasks, without_ends, tmp_path):
    with pytest.raises(ConfigError, match=r"eval\.tasks has rolling, .*BOS or EOS, and this tokenizer has neither"):
        harness("rolling", tokenizer=without_ends)
    bare = (tasks / "choice.yaml").read_text().replace("task: choice", "task: bare").replace('"{{question}}"', '""')
    (tmp_path / "bare.yaml").write_text(bare)
    options = {"include_path": str(tmp_path), "max_length": MAX_LENGTH}
    with pytest.raises(ConfigError, match=r"eval\.tasks has bare, .*this tokenizer has neither"):
        Harness("bare", without_ends, **options)
    Harness("bare", without_ends, num_fewshot=1, **options)
    rolling = ROLLING.format(name="whole", folder=tasks).replace('doc_to_text: ""', 'doc_to_text: "a text"')
    (tmp_path / "whole.yaml").write_text(rolling)
    with pytest.raises(ConfigError, match=r"eval\.tasks has whole, .*this tokenizer has neither"):
        Harness("whole", without_ends, num_fewshot=1, **options)


def test_a_text_before_which_nothing_stands_is_refused_where_it_comes_up(model, tokenizer, without_ends):
    bare, spaces = requests([("", " the sea")]), requests([(" ", "the sea")])
    lm = ScorerLM(Scorer(model, 512), without_ends, MAX_LENGTH, "mine")
    for each in (bare, spaces):
        with pytest.raises(ConfigError, match="harness/mine scores texts from their first token on"):
            lm.loglikelihood(each)
    with pytest.raises(ConfigError, match="harness/mine scores texts from their first token on"):
        lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("the sea",), 0)])
    with pytest.raises(ConfigError, match="harness/mine has an empty prompt, and this tokenizer puts no BOS"):
        lm.generate_until([Instance("generate_until", {}, ("", {"max_gen_toks": 4}), 0)])
    with pytest.raises(ConfigError, match="harness/mine has an empty answer"):
        lm.loglikelihood(requests([("the sea", "")]))
    with_ends = ScorerLM(Scorer(model, 512), tokenizer, MAX_LENGTH, "mine")
    assert with_ends.loglikelihood(spaces) == with_ends.loglikelihood(requests([("", " the sea")]))


def test_what_a_yaml_includes_from_elsewhere_counts(own_alone, tasks, tokenizer, tmp_path, monkeypatch):
    """It lies outside the folder, whose files alone were looked at."""
    monkeypatch.setattr(lmeval, "_task_manager", lmeval._task_manager.__wrapped__)  # as in another process
    folder = tmp_path / "own"
    folder.mkdir()
    base = (tasks / "choice.yaml").read_text().replace("task: choice\n", "")
    (tmp_path / "base.yaml").write_text(base)
    (folder / "mine.yaml").write_text("include: ../base.yaml\ntask: mine\n")

    def unit():
        return Harness("mine", tokenizer, include_path=str(folder), max_length=64).units()["mine"]

    first = unit()
    assert unit() == first
    (tmp_path / "base.yaml").write_text(base.replace("{{question}}", "Question: {{question}}"))
    assert unit() != first


def test_own_tasks_are_the_same_wherever_their_folder_is(own_alone, tasks, tokenizer, tmp_path):
    units = []
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "code.py").write_text("def label(doc):\n    return doc['label']\n")
        text = (tasks / "choice.yaml").read_text().replace("task: choice", "task: mine")
        (folder / "mine.yaml").write_text(text.replace("doc_to_target: label", "doc_to_target: !function code.label"))
        units.append(Harness("mine", tokenizer, include_path=str(folder), max_length=64).units())
    assert units[0] == units[1]


def test_a_task_without_a_number_is_named(harness, model, monkeypatch):
    results = {"results": {"choice": {"alias": "choice", "acc,none": "N/A"}}}
    monkeypatch.setattr("lm_eval.evaluate", lambda *_, **__: results)
    with pytest.raises(ConfigError, match="harness/choice has no metric that is a number"):
        harness("choice").measure(Scorer(model, 512), "choice")


def test_files_that_cannot_be_read_are_named(tasks, tokenizer, tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text(CHOICE.format(name="mine", folder=tasks))

    def unreadable(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(harness_module, "sha256", unreadable)
    with pytest.raises(DataError, match=rf"{tmp_path}/mine\.yaml cannot be read: Permission denied"):
        Harness("mine", tokenizer, include_path=str(tmp_path), max_length=64)


@pytest.mark.parametrize(
    "config",
    [
        {"dataset_kwargs": "x"}, {"dataset_kwargs": {"data_files": 7}}, {"dataset_path": ["a", 3]},
        {"dataset_kwargs": {"data_dir": {"a": None}}}, {},
    ],
    ids=str,
)  # fmt: skip
def test_definitions_of_any_shape_name_no_files_they_do_not_have(config):
    assert harness_module._local_data([config]) == harness_module._local_data([])


@pytest.mark.parametrize("kind", ["loglikelihood", "loglikelihood_rolling", "generate_until"])
def test_a_token_without_a_row_is_named_before_anything_is_computed(model, monkeypatch, kind):
    """A token that was added to the tokenizer, and not to the model, in the last question."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.add_tokens(["<|tool|>"])
    rows = model.get_input_embeddings().weight.shape[0]
    token = tokenizer.convert_tokens_to_ids("<|tool|>")
    assert token >= rows
    lm = ScorerLM(Scorer(model, 512), tokenizer, MAX_LENGTH, "mine")

    def compute(*args, **kwargs):
        raise AssertionError("something was computed")

    monkeypatch.setattr(ScorerLM, "_model_call", compute)
    monkeypatch.setattr(ScorerLM, "_model_generate", compute)
    rest = {"loglikelihood": (" the sea",), "loglikelihood_rolling": (), "generate_until": ({"max_gen_toks": 4},)}[kind]
    asked = [Instance(kind, {}, (text, *rest), i) for i, text in enumerate(("Anne saw", "Anne <|tool|> saw"))]
    expected = rf"harness/mine has the token '<\|tool\|>' of id {token}, .* has {rows} rows"
    with pytest.raises(DataError, match=expected):
        getattr(lm, kind)(asked)
    if kind == "loglikelihood":
        with pytest.raises(DataError, match=expected):
            lm.loglikelihood(requests([("Anne saw", " <|tool|>")]))
