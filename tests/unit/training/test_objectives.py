"""Objectives against losses worked out by hand in fp64: each view by itself, all logits, transformers' attention."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.memory import cpu_peak
from benchmarks.objectives import OBJECTIVES, Steps
from pose.data.examples import IGNORE
from pose.errors import ConfigError
from pose.modeling.load import build_model, scale_config
from pose.modeling.lora import add_lora
from pose.modeling.loss import CHUNK_LEN, CHUNK_LEN_OF_VIEWS
from pose.modeling.options import LoraOptions
from pose.modeling.teacher import Teacher
from pose.positions import EqualChunks, Full, Mix, PoSE, RandPos, ShortPI, SingleShift
from pose.rope import LongRope, Yarn
from pose.training.objectives import LanguageModel, LongShort, SelfDistill

B, L, T, LAYERS, VOCAB = 5, 24, 96, 4, 61
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": L, "initializer_range": 0.3,
    "tie_word_embeddings": False,
}  # fmt: skip
ORIGINAL = LlamaConfig(**SHAPE)
SKIPS = {3: 20, 10: 50, 23: 7, 1: 72}  # first skip of a row, and its size; one row has none


def scaled(scaling=None) -> LlamaConfig:
    config = copy.deepcopy(ORIGINAL)
    scale_config(config, scaling or Yarn(), T)
    return config


def model_of(config, seed=0):
    torch.manual_seed(seed)
    return build_model(config, None, "sdpa", torch.float64).train()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(VOCAB, (B, L), generator=generator)
    labels = tokens.clone()
    labels[1, :-4] = IGNORE  # a retrieval example
    position_ids = torch.arange(L).repeat(B, 1)
    for row, (first, skip) in enumerate(SKIPS.items()):
        position_ids[row, first:] += skip
    items = [
        {"input_ids": tokens[i], "labels": labels[i], "position_ids": position_ids[i]} for i in range(B)
    ]  # fmt: skip
    return SelfDistill().collate(items)


def states_by_hand(model, row_ids, row_positions, layers=(LAYERS,)):
    """Hidden states of one row: transformers' own model, attention and mask."""
    plain = LlamaForCausalLM(model.config).double()
    plain.load_state_dict(model.state_dict())
    plain.set_attn_implementation("eager")
    mask = torch.full((L, L), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    out = plain.model(
        input_ids=row_ids[None], position_ids=row_positions[None], attention_mask=mask, output_hidden_states=True
    )
    return [out.hidden_states[layer][0] for layer in layers], plain.lm_head


def nll_by_hand(head, states, labels):
    return F.cross_entropy(head(states)[:-1], labels[1:], ignore_index=IGNORE)


PLAIN = torch.arange(L)


def first_skip(positions) -> int:
    moved = (positions != PLAIN).nonzero()
    return int(moved[0]) if len(moved) else L


def self_distill_by_hand(model, batch, weight):
    lms, kls = [], []
    for ids, labels, positions in zip(batch["input_ids"], batch["labels"], batch["position_ids"], strict=True):
        (plain,), head = states_by_hand(model, ids, PLAIN)
        (moved,), _ = states_by_hand(model, ids, positions)
        lms.append(nll_by_hand(head, plain, labels))
        p, q = head(plain).log_softmax(-1), head(moved).log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1)[first_skip(positions) :]
        kls.append(kl.mean() if len(kl) else torch.zeros((), dtype=torch.float64))
    lm, kl = torch.stack(lms), torch.stack(kls)
    return lm + weight * kl, lm.mean(), kl.mean()


@pytest.mark.parametrize("weight", [1.0, 0.3])
@pytest.mark.parametrize("scaling", [Yarn(), LongRope(long_factor=[4.0] * 4)], ids=["yarn", "longrope"])
def test_self_distillation_by_hand(batch, weight, scaling):
    """With frequencies of the text's length too, where the two views have no token in common."""
    model = model_of(scaled(scaling))
    loss, by_example, parts = SelfDistill(weight).losses(model, batch)
    by_hand, lm, kl = self_distill_by_hand(model, batch, weight)
    assert kl > 0.05, "or nothing would be tested"
    torch.testing.assert_close(by_example.double(), by_hand, atol=1e-6, rtol=1e-6)
    for got, wanted in ((loss, by_hand.mean()), (parts[0], lm), (parts[1], kl)):
        torch.testing.assert_close(got.double(), wanted, atol=1e-6, rtol=1e-6)
    assert not by_example.requires_grad and not any(part.requires_grad for part in parts)


