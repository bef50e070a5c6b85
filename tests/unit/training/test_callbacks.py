"""What a user sees of a training: the bar, and the speed."""

import re
import time
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch.utils.data import DataLoader

from pose.training import callbacks
from pose.training.callbacks import ProgressBar, Throughput

TOKENS = 8  # of a batch


class Line(L.LightningModule):
    """One weight, batches of 2 x 4 tokens."""

    def __init__(self, fails_at=None):
        super().__init__()
        self.layer, self.fails_at = torch.nn.Linear(1, 1), fails_at

    def training_step(self, batch, batch_idx):
        if self.global_step == self.fails_at:
            raise ValueError("here")
        return self.layer(batch["input_ids"].float().mean()[None]).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Recorder(DummyLogger):
    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, metrics))


def fit(*given, steps=6, log_every=1, accumulate=1, fails_at=None):
    recorder = Recorder()
    trainer = L.Trainer(
        max_steps=steps, max_epochs=-1, accumulate_grad_batches=accumulate, accelerator="cpu", logger=recorder,
        callbacks=list(given), enable_checkpointing=False, enable_model_summary=False, log_every_n_steps=log_every,
        enable_progress_bar=any(isinstance(one, ProgressBar) for one in given),
    )  # fmt: skip
    items = [{"input_ids": torch.ones(4, dtype=torch.long)}] * 200
    trainer.fit(Line(fails_at), DataLoader(items, 2))
    return recorder.rows


def drawn(capsys) -> list[str]:
    return [line for line in capsys.readouterr().out.replace("\n", "\r").split("\r") if "|" in line]


def test_the_bar_is_drawn_once_for_each_step(capsys):
    fit(ProgressBar(), steps=4, accumulate=3)
    lines = drawn(capsys)
    assert [int(re.search(r"\| (\d+)/4 \[", line)[1]) for line in lines] == [0, 1, 2, 3, 4]
    assert all(line.startswith("Training:") for line in lines)
    assert "step/s" in lines[-1] and lines[-1].startswith("Training: 100%")


def test_a_job_that_fails_closes_its_bar(capsys):
    """Or the next job's is drawn on a line below it."""
    bar = ProgressBar()
    with pytest.raises(ValueError, match="here"):
        fit(bar, fails_at=2)
    assert bar.bar.disable, "closed"
    before = drawn(capsys)
    fit(ProgressBar(), steps=2)
    assert before and "\x1b[A" not in "".join(drawn(capsys))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_speed_is_that_of_whole_steps(monkeypatch, accumulate):
    """Once a logged step, over all of its batches: the clock goes a second for each."""
    now = [0.0]

    class Clock(L.Callback):
        def on_train_batch_start(self, *_):
            now[0] += 1.0

    clock = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(callbacks, "time", clock)
    rows = fit(Clock(), Throughput(), log_every=2, accumulate=accumulate)
    found = [(step, row) for step, row in rows if "cost/tokens_per_second" in row]
    assert [step for step, _ in found] == [1, 3, 5]
    for _, row in found:
        assert row["cost/tokens_per_second"] == pytest.approx(TOKENS)
        assert row["cost/step_seconds"] == pytest.approx(accumulate)


def test_each_is_logged_once_a_step(monkeypatch):
    calls = []
    log_dict = L.LightningModule.log_dict

    def counted(self, metrics, *arguments, **options):
        calls.append((self.global_step, sorted(metrics)))
        return log_dict(self, metrics, *arguments, **options)

    monkeypatch.setattr(L.LightningModule, "log_dict", counted)
    fit(Throughput(), steps=4, log_every=2, accumulate=3)
    speed = ["data_seconds", "optimizer_seconds", "seconds", "step_seconds", "tokens", "tokens_per_second"]
    assert calls == [(step, [f"cost/{name}" for name in speed]) for step in (2, 4)]


def test_a_step_is_split_into_what_it_waits_for_and_computes(monkeypatch):
    """Of two batches a step: a second of waiting and four of computing each, then two of the optimizer."""
    now, logged = [0.0], []
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    throughput = Throughput()
    throughput.flops_per_token, throughput.peak_flops = 3.0, 12.0
    module = SimpleNamespace(device=torch.device("cpu"), log_dict=logged.append, stepping_since=None)
    trainer = SimpleNamespace(global_step=0, world_size=1, log_every_n_steps=2)
    batch = {"input_ids": torch.ones(2, 12)}
    throughput.on_train_start(trainer, module)
    for batch_idx in range(8):
        now[0] += 1
        throughput.on_train_batch_start(trainer, module, batch, batch_idx)
        now[0] += 4
        if batch_idx % 2:
            module.stepping_since = now[0]
            now[0] += 2
            trainer.global_step += 1
        throughput.on_train_batch_end(trainer, module, None, batch, batch_idx)
        if batch_idx == 3:
            with throughput.paused():
                now[0] += 100
    assert len(logged) == 2
    for i, metrics in enumerate(logged, 1):
        assert {name: value.item() for name, value in metrics.items()} == {
            "cost/tokens_per_second": 4.0, "cost/step_seconds": 12.0, "cost/data_seconds": 2.0,
            "cost/optimizer_seconds": 2.0, "cost/mfu": 1.0,
            "cost/seconds": 24.0 * i, "cost/tokens": 96.0 * i, "cost/flops": 288.0 * i,
        }  # fmt: skip
    assert throughput.shown == {"tokens/s": 4.0, "MFU": 1.0}


def test_peak_memory_is_of_training_alone(monkeypatch):
    """Not of what was measured before it, nor of what is measured in between."""
    peak = [9 * 2**30]
    memory = SimpleNamespace(
        max_memory_allocated=lambda device: peak[0],
        reset_peak_memory_stats=lambda device: peak.__setitem__(0, 2**30),
        get_device_name=lambda device: "NVIDIA H100 80GB HBM3",
    )
    monkeypatch.setattr(callbacks.torch, "cuda", memory)
    throughput, logged = Throughput(), []
    module = SimpleNamespace(device=torch.device("cuda"), log_dict=logged.append)
    trainer = SimpleNamespace(global_step=0, world_size=1, log_every_n_steps=1, precision="bf16-mixed")
    batch = {"input_ids": torch.ones(2, 4)}

    def step(bytes_needed):
        peak[0], trainer.global_step = max(peak[0], bytes_needed), trainer.global_step + 1
        throughput.on_train_batch_end(trainer, module, None, batch, 0)
        return logged[-1]["cost/peak_memory_gib"]

    throughput.on_train_start(trainer, module)
    with throughput.paused():  # a watch before the first step
        peak[0] = 8 * 2**30
    assert step(3 * 2**30) == 3
    peak[0] = 5 * 2**30  # of a step that is not logged
    with throughput.paused():
        peak[0] = 20 * 2**30
    assert step(4 * 2**30) == 5, "the largest of the whole training"
    assert throughput.peak_flops == 989e12


def test_the_seconds_of_a_run_add_up_over_its_starts():
    throughput = Throughput()
    throughput.load_state_dict({"seconds": 100.0})
    throughput.on_train_start(SimpleNamespace(global_step=3), SimpleNamespace(device=torch.device("cpu")))
    time.sleep(0.01)
    assert 100 < throughput.state_dict()["seconds"] < 101
