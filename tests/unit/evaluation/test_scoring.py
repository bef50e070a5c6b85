"""The scorer against stock transformers with full logits, in one pass and in chunks."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DynamicCache,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
)

from pose.evaluation.scoring import CHUNK_LEN, Scorer, peak_memory_gib
from pose.modeling import attention
from pose.modeling.layers import cache_width
from pose.modeling.load import build_model, scale_config
from pose.modeling.long import feed_forward_in_chunks, takes_cache
from pose.modeling.loss import token_nll
from pose.modeling.prefix import PrefixCache, can_share, groups_that_share
from pose.rope import Dynamic, Yarn

VOCAB = 97
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
CONFIGS = {
    "gqa": lambda: LlamaConfig(num_key_value_heads=2, **SIZES),
    "mqa, biases": lambda: Qwen2Config(num_key_value_heads=1, **SIZES),
    "gqa, yarn": lambda: scaled(LlamaConfig(num_key_value_heads=2, **SIZES), Yarn()),
    "sliding window": lambda: MistralConfig(num_key_value_heads=2, sliding_window=9, **SIZES),
    "mha": lambda: LlamaConfig(num_key_value_heads=4, **SIZES),
    "mha, parallel": lambda: GPTNeoXConfig(**SIZES),
    "experts": lambda: MixtralConfig(num_key_value_heads=4, num_local_experts=4, **SIZES),
    "gqa, many layers": lambda: LlamaConfig(num_key_value_heads=2, **SIZES | {"num_hidden_layers": 8}),
    "gqa, dynamic": lambda: scaled(LlamaConfig(num_key_value_heads=2, **SIZES), Dynamic()),
}
PREFILLED = {"gqa", "mqa, biases", "gqa, yarn", "sliding window"}


def scaled(config, scaling):
    config.max_position_embeddings = 32
    scale_config(config, scaling, 128)
    return config


@functools.cache
def models(kind):
    """A model of ours, and the same weights as stock transformers runs them, in float64."""
    torch.manual_seed(0)
    model = build_model(CONFIGS[kind](), None, "sdpa")
    stock = AutoModelForCausalLM.from_config(model.config, attn_implementation="eager")
    stock.load_state_dict(model.state_dict())
    return model, (stock if kind == "experts" else stock.double()).eval()  # transformers has no float64 for experts


@pytest.fixture
def windows():
    return np.random.default_rng(0).integers(0, VOCAB, (3, 45)).astype(np.uint16)


def stock_logits(stock, windows):
    with torch.no_grad():
        return stock(input_ids=torch.from_numpy(windows.astype(np.int64)), use_cache=False).logits


def stock_losses(logits, windows):
    """Of every token after the first, [B, N - 1]."""
    targets = torch.from_numpy(windows.astype(np.int64))[:, 1:, None]
    return -logits[:, :-1].log_softmax(-1).gather(2, targets)[..., 0].numpy()


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("chunk_len", [None, 7, 15, 44, 45])
def test_losses_and_predictions_are_the_stock_models(kind, windows, chunk_len):
    """Values and types, of the last tokens of each window of a batch; where a chunk ends does not matter."""
    model, stock = models(kind)
    logits = stock_logits(stock, windows)
    losses = stock_losses(logits, windows)
    scorer = Scorer(model, 1000)
    if chunk_len is not None:
        scorer.chunk_len = chunk_len
    for num in (1, 2, 7, 31, 44):
        nll = scorer.nll(windows, num)
        assert nll.dtype == np.float64
        np.testing.assert_allclose(nll, losses[:, -num:], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(nll.sum(), losses[:, -num:].sum(), rtol=1e-5)
        assert np.array_equal(scorer.predictions(windows, num), logits[:, -num:].argmax(-1).numpy())
    places = np.array([1, 2, 20, 21, 22, 44])
    np.testing.assert_allclose(scorer.nll(windows, places), losses[:, places - 1], rtol=1e-4, atol=1e-5)
    assert np.array_equal(scorer.predictions(windows, 45), logits.argmax(-1).numpy())


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_a_long_window_holds_at_one_time(monkeypatch, kind, windows):
    """No layer's feed-forward part and no output layer sees more than a chunk; the others stay whole."""
    model, _ = models(kind)
    scorer = Scorer(model, 1)
    scorer.chunk_len = 8
    seen = {"mlp": 0, "base": 0, "head": 0}

    def note(name):
        def hook(module, args, kwargs):
            x = args[0] if args else kwargs["input_ids"]
            seen[name] = max(seen[name], x.shape[-2 if x.is_floating_point() else -1])

        return hook

    inner = [m for name, m in model.named_modules() if name.endswith(("down_proj", "dense_4h_to_h"))]
    hooks = [m.register_forward_pre_hook(note("mlp"), with_kwargs=True) for m in inner]
    hooks.append(model.base_model.register_forward_pre_hook(note("base"), with_kwargs=True))
    hooks.append(scorer.head.register_forward_pre_hook(note("head"), with_kwargs=True))
    monkeypatch.setattr("pose.evaluation.scoring.token_nll", functools.partial(token_nll, chunk_len=8))
    try:
        scorer.nll(windows[:1], 44)
    finally:
        for hook in hooks:
            hook.remove()
    assert takes_cache(model.config) == (kind in PREFILLED)
    assert seen["base"] == (8 if kind in PREFILLED else 45)
    assert seen["mlp"] <= 8 and (inner or kind == "experts")
    assert seen["head"] == 8


