"""Causal attention that infers nothing from position ids.

transformers >= 4.53 reads a jump in `position_ids` as the start of another packed document and
hides everything before it. It does so while it builds masks, and builds none for attention
functions that it has no mask function for: so PoSE registers its own, which are causal by *index*.
FlashAttention's wrapper in transformers cuts at position jumps as well, so it is called directly.

One model computes in several precisions: it trains under autocast, and is measured and exported in fp32. So the kernel
follows from the dtype and the device of each call (`compute_dtype`, `flash_kernel`): FlashAttention for half precision
on a GPU, torch's SDPA for all else, which takes its own kernels in the order of `preferred_kernels`.

Shapes: B batch, H query heads, K key-value heads, Q query tokens, T key tokens, D head size.
"""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from functools import wraps
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface

from pose.errors import ConfigError

# By the name it has in configs: the name it is registered under. transformers takes a name with "flash" in it for a
# kernel to fetch from its hub.
BACKENDS = {
    "sdpa": "pose_sdpa",
    "eager": "pose_eager",
    "flash_attention_2": "pose_fa2",
    "flash_attention_3": "pose_fa3",
}
# FlashAttention's packages, the faster first: the module that is imported, what is installed, and the GPUs that it is
# for, by compute capability from and below
FLASH = {
    "flash_attention_3": ("flash_attn_interface", "flash_attn_3, compiled from its sources", (9, 0), (10, 0)),
    "flash_attention_2": ("flash_attn", "flash-attn (docs/HOWTO.md has how to install it)", (8, 0), (99, 0)),
}
FLASH_DEVICES = ("cuda",)
KERNELS = [  # of torch's SDPA, in order
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
]  # fmt: skip
MASK_QUERIES = 256  # queries that share one mask, and see no key after the last of them


class Packing(NamedTuple):
    """How texts that begin alike are one row of tokens to a model, each token of a common beginning once.

    What a layer does to a token by itself (all but attention) is so done once. A model hands this to its attention as
    the keyword `packing`, where it hands keywords on (`pose.modeling.layers.hands_on`).

    Attributes:
        rows: int64 [R, L], the place in the one row, of n tokens, of each token of R texts.
        places: int64 [n], where each token is (first) in the flattened rows: rows.flatten()[places] is 0, 1, ..., n-1.
    """

    rows: torch.Tensor
    places: torch.Tensor


def resolve_backend(name: str) -> str:
    """The name transformers knows a backend by, here.

    Args:
        name: one of BACKENDS, or "auto": flash_attention_3, else flash_attention_2, where it is installed and a GPU
            that it runs on is there, sdpa elsewhere.

    Raises:
        ConfigError: an unknown backend, or FlashAttention without its package or without such a GPU.
    """
    if name == "auto":
        name = next((one for one in FLASH if can_run(one)), "sdpa")
    if name not in BACKENDS:
        raise ConfigError(
            f"attention={name!r} (in train.py model.attention) is unknown: choose auto, {', '.join(BACKENDS)}"
        )
    if name in FLASH and not can_run(name):
        _, package, least, _ = FLASH[name]
        gpu = "Ampere or newer" if least < (9, 0) else "Hopper"
        raise ConfigError(
            f"attention={name} (in train.py model.attention) needs a GPU ({gpu}) and the package {package}: use sdpa "
            "here"
        )
    return BACKENDS[name]


def can_run(name: str) -> bool:
    """Whether a FlashAttention is installed, on a machine with a GPU for it."""
    module, _, least, below = FLASH[name]
    gpu = torch.cuda.is_available() and least <= torch.cuda.get_device_capability() < below
    return gpu and importlib.util.find_spec(module) is not None


@contextlib.contextmanager
def preferred_kernels(device: torch.device) -> Iterator[None]:
    """Around a training: torch's SDPA takes cuDNN's kernel where that applies, else flash's, else one of the others.

    Around all of it and not around each call: what is compiled would carry the order in its graph, and torch's cache
    of graphs keeps none with it (pytorch issue 194007). Outside, torch's own order holds: a cache that grows token by
    token would make cuDNN plan anew for each.

    Args:
        device: that it trains on; a CPU has one kernel.
    """
    with sdpa_kernel(KERNELS, set_priority=True) if device.type in FLASH_DEVICES else contextlib.nullcontext():
        yield


