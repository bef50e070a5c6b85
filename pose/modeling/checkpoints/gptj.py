"""GPT-J's checkpoints, read as transformers' Phi.

transformers' own GPT-J takes sines and cosines from a fixed table, so its RoPE cannot be scaled, and it
has no SDPA. Its block is Phi's with four differences that are only a matter of form:

- rotary pairs are neighbours (0, 1), (2, 3), ...; Phi pairs dimension j with j + r/2. Reordering the rows of
  the query and key matrices within each head turns one into the other, and leaves every inner product as it is.
- GPT-J's attention has no biases: Phi's are zero, and frozen, so what trains is GPT-J and nothing else.
- the share of rotary dimensions, 64 of 256, is Phi's partial_rotary_factor.
- names.

One layer norm feeds attention and MLP in both, and both have a bias on the head. A scaled GPT-J so has a
plain form, and is exported in it. https://github.com/kingoflolz/mesh-transformer-jax
"""

from typing import Any

import torch
from transformers import GPTJConfig, PhiConfig

from pose.errors import CheckpointError

NAMES = {
    "transformer.wte": "model.embed_tokens",
    "transformer.ln_f": "model.final_layernorm",
    "lm_head": "lm_head",
    "ln_1": "input_layernorm",
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.out_proj": "self_attn.dense",
    "mlp.fc_in": "mlp.fc1",
    "mlp.fc_out": "mlp.fc2",
}


class GPTJ:
    """A GPT-J checkpoint in its own form.

    Args:
        raw: its config.json.

    Attributes:
        config: the PhiConfig of the same model.
        frozen: ends of the names of parameters that GPT-J does not have.

    Raises:
        CheckpointError: no window; no rotary_dim, or more than a head has.
    """

    frozen = tuple(f"self_attn.{name}.bias" for name in ("q_proj", "k_proj", "v_proj", "dense"))

    def __init__(self, raw: dict[str, Any]):
        if not {"n_positions", "max_position_embeddings"} & raw.keys():
            raise CheckpointError("this GPT-J's config.json has no n_positions, its window: write it there")
        gptj = GPTJConfig(**raw)
        self.num_heads = gptj.n_head
        self.head_dim = gptj.n_embd // gptj.n_head
        self.rotary_dim = gptj.rotary_dim
        share = (self.rotary_dim or 0) / self.head_dim
        if not 0 < share <= 1 or int(self.head_dim * share) != self.rotary_dim:
            raise CheckpointError(
                f"rotary_dim={self.rotary_dim} of this GPT-J's config.json is not supported for heads of "
                f"{self.head_dim} dimensions: GPT-J-6B has 64 of 256"
            )
        self.config = PhiConfig(
            vocab_size=gptj.vocab_size,
            hidden_size=gptj.n_embd,
            intermediate_size=gptj.n_inner or 4 * gptj.n_embd,
            num_hidden_layers=gptj.n_layer,
            num_attention_heads=gptj.n_head,
            resid_pdrop=gptj.resid_pdrop,
            embd_pdrop=gptj.embd_pdrop,
            attention_dropout=gptj.attn_pdrop,
            hidden_act=gptj.activation_function,
            max_position_embeddings=gptj.n_positions,
            initializer_range=gptj.initializer_range,
            layer_norm_eps=gptj.layer_norm_epsilon,
            tie_word_embeddings=gptj.tie_word_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": share},
            bos_token_id=gptj.bos_token_id,
            eos_token_id=gptj.eos_token_id,
            pad_token_id=gptj.pad_token_id,
        )

    def convert(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """What a tensor of the checkpoint is in the Phi model, by name; itself where GPT-J has no such weight."""
        module, _, kind = name.rpartition(".")
        prefix = ""
        if module.startswith("transformer.h."):
            _, _, layer, module = module.split(".", 3)
            prefix = f"model.layers.{layer}."
        target = prefix + NAMES.get(module, "")
        if module not in NAMES or f"{target}.{kind}".endswith(self.frozen):
            return {name: tensor}
        if module in ("attn.q_proj", "attn.k_proj"):
            tensor = self._halves(tensor)
        added = {f"{target}.bias": tensor.new_zeros(len(tensor))} if f"{target}.bias".endswith(self.frozen) else {}
        return {f"{target}.{kind}": tensor} | added

    def _halves(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [n_head * head_dim, n_embd] of interleaved pairs, in Phi's order: first members, then second ones."""
        heads = rows.view(self.num_heads, self.head_dim, -1)
        rotary, rest = heads[:, : self.rotary_dim], heads[:, self.rotary_dim :]
        return torch.cat([rotary[:, 0::2], rotary[:, 1::2], rest], dim=1).reshape(rows.shape)