def test_gradients_of_self_distillation_stop_at_the_plain_view(batch):
    """By autograd of two whole passes, of which the first is a constant in the KL."""
    model = model_of(scaled())
    SelfDistill(0.7).losses(model, batch).loss.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    head, total = model.lm_head, 0.0
    for ids, labels, positions in zip(batch["input_ids"], batch["labels"], batch["position_ids"], strict=True):
        plain, moved = (
            model.model(input_ids=ids[None], position_ids=at[None], use_cache=False).last_hidden_state[0]
            for at in (PLAIN, positions)
        )
        total = total + nll_by_hand(head, plain, labels)
        p, q = head(plain).log_softmax(-1).detach(), head(moved).log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1)[first_skip(positions) :]
        total = total + 0.7 * (kl.mean() if len(kl) else 0)
    (total / B).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, atol=1e-6 * p.grad.abs().max().item(), rtol=1e-5, msg=name)


def test_without_its_weight_self_distillation_is_the_language_model_at_plain_positions(batch):
    """Bit for bit, gradients too."""
    model = model_of(scaled())
    plain = batch | {"position_ids": PLAIN.repeat(B, 1)}
    found = []
    for objective, given in ((SelfDistill(0), batch), (LanguageModel(), plain)):
        model.zero_grad()
        losses = objective.losses(model, given)
        losses.loss.backward()
        found.append((losses.loss, losses.by_example, [p.grad.clone() for p in model.parameters()]))
    (loss, by_example, gradients), (wanted, wanted_by_example, wanted_gradients) = found
    assert torch.equal(loss, wanted) and torch.equal(by_example, wanted_by_example)
    assert all(torch.equal(a, b) for a, b in zip(gradients, wanted_gradients, strict=True))


