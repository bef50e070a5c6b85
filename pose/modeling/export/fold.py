"""The attention factor of a RoPE scaling, multiplied into the weights that make queries and keys.

cos and sin carry the factor a, so queries and keys do, and the logits of the attention carry a^2. The same function has
a in the weights before the rotation, which no engine can overlook: in the projections, or in the norms of the heads
where a model has them in between; only in the rows that are rotated.

Shapes: D head size, d of them rotary; O outputs of a layer.
"""

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from pose.modeling.compat import full_shape
from pose.modeling.layers import decoder_layers
from pose.modeling.load import rope_geometry
from pose.modeling.rotary import head_dim_of

NORMS = (("q_norm", "k_norm"), ("q_layernorm", "k_layernorm"))  # they hide the scale of what comes before them
PARTS = (*NORMS, ("q_proj", "k_proj"), ("qkv_proj",), ("query_key_value",))
# Families that rotate the first d dimensions of each head of what PARTS make, with nothing in between that a factor
# does not go through. Each has a test; in another the norms may come after the rotation, or multiply by 1 + w.
FAMILIES = {
    "arcee", "cohere", "ernie4_5", "gemma", "glm", "glm4", "glm4_moe", "gpt_neox", "granite", "granitemoe", "helium",
    "llama", "ministral", "mistral", "mixtral", "nemotron", "olmo", "olmo2", "olmoe", "persimmon", "phi", "phi3",
    "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "stablelm", "starcoder2",
}  # fmt: skip


class Fold:
    """Multiplies the rotary rows of what makes queries and keys.

    Args:
        model: under any strategy, with or without adapters.
        by: the factor of each.

    Raises:
        LookupError: it cannot be done exactly; says why.
    """

    def __init__(self, model: PreTrainedModel, by: float):
        config, self._units = model.config, dict[str, torch.Tensor]()
        if config.model_type not in FAMILIES:
            raise LookupError(f"how a {config.model_type} model makes queries and keys is not known here")
        if getattr(config, "clip_qkv", None) is not None:
            raise LookupError("queries and keys are clipped (clip_qkv in the config)")
        names = {id(module): name for name, module in model.named_modules()}
        for layer in decoder_layers(model):
            for part, module in _parts(layer).items():
                unit, weight = _unit(config, part, by), getattr(module, "weight", None)
                shape: tuple[int, ...] = () if weight is None else full_shape(weight)
                if len(shape) != (1 if "norm" in part else 2) or shape[0] % len(unit):
                    raise LookupError(f"{names[id(module)]} is not of the form that is known of a {config.model_type}")
                self._units[names[id(module)]] = unit

    def __call__(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A weight or bias [O, ...] multiplied, in at least fp32; or itself where nothing is.

        Args:
            name: of the model without adapters.
            tensor: whole.
        """
        unit = self._units.get(name.rpartition(".")[0])
        if unit is None:
            return tensor
        rows = unit.to(tensor.device).repeat(len(tensor) // len(unit)).view(-1, *[1] * (tensor.ndim - 1))
        # Rounded once: a factor in fp32 would be off by as much in every row.
        return (tensor.double() * rows).to(torch.promote_types(tensor.dtype, torch.float32))


def _parts(layer: nn.Module) -> dict[str, nn.Module]:
    """What makes the queries and keys of a decoder layer, by name."""
    for module in layer.modules():
        for names in PARTS:
            parts = {name: part for name in names if isinstance(part := getattr(module, name, None), nn.Module)}
            if parts:
                return parts
    raise LookupError("a layer has no attention of a known form")


def _unit(config: PretrainedConfig, part: str, by: float) -> torch.Tensor:
    """The multipliers of the rows of a part, float64 [.], which repeat until its end."""
    num_heads = config.num_attention_heads
    head, one = torch.ones(2, head_dim_of(config), dtype=torch.float64)
    head[: rope_geometry(config).dim] = by
    if part == "query_key_value":  # query, key and value of a head side by side
        return torch.cat([head, head, one])
    if part == "qkv_proj":  # all queries, then all keys, then all values
        groups = config.num_key_value_heads
        return torch.cat([head.repeat(num_heads + groups), one.repeat(groups)])
    return head
