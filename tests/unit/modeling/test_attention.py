"""The attention backends against a reference written out query by query, and against stock transformers."""

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pose.errors import ConfigError
from pose.modeling import attention
from pose.modeling.load import build_model

FUNCTIONS = {"sdpa": attention.sdpa, "eager": attention.eager}
SIZES = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # large enough for attention to matter
}
CONFIGS = {
    "mha": LlamaConfig(num_key_value_heads=4, **SIZES),
    "gqa": LlamaConfig(num_key_value_heads=2, **SIZES),
    "sliding": MistralConfig(num_key_value_heads=2, sliding_window=6, **SIZES),
    "biases": Qwen2Config(num_key_value_heads=2, **SIZES),
}


def reference(query, key, value, scaling, window=None):
    """Attention of one query at a time in float64; queries are the last of the keys. [B, Q, H, D]."""
    (num_batch, num_heads, num_query, _), num_key = query.shape, key.shape[2]
    groups = num_heads // key.shape[1]
    output = torch.zeros(num_batch, num_query, num_heads, value.shape[-1], dtype=torch.float64)
    for b in range(num_batch):
        for h in range(num_heads):
            for i in range(num_query):
                last = num_key - num_query + i
                seen = [j for j in range(last + 1) if window is None or last - j < window]
                k, v = key[b, h // groups, seen].double(), value[b, h // groups, seen].double()
                output[b, i, h] = (k @ query[b, h, i].double() * scaling).softmax(0) @ v
    return output


def random_qkv(num_query, num_key, num_heads=4, num_kv_heads=4, head_dim=8, num_batch=2):
    generator = torch.Generator().manual_seed(0)
    shapes = (num_heads, num_query), (num_kv_heads, num_key), (num_kv_heads, num_key)
    return [torch.randn(num_batch, heads, length, head_dim, generator=generator) for heads, length in shapes]


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    built = {name: build_model(copy.deepcopy(config), None, "sdpa").eval() for name, config in CONFIGS.items()}
    for name, parameter in built["biases"].named_parameters():
        if name.endswith("proj.bias"):
            torch.nn.init.normal_(parameter)  # zero at the start
    return built


@pytest.fixture
def tokens():
    return torch.randint(SIZES["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("backend", FUNCTIONS)
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize(("num_query", "num_key"), [(9, 9), (4, 9), (1, 9), (1, 1)])
def test_equals_the_reference(backend, num_kv_heads, window, num_query, num_key):
    query, key, value = random_qkv(num_query, num_key, num_kv_heads=num_kv_heads)
    module = torch.nn.Module().eval()
    output, _ = FUNCTIONS[backend](module, query, key, value, None, scaling=0.3, sliding_window=window)
    torch.testing.assert_close(
        output.double(), reference(query, key, value, 0.3, window), atol=1e-5, rtol=1e-5, check_stride=False
    )


@pytest.mark.parametrize("queries", [1, 3, 4, 100])
@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize(("num_query", "num_key"), [(9, 9), (7, 9), (2, 9)])
@pytest.mark.parametrize("grouped", [True, False], ids=["kernel groups heads", "heads repeated"])
def test_masks_of_some_queries_at_a_time(monkeypatch, queries, window, num_query, num_key, grouped):
    """No mask has more queries, nor keys that none of them sees; what a kernel cannot group comes repeated."""
    shapes = []

    def watched(query, key, value, attn_mask=None, **kwargs):
        assert kwargs["enable_gqa"] == grouped and (grouped or key.shape[1] == 4)
        if attn_mask is not None:
            shapes.append(attn_mask.shape)
            assert attn_mask.any(0).all() and attn_mask.any(1).all()
        return kernel(query, key, value, attn_mask=attn_mask, **kwargs)

    kernel = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    monkeypatch.setattr(attention, "MASK_QUERIES", queries)
    monkeypatch.setattr(attention, "_kernel_groups_heads", lambda *_: grouped)
    query, key, value = random_qkv(num_query, num_key, num_kv_heads=2)
    output, _ = attention.sdpa(torch.nn.Module().eval(), query, key, value, None, scaling=0.3, sliding_window=window)
    assert output.is_contiguous()
    torch.testing.assert_close(output.double(), reference(query, key, value, 0.3, window), atol=1e-5, rtol=1e-5)
    assert len(shapes) == (0 if window is None and num_query == num_key else -(-num_query // queries))
    assert all(shape[0] <= queries for shape in shapes)


@pytest.mark.parametrize(
    ("device", "dtype", "masked", "grouped"),
    [
        ("cpu", torch.float32, True, True),
        ("cpu", torch.bfloat16, False, True),
        ("meta", torch.bfloat16, False, True),
        ("meta", torch.float16, True, False),
        ("meta", torch.float32, False, False),
    ],
)
def test_which_kernels_take_fewer_key_value_heads(device, dtype, masked, grouped):
    """Meta stands in for a GPU."""
    assert attention._kernel_groups_heads(torch.empty(1, 4, 2, 8, device=device, dtype=dtype), masked) is grouped


def test_eager_returns_its_weights():
    query, key, value = random_qkv(4, 9)
    output, weights = attention.eager(torch.nn.Module().eval(), query, key, value, None)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 4))
    torch.testing.assert_close((weights @ value).transpose(1, 2), output)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("backend", FUNCTIONS)
@torch.no_grad()
def test_logits_equal_stock_transformers(models, tokens, name, backend):
    """Stock sdpa with an explicit mask and plain positions, where it does what it should."""
    model, stock = models[name], copy.deepcopy(models[name])
    model.set_attn_implementation(f"pose_{backend}")
    stock.set_attn_implementation("sdpa")
    wanted = stock(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits
    torch.testing.assert_close(model(input_ids=tokens, use_cache=False).logits, wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_sliding_window_of_the_config_reaches_attention(models, tokens):
    """Two layers of window 6 look back 10 tokens at most."""
    logits = models["sliding"](input_ids=tokens, use_cache=False).logits
    changed = tokens.clone()
    changed[:, 0] = (changed[:, 0] + 1) % SIZES["vocab_size"]
    moved = (models["sliding"](input_ids=changed, use_cache=False).logits != logits).any(-1).any(0)
    assert moved[:11].all()
    assert not moved[11:].any()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("backend", FUNCTIONS)
@pytest.mark.parametrize("chunks", [(16, 8), (3, 21), (22, 1, 1)])
@torch.no_grad()
def test_prefill_in_chunks_and_decoding_equal_one_forward(models, tokens, name, backend, chunks):
    model = models[name]
    model.set_attn_implementation(f"pose_{backend}")
    whole = model(input_ids=tokens, use_cache=False).logits
    cache, parts = None, []
    for chunk in tokens.split(chunks, dim=1):
        output = model(input_ids=chunk, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", FUNCTIONS)
@torch.no_grad()
def test_greedy_generation_equals_stock_transformers(models, tokens, backend):
    model, stock = models["gqa"], copy.deepcopy(models["gqa"])
    model.set_attn_implementation(f"pose_{backend}")
    stock.set_attn_implementation("sdpa")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    got, wanted = (m.generate(tokens, attention_mask=torch.ones_like(tokens), **options) for m in (model, stock))
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", ["mha", "gqa", "biases"])
@pytest.mark.parametrize("backend", FUNCTIONS)
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16 weights", "bf16 autocast"])
@torch.no_grad()
def test_skipped_positions_are_no_document_border(models, tokens, name, backend, rows, precision):
    """The first token moves the logits of the last, across two skips, one of them back to 0."""
    model = models[name]
    if precision == "bf16 weights":
        model = copy.deepcopy(model).to(torch.bfloat16)
    model.set_attn_implementation(f"pose_{backend}")
    positions = torch.cat([torch.arange(8), torch.arange(100, 108), torch.arange(8)]).expand(rows, -1)
    changed = tokens.clone()
    changed[:, 0] = (changed[:, 0] + 1) % SIZES["vocab_size"]
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16 autocast"):
        logits = [
            model(input_ids=ids[:rows], position_ids=positions, use_cache=False).logits for ids in (tokens, changed)
        ]
    moved = (logits[0][:, -1] - logits[1][:, -1]).abs().amax(-1)
    assert (moved > 0.01 * logits[0].float().std()).all()


@pytest.mark.parametrize("backend", FUNCTIONS)
def test_skipped_positions_pass_gradients(models, tokens, backend):
    """Training sees across the skip too: the last token's loss has a gradient at the first."""
    model = copy.deepcopy(models["gqa"]).train()
    model.set_attn_implementation(f"pose_{backend}")
    embeddings = model.get_input_embeddings()(tokens[:1]).detach().requires_grad_()
    positions = torch.cat([torch.arange(8), torch.arange(200, 216)])[None]
    model(inputs_embeds=embeddings, position_ids=positions, use_cache=False).logits[0, -1].logsumexp(-1).backward()
    assert embeddings.grad[0, 0].abs().max() > 1e-6


@pytest.mark.parametrize("backend", FUNCTIONS)
@torch.no_grad()
def test_padding_is_refused(models, tokens, backend):
    """transformers drops the mask of a backend without a mask function, so it would be ignored."""
    model = models["gqa"]
    model.set_attn_implementation(f"pose_{backend}")
    mask = torch.ones_like(tokens)
    model(input_ids=tokens, attention_mask=mask)
    mask[1, :5] = 0
    for call in (model, model.base_model, copy.deepcopy(model)):
        with pytest.raises(ValueError, match="padding"):
            call(input_ids=tokens, attention_mask=mask)


def fake_flash_attn(query, key, value, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)):
    """flash_attn_func by its documentation: [B, S, H, D], causal from the bottom right, keys i-left..i+right."""
    assert query.dtype in (torch.float16, torch.bfloat16)
    assert query.dtype == key.dtype == value.dtype
    assert causal
    assert dropout_p == 0.0
    left, right = window_size
    assert right in (-1, 0)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return reference(q, k, v, softmax_scale, None if left == -1 else left + 1).to(query.dtype)


def fake_flash_attn_3(query, key, value, softmax_scale=None, causal=False, window_size=(-1, -1)):
    """flash_attn_func of FlashAttention-3: the same without dropout."""
    return fake_flash_attn(query, key, value, 0.0, softmax_scale, causal, window_size)


@pytest.fixture
def flash_calls(monkeypatch):
    """FlashAttention's packages as if they were there and ran on the CPU; backend and dtype of each call of them."""
    calls = []

    def fake(module, backend, function):
        def flash_attn_func(query, *args, **kwargs):
            calls.append((backend, query.dtype))
            return function(query, *args, **kwargs)

        monkeypatch.setitem(sys.modules, module, SimpleNamespace(flash_attn_func=flash_attn_func))

    fake("flash_attn", "flash_attention_2", fake_flash_attn)
    fake("flash_attn_interface", "flash_attention_3", fake_flash_attn_3)
    monkeypatch.setattr(attention, "FLASH_DEVICES", ("cpu",))
    return calls


@pytest.mark.parametrize("backend", attention.FLASH)
@pytest.mark.parametrize(("num_query", "window"), [(9, None), (9, 3), (4, 3), (1, None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_flash_attention_is_called_with_the_right_arguments(flash_calls, backend, num_query, window, dtype):
    """In half precision; fp32 goes to SDPA, and comes back as fp32."""
    query, key, value = (x.to(dtype) for x in random_qkv(num_query, 9, num_kv_heads=2))
    function = getattr(attention, backend)
    output, _ = function(None, query, key, value, None, scaling=0.3, sliding_window=window)
    assert output.dtype == dtype
    assert flash_calls == ([] if dtype == torch.float32 else [(backend, dtype)])
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(
        output.double(), reference(query, key, value, 0.3, window), atol=tolerance, rtol=tolerance, check_stride=False
    )


@pytest.mark.parametrize("backend", attention.FLASH)
def test_flash_attention_of_narrower_values(monkeypatch, flash_calls, backend):
    """DeepSeek's values have fewer dimensions than its queries, and the kernels take one size."""
    query, key, value = (x.bfloat16() for x in random_qkv(9, 9))
    value = value[..., : value.shape[-1] // 2].contiguous()
    for module in ("flash_attn", "flash_attn_interface"):
        function = sys.modules[module].flash_attn_func

        def strict(q, k, v, *args, function=function, **kwargs):
            assert q.shape[-1] == k.shape[-1] == v.shape[-1]
            return function(q, k, v, *args, **kwargs)

        monkeypatch.setitem(sys.modules, module, SimpleNamespace(flash_attn_func=strict))
    output, _ = getattr(attention, backend)(None, query, key, value, None, scaling=0.3)
    assert flash_calls == [(backend, torch.bfloat16)] and output.shape[-1] == value.shape[-1]
    expected = reference(query, key, value, 0.3)
    torch.testing.assert_close(output.double(), expected, atol=0.03, rtol=0.03, check_stride=False)


def test_flash_attention_3_of_before_gave_log_sums_beside_its_output(monkeypatch, flash_calls):
    def earlier(*args, **kwargs):
        return fake_flash_attn_3(*args, **kwargs), torch.zeros(1)

    monkeypatch.setitem(sys.modules, "flash_attn_interface", SimpleNamespace(flash_attn_func=earlier))
    query, key, value = (x.bfloat16() for x in random_qkv(9, 9))
    output, _ = attention.flash_attention_3(None, query, key, value, None, scaling=0.3)
    torch.testing.assert_close(output.double(), reference(query, key, value, 0.3), atol=0.03, rtol=0.03)


def test_flash_attention_3_has_no_dropout(flash_calls):
    query, key, value = (x.bfloat16() for x in random_qkv(9, 9))
    torch.manual_seed(0)
    output, _ = attention.flash_attention_3(None, query, key, value, None, dropout=0.5, scaling=0.3)
    torch.manual_seed(0)
    assert not flash_calls and torch.equal(output, attention.sdpa(None, query, key, value, None, 0.5, 0.3)[0])
    assert not torch.equal(output, attention.sdpa(None, query, key, value, None, 0.0, 0.3)[0])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("precision", ["fp32", "bf16 weights", "bf16 autocast"])
@pytest.mark.parametrize("backend", attention.BACKENDS)
def test_a_model_in_every_precision_with_every_backend(models, tokens, flash_calls, name, precision, backend):
    """Forward and backward, as training, measuring and the check of an export have it, with flash-attn installed.

    What attention gives has the dtype of the layer that reads it, and what flash-attn does not take goes elsewhere.
    """
    model = copy.deepcopy(models[name]).train()
    model.set_attn_implementation(attention.BACKENDS[backend])
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    if precision == "bf16 weights":
        model.to(dtype)
    seen = set()
    for layer in model.base_model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.add(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16 autocast"):
        logits = model(input_ids=tokens, use_cache=False).logits
    assert logits.dtype == dtype and seen == {dtype}
    assert flash_calls == [(backend, dtype)] * (2 if backend in attention.FLASH and precision != "fp32" else 0)
    logits.float().logsumexp(-1).sum().backward()
    exact = copy.deepcopy(models[name]).train()
    wanted = exact(input_ids=tokens, use_cache=False).logits
    wanted.logsumexp(-1).sum().backward()
    share = 1e-4 if precision == "fp32" else 0.2  # of the size of what is compared
    assert (logits - wanted).abs().max() < share * wanted.std()
    for (key, got), parameter in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert got.grad.dtype == got.dtype
        assert (got.grad - parameter.grad).norm() <= share * parameter.grad.norm() + 1e-4, key


def test_fp32_queries_and_keys_under_autocast_are_grouped_as_half_precision(monkeypatch):
    """RoPE leaves them so: what a kernel takes is asked for the dtype that it computes in."""
    asked = []
    monkeypatch.setattr(attention, "_kernel_groups_heads", lambda query, masked: asked.append(query.dtype) or True)
    query, key, value = random_qkv(9, 9, num_kv_heads=2)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = attention.sdpa(torch.nn.Module(), query, key, value.bfloat16(), None, scaling=0.3)
    assert asked == [torch.bfloat16] and output.dtype == torch.bfloat16


@pytest.mark.parametrize("backend", FUNCTIONS)
@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias"])
def test_what_is_not_implemented_is_refused(backend, name):
    query, key, value = random_qkv(4, 4)
    FUNCTIONS[backend](torch.nn.Module().eval(), query, key, value, None, **{name: None})
    with pytest.raises(ConfigError, match=name):
        FUNCTIONS[backend](torch.nn.Module().eval(), query, key, value, None, **{name: 1.0})


def fake_machine(monkeypatch, packages, gpu):
    """packages: the modules of FlashAttention that are installed. gpu: None, or its compute capability."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name in packages else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: gpu)


FA2, FA3 = "flash_attn", "flash_attn_interface"


@pytest.mark.parametrize("packages", [[], [FA2], [FA3], [FA2, FA3]])
@pytest.mark.parametrize("gpu", [None, (7, 5), (8, 0), (8, 9), (9, 0), (10, 0)])
def test_auto_takes_flash_attention_only_where_it_can_run(monkeypatch, packages, gpu):
    fake_machine(monkeypatch, packages, gpu)
    fast = [name for name, runs in (
        ("flash_attention_3", gpu == (9, 0) and FA3 in packages),
        ("flash_attention_2", gpu is not None and gpu >= (8, 0) and FA2 in packages),
    ) if runs]  # fmt: skip
    names = [attention.resolve_backend(name) for name in fast]
    assert attention.resolve_backend("auto") == (names or ["pose_sdpa"])[0]
    for name, package in (("flash_attention_2", "flash-attn"), ("flash_attention_3", "flash_attn_3")):
        if name not in fast:
            with pytest.raises(ConfigError, match=rf"attention={name} .*{package}.*use sdpa"):
                attention.resolve_backend(name)


def test_every_backend_has_an_identity_of_its_own(monkeypatch):
    """What is measured by one is not taken for another's."""
    fake_machine(monkeypatch, [FA2, FA3], (9, 0))
    assert len({attention.resolve_backend(name) for name in attention.BACKENDS}) == 4


ORDER = [int(kernel) for kernel in attention.KERNELS]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_training_prefers_cudnns_kernel_then_flash(monkeypatch, compiled):
    """Around the training, so that compiled layers hold nothing of it; every kernel may still be taken."""
    monkeypatch.setattr(attention, "FLASH_DEVICES", ("cpu",))
    before, seen = torch._C._get_sdp_priority_order(), []

    def attend(query, key, value):
        return attention.sdpa(None, query, key, value, None, scaling=0.3)[0]

    def note(graph, inputs):
        seen.append(torch._C._get_sdp_priority_order())
        assert not [
            node for node in graph.graph.nodes if "sdp" in str(node.target) and "scaled" not in str(node.target)
        ]
        return graph

    query, key, value = random_qkv(9, 9, num_kv_heads=2)
    function = torch.compile(attend, backend=note, fullgraph=True) if compiled else attend
    with attention.preferred_kernels(torch.device("cpu")):
        inside = torch._C._get_sdp_priority_order()
        output = function(query, key, value)
        enabled = torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()
    assert inside[: len(ORDER)] == ORDER and all(enabled) and seen == [inside] * compiled
    assert torch._C._get_sdp_priority_order() == before
    torch.testing.assert_close(output.double(), reference(query, key, value, 0.3), atol=1e-5, rtol=1e-5)


def test_a_cpu_has_one_kernel():
    before = torch._C._get_sdp_priority_order()
    with attention.preferred_kernels(torch.device("cpu")):
        assert torch._C._get_sdp_priority_order() == before
    assert before[: len(ORDER)] != ORDER


def test_unknown_backend_is_refused():
    with pytest.raises(ConfigError, match=r"attention='flex' .*is unknown.*auto, sdpa, eager, flash_attention_2, .*_3"):
        attention.resolve_backend("flex")


@pytest.mark.parametrize("backend", attention.BACKENDS)
@torch.no_grad()
def test_transformers_takes_every_backend(monkeypatch, flash_calls, tokens, backend):
    """It builds a model with it and computes with our function, with a package that fakes FlashAttention.

    For a name with "flash" in it, transformers would look for a kernel on its hub.
    """
    with monkeypatch.context() as patch:
        fake_machine(patch, [FA2, FA3], (9, 0))
        name = attention.resolve_backend(backend)
    assert ALL_ATTENTION_FUNCTIONS[name] is getattr(attention, backend)
    config = copy.deepcopy(CONFIGS["gqa"])
    model = AutoModelForCausalLM.from_config(config, attn_implementation=name, dtype=torch.bfloat16).eval()
    got = model(input_ids=tokens, use_cache=False).logits.float()
    model.set_attn_implementation("sdpa")
    wanted = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits.float()
    assert (got - wanted).abs().max() < 0.15 * wanted.std()
