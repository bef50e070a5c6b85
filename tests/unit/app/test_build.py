"""What is refused before any weights are loaded, and what is worked out from the config."""

import json
import shutil
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from pose.app import build, schema
from pose.errors import CheckpointError, ConfigError, DataError, PoseError
from pose.training import loggers

CONF = Path(__file__).resolve().parents[3] / "conf"
schema.register()


@pytest.fixture
def plan(tmp_path):
    """Plans a run of the shipped model from overrides."""

    def plan_(*overrides, name="train"):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose(name, [f"cache_dir={tmp_path}/cache", "trainer.accelerator=cpu", *overrides])
        return build.plan_training(cfg, tmp_path)

    return plan_


@pytest.fixture
def documents(tmp_path):
    """Writes a documents file."""

    def write(*lines):
        file = tmp_path / "documents.jsonl"
        file.write_text("".join(line + "\n" for line in lines))
        return f"data.documents={file}"

    return write


LONG = json.dumps({"text": "It was a truth universally acknowledged. " * 400})


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        (["pose.target_len=128"], ConfigError, ["pose.target_len=128", "256"]),
        (["pose.target_len=long"], ConfigError, ["pose.target_len='long'", "integer"]),
        (["pose.num_chunks=257"], ConfigError, ["pose.num_chunks=257", "pose.train_len=256"]),
        (["pose.num_chunks=0"], ConfigError, ["pose.num_chunks=0", "at least 1"]),
        (["pose.train_len=4096"], ConfigError, ["pose.target_len=2048", "pose.train_len=4096"]),
        (["pose.content=other"], ConfigError, ["pose.content='other'", "aligned"]),
        (["rope=linear", "rope.factor=0.5"], ConfigError, ["rope.factor=0.5", "at least 1"]),
        (["rope=none", "rope.factor=2"], ConfigError, ["rope.factor=2", "rope=none"]),
        (["trainer.global_batch=6", "trainer.micro_batch=4"], ConfigError, ["trainer.global_batch=6", "4"]),
        (["trainer.max_steps=0"], ConfigError, ["trainer.max_steps=0"]),
        (["trainer.accelerator=abacus"], ConfigError, ["abacus"]),
        (["model.attention=quick"], ConfigError, ["model.attention", "'quick'", "sdpa"]),
        (["model.attention=flash_attention_2"], ConfigError, ["flash_attention_2", "sdpa"]),
        (["model.export_dtype=int8"], ConfigError, ["model.export_dtype='int8'", "bfloat16"]),
        (["seed=-1"], ConfigError, ["seed=-1"]),
        (["finetune.betas=[0.9]"], ConfigError, ["finetune.betas=[0.9]"]),
        (["trainer.log_every_n_steps=0"], ConfigError, ["trainer.log_every_n_steps=0"]),
        (["data.curriculum=[5]"], ConfigError, ["data.curriculum", "5"]),
        (["finetune.lr=0"], ConfigError, ["finetune.lr=0"]),
        (["finetune=lora", "finetune.lora.rank=0"], ConfigError, ["finetune.lora.rank=0", "at least 1"]),
        (["finetune=lora", "finetune.lora.target_modules=[q]"], ConfigError, ["lora.target_modules", "q_proj"]),
        (["finetune.lora.alpha=3"], ConfigError, ["finetune.lora.alpha=3", "finetune=lora"]),
        (["trainer.gradient_clip=-1"], ConfigError, ["trainer.gradient_clip=-1"]),
        (["trainer.precision=int3"], ConfigError, ["int3"]),
        (["finetune.schedule=steep"], ConfigError, ["finetune.schedule='steep'", "linear"]),
        (["data.synthetic.passkey=1.5"], ConfigError, ["data.synthetic.passkey=1.5"]),
        (["eval.tasks=[riddle]"], ConfigError, ["riddle", "passkey"]),
        (["eval.lengths=[60]"], ConfigError, ["60"]),
        (["eval.lengths=[999999]", "eval.tasks=[perplexity]"], DataError, ["999999", "books.heldout"]),
        (["model.path=/no/such/folder"], CheckpointError, ["/no/such/folder"]),
        (["model=local"], ConfigError, ["model.path", "folder"]),
        (["model.path=null"], ConfigError, ["model.init"]),
        (["data=jsonl"], ConfigError, ["data.documents"]),
        (["data=jsonl", "data.documents=nowhere.jsonl"], DataError, ["nowhere.jsonl"]),
    ],
)  # fmt: skip
def test_refused_with_a_clear_message(plan, overrides, error, words):
    with pytest.raises(error) as caught:
        plan(*overrides)
    assert isinstance(caught.value, PoseError)
    for word in words:
        assert word in str(caught.value)


def test_a_broken_line_is_named(plan, documents):
    with pytest.raises(DataError, match=r"documents\.jsonl, line 2"):
        plan("eval=none", "data=jsonl", documents(LONG, '{"text": "no end'))


def test_documents_that_are_too_short(plan, documents):
    with pytest.raises(DataError, match="none of the 1 documents is long enough"):
        plan("eval=none", "data=jsonl", documents('{"text": "short"}'))


def test_a_scaled_checkpoint_is_not_scaled_again(plan, documents, tmp_path):
    first = plan("eval=none", "data=jsonl", documents(LONG))
    first.config.save_pretrained(tmp_path / "scaled")
    first.tokenizer.save_pretrained(tmp_path / "scaled")
    shutil.copy("assets/tiny/model.safetensors", tmp_path / "scaled")
    with pytest.raises(ConfigError, match="already scaled"):
        plan("eval=none", "data=jsonl", documents(LONG), f"model.path={tmp_path}/scaled")
    again = plan("eval=none", "data=jsonl", documents(LONG), f"model.path={tmp_path}/scaled", "rope=none")
    assert again.expected is None and again.config.rope_parameters == first.config.rope_parameters


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "accumulate"), [(16, 16, 1), (16, 4, 4), (64, 1, 64), (2, 16, 1)]
)
def test_gradient_accumulation_is_worked_out(plan, documents, global_batch, micro_batch, accumulate):
    planned = plan(
        "eval=none", "data=jsonl", documents(LONG),
        f"trainer.global_batch={global_batch}", f"trainer.micro_batch={micro_batch}",
    )  # fmt: skip
    assert planned.trainer.accumulate_grad_batches == accumulate
    assert planned.data.micro_batch * accumulate == global_batch
    assert len(planned.data.dataset) == global_batch * planned.trainer.max_steps


def test_the_model_trains_in_train_mode(plan, documents):
    """transformers recomputes activations, and drops out, only then."""
    overrides = ["eval=none", "data=jsonl", documents(LONG), "model.gradient_checkpointing=true"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", overrides)
    planned = plan(*overrides)
    model = build.load_for_training(cfg, planned, planned.trainer.strategy)
    assert model.training and model.is_gradient_checkpointing


def test_lengths_default_to_doublings(plan):
    assert plan("eval.tasks=[passkey]").suite.lengths == [256, 512, 1024, 2048]


def test_shipped_files_are_found_from_anywhere(plan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert plan("eval=none").geometry.window == 256


def test_wandb_is_offline_without_an_account(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not loggers._has_wandb_account()
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert loggers._has_wandb_account()