def test_modules_are_as_before_after_a_long_window(windows):
    model, _ = models("mha")
    with pytest.raises(RuntimeError, match="stopped"), feed_forward_in_chunks(model, 4):
        assert any("forward" in vars(module) for module in model.modules())
        raise RuntimeError("stopped")
    assert not any("forward" in vars(module) for name, module in model.named_modules() if name.endswith("mlp"))


def test_windows_that_fit_into_one_pass_are_not_cut(monkeypatch, windows):
    """batch_tokens is what a pass may hold; below CHUNK_LEN tokens no window is cut."""
    model, _ = models("gqa")
    assert Scorer(model, 1).chunk_len == CHUNK_LEN
    assert Scorer(model, 10**6).chunk_len == 10**6
    monkeypatch.setattr("pose.modeling.long.DynamicCache", lambda **_: pytest.fail("a cache was made"))
    Scorer(model, 1).nll(windows[:1], 3)


@pytest.mark.parametrize("queries", [1, 4, 16])
def test_masks_of_some_queries_at_a_time(monkeypatch, windows, queries):
    """Long chunks attend in blocks of queries."""
    for kind in PREFILLED:
        model, stock = models(kind)
        monkeypatch.setattr(attention, "MASK_QUERIES", queries)
        scorer = Scorer(model, 1)
        scorer.chunk_len = 13
        losses = stock_losses(stock_logits(stock, windows), windows)
        np.testing.assert_allclose(scorer.nll(windows, 44), losses, rtol=1e-4, atol=1e-5)


@given(num=st.integers(0, 20), length=st.integers(1, 9), batch_tokens=st.integers(1, 40))
def test_batches_are_as_full_as_allowed_and_in_order(num, length, batch_tokens):
    windows = [np.arange(length) + 100 * i for i in range(num)]
    batches = list(Scorer.batches(_Limit(batch_tokens), iter(windows)))
    assert all(batch.size <= batch_tokens or len(batch) == 1 for batch in batches)
    assert all((len(batch) + 1) * length > batch_tokens for batch in batches[:-1])
    joined = np.concatenate(batches) if batches else np.empty((0, length))
    assert np.array_equal(joined, np.array(windows).reshape(num, length))


class _Limit:
    """What `Scorer.batches` needs to know of a scorer."""

    def __init__(self, batch_tokens: int):
        self.batch_tokens = batch_tokens


