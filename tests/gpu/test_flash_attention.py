"""FlashAttention, on a GPU that has it: equal to sdpa, and blind to position ids."""

import pytest
import torch
from transformers import LlamaConfig, MistralConfig

from pose.modeling import attention
from pose.modeling.guards import run_guards
from pose.modeling.load import build_model, rope_geometry, scale_config
from pose.rope import Linear

INSTALLED = [name for name in attention.FLASH if attention.can_run(name)]
pytestmark = pytest.mark.skipif(not INSTALLED, reason="needs a GPU and the package flash-attn or flash_attn_3")
SIZES = {
    "vocab_size": 101,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}
CONFIGS = {
    "mha": (LlamaConfig, {"num_key_value_heads": 4}),
    "gqa": (LlamaConfig, {"num_key_value_heads": 2}),
    "sliding": (MistralConfig, {"num_key_value_heads": 2, "sliding_window": 48}),
}


def random_qkv(num_query, num_key, num_kv_heads, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = (4, num_query), (num_kv_heads, num_key), (num_kv_heads, num_key)
    return [torch.randn(2, heads, length, 64, generator=generator).to("cuda", dtype) for heads, length in shapes]


@pytest.fixture(params=INSTALLED)
def backend(request):
    return request.param


@pytest.fixture(params=CONFIGS)
def model(request, backend):
    cls, options = CONFIGS[request.param]
    torch.manual_seed(0)
    return build_model(cls(**SIZES | options), None, backend).cuda().eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize(("num_query", "num_key"), [(100, 100), (37, 100), (1, 100)])
def test_equals_eager_in_fp32(backend, dtype, num_kv_heads, window, num_query, num_key):
    qkv = random_qkv(num_query, num_key, num_kv_heads, dtype)
    got, _ = getattr(attention, backend)(None, *qkv, None, scaling=0.2, sliding_window=window)
    exact = [x.float() for x in qkv]
    wanted, _ = attention.eager(torch.nn.Module().eval(), *exact, None, scaling=0.2, sliding_window=window)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), wanted, atol=0.02, rtol=0.02)


def test_fp32_inputs_under_autocast(backend):
    """RoPE leaves queries and keys in fp32 there; the kernel takes the dtype of autocast."""
    for dtype in (torch.bfloat16, torch.float16):
        query, key, value = random_qkv(32, 32, 2, torch.float32)
        with torch.autocast("cuda", dtype):
            output, _ = getattr(attention, backend)(None, query, key, value.to(dtype), None, scaling=0.2)
        assert output.dtype == dtype


@torch.no_grad()
def test_fp32_goes_to_sdpa(model, backend):
    """As a model is measured, and its export compared: outside autocast, with the package installed."""
    tokens = torch.randint(SIZES["vocab_size"], (2, 96), generator=torch.Generator().manual_seed(0)).cuda()
    logits = []
    for name in (backend, "sdpa"):
        model.set_attn_implementation(attention.resolve_backend(name))
        logits.append(model(input_ids=tokens, use_cache=False).logits)
    assert logits[0].dtype == torch.float32 and torch.equal(*logits)


def test_auto_is_flash_attention():
    assert attention.resolve_backend("auto") == attention.resolve_backend(INSTALLED[0])


@pytest.mark.parametrize("precision", ["bf16 weights", "bf16 autocast"])
def test_guards_pass(precision, backend):
    config = LlamaConfig(num_key_value_heads=2, **SIZES)
    geometry = rope_geometry(config)
    expected = scale_config(config, Linear(), 2048).frequencies(geometry)
    model = build_model(config, None, backend).cuda()
    if precision == "bf16 weights":
        model.to(torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16 autocast"):
        run_guards(model, expected, 2048, "cuda")


@pytest.mark.parametrize("rows", [1, 2])
@torch.no_grad()
def test_logits_and_skips_equal_sdpa(model, backend, rows):
    """Positions that skip ahead and jump back to 0 change nothing in who sees whom."""
    model.to(torch.bfloat16)
    tokens = torch.randint(SIZES["vocab_size"], (rows, 96), generator=torch.Generator().manual_seed(0)).cuda()
    positions = torch.cat([torch.arange(32), torch.arange(150, 182), torch.arange(32)]).expand(rows, -1).cuda()
    logits = []
    for name in (backend, "sdpa"):
        model.set_attn_implementation(attention.resolve_backend(name))
        logits.append(model(input_ids=tokens, position_ids=positions, use_cache=False).logits.float())
    assert (logits[0] - logits[1]).abs().max() < 0.15 * logits[1].std()


@torch.no_grad()
def test_prefill_in_chunks_and_decoding_equal_one_forward(model):
    model.to(torch.bfloat16)
    tokens = torch.randint(SIZES["vocab_size"], (2, 96), generator=torch.Generator().manual_seed(0)).cuda()
    whole = model(input_ids=tokens, use_cache=False).logits.float()
    cache, parts = None, []
    for chunk in tokens.split((64, 30, 1, 1), dim=1):
        output = model(input_ids=chunk, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits.float())
    assert (torch.cat(parts, 1) - whole).abs().max() < 0.15 * whole.std()


def test_gradients_equal_sdpa(model, backend):
    """Under bf16 autocast with fp32 weights, as in training."""
    tokens = torch.randint(SIZES["vocab_size"], (2, 96), generator=torch.Generator().manual_seed(0)).cuda()
    positions = torch.cat([torch.arange(48), torch.arange(150, 198)]).expand(2, -1).cuda()
    gradients = []
    for name in (backend, "sdpa"):
        model.set_attn_implementation(attention.resolve_backend(name))
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=tokens, position_ids=positions, labels=tokens, use_cache=False).loss
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (gradients[0] - gradients[1]).norm() < 0.05 * gradients[1].norm()
