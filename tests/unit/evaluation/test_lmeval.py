"""What is relied on of lm-evaluation-harness: its names, which its authors may change, and its index of tasks."""

import inspect
import random
from functools import partial

import lm_eval
import numpy as np
import pytest
import torch
from lm_eval.api import metrics as lm_eval_metrics
from lm_eval.api.registry import DEFAULT_METRIC_REGISTRY, is_higher_better
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.models.utils_hf import stop_sequences_criteria
from lm_eval.tasks import TaskManager

from pose.errors import ConfigError
from pose.evaluation import lmeval
from pose.evaluation.hflm import ScorerLM
from pose.evaluation.lmeval import Definitions


@pytest.mark.parametrize("name", [name for name, value in vars(ScorerLM).items() if inspect.isfunction(value)])
def test_every_method_that_is_replaced_is_there_and_takes_what_ours_takes(name):
    if name in ("__init__", "_count", "_prefix", "_check_ids", "_require_prefix"):  # ours
        return
    ours = inspect.signature(getattr(ScorerLM, name)).parameters
    theirs = inspect.signature(getattr(HFLM, name)).parameters
    assert set(ours) - {"kwargs", "generation_kwargs"} <= set(theirs), name


def test_the_class_for_models_asks_as_it_did():
    """What `ScorerLM` counts on, by the text of lm-eval's methods."""
    scored = inspect.getsource(HFLM._loglikelihood_tokens)
    for text in ("self._batch_scheduler", "self._model_call(batched_inps", "override_bs", 'self.batch_size == "auto"'):
        assert text in scored, text
    assert "self._detect_batch_size()" in inspect.getsource(HFLM.generate_until)
    assert "self._detect_batch_size()" in inspect.getsource(HFLM.loglikelihood_rolling)
    assert {"softmax_dtype", "backend", "batch_size", "max_length"} <= set(inspect.signature(HFLM).parameters)
    assert isinstance(HFLM.prefix_token_id, property)
    assert list(inspect.signature(stop_sequences_criteria).parameters)[:2] == ["tokenizer", "stop_sequences"]
    assert normalize_gen_kwargs({"max_gen_toks": 3}, 9)["max_gen_toks"] == 3


def test_what_is_evaluated_is_asked_for_as_it_was():
    assert {"limit", "bootstrap_iters", "log_samples"} <= set(inspect.signature(lm_eval.evaluate).parameters)
    assert "DISABLE_MULTIPROC" in inspect.getsource(lm_eval_metrics)
    assert set(DEFAULT_METRIC_REGISTRY) == {
        "loglikelihood", "loglikelihood_rolling", "multiple_choice", "generate_until",
    }  # fmt: skip
    assert [is_higher_better(name) for name in ("acc", "word_perplexity")] == [True, False]
    assert callable(TaskManager.load) and isinstance(TaskManager.task_index, property)


@pytest.fixture
def definitions(tmp_path, monkeypatch):
    """Those of YAMLs alone: lm-eval's own take seconds to read."""
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))

    def make(**yamls):
        for name, text in yamls.items():
            (tmp_path / f"{name}.yaml").write_text(text)
        return Definitions(str(tmp_path), str(yamls))

    return make


def test_the_index_has_the_kinds_that_are_told_apart():
    definitions = Definitions()
    index = definitions.index
    kinds = {name: index[name].kind.name for name in ("boolq", "mmlu", "ai2_arc", "squadv2")}
    assert kinds == {"boolq": "TASK", "mmlu": "GROUP", "ai2_arc": "TAG", "squadv2": "PY_TASK"}
    assert "arc_challenge" in index["ai2_arc"].tags and isinstance(index["mmlu"].cfg["task"], list)
    assert definitions.metrics("squadv2") == {} and definitions.metrics("mmlu") == {"acc": True}
    assert definitions.metrics("wikitext") == dict.fromkeys(
        ("word_perplexity", "byte_perplexity", "bits_per_byte"), False
    )


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ("[{metric: acc}, {metric: brier_score}]", {"acc": True, "brier_score": False}),
        ("[{metric: mine, higher_is_better: false}]", {"mine": False}),
        ("[{metric: mine}]", {"mine": None}),
        ("[{metric: mine, higher_is_better: perhaps}]", {"mine": None}),
        ("[{metric: !function code.own, higher_is_better: true}]", {"own": True}),
        ("[3, {x: y}, {metric: acc}]", {"acc": True}),
        ("null", {"acc": True, "acc_norm": True}),
    ],
)
def test_metrics_are_those_of_the_definition(definitions, metrics, expected):
    text = f"task: t\noutput_type: multiple_choice\nmetric_list: {metrics}\n"
    assert definitions(t=text).metrics("t") == expected


def test_a_group_has_the_directions_of_its_tasks(definitions):
    found = definitions(
        a="task: a\noutput_type: multiple_choice\nmetric_list: [{metric: mine, higher_is_better: false}]\n",
        g="group: g\ntask: [a]\naggregate_metric_list: [{metric: mine}, {metric: acc}]\n",
        one="group: one\ntask: [a]\naggregate_metric_list: {metric: mine}\n",
        over="group: over\ntask: [{task: a, metric_list: [{metric: mine, higher_is_better: true}]}]\n"
        "aggregate_metric_list: [{metric: mine}]\n",
    )
    assert found.metrics("g") == {"mine": False, "acc": True} and found.metrics("one") == {"mine": False}
    assert found.metrics("over") == {"mine": True}


def test_groups_that_are_no_groups_are_named(definitions):
    found = definitions(
        circle="group: circle\ntask: [other]\n", other="group: other\ntask: [circle]\n",
        nameless="group: nameless\ntask: [{num_fewshot: 3}]\n", single="group: single\ntask: a\n", a="task: a\n",
        empty="group: empty\n",
    )  # fmt: skip
    with pytest.raises(ConfigError, match="circle is inside of itself: circle > other > circle"):
        list(found.configs("circle"))
    with pytest.raises(ConfigError, match=r"nameless has a member without a name: .*num_fewshot"):
        list(found.configs("nameless"))
    assert [config["task"] for config in found.configs("single")] == ["a"]
    assert list(found.configs("empty")) == []
    with pytest.raises(ConfigError, match=r"eval\.tasks has single, a set of tasks .*: give \[a\]") as caught:
        found.check("single", "")
    assert "watch.tasks" in str(caught.value.under("watch"))


def test_generators_that_tasks_may_use_are_seeded():
    def drawn(seed):
        with lmeval.surroundings(seed):
            return random.random(), np.random.rand(), torch.rand(1).item()

    first, other = drawn(1), drawn(2)
    assert drawn(1) == first and all(a != b for a, b in zip(first, other, strict=True))
