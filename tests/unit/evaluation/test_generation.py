"""Greedy decoding against a plain loop: the whole text through the model for every token."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, LlamaConfig

from pose.evaluation import generation
from pose.evaluation.generation import end_ids, greedy
from pose.modeling.load import build_model
from pose.modeling.rotary import depends_on_length


def make(**options):
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.5, eos_token_id=None, **options,
    )  # fmt: skip
    return build_model(config, None, "sdpa").eval()


@torch.no_grad()
def plain(model, prompt, num: int) -> list[int]:
    tokens = torch.tensor(prompt)[None]
    for _ in range(num):
        tokens = torch.cat([tokens, model(input_ids=tokens, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return tokens[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def prompts():
    return np.random.default_rng(0).integers(50, size=(3, 29))


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}


@pytest.mark.parametrize("rope", [None, DYNAMIC])
@pytest.mark.parametrize("chunk", [2048, 8])
def test_as_a_plain_loop(monkeypatch, prompts, rope, chunk):
    """Across the window of 32 tokens too, beyond which the dynamic frequencies change with every token."""
    monkeypatch.setattr(generation, "PREFILL_CHUNK", chunk)
    model = make(rope_parameters=rope)
    assert depends_on_length(model.config) is (rope is not None)
    rows = greedy(model, prompts, 12)
    assert [row.tolist() for row in rows] == [plain(model, prompt, 12) for prompt in prompts]
    assert len({row.tobytes() for row in rows}) == 3


def test_a_long_prompt_goes_through_the_model_in_chunks(monkeypatch, prompts):
    monkeypatch.setattr(generation, "PREFILL_CHUNK", 8)
    model, passed = make(), []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: passed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    greedy(model, prompts, 3)
    assert passed == [8, 8, 8, 5, 1, 1]


def test_a_checkpoints_settings_play_no_part_and_stay(prompts):
    model = make()
    expected = [row.tolist() for row in greedy(model, prompts, 10)]
    own = GenerationConfig(
        do_sample=True, temperature=5.0, top_k=7, repetition_penalty=3.0, no_repeat_ngram_size=1, min_new_tokens=9,
        suppress_tokens=[expected[0][0]], bad_words_ids=[[expected[1][0]]], max_length=30, num_beams=3,
        eos_token_id=expected[2][1],
    )  # fmt: skip
    model.generation_config = own
    assert [row.tolist() for row in greedy(model, prompts, 10)] == expected
    assert model.generation_config is own


def test_a_text_ends_before_its_first_end_token(prompts):
    model = make()
    rows = [row.tolist() for row in greedy(model, prompts, 10)]
    ends = [rows[0][3], rows[1][6]]

    def cut(row):
        return row[: min((row.index(end) for end in ends if end in row), default=10)]

    assert [row.tolist() for row in greedy(model, prompts, 10, ends)] == [cut(row) for row in rows]
    assert len(cut(rows[0])) <= 3 and len(cut(rows[1])) <= 6


@pytest.mark.parametrize(("named", "expected"), [(None, [5]), (7, [5, 7]), ([9, 5], [5, 9])])
def test_end_tokens_are_those_of_tokenizer_and_checkpoint(named, expected):
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=named))
    assert end_ids(model, SimpleNamespace(eos_token_id=5)) == expected
    assert end_ids(model, SimpleNamespace(eos_token_id=None)) == [i for i in expected if i != 5 or named == [9, 5]]
