"""lm-evaluation-harness over local questions, against a plain loop with a stock transformers model."""

import inspect
import json
import random
import sys
import time
from functools import cache
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from pose.errors import ConfigError, DataError
from pose.evaluation.harness import FEWSHOT, Harness
from pose.evaluation.hflm import ScorerLM
from pose.evaluation.scoring import Scorer
from pose.evaluation.task import Estimate
from pose.modeling.load import build_model, load_config

TINY = str(Path(__file__).resolve().parents[2] / "assets/tiny")
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
        "both": GROUP.format(name="both"),
        "apart": GROUP.format(name="apart").split("aggregate")[0],
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
    json.dumps(outcome)
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
    assert estimate == pytest.approx(Estimate(acc, acc - 1.96 * stderr, acc + 1.96 * stderr, num), rel=1e-4)


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


def test_questions_without_room_for_the_answer_are_cut_or_refused(harness, model, tokenizer, capsys):
    sizes = [len(tokenizer(row["question"]).input_ids) for row in questions(16, 1)[:8]]
    window = 11 + sorted(sizes)[4]  # one token short for some
    outcome = harness("written", max_length=window).measure(Scorer(model, 512), "written")
    assert outcome["truncated"] == sum(size + 12 > window for size in sizes) > 0
    assert (
        f"{outcome['truncated']} of 8 requests are longer than the window of {window} tokens" in capsys.readouterr().out
    )
    with pytest.raises(ConfigError, match="harness/written writes up to 12 tokens, and the window is 12"):
        harness("written", max_length=12).measure(Scorer(model, 512), "written")
    with pytest.raises(ConfigError, match=r"harness/choice has an answer of .* tokens, and the window is 2"):
        harness("choice", max_length=2).measure(Scorer(model, 512), "choice")


def test_a_group_has_the_score_of_all_its_questions(harness, model):
    task = harness("both")
    outcome = task.measure(Scorer(model, 512), "both")
    parts = [outcome["members"][name]["acc,none"]["value"] for name in ("choice", "choice_again")]
    assert parts[0] != parts[1] and outcome["num"] == 32
    assert task.summarise({"both": outcome})["harness/both"].value == pytest.approx(np.mean(parts))


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
    outcome = harness("fixed", num_fewshot=3, limit=2).measure(Scorer(model, 512), "fixed")
    assert outcome["num_fewshot"] == {"fixed": 0}
    assert "harness/fixed: the definition fixes 0 examples; eval.num_fewshot=3 is not used" in capsys.readouterr().out


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


def test_a_missing_folder_or_package_is_named(tokenizer, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"eval\.include_path=nowhere is no folder"):
        Harness("piqa", tokenizer, include_path="nowhere", max_length=64)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ConfigError, match="pip install lm-eval"):
        Harness("piqa", tokenizer, include_path=str(tmp_path), max_length=64)


def test_a_unit_depends_on_the_questions_and_every_option(harness, tasks, with_bos):
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
