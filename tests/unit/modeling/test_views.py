"""Two views of the same tokens in one pass, against two passes."""

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, Qwen3Config, StableLmConfig

from pose.data.examples import collate_views, skipped_tokens
from pose.errors import GuardError
from pose.modeling import attention, guards, views
from pose.modeling.layers import hands_on
from pose.modeling.load import build_model, scale_config
from pose.modeling.speed import recompute
from pose.modeling.views import hidden_states_of_views, shares_beginnings
from pose.rope import Dynamic, Linear

B, L, T = 4, 20, 80
SHAPE = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": L, "initializer_range": 0.3, "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "sliding window": MistralConfig(**SHAPE | {"sliding_window": 7}),
    "qwen3": Qwen3Config(**SHAPE, head_dim=8),
    "stablelm": StableLmConfig(**SHAPE),
    "dynamic": LlamaConfig(**SHAPE),
}
scale_config(CONFIGS["dynamic"], Dynamic(), T)
scale_config(CONFIGS["llama"], Linear(), T)
SHARES = {"llama", "sliding window", "qwen3"}


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(1, 61, (B, L), generator=generator)
    positions = torch.arange(L).repeat(B, 1)
    for row, (first, skip) in enumerate(((4, 20), (19, 33), (0, 60))):
        positions[row, first:] += skip
    return collate_views(
        [{"input_ids": tokens[i], "labels": tokens[i], "position_ids": positions[i]} for i in range(B)]
    )


def body(model, tokens, positions):
    return model.base_model(input_ids=tokens, position_ids=positions, use_cache=False).last_hidden_state.flatten(0, 1)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_views_are_those_of_two_passes(name, backend, batch):
    """States and gradients; models that cannot share beginnings have two rows for each example."""
    torch.manual_seed(0)
    model = build_model(CONFIGS[name], None, backend, torch.float64)
    assert shares_beginnings(model.config) == (name in SHARES)
    tokens, positions = batch["input_ids"], batch["position_ids"]
    weights = torch.randn(2, B * L, 32, dtype=torch.float64)
    found = hidden_states_of_views(model, tokens, positions, batch["skipped_at"])
    together = torch.stack([found.plain, found.second(batch["skipped_at"])])
    apart = torch.stack([body(model, tokens, torch.arange(L).repeat(B, 1)), body(model, tokens, positions)])
    assert (apart[0] - apart[1]).abs().max() > 0.1
    torch.testing.assert_close(together, apart, atol=1e-6, rtol=1e-6)
    parameters = list(model.base_model.parameters())
    got, wanted = (torch.autograd.grad((states * weights).sum(), parameters) for states in (together, apart))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 * b.abs().max().item(), rtol=1e-5)


@pytest.mark.parametrize("how", [True, "selective"])
def test_recomputed_activations_see_the_two_views_too(how, batch):
    torch.manual_seed(0)
    model = build_model(CONFIGS["llama"], None, "sdpa").train()
    given = (model, batch["input_ids"], batch["position_ids"], batch["skipped_at"])
    parameters = list(model.base_model.parameters())
    wanted = torch.autograd.grad(hidden_states_of_views(*given).skipped.square().sum(), parameters)
    recompute(model, how)
    got = torch.autograd.grad(hidden_states_of_views(*given).skipped.square().sum(), parameters)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_tokens_before_the_first_skip_are_computed_once(batch):
    model = build_model(CONFIGS["llama"], None, "sdpa")
    seen = []
    model.base_model.layers[0].mlp.register_forward_hook(lambda module, args, out: seen.append(out.shape[:-1].numel()))
    hidden_states_of_views(model, batch["input_ids"], batch["position_ids"], batch["skipped_at"])
    wanted = (L - 4) + (L - 19) + L
    assert wanted <= seen[0] - B * L < wanted + B * L // 16 and (seen[0] - B * L) % (B * L // 16) == 0


def test_batches_are_of_few_lengths_and_the_same_whatever_is_added(batch, monkeypatch):
    """States and gradients with tokens behind the texts are those without."""
    model = build_model(CONFIGS["llama"], None, "sdpa")
    found, lengths = {}, {}
    for num in (16, B * L):
        monkeypatch.setattr(views, "LENGTHS", num)
        seen = set()
        hook = model.base_model.layers[0].mlp.register_forward_hook(lambda m, args, out, seen=seen: seen.add(out.shape))
        for first in range(B * L):
            skipped = torch.arange(first, B * L)
            given = model, batch["input_ids"], batch["position_ids"], skipped
            if first in (1, 7, 40):
                states = hidden_states_of_views(*given)
                parts = states.plain.square().sum() + states.skipped.sum()
                gradient = torch.autograd.grad(parts, model.get_input_embeddings().weight)
                found[num, first] = (states.plain, states.skipped, *gradient)
            else:
                with torch.no_grad():
                    hidden_states_of_views(*given)
        hook.remove()
        lengths[num] = len(seen)
    assert lengths == {16: 16, B * L: B * L}
    for first in (1, 7, 40):
        for a, b in zip(found[16, first], found[B * L, first], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_who_hands_keywords_to_its_attention():
    for name, config in CONFIGS.items():
        assert hands_on(config, "packing") == (name != "stablelm"), name
    assert not hands_on(CONFIGS["stablelm"], "packing"), "asked again"


def test_skipped_tokens(batch):
    found = skipped_tokens(batch["position_ids"])
    assert found.at.tolist() == [*range(4, L), L + 19, *range(2 * L, 3 * L)]
    wanted = [1 / (B * 16)] * 16 + [1 / B] + [1 / (B * L)] * L
    torch.testing.assert_close(found.weights, torch.tensor(wanted))
    assert torch.equal(batch["skipped_at"], found.at)
    assert torch.equal(batch["skipped_weights"].view(torch.float32), found.weights)


def test_the_guard_passes_what_is_right(batch):
    for name in ("llama", "stablelm", "dynamic"):
        guards.check_views(build_model(CONFIGS[name], None, "sdpa"), 512, "cpu")


def test_the_guard_finds_views_that_are_mixed_up(monkeypatch):
    """As of an attention that does not look at the packing: all texts are one to it."""
    model = build_model(CONFIGS["llama"], None, "sdpa")

    def blind(rows, places):
        return None

    monkeypatch.setattr(views, "Packing", blind)
    with pytest.raises(GuardError, match="two views of the same tokens"):
        guards.check_views(model, 512, "cpu")


def test_packed_rows_may_be_any(batch):
    """Three texts of which two share their first five tokens: attention of each by itself."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 25, 8, generator=generator) for heads in (4, 2, 2))
    rows = torch.tensor([[*range(10)], [*range(5), *range(10, 15)], [*range(15, 25)]])
    places = torch.tensor([(rows.flatten() == i).nonzero()[0] for i in range(25)])
    got, _ = attention.sdpa(None, query, key, value, None, packing=attention.Packing(rows, places))
    for row in rows:
        wanted, _ = attention.sdpa(None, query[:, :, row], key[:, :, row], value[:, :, row], None)
        torch.testing.assert_close(got[:, row], wanted)
