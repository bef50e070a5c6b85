"""What this package takes from transformers, peft, DeepSpeed and torch beyond what they document.

Each name stands here once, with what is relied on; tests/unit/modeling/test_compat.py holds it against the installed
versions.
"""

import copy

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel


def causal_lm_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """The class that AutoModelForCausalLM builds from a config; None where it knows none."""
    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return found[0] if isinstance(found, tuple) else found


def keeps_state(cls: type[PreTrainedModel]) -> bool:
    """Whether a model's layers keep a state that is no cache of keys and values."""
    return cls._is_stateful


def takes_attention_by_name(cls: type[PreTrainedModel]) -> bool:
    """Whether a model calls the attention that is registered under the name in its config."""
    return cls._supports_attention_backend


def build_on_meta(config: PretrainedConfig, attention: str) -> PreTrainedModel:
    """A model without memory, buffers included, that can be run. No random number is drawn for it.

    Args:
        config: stays as it is.
        attention: a registered name.
    """
    # batched_mm looks at no values, where the default for experts does
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            copy.deepcopy(config), attn_implementation=attention, experts_implementation="batched_mm"
        )
