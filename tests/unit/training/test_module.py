"""The LightningModule's way with losses that are not finite, and with memory that runs out."""

import json
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pose.app.runtime import explained_memory_errors, readable_errors
from pose.data.datamodule import PoseDataModule
from pose.errors import Interrupted, TrainingError
from pose.modeling.attention import BACKENDS
from pose.positions import PoSE
from pose.training import module as pose_module
from pose.training.module import SKIPS_IN_A_ROW, PoseModule

TOKENIZER = AutoTokenizer.from_pretrained("assets/tiny")
NUM_DOCUMENTS = 6


@pytest.fixture
def data(tmp_path):
    """Two examples a batch, two batches a step; a document is told by its words."""
    file = tmp_path / "documents.jsonl"
    documents = [{"id": f"doc{i}", "text": f"{i} and {i} is {i}. " * 20} for i in range(NUM_DOCUMENTS)]
    file.write_text("".join(json.dumps(document) + "\n" for document in documents))
    data = PoseDataModule(
        [file], TOKENIZER, PoSE(32, 64), num_examples=60, micro_batch=2, global_batch=4, seed=5, cache_dir=tmp_path
    )
    data.prepare_data()
    data.setup()
    return data


def fit(data, callbacks=(), steps=15, ckpt_path=None, **options) -> tuple[PoseModule, L.Trainer]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(TOKENIZER),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            attn_implementation=BACKENDS["sdpa"],
        )
    )
    module = PoseModule(
        lambda strategy: model, expected=None, target_len=64, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1,
        warmup_steps=0, max_steps=steps, **{"schedule": "constant"} | options,
    )  # fmt: skip
    trainer = L.Trainer(
        max_steps=steps, max_epochs=-1, accumulate_grad_batches=2, accelerator="cpu", logger=False,
        callbacks=[Weights(), *callbacks], enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return module, trainer


class Weights(L.Callback):
    """Notes the weights before every step."""

    def on_train_start(self, trainer, pl_module):
        self.before = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before.setdefault(
            trainer.global_step, torch.cat([p.detach().flatten().clone() for p in pl_module.parameters()])
        )


@pytest.fixture
def break_loss(monkeypatch):
    """Makes the loss of some examples NaN, told by their tokens; gradients are NaN too, as they would be."""

    def break_(broken):
        honest = pose_module.loss_and_example_losses
        seen = []

        def loss_and_example_losses(hidden, head, labels):
            loss, by_example = honest(hidden, head, labels)
            bad = torch.tensor([broken(row, len(seen) * 2 + i) for i, row in enumerate(labels)])
            seen.append(labels)
            nan = hidden.sum() * torch.nan
            return loss + (nan if bad.any() else 0), torch.where(bad, torch.nan, by_example)

        monkeypatch.setattr(pose_module, "loss_and_example_losses", loss_and_example_losses)

    return break_


def where(data, item: int) -> tuple[int, int, str]:
    """Epoch, index and document of an item, from the words of its text."""
    text = TOKENIZER.decode(data.dataset[item]["input_ids"])
    number = next(character for character in text if character.isdigit())
    return (*divmod(item, NUM_DOCUMENTS), f"doc{number}")


@pytest.mark.parametrize("item", [0, 13, 18])
def test_a_loss_that_is_not_finite_stops_and_is_named(data, break_loss, item):
    break_loss(lambda row, i: i == item)
    epoch, index, document = where(data, item)
    with pytest.raises(TrainingError) as caught:
        fit(data)
    message = str(caught.value)
    assert f"loss of step {item // 4 + 1} is not finite" in message
    assert f"example (epoch {epoch}, index {index}), document {document} (loss nan)" in message
    assert message.count("example (") == 1 and "trainer.on_nonfinite=skip" in message


def test_a_skipped_step_changes_no_weight_and_the_next_ones_train(data, break_loss, capsys):
    break_loss(lambda row, i: i in (13, 14))
    module, trainer = fit(data, on_nonfinite="skip")
    before = next(callback.before for callback in trainer.callbacks if isinstance(callback, Weights))
    changed = [not torch.equal(before[step], before[step + 1]) for step in range(14)]
    assert [step for step in range(14) if not changed[step]] == [3]
    assert all(p.isfinite().all() for p in module.parameters())
    printed = capsys.readouterr().out
    assert "Step 4 is skipped (1 so far)" in printed and printed.count("document doc") == 2
    assert float(trainer.callback_metrics["train/skipped_steps"]) == 1
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


def test_skipping_without_end_stops(data, break_loss):
    break_loss(lambda row, i: i >= 4)
    with pytest.raises(TrainingError, match=f"loss of step {SKIPS_IN_A_ROW + 1} .*last {SKIPS_IN_A_ROW - 1} steps"):
        fit(data, on_nonfinite="skip")


def test_skipped_steps_may_be_many_but_not_in_a_row(data, break_loss):
    break_loss(lambda row, i: i // 4 % 3 != 2)
    module, _ = fit(data, on_nonfinite="skip")
    assert module.num_skipped == SKIPS_IN_A_ROW


def test_a_loss_that_is_not_finite_leaves_the_logged_mean(data, break_loss):
    break_loss(lambda row, i: i == 57)  # in the first batch of the last step
    module, trainer = fit(data, on_nonfinite="skip")
    assert module.num_skipped == 1 and trainer.callback_metrics["train/loss"].isfinite()


def test_a_gradient_that_is_not_finite_counts_too(data):
    class Explodes(L.Callback):
        def on_after_backward(self, trainer, pl_module):
            if trainer.global_step == 2:
                next(pl_module.parameters()).grad[0, 0] = torch.inf

    with pytest.raises(TrainingError, match="the gradient of step 3 is not finite, though its losses are"):
        fit(data, callbacks=[Explodes()])
    module, _ = fit(data, callbacks=[Explodes()], on_nonfinite="skip")
    assert module.num_skipped == 1 and all(p.isfinite().all() for p in module.parameters())


def test_what_another_process_finds_counts_here(data, monkeypatch):
    asked = []

    def reduce_boolean_decision(self, decision, all=True):
        asked.append((decision, all))
        return len(asked) == 4

    monkeypatch.setattr("lightning.pytorch.strategies.Strategy.reduce_boolean_decision", reduce_boolean_decision)
    module, trainer = fit(data, on_nonfinite="skip")
    assert module.num_skipped == 1 and asked == [(False, False)] * 15
    before = next(callback.before for callback in trainer.callbacks if isinstance(callback, Weights))
    assert [step for step in range(14) if torch.equal(before[step], before[step + 1])] == [3]


def test_the_logged_loss_is_the_mean_since_the_last(data, monkeypatch):
    honest, losses = pose_module.loss_and_example_losses, []

    def record(*arguments):
        losses.append(honest(*arguments))
        return losses[-1]

    monkeypatch.setattr(pose_module, "loss_and_example_losses", record)
    _, trainer = fit(data)
    torch.testing.assert_close(
        trainer.callback_metrics["train/loss"], torch.stack([loss for loss, _ in losses[-2:]]).mean()
    )


class Rates(L.Callback):
    """Notes the learning rate of every step."""

    def __init__(self):
        self.rates = {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates[trainer.global_step] = optimizer.param_groups[0]["lr"]


def test_a_longer_run_follows_the_longer_schedule_at_once(data, tmp_path):
    """Also in the first step after a checkpoint that the shorter one ended with, at a learning rate of 0."""
    rates = Rates()
    _, trainer = fit(data, [rates], steps=5, schedule="linear")
    assert rates.rates == pytest.approx({step: 1e-2 * (1 - step / 5) for step in range(5)})
    trainer.save_checkpoint(tmp_path / "state")
    rates = Rates()
    fit(data, [rates], steps=15, schedule="linear", ckpt_path=tmp_path / "state")
    assert rates.rates == pytest.approx({step: 1e-2 * (1 - step / 15) for step in range(5, 15)})


def test_dropout_is_of_the_step_alone(data, monkeypatch):
    draws = {}

    class Draw(PoseModule):
        def training_step(self, batch, batch_idx):
            draws.setdefault((self.trainer.global_step, batch_idx % 2), []).append(torch.rand(1).item())
            return super().training_step(batch, batch_idx)

    monkeypatch.setitem(globals(), "PoseModule", Draw)
    for seed in (3, 3, 4):
        fit(data, seed=seed)

    class OnProcess1(Draw):
        def on_train_batch_start(self, *arguments):
            with monkeypatch.context() as patch:
                patch.setattr(L.Trainer, "global_rank", property(lambda trainer: 1))
                super().on_train_batch_start(*arguments)

    monkeypatch.setitem(globals(), "PoseModule", OnProcess1)
    fit(data, seed=3)
    assert all(values.pop() != values[0] for values in draws.values()), "each process has its own"
    assert len(draws) == 30 and len({values[0] for values in draws.values()}) == 30
    assert all(first == again != other for first, again, other in draws.values())


OOM = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried"),
    MemoryError(),
]


@pytest.mark.parametrize("error", OOM, ids=["cuda", "cpu", "python"])
def test_out_of_memory_names_what_to_lower(error):
    cfg = OmegaConf.create(
        {
            "trainer": {"micro_batch": 8},
            "model": {"gradient_checkpointing": False},
            "pose": {"train_len": 2048},
            "finetune": {"lora": {"rank": None}},
        }
    )
    with pytest.raises(TrainingError) as caught, explained_memory_errors(cfg):
        raise error
    for words in (
        "trainer.micro_batch (it is 8",
        "model.gradient_checkpointing=true",
        "pose.train_len (it is 2048)",
        "lora",
    ):
        assert words in str(caught.value)
    cfg.trainer.micro_batch, cfg.model.gradient_checkpointing = 1, True
    with pytest.raises(TrainingError) as caught, explained_memory_errors(cfg):
        raise error
    assert "micro_batch" not in str(caught.value) and "gradient_checkpointing" not in str(caught.value)


def test_other_errors_pass_through():
    with pytest.raises(RuntimeError, match="shapes"), explained_memory_errors(None):
        raise RuntimeError("shapes do not fit")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_full_disk_is_said_in_one_line(error, capsys):
    with pytest.raises(SystemExit) as caught, readable_errors():
        raise error
    assert caught.value.code == 1 and "The disk is full" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError), readable_errors():
        raise FileNotFoundError("x")


def test_an_interrupted_run_has_the_status_of_sigterm(capsys):
    with pytest.raises(SystemExit) as caught, readable_errors():
        raise Interrupted("asked to stop at step 3")
    assert caught.value.code == 143 and "asked to stop at step 3" in capsys.readouterr().err


def test_the_number_of_processes_does_not_change_a_global_batch(data):
    """What the loaders of W processes give, step by step, is what one gives."""

    def batches(rank, world, step=0):
        data.trainer = SimpleNamespace(global_step=step, global_rank=rank, world_size=world)
        return [batch["input_ids"] for batch in data.train_dataloader()]

    alone = torch.cat(batches(0, 1)).reshape(15, 4, -1)
    for world in (2, 4):
        parts = [torch.cat(batches(rank, world)).reshape(15, 4 // world, -1) for rank in range(world)]
        assert torch.equal(torch.stack(parts, 2).flatten(1, 2), alone)
    assert torch.equal(torch.cat(batches(0, 1, step=7)).reshape(8, 4, -1), alone[7:])
