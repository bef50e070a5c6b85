"""Checks of the model that is about to train, on the device and in the precision it trains in.

Each looks for one way in which long-context training runs and is silently wrong.
"""

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from pose.data.examples import skipped_tokens
from pose.errors import GuardError
from pose.modeling import compat
from pose.modeling.loss import causal_lm_loss
from pose.modeling.rotary import frequencies_at, rotary_modules, target_len_of
from pose.modeling.views import hidden_states_of_views
from pose.rope import Frequencies

PROBE_LEN = 32  # tokens, in two chunks
LOGITS_TOLERANCE = 0.05  # standard deviations; room for bf16
INV_FREQ_TOLERANCE = 1e-5  # relative; fp32 rounding is 1e-7, bf16 rounding 4e-3
ANGLE_TOLERANCE = 2**-21  # relative; fp32 products and their cosines round by 2**-23 or so, TF32 by 2**-11


@torch.no_grad()
def run_guards(
    model: PreTrainedModel,
    expected: Frequencies | None,
    target_len: int,
    device: torch.device | str,
    has_views: bool = False,
) -> str:
    """Runs every guard; the caller provides the precision context.

    Args:
        model: as it trains.
        expected: the closed form of its frequencies for a text of target_len; None skips that comparison.
        target_len: the window to extend to, in tokens.
        device: of the model.
        has_views: whether it trains on two views of the same tokens.

    Returns:
        What was checked and found, in one line.

    Raises:
        GuardError: a guard failed; the message says what it means and what to look at.
    """
    training = model.training
    model.eval()
    try:
        deviation = check_frequencies(model, expected, target_len)
        check_rotation(model, target_len, device)
        check_chunks_attend(model, target_len, device)
        own, chunked = check_loss(model, device)
        if has_views:
            check_views(model, target_len, device)
    finally:
        model.train(training)
    closed_form = "" if deviation is None else f" and those of the closed form (to {deviation:.0e})"
    of_views = "; two views computed together are those computed apart" if has_views else ""
    return (
        f"frequencies are fp32{closed_form}; the first chunk reaches the last, {target_len:,} positions apart; the "
        f"loss is the model's own ({chunked:.4f}, {own:.4f}){of_views}"
    )


def check_frequencies(model: PreTrainedModel, expected: Frequencies | None, target_len: int) -> float | None:
    """The inverse frequencies the model rotates a text of target_len with are fp32 and equal the closed form.

    Args:
        model: as it trains.
        expected: the closed form for a text of target_len; None compares with nothing.
        target_len: in tokens.

    Returns:
        Their largest relative deviation from it; None without one.

    Raises:
        GuardError: there are none, or they are of another dtype, or frequencies or attention factor are others.
    """
    modules, deviation = rotary_modules(model), None
    if not modules:
        raise GuardError("no rotary embedding was found in the model: there is nothing to extend")
    for module in modules:
        for buffer in module.buffers(recurse=False):
            if buffer.is_floating_point() and buffer.dtype != torch.float32:
                raise GuardError(
                    f"the model's inv_freq is {str(buffer.dtype).removeprefix('torch.')}, not float32: positions far "
                    "out would be rotated by angles that are wrong by whole turns. Something cast the model's buffers "
                    "after pose.modeling.rotary.keep_frequencies_fp32."
                )
        if expected is None:
            continue
        inv_freq = frequencies_at(module, target_len)
        wanted = expected.inv_freq.to(inv_freq.device)
        same_shape = inv_freq.shape == wanted.shape
        tiny = torch.finfo(torch.float32).tiny
        tolerance = INV_FREQ_TOLERANCE * wanted.abs() + tiny  # with drope all frequencies are about 0
        if not same_shape or not ((inv_freq.double() - wanted).abs() <= tolerance).all():
            detail = (
                f"{((inv_freq.double() / wanted) - 1).abs().max().item():.1%} off at worst" if same_shape
                else f"{len(inv_freq)} of them, {len(wanted)} expected"
            )  # fmt: skip
            raise GuardError(
                f"the model's inv_freq is not that of the configured scaling ({detail}): the scaling did not reach "
                "the model. It must be in the config before the model is built."
            )
        deviation = max(deviation or 0.0, ((inv_freq.double() - wanted).abs() / (wanted.abs() + tiny)).max().item())
        factor = getattr(module, "attention_scaling", 1.0)
        if abs(factor - expected.attention_factor) > 1e-6:
            raise GuardError(
                f"the model's attention factor is {factor:g}, and the configured scaling has "
                f"{expected.attention_factor:g}: the scaling did not reach the model"
            )
    return deviation


def check_rotation(model: PreTrainedModel, target_len: int, device):
    """cos and sin at positions up to the target are those of the frequencies, worked out in fp64.

    transformers 5.17 makes the angles by a matrix product (5.23 does not), and GPUs that may use TF32 for those (where
    TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 is set, as in some containers) keep 11 bits of each position.

    Args:
        model: as it computes.
        target_len: in tokens.
        device: of the model.

    Raises:
        GuardError: they are others.
    """
    positions = torch.linspace(0, target_len - 1, min(PROBE_LEN, target_len), dtype=torch.float64).long()
    for module in rotary_modules(model):
        states = torch.zeros(1, len(positions), 1, dtype=torch.float32, device=device)  # whatever the default dtype is
        found = module(states, positions[None].to(device))
        angles = positions.double()[:, None] * frequencies_at(module, target_len).cpu().double()
        # Both layouts that transformers has: all frequencies twice over, and each one twice
        layouts = torch.cat([angles, angles], -1), angles.repeat_interleave(2, -1)
        if not isinstance(found, tuple) or found[0].shape[1:] != layouts[0].shape:
            continue  # of a model with a way of its own
        factor, room = getattr(module, "attention_scaling", 1.0), 1e-3 + ANGLE_TOLERANCE * angles.max()
        rotated = torch.cat(found).cpu()  # cos and sin, [2, n, d]
        wrong = min((rotated - factor * torch.stack([a.cos(), a.sin()])).abs().max().item() for a in layouts)
        if wrong > room * factor:
            raise GuardError(
                f"{type(module).__name__} rotates positions up to {target_len - 1:,} by other angles than those of its "
                f"frequencies (cos or sin off by {wrong:.2g}), as fp32 products rounded to TF32 make them. Unset "
                "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, keep torch.backends.cuda.matmul.allow_tf32 off, or use "
                "transformers>=5.23, which has no product there"
            )