def test_scorer_turns_dropout_off(windows):
    torch.manual_seed(0)
    model = build_model(LlamaConfig(**SIZES, attention_dropout=0.5), None, "sdpa").train()
    scorer = Scorer(model, 1000)
    assert np.array_equal(scorer.nll(windows, 20), scorer.nll(windows, 20))


@pytest.mark.skipif(torch.cuda.is_available(), reason="of the GPU, where one is used")
def test_peak_memory_counts_what_was_held_and_let_go():
    lines = Path("/proc/self/status").read_text().splitlines()
    held = int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 2**20
    block = np.ones(2**26)  # half a GiB
    del block
    assert held + 0.45 < peak_memory_gib(torch.device("cpu")) < held + 20


def prompts_like(kind, rng, num=7, length=45):
    """Windows that share beginnings of several lengths, or none, or all but a token."""
    windows = rng.integers(0, VOCAB, (num, length))
    for i in range(num):
        share = {"chain": 6 * i, "none": 0, "twins": length, "all but one": length - 1, "star": 30}[kind]
        windows[i, :share] = windows[0, :share]
    return windows[rng.permutation(num)]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("alike", ["chain", "none", "twins", "all but one", "star"])
@pytest.mark.parametrize("batch_tokens", [1, 100, 1000])
def test_predictions_of_windows_that_begin_alike(kind, alike, batch_tokens):
    """In any order, in batches or alone, with the common beginning in chunks."""
    model, stock = models(kind)
    windows = prompts_like(alike, np.random.default_rng(1))
    logits = stock_logits(stock, windows)
    predicted, losses = logits.argmax(-1).numpy(), stock_losses(logits, windows)
    passed = []
    hook = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: passed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    scorer = Scorer(model, batch_tokens)
    scorer.chunk_len = 45 if kind not in PREFILLED - {"sliding window"} else 13
    try:
        for num in (1, 5, 45):
            passed.clear()
            assert np.array_equal(scorer.predictions(windows, num), predicted[:, -num:])
            if num < 45 and kind not in ("sliding window", "gqa, dynamic") and batch_tokens == 1:
                beginnings = {tuple(row[:n]) for row in windows for n in range(1, 46 - num)}
                shared = len(beginnings) + num * len(windows)
                assert sum(passed) == (shared if shared <= 0.8 * windows.size else windows.size)
            if num == 45 or kind in ("sliding window", "gqa, dynamic"):
                assert sum(passed) == windows.size
            if num < 45:
                passed.clear()
                nll = scorer.ending_nll(windows, num)
                np.testing.assert_allclose(nll, losses[:, -num:], rtol=1e-4, atol=1e-4)
                assert nll.dtype == np.float64
                if (
                    batch_tokens == 1
                    and num == 1
                    and alike == "star"
                    and kind not in ("sliding window", "gqa, dynamic")
                ):
                    assert sum(passed) < 0.8 * windows.size, "common beginnings go through once"
    finally:
        hook.remove()


def test_on_a_gpu_a_cache_may_take_a_third_of_what_is_free(monkeypatch):
    model, _ = models("mha")
    need = 2 * 2 * 32 * 4 * 45  # keys and values, layers, sizes, bytes
    monkeypatch.setattr("pose.modeling.prefix.MAX_BYTES", need - 1)
    assert not can_share(model, 45)
    monkeypatch.setattr(type(model), "device", torch.device("cuda", 0))
    for free, fits in ((3 * need, True), (3 * need - 3, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10 * need))
        assert can_share(model, 45) is fits
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for processes, fits in ((1, True), (2, False)):  # these decide alike, however much each has free
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda processes=processes: processes)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * need, 10 * need))
        assert can_share(model, 45) is fits


