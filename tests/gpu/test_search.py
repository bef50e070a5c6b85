"""What a search of a model that is scaled already reads from it, on a GPU."""

import pytest
import torch
from transformers import LlamaConfig

from pose.app.needles import _digest
from pose.app.search import _own_frequencies
from pose.modeling.load import build_model, scale_config
from pose.rope import Yarn

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_the_frequencies_of_a_model_are_those_that_it_has_on_a_cpu():
    config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
                         num_attention_heads=2, max_position_embeddings=128)  # fmt: skip
    scale_config(config, Yarn(), 512)
    model = build_model(config, None, "sdpa", torch.bfloat16)
    on_cpu = _digest(_own_frequencies(model, 512))
    assert _digest(_own_frequencies(model.to("cuda"), 512)) == on_cpu