def check_computing(model: PreTrainedModel, device) -> tuple[float, float]:
    """What every measurement rests on: `check_rotation` at the model's window, and `check_loss`.

    Args, Returns and Raises as these.
    """
    check_rotation(model, target_len_of(model.config), device)
    return check_loss(model, device)


def check_chunks_attend(model: PreTrainedModel, target_len: int, device):
    """Other tokens in the first chunk move the logits of the last, whatever the skip and the batch.

    Args:
        model: as it trains, in eval mode.
        target_len: in tokens; the chunks are as far apart as it allows.
        device: of the model.

    Raises:
        GuardError: they do not, or the hidden states are not finite.
    """
    half = PROBE_LEN // 2
    skip = max(target_len - PROBE_LEN, 1)
    positions = torch.cat([torch.arange(half), torch.arange(half) + half + skip]).to(device)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (2, PROBE_LEN), generator=generator).to(device)
    changed = tokens.clone()
    changed[:, :half] = tokens[:, :half].roll(1, 1).flip(0)
    for rows in (1, 2):  # FlashAttention's wrapper takes another path at batch 1
        hidden = [
            model.base_model(
                input_ids=ids[:rows], position_ids=positions.expand(rows, -1), use_cache=False
            ).last_hidden_state
            for ids in (tokens, changed)
        ]
        if not hidden[0].isfinite().all():
            raise GuardError("the model computes infinities or NaN: its weights, or its precision, are broken")
        if torch.equal(hidden[0][:, half:], hidden[1][:, half:]):
            raise GuardError(
                f"changing the first chunk changes nothing in the last (batch of {rows}, position ids skip by {skip}): "
                "attention treats the skip as the border of two documents, so the model would only ever train on "
                f"short contexts. Attention in use: {compat.attention_of(model)!r}; pose needs its own "
                "(pose.modeling.attention)."
            )


@torch.no_grad()
def check_loss(model: PreTrainedModel, device) -> tuple[float, float]:
    """The chunked loss is the model's own: nothing between the hidden states and its logits is left out.

    Args:
        model: causal, of any dtype.
        device: of the model.

    Returns:
        The model's own loss and the chunked one, of a probe; nats per token.

    Raises:
        GuardError: they differ, or the logits do.
    """
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(model.config.vocab_size, (1, PROBE_LEN), generator=generator).to(device)
    positions = torch.arange(PROBE_LEN, device=device)[None]
    logits = model(input_ids=tokens, position_ids=positions, use_cache=False).logits.float()
    head = model.get_output_embeddings()
    hidden = model.base_model(input_ids=tokens, position_ids=positions, use_cache=False).last_hidden_state
    own, chunked = F.cross_entropy(logits[0, :-1], tokens[0, 1:]), causal_lm_loss(hidden, head, tokens)
    difference = (head(hidden).float() - logits).abs().max()  # a loss of small logits hardly depends on them
    if not (difference <= LOGITS_TOLERANCE * logits.std() and (own - chunked).abs() <= 1e-2 * own):
        raise GuardError(
            f"the loss from the hidden states is {chunked:.4f} where the model's own logits give {own:.4f}, and logits "
            f"differ by up to {difference / logits.std():.2g} standard deviations: this model "
            f"({model.config.model_type}) changes its logits after the head, which the chunked loss does not do"
        )
    return own.item(), chunked.item()


def check_views(model: PreTrainedModel, target_len: int, device):
    """The two views of an example (`pose.modeling.views`) are what the model makes of each by itself.

    Args:
        model: as it trains, in eval mode.
        target_len: in tokens; the second view ends there.
        device: of the model.

    Raises:
        GuardError: they are not.
    """
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(model.config.vocab_size, (2, PROBE_LEN), generator=generator).to(device)
    plain = torch.arange(PROBE_LEN, device=device).repeat(2, 1)
    skipped = plain.clone()
    for row, first in enumerate((PROBE_LEN // 4, PROBE_LEN // 2)):
        skipped[row, first:] += target_len - PROBE_LEN
    skipped_at = skipped_tokens(skipped.cpu()).at.to(device)
    views = hidden_states_of_views(model, tokens, skipped, skipped_at)
    together = torch.stack([views.plain, views.second(skipped_at)])
    apart = torch.stack(
        [
            model.base_model(input_ids=tokens, position_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
            for ids in (plain, skipped)
        ]
    )
    difference = (together.float() - apart.float()).abs().max() / apart.float().std()
    if not difference <= LOGITS_TOLERANCE:
        raise GuardError(
            f"two views of the same tokens, computed together, differ from those computed apart by {difference:.2g} "
            f"standard deviations: this model ({model.config.model_type}) does something besides attention that looks "
            "at other tokens; choose objective=lm"
        )