def test_prefixes_are_not_shared_where_their_cache_is_too_large(monkeypatch):
    model, _ = models("mha")
    assert can_share(model, 45)
    monkeypatch.setattr("pose.modeling.prefix.MAX_BYTES", 2 * 2 * 32 * 4 * 45)  # keys and values, layers, sizes, bytes
    assert can_share(model, 45) and not can_share(model, 46)
    windows = prompts_like("star", np.random.default_rng(1))
    passed = []
    hook = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: passed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    try:
        for batch_tokens, shared in ((45, True), (89, True), (90, False)):  # 1, 1 and 2 windows in a batch
            passed.clear()
            Scorer(model, batch_tokens).predictions(windows, 3)
            assert (sum(passed) < windows.size) is shared
    finally:
        hook.remove()


def test_a_common_beginning_goes_through_the_model_in_chunks():
    model, _ = models("gqa")
    passed = []
    hook = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: passed.append(tuple(kwargs["position_ids"][0, [0, -1]].tolist())), with_kwargs=True
    )
    scorer = Scorer(model, 1)
    scorer.chunk_len = 13
    try:
        scorer.predictions(prompts_like("star", np.random.default_rng(1)), 3)
    finally:
        hook.remove()
    assert passed[:5] == [(0, 12), (13, 25), (26, 38), (39, 41), (42, 44)]
    assert max(last - first for first, last in passed) < 13


@pytest.mark.parametrize("size", [1, 2])
def test_beginnings_are_shared_where_that_leaves_four_fifths_of_the_tokens(size):
    for alike, worth in ((0, False), (3, False), (4, True), (9, True)):
        windows = np.arange(20).reshape(2, 10)
        windows[:, :alike] = 0
        assert (groups_that_share(windows, size, 1) is not None) is worth


def test_a_cache_is_as_wide_as_its_heads():
    config = LlamaConfig(num_key_value_heads=2, head_dim=24, **SIZES)
    assert cache_width(config) == 2 * 2 * 2 * 24 and takes_cache(config)
    assert cache_width(CONFIGS["gqa"]()) == 2 * 2 * 2 * 8 and cache_width(CONFIGS["mha, parallel"]()) == 2 * 2 * 32
    latent = DeepseekV3Config(kv_lora_rank=12, qk_rope_head_dim=8, q_lora_rank=8, **SIZES)
    cache = build_model(latent, None, "sdpa")(torch.arange(3)[None], use_cache=True).past_key_values
    assert cache_width(latent) == sum(x.numel() for layer in cache.layers for x in (layer.keys, layer.values)) / 3
    config.head_dim = 32  # 2 * 2 * 2 * 32 = 8 * 32: no longer the smaller part
    assert not takes_cache(config)


def test_a_sliding_window_needs_no_longer_cache(monkeypatch, windows):
    model, _ = models("sliding window")
    caches = []

    def cache(**options):
        caches.append(DynamicCache(**options))
        return caches[-1]

    monkeypatch.setattr("pose.modeling.long.DynamicCache", cache)
    scorer = Scorer(model, 1)
    scorer.chunk_len = 7
    scorer.nll(windows[:1], 44)
    assert [layer.keys.shape[2] for layer in caches[0].layers] == [8, 8]


def test_batches_are_smaller_on_a_cpu(windows):
    model, _ = models("mha")
    assert Scorer(model).batch_tokens == 1024 and Scorer(model, 7).batch_tokens == 7


def test_a_group_that_shares_nothing_after_one_that_does():
    model, _ = models("gqa")
    rng = np.random.default_rng(0)
    first, second = rng.integers(VOCAB, size=(2, 20)), rng.integers(VOCAB, size=(2, 20))
    first[1, :12] = first[0, :12]
    second[:, 0] = [first[0, 0] + 1, first[0, 0] + 2]
    prefix = PrefixCache(model, 7)
    with torch.no_grad():
        prefix.states(first, 4)
        assert len(prefix.tokens) == 12
        got = prefix.states(second, 4)
        expected = PrefixCache(model, 7).states(second, 4)
    torch.testing.assert_close(got, expected)