@pytest.mark.parametrize("scaling", [Yarn(), LongRope(long_factor=[4.0] * 4)], ids=["yarn", "longrope"])
@pytest.mark.parametrize("layers", [None, [2], [4, 1]])
def test_long_short_by_hand(batch, layers, scaling):
    """The teacher has its own frequencies and its own weights."""
    model, original = model_of(scaled(scaling)), model_of(ORIGINAL, seed=1)
    objective = LongShort(lm_weight=0.9, short_weight=2.0, skipped_weight=3.0, layers=layers)
    chosen = objective.layers_of(LAYERS)
    assert chosen == ([1, 2, 3, 4] if layers is None else sorted(layers))
    found = objective.losses(model, batch, Teacher(original))
    by_hand, short, moved, lms = [], [], [], []
    for ids, labels, positions in zip(batch["input_ids"], batch["labels"], batch["position_ids"], strict=True):
        wanted, _ = states_by_hand(original, ids, PLAIN, [*chosen, LAYERS])
        plain, head = states_by_hand(model, ids, PLAIN, chosen)
        (skipped,), _ = states_by_hand(model, ids, positions)
        distance = [1 - F.cosine_similarity(a, b, dim=-1).mean() for a, b in zip(plain, wanted[:-1], strict=True)]
        short.append(sum(distance))
        moved.append(1 - F.cosine_similarity(skipped, wanted[-1], dim=-1).mean())
        lms.append(nll_by_hand(head, skipped, labels))
        by_hand.append(0.9 * lms[-1] + 2 * short[-1] + 3 * moved[-1])
    torch.testing.assert_close(found.by_example.double(), torch.stack(by_hand), atol=1e-6, rtol=1e-6)
    for got, wanted in zip(
        (found.loss, *found.parts), (by_hand, lms, short, moved), strict=True
    ):  # fmt: skip
        torch.testing.assert_close(got.double(), torch.stack(wanted).mean(), atol=1e-6, rtol=1e-6)
    assert min(part.item() for part in found.parts) > 0.01, "or nothing would be tested"
    found.loss.backward()
    assert all(p.grad is None for p in original.parameters()), "no gradient reaches the teacher"
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("train_embeddings_and_norms", [False, True])
def test_the_teacher_of_adapters_is_the_model_as_it_was(batch, train_embeddings_and_norms):
    """Adapters off, its own frequencies back, and what trains beside adapters as it was; then all as before."""
    original = model_of(ORIGINAL).float()
    options = LoraOptions(rank=2, train_embeddings_and_norms=train_embeddings_and_norms, dropout=0.5)
    torch.manual_seed(0)
    model = build_model(scaled(), None, "sdpa", prepare=lambda one: add_lora(one, options)).train()
    model.load_state_dict(
        {name.replace(".base_layer", ""): value for name, value in original.state_dict().items()}, strict=False
    )
    for name, module in model.named_modules():
        if hasattr(module, "base_layer"):
            module.base_layer.weight.data.copy_(original.get_submodule(name).weight)
    teacher = Teacher(model, ORIGINAL)
    with torch.no_grad():  # as if it had trained
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    got = teacher.hidden_states(batch["input_ids"], [1, LAYERS])
    assert not any(states.requires_grad for states in got), "no gradient goes through the teacher"
    plain = PLAIN.repeat(B, 1)
    out = original.model(input_ids=batch["input_ids"], position_ids=plain, use_cache=False, output_hidden_states=True)
    torch.testing.assert_close(got[0], out.hidden_states[1], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(got[1], out.last_hidden_state, atol=1e-5, rtol=1e-5)
    after = model.state_dict()
    assert model.training and all(torch.equal(before[name], after[name]) for name in before)
    model.eval()
    now = model.model(input_ids=batch["input_ids"], position_ids=plain, use_cache=False).last_hidden_state
    assert (now - got[1]).abs().max() > 0.1, "afterwards adapters and new frequencies are on again"


@pytest.mark.parametrize("objective", [SelfDistill(), LongShort()], ids=["self_distill", "long_short"])
def test_a_loss_is_the_mean_of_those_of_micro_batches(batch, objective):
    """So that processes and micro-batches may be any number."""
    model, teacher = model_of(scaled()), Teacher(model_of(ORIGINAL, seed=1))
    items = [{name: batch[name][i] for name in ("input_ids", "labels", "position_ids")} for i in range(B)]
    whole = objective.losses(model, objective.collate(items), teacher)
    apart = [objective.losses(model, objective.collate([item]), teacher) for item in items]
    torch.testing.assert_close(whole.loss, torch.stack([one.loss for one in apart]).mean())
    torch.testing.assert_close(whole.by_example, torch.cat([one.by_example for one in apart]))


def test_a_batch_without_a_skip(batch):
    """As of pose=mix, or of a curriculum's short sequences: the KL is 0, and there is a gradient all the same."""
    model = model_of(scaled())
    items = [{"input_ids": ids, "labels": ids, "position_ids": PLAIN} for ids in batch["input_ids"]]
    found = SelfDistill().losses(model, SelfDistill().collate(items))
    assert found.parts[1] == 0 and torch.equal(found.loss, found.parts[0])
    found.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


SAMPLERS = [PoSE(L, T), Mix(L, T, PoSE(L, T)), RandPos(L, T), EqualChunks(L, T, num_chunks=2)]
WITHOUT = [
    Full(L, T), ShortPI(L, T), PoSE(L, L), PoSE(L, T, num_chunks=1), Mix(L, T, PoSE(L, T), plain_share=1.0),
    Mix(L, T, ShortPI(L, T)), EqualChunks(L, T, num_chunks=1), SingleShift(L, T), Mix(L, T, SingleShift(L, T)),
]  # fmt: skip


@pytest.mark.parametrize("objective", [SelfDistill(), LongShort()], ids=["self_distill", "long_short"])
def test_objectives_of_two_views_need_a_sampler_that_skips(objective):
    for sampler in SAMPLERS:
        objective.check(sampler, LAYERS)
        LanguageModel().check(sampler, LAYERS)
    for sampler in WITHOUT:
        LanguageModel().check(sampler, LAYERS)
        with pytest.raises(ConfigError, match=r"choose a sampler with skips, or objective=lm"):
            objective.check(sampler, LAYERS)
        SelfDistill(0).check(sampler, LAYERS)  # has one view
    assert (SelfDistill(0).num_views, SelfDistill(0.1).num_views, LongShort().num_views) == (1, 2, 2)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SelfDistill(-1), "objective.weight=-1"),
        (lambda: SelfDistill("a"), "objective.weight='a'"),
        (lambda: LongShort(short_weight=-0.1), "objective.short_weight=-0.1"),
        (lambda: LongShort(lm_weight=0, short_weight=0, skipped_weight=0), "skipped_weight are all 0"),
        (lambda: LongShort(layers=[]), r"objective.layers=\[\]"),
        (lambda: LongShort(layers="12"), "objective.layers='12'"),
        (lambda: LongShort(layers=[0, 1]), "objective.layers=0"),
        (lambda: LongShort(layers=[2, 2]), r"objective.layers=\[2, 2\] names a layer twice"),
        (lambda: LongShort(layers=[2, 5]).check(PoSE(L, T), LAYERS), "this model has 4 layers"),
    ],
)
def test_what_is_not_accepted_is_named(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_layers_are_spread_over_the_depth():
    assert LongShort().layers_of(32) == [1, 8, 16, 24, 32]
    assert LongShort().layers_of(1) == [1] and LongShort().layers_of(2) == [1, 2]
    assert replace(LongShort(), layers=[9, 3]).layers_of(32) == [3, 9]


@pytest.mark.parametrize("objective", [SelfDistill(), LongShort()], ids=["self_distill", "long_short"])
@pytest.mark.parametrize("first_skip", [1, 128])
def test_half_as_many_examples_of_two_views_hold_about_as_much_for_the_backward_pass(objective, first_skip):
    """In bytes of activations, at the widest second view and at the mean one: a micro-batch counts both views."""
    length, num = 256, 4
    config = LlamaConfig(**SHAPE | {"max_position_embeddings": length, "hidden_size": 64, "intermediate_size": 160})
    teacher = Teacher(model_of(config).eval().requires_grad_(False))
    scale_config(trained := copy.deepcopy(config), Yarn(), 4 * length)
    model = model_of(trained)
    ids = torch.arange(length)
    items = [
        {"input_ids": tokens, "labels": tokens, "position_ids": torch.where(ids < first_skip, ids, ids + 3 * length)}
        for tokens in torch.randint(VOCAB, (num, length), generator=torch.Generator().manual_seed(0))
    ]

    def held(objective, items):
        found = {}

        def note(tensor):
            found[tensor.untyped_storage().data_ptr()] = tensor  # kept, or another one would get its place
            return tensor

        own = {parameter.untyped_storage().data_ptr() for parameter in (*model.parameters(), *model.buffers())}
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            objective.losses(model, objective.collate(items), teacher)
        return sum(t.untyped_storage().nbytes() for place, t in found.items() if place not in own)

    of_lm = held(LanguageModel(), items)
    assert held(objective, items[: num // 2]) <= 1.2 * of_lm < 1.5 * of_lm < held(objective, items)


@pytest.mark.nightly
@pytest.mark.parametrize("part", ["tiny", "llama"])
def test_a_step_of_two_views_takes_at_most_1_3_times_the_memory_of_lm(part):
    """The widest of 101 drawn steps, with weights, gradients and AdamW's states, as torch's allocator gave it."""
    taken = {}
    for name in OBJECTIVES:
        steps = Steps(part, name, None, "32-true")
        steps()  # the optimizer's states
        taken[name] = cpu_peak(steps)
        taken[f"{name} with states"] = taken[name] + steps.states_bytes
    for name in ("self_distill", "long_short"):
        assert taken[name] <= 1.3 * taken["lm"], name
        assert taken[f"{name} with states"] <= 1.3 * taken["lm with states"], name


def test_steps_of_the_benchmark_can_recompute_activations():
    def peak(checkpointing):
        steps = Steps("tiny", "lm", None, "32-true", 4, checkpointing=checkpointing)
        steps()
        return cpu_peak(steps)

    assert peak(True) < 0.8 * peak(False)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_logits_of_two_views_exist_for_half_as_many_tokens(objective, monkeypatch):
    shapes, honest = [], F.linear

    def linear(states, weight, bias=None):
        shapes.extend([states.shape[-2]] if len(weight) == VOCAB else [])
        return honest(states, weight, bias)

    length = 1200
    config = LlamaConfig(**SHAPE | {"max_position_embeddings": length})
    teacher = Teacher(model_of(config).eval().requires_grad_(False))
    scale_config(trained := copy.deepcopy(config), Yarn(), 4 * length)
    ids = torch.arange(length)
    item = {"input_ids": ids % VOCAB, "labels": ids % VOCAB, "position_ids": torch.where(ids < 50, ids, ids + length)}
    monkeypatch.setattr(F, "linear", linear)
    objective.losses(model_of(trained), objective.collate([item]), teacher)
    assert max(shapes) == (CHUNK_LEN if objective.name == "lm" else CHUNK_LEN_OF_VIEWS)
    assert CHUNK_LEN_OF_VIEWS == CHUNK_LEN / 2