def compute_dtype(value: torch.Tensor) -> torch.dtype:
    """What attention computes in and gives: the dtype of autocast where it is on, else that of the values.

    Values come out of a linear layer as they are. Queries and keys have been through RoPE, which may make them
    fp32 under autocast.
    """
    device = value.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype


def flash_kernel(name: str, dtype: torch.dtype, device: torch.device) -> Callable | None:
    """The function of FlashAttention for tensors of a dtype on a device; None where it takes none and SDPA serves.

    It alone decides that, for every call.

    Args:
        name: one of FLASH.
        dtype, device: of the tensors.
    """
    if dtype not in (torch.float16, torch.bfloat16) or device.type not in FLASH_DEVICES:
        return None
    if name == "flash_attention_3":
        from flash_attn_interface import flash_attn_func
    else:
        from flash_attn import flash_attn_func
    return flash_attn_func


def causal_mask(num_query: int, num_key: int, sliding_window: int | None, device) -> torch.Tensor:
    """Which key each query sees, by index; the queries are the last of the keys. bool [Q, T]."""
    query = torch.arange(num_key - num_query, num_key, device=device)[:, None]
    key = torch.arange(num_key, device=device)
    mask = key <= query
    return mask if sliding_window is None else mask & (key > query - sliding_window)


def _by_packing(attention: Callable) -> Callable:
    """The same attention, which also takes texts that are packed into one row (`Packing`): each attends by itself."""

    @wraps(attention)
    def attend(module, query_BHQD, key_BKTD, value_BKTD, attention_mask, dropout=0.0, scaling=None, **kwargs):
        packing = kwargs.pop("packing", None)
        if packing is None:
            return attention(module, query_BHQD, key_BKTD, value_BKTD, attention_mask, dropout, scaling, **kwargs)
        rows = packing.rows

        def unpacked(x_1HND):  # [R, H, L, D]
            x_HRLD = x_1HND[0].index_select(1, rows.flatten()).unflatten(1, rows.shape)
            return x_HRLD.transpose(0, 1)

        query, key, value = (unpacked(x) for x in (query_BHQD, key_BKTD, value_BKTD))
        output_RLHD, _ = attention(module, query, key, value, None, dropout, scaling, **kwargs)
        return output_RLHD.flatten(0, 1).index_select(0, packing.places)[None], None

    return attend


