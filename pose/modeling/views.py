"""The same tokens under two sets of position ids, in one pass: plain ones, and those of a sampler.

Up to the first skip of a row both are equal, and so is what a causal model makes of these tokens: they are computed
once, and attention alone sees two texts (`pose.modeling.attention.Packing`). With PoSE's two chunks that is half of the
second view, on average. Two sorts of models get both views as separate rows: those whose frequencies depend on the
length of the text, which differs between the views, and those that do not hand keywords to their attention.

Shapes: B rows, L tokens of each, m tokens from the first skip of their rows on, H hidden size.
"""

from typing import NamedTuple

import torch
from transformers import PretrainedConfig, PreTrainedModel

from pose.modeling.attention import Packing
from pose.modeling.layers import hands_on
from pose.modeling.rotary import depends_on_length

# Of the row that both views are packed into, by the batch: libraries of matrix products prepare for each length anew
LENGTHS = 16


class Views(NamedTuple):
    """Hidden states of the two views.

    Attributes:
        plain: [B * L, H], at positions 0..L-1 of each row.
        skipped: [m, H], from the first skip of each row on, at the sampler's positions.
        whole: [B * L, H], all at the sampler's positions; None where it is that of the first up to the first skips.
    """

    plain: torch.Tensor
    skipped: torch.Tensor
    whole: torch.Tensor | None = None

    def second(self, skipped_at: torch.Tensor) -> torch.Tensor:
        """The whole second view, [B * L, H]."""
        return self.plain.index_copy(0, skipped_at, self.skipped) if self.whole is None else self.whole


def shares_beginnings(config: PretrainedConfig) -> bool:
    """Whether a model computes the tokens before the first skip once for both views."""
    return not depends_on_length(config) and hands_on(config, "packing")


def hidden_states_of_views(
    model: PreTrainedModel, input_ids: torch.Tensor, position_ids: torch.Tensor, skipped_at: torch.Tensor
) -> Views:
    """What a model makes of tokens at plain positions and at a sampler's.

    Args:
        model: a causal language model, ready to compute.
        input_ids: int64 [B, L].
        position_ids: int64 [B, L], the sampler's.
        skipped_at: int64 [m], the places in B * L of the tokens from the first skip of each row on, ascending; m is
            known without a look at the device.
    """
    batch, length = input_ids.shape
    num, device = batch * length, input_ids.device
    plain_ids = torch.arange(length, device=device).expand(batch, length)
    if not shares_beginnings(model.config):
        rows = torch.cat([input_ids, input_ids]), torch.cat([plain_ids, position_ids])
        states = _states(model, *rows).flatten(0, 1)
        return Views(states[:num], states[num + skipped_at], states[num:])
    both = num + len(skipped_at)
    # The first token again, which no text has and nothing is made of: else each batch would be of a length of its own
    again = torch.zeros(-len(skipped_at) % max(num // LENGTHS, 1), dtype=torch.long, device=device)
    tokens = torch.cat([input_ids.flatten(), input_ids.flatten()[skipped_at], input_ids.flatten()[again]])
    positions = torch.cat([plain_ids.flatten(), position_ids.flatten()[skipped_at], again])
    places = torch.arange(num, device=device)
    second = places.index_copy(0, skipped_at, torch.arange(num, both, device=device))
    packing = Packing(
        torch.stack([places, second]).view(2 * batch, length), torch.cat([places, num + skipped_at, again])
    )
    states = _states(model, tokens[None], positions[None], packing=packing)[0]
    return Views(states[:num], states[num:both])


def _states(model: PreTrainedModel, input_ids: torch.Tensor, position_ids: torch.Tensor, **keywords) -> torch.Tensor:
    body = model.base_model
    return body(input_ids=input_ids, position_ids=position_ids, use_cache=False, **keywords).last_hidden_state
