"""What a search minimises: every needle of every text counts, each answer as much as another."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, PreTrainedTokenizerFast

from pose.evaluation.needle_fitness import NeedleFitness
from pose.evaluation.scoring import Scorer
from pose.modeling.load import build_model, rope_geometry, scale_config
from pose.rope import Linear
from pose.tasks.needle_gain import NUM_KEYS, MultiKeyPrompts

TINY = Path(__file__).resolve().parents[3] / "assets" / "tiny"
TOKENIZER = PreTrainedTokenizerFast.from_pretrained(TINY)
HAYSTACK = "\n\n".join(f"Sentence {i} has its end, as all the others of this text have." for i in range(200))


@pytest.fixture(scope="module")
def model_and_frequencies():
    config = LlamaConfig.from_pretrained(TINY)
    frequencies = Linear().resolve(rope_geometry(config), 1024).frequencies(rope_geometry(config))
    scale_config(config, Linear(), 1024)
    return build_model(config, str(TINY), "sdpa"), frequencies


def test_it_is_the_mean_over_questions_of_what_each_answer_costs_alone(model_and_frequencies):
    """By single windows without any sharing of what they begin with, and without what stands behind an answer."""
    model, frequencies = model_and_frequencies
    prompts, depths = MultiKeyPrompts(TOKENIZER, HAYSTACK, seed=0), [0.0, 0.3, 0.5]
    fitness, scorer = NeedleFitness(Scorer(model), prompts, 1000, depths, 3), Scorer(model)
    found, losses, asked = fitness(frequencies), [], []
    for trial, places in enumerate([[0.0, 0.3, 0.5, 0.0], [0.3, 0.5, 0.0, 0.3], [0.5, 0.0, 0.3, 0.5]]):
        made = prompts.sample(1000, places, trial)
        asked += [(trial, place) for place in places]
        for row, answer in zip(made.input_ids, made.answers, strict=True):
            losses.append(scorer.nll(row[None, : answer.stop], answer.stop - answer.start).mean())
    assert len(losses) == 3 * NUM_KEYS and np.std(losses) > 0.1
    assert found == pytest.approx(np.mean(losses), rel=1e-5)
    answers = fitness.answers(frequencies)
    assert [(answer.trial, answer.depth) for answer in answers] == asked
    assert [answer.nll for answer in answers] == pytest.approx(losses, rel=1e-4), "each by its needle's depth"


@pytest.mark.parametrize("goes", ["shared", "whole", "in chunks", "by layers"])
def test_a_short_text_can_stand_for_a_long_one(model_and_frequencies, monkeypatch, goes):
    """By the position ids that its prompts say, in plain forward passes of single windows."""
    model, frequencies = model_and_frequencies
    monkeypatch.setattr("pose.evaluation.scoring.can_share", lambda *_: goes == "shared")
    monkeypatch.setattr("pose.modeling.long.takes_cache", lambda _: goes == "in chunks")
    prompts, losses, scorer = MultiKeyPrompts(TOKENIZER, HAYSTACK, seed=0), [], Scorer(model)
    if goes in ("in chunks", "by layers"):
        scorer.chunk_len = 128
    found = NeedleFitness(scorer, prompts, 500, [0.0, 0.5], 2, 1024)(frequencies)
    for trial in range(2):
        made = prompts.sample(500, [0.0, 0.5, 0.0, 0.5], trial, 1024)
        for row, answer in zip(made.input_ids, made.answers, strict=True):
            ids, places = torch.from_numpy(row)[None], torch.from_numpy(made.position_ids)[None]
            with torch.no_grad():
                logits = model(input_ids=ids, position_ids=places, use_cache=False).logits[0].double()
            nll = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
            losses.append(nll[answer.start - 1 : answer.stop - 1].mean().item())
    assert found == pytest.approx(np.mean(losses), rel=1e-5)
    assert found != pytest.approx(NeedleFitness(Scorer(model), prompts, 500, [0.0, 0.5], 2)(frequencies), rel=1e-3)


def test_a_text_goes_through_the_model_once(model_and_frequencies):
    model, frequencies = model_and_frequencies
    fitness, passed = NeedleFitness(Scorer(model), MultiKeyPrompts(TOKENIZER, HAYSTACK, seed=0), 1000, [0.1], 2), []
    hook = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: passed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    try:
        fitness(frequencies)
    finally:
        hook.remove()
    assert 2 * 900 < sum(passed) < 2.5 * 1000 < 2 * NUM_KEYS * 1000