@_by_packing
def sdpa(module, query_BHQD, key_BKTD, value_BKTD, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """torch's scaled_dot_product_attention; builds masks only where `is_causal` cannot say it, and for some queries
    at a time.

    Args:
        attention_mask: not looked at: transformers hands none to functions it has no mask function for, and
            `pose.modeling.load` refuses padding.

    Returns:
        [B, Q, H, D] of `compute_dtype`, and None, as transformers expects.
    """
    dtype = compute_dtype(value_BKTD)
    query_BHQD, key_BKTD, value_BKTD = (x.to(dtype) for x in (query_BHQD, key_BKTD, value_BKTD))
    num_query, num_key = query_BHQD.shape[2], key_BKTD.shape[2]
    window = _sliding_window(kwargs, num_key)
    masked = window is not None or 1 < num_query < num_key
    if not _kernel_groups_heads(query_BHQD, masked):
        groups = query_BHQD.shape[1] // key_BKTD.shape[1]
        key_BKTD, value_BKTD = key_BKTD.repeat_interleave(groups, 1), value_BKTD.repeat_interleave(groups, 1)

    def attend(query, key, value, **causality):
        grouped = query.shape[1] != key.shape[1]
        options = {"dropout_p": dropout, "scale": scaling, "enable_gqa": grouped}
        return F.scaled_dot_product_attention(query, key, value, **causality, **options).transpose(1, 2)

    if not masked:
        return attend(query_BHQD, key_BKTD, value_BKTD, is_causal=num_query > 1).contiguous(), None
    outputs, end = [], num_key - num_query
    for query in query_BHQD.split(MASK_QUERIES, 2):
        begin, end = end, end + query.shape[2]
        first = 0 if window is None else max(begin - window + 1, 0)
        mask = causal_mask(end - begin, end - first, window, query.device)
        outputs.append(attend(query, key_BKTD[:, :, first:end], value_BKTD[:, :, first:end], attn_mask=mask))
    return torch.cat(outputs, 1), None


def _kernel_groups_heads(query: torch.Tensor, masked: bool) -> bool:
    """Whether a kernel of bounded memory takes fewer key-value heads than query heads.

    That of the CPU does, and on a GPU FlashAttention: in half precision, without a mask.
    """
    return query.device.type == "cpu" or (not masked and query.dtype != torch.float32)


@_by_packing
def eager(module, query_BHQD, key_BKTD, value_BKTD, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """The textbook form, softmax in fp32: for reading and for checking the others.

    Args and Returns: as `sdpa`, with the attention weights [B, H, Q, T] in place of None.
    """
    num_query, num_key = query_BHQD.shape[2], key_BKTD.shape[2]
    mask = causal_mask(num_query, num_key, _sliding_window(kwargs, num_key), query_BHQD.device)
    groups = query_BHQD.shape[1] // key_BKTD.shape[1]
    key_BHTD, value_BHTD = key_BKTD.repeat_interleave(groups, 1), value_BKTD.repeat_interleave(groups, 1)
    scaling = query_BHQD.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query_BHQD @ key_BHTD.transpose(2, 3)) * scaling
    weights = scores.float().masked_fill(~mask, -torch.inf).softmax(-1).to(value_BHTD.dtype)
    weights = F.dropout(weights, dropout, module.training)
    return (weights @ value_BHTD).transpose(1, 2).contiguous(), weights


@_by_packing
def flash_attention_2(module, query_BHQD, key_BKTD, value_BKTD, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """The package flash-attn, called without position ids; `sdpa` where `flash_kernel` has none.

    Args and Returns: as `sdpa`.
    """
    dtype = compute_dtype(value_BKTD)
    kernel = flash_kernel("flash_attention_2", dtype, value_BKTD.device)
    if kernel is None:
        return sdpa(module, query_BHQD, key_BKTD, value_BKTD, attention_mask, dropout, scaling, **kwargs)
    q, k, v, causality = _for_flash(query_BHQD, key_BKTD, value_BKTD, dtype, kwargs)
    return kernel(q, k, v, dropout, softmax_scale=scaling, **causality)[..., : value_BKTD.shape[-1]], None


@_by_packing
def flash_attention_3(module, query_BHQD, key_BKTD, value_BKTD, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """As `flash_attention_2`, by FlashAttention-3, which has no dropout: with one, `sdpa`."""
    dtype = compute_dtype(value_BKTD)
    kernel = None if dropout else flash_kernel("flash_attention_3", dtype, value_BKTD.device)
    if kernel is None:
        return sdpa(module, query_BHQD, key_BKTD, value_BKTD, attention_mask, dropout, scaling, **kwargs)
    q, k, v, causality = _for_flash(query_BHQD, key_BKTD, value_BKTD, dtype, kwargs)
    output = kernel(q, k, v, softmax_scale=scaling, **causality)
    output = output[0] if isinstance(output, tuple) else output  # its first versions gave log-sums beside it
    return output[..., : value_BKTD.shape[-1]], None


def _for_flash(query_BHQD, key_BKTD, value_BKTD, dtype, kwargs):
    """As its kernels take them: queries [B, Q, H, D], keys, values with zeros up to D, and who sees whom."""
    window = _sliding_window(kwargs, key_BKTD.shape[2])
    q, k, v = (x.transpose(1, 2).to(dtype) for x in (query_BHQD, key_BKTD, value_BKTD))
    v = F.pad(v, (0, max(q.shape[-1] - v.shape[-1], 0)))  # DeepSeek's are narrower, and the kernels take one size
    return q, k, v, {"causal": True, "window_size": (-1, -1) if window is None else (window - 1, 0)}


for _function in (sdpa, eager, flash_attention_2, flash_attention_3):
    AttentionInterface.register(BACKENDS[_function.__name__], _function)


def unsupported_term(kwargs: dict) -> str | None:
    """What a model asks of attention, beside scores, scale and window, that is not implemented here; None for none."""
    return next((name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None), None)


def _sliding_window(kwargs: dict, num_key: int) -> int | None:
    """The model's sliding window, in tokens, where it hides anything. Refuses what is not implemented."""
    term = unsupported_term(kwargs)
    if term is not None:
        raise ConfigError(f"this model's attention uses {term}, which is not supported")
    window = kwargs.get("sliding_window")
    return window if window is not None and window < num_key else None
