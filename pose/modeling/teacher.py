"""The original model beside the one that trains, for objectives that keep to it.

With adapters it is the same model with its adapters off and its own frequencies back: no second copy. What trains
besides adapters (embeddings, norms) is kept as it was. A model whose weights all train has a frozen copy beside it, in
the bits of its checkpoint.

Shapes: B examples, L tokens, H hidden size.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from pose.modeling import compat
from pose.modeling.compat import Rotary, rotary_modules
from pose.modeling.layers import decoder_layers
from pose.modeling.rotary import rotate_by_example_length
from pose.modeling.shard import with_root


class Teacher:
    """The original model. No gradient reaches it, and it is in no state dict.

    Args:
        model: its weights: another model, or the one that trains, whose adapters are then off while it computes.
        original: the config of the original, with its own frequencies; None where `model` is built from it.
    """

    def __init__(self, model: PreTrainedModel, original: PretrainedConfig | None = None):
        self.model, self._has_own_weights = model, original is None
        self._rotary: list[Rotary] = []
        self._kept: list[tuple[nn.Parameter, torch.Tensor]] = []  # what trains besides adapters, and what it was
        if original is not None:
            empty = compat.build_empty(original, attn_implementation=compat.attention_of(model))
            rotate_by_example_length(empty)
            self._rotary = rotary_modules(empty)
            self._kept = [
                (parameter, parameter.detach().clone())
                for name, parameter in model.named_parameters()
                if parameter.requires_grad and not compat.is_of_adapter(name)
            ]

    @torch.no_grad()
    def hidden_states(self, input_ids: torch.Tensor, layers: Sequence[int]) -> list[torch.Tensor]:
        """What the original makes of tokens at positions 0..L-1, as `states_of_layers`.

        Args:
            input_ids: int64 [B, L].
            layers: of 1..number of layers.

        Returns:
            For each layer [B, L, H].
        """
        plain = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)

        def compute():
            with states_of_layers(self.model, layers) as states:
                self.model.base_model(input_ids=input_ids, position_ids=plain, use_cache=False)
            return states

        training = self.model.training
        if self._has_own_weights:
            return with_root(self.model, compute)
        self.model.train(False)  # no dropout
        try:
            with self._as_original():
                return compute()
        finally:
            self.model.train(training)

    @contextmanager
    def _as_original(self) -> Iterator[None]:
        """The model that trains as it was, before anything of a step is computed."""
        modules = rotary_modules(self.model)
        forwards = [module.__dict__.get("forward") for module in modules]
        # The device is known when the first step comes
        self._kept = [(parameter, before.to(parameter.device)) for parameter, before in self._kept]
        trained = [parameter.detach().clone() for parameter, _ in self._kept]
        for parameter, before in self._kept:
            parameter.copy_(before)
        for module, original in zip(modules, self._rotary, strict=True):
            module.forward = original.to(module.inv_freq.device).forward
        try:
            with compat.without_adapters(self.model):
                yield
        finally:
            for (parameter, _), now in zip(self._kept, trained, strict=True):
                parameter.copy_(now)
            for module, forward in zip(modules, forwards, strict=True):
                if forward is None:
                    del module.forward
                else:
                    module.forward = forward


def freeze(model: PreTrainedModel):
    """No weight of a model trains, in place."""
    model.requires_grad_(False)


@contextmanager
def states_of_layers(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[list[torch.Tensor]]:
    """Fills a list with what layers of a model give in the pass within, in the order of `layers`.

    Args:
        model: a causal language model of n layers.
        layers: of 1..n, ascending; n is what the head sees, after the last norm, as in transformers' hidden_states.
    """
    modules = decoder_layers(model)
    found: list[torch.Tensor] = []
    hooks = []

    def note(module, args, output):
        found.append(output[0] if isinstance(output, tuple) else output)

    def note_last(module, args, output):
        found.append(output.last_hidden_state)

    for layer in layers:
        is_last = layer == len(modules)
        source = model.base_model if is_last else modules[layer - 1]
        hooks.append(source.register_forward_hook(note_last if is_last else note))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
