"""The experiments of SmolLM2-135M, on a small random model of its form: RoPE of base 100,000, grouped queries, tied."""

import pytest
import torch
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

pytestmark = [pytest.mark.slow, pytest.mark.nightly]
WINDOW, TARGET = 512, 2048
SMALL = (
    f"pose.target_len={TARGET}", "pose.train_len=128", "data.window_len=512", "trainer.max_steps=2",
    "trainer.global_batch=2", "trainer.micro_batch=1", "trainer.log_every_n_steps=1", "watch.every_n_steps=2",
    "watch.trials=2", "watch.lengths=[512]", "eval.max_documents=1", "eval.windows=1", "eval.trials=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained("assets/tiny")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=48, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=WINDOW, tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 100000.0}, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).save_pretrained(folder)  # fmt: skip
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def train(script, model, tmp_path):
    def train_(name, *overrides):
        folder = tmp_path / "run"
        result = script(
            "train.py", f"experiment={name}", f"model.path={model}", *SMALL, *overrides, f"hydra.run.dir={folder}"
        )
        assert result.returncode == 0, result.stderr[-3000:]
        return folder, result.stdout

    return train_


def test_before_scaled_and_after(train, load_json):
    """Everything that the experiment promises, on documents that are left out of a folder which holds them."""
    folder, said = train("smollm2_32k", "data.documents=assets/corpora", f"eval.lengths=[{WINDOW},{TARGET}]")
    # 5 books, 178 reports, 16 proofs and what is held out: one, 20 and 3
    assert "Left out    24 of 223 documents" in said and "in 199 documents" in said
    metrics = load_json(folder / "metrics.json")
    for name in ("untuned", "scaled", "extended"):
        for n in (WINDOW, TARGET):
            wanted = ("ppl", "tail_ppl", "passkey", "needle_gain", "ruler/niah_single_2", "ruler/niah_multikey_1")
            assert {f"{family}@{n}" for family in wanted} <= set(metrics[name])
        assert "position_ppl@1024-2048" in metrics[name] and metrics[f"measuring/{name}_seconds"] > 0
    assert metrics["cost/tokens"] == 2 * 2 * 128 and metrics["train/steps"] == 2
    config = load_json(folder / "model" / "config.json")
    assert config["rope_parameters"]["factor"] == 2 * TARGET / WINDOW == 8
    assert config["max_position_embeddings"] == TARGET and config["pose"]["window"] == WINDOW
    assert "val/short_ppl_increase" in (folder / "metrics.csv").read_text(), "the watch looks after short texts"


def test_on_a_cpu(train, load_json):
    """Compiled, all in fp32; the extended model at the window and at the target."""
    folder, said = train("smollm2_32k_cpu", f"eval.lengths=[{WINDOW},{TARGET}]", "watch.every_n_steps=null")
    metrics = load_json(folder / "metrics.json")
    assert {"tail_ppl@512", "tail_ppl@2048", "passkey@512", "passkey@2048"} <= set(metrics["extended"])
    assert "untuned" not in metrics and not any(name.startswith("needle_gain") for name in metrics["extended"])
    assert "tokens in 199 documents" in said, "the shipped text alone"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["trainer"]["compile"] is True
    assert (config["trainer"]["precision"], config["eval_dtype"]) == ("32-true", "float32")


@pytest.mark.parametrize(
    ("overrides", "example_len"),
    [
        (("pose=short_pi",), 128),
        (
            ("pose=full", "trainer.global_batch=1", f"data.window_len={TARGET}", "model.gradient_checkpointing=true"),
            TARGET,
        ),
    ],
)
def test_the_arms_beside_it(train, load_json, overrides, example_len):
    """As the head of the experiment has them; eval=none measures nothing."""
    folder, _ = train("smollm2_32k_cpu", *overrides, "trainer.compile=false", "watch.every_n_steps=null", "eval=none")
    metrics = load_json(folder / "metrics.json")
    steps, batch = metrics["train/steps"], 1 if example_len == TARGET else 2
    assert metrics["cost/tokens"] == steps * batch * example_len and "extended" not in metrics
