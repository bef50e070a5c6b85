"""What is relied on of private names of Lightning and DeepSpeed; a new version that breaks it fails here."""

from unittest.mock import Mock

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader

from pose.training import compat


class Line(L.LightningModule):
    """One weight; notes the steps at which training starts, steps, ends."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = torch.nn.Linear(1, 1), []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.global_step, batch_idx))
        return self.layer(batch).pow(2).mean()

    def on_train_start(self):
        self.seen.append("start")

    def on_train_end(self):
        self.seen.append("end")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(max_steps, logger=False):
    return L.Trainer(
        max_steps=max_steps, max_epochs=-1, accumulate_grad_batches=2, accelerator="cpu", logger=logger,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip


def data(batches=40):
    return DataLoader(torch.ones(batches, 1), 1)


def test_a_run_that_goes_on_from_its_last_step_comes_to_its_end(tmp_path):
    first = trainer(3)
    first.fit(Line(), data())
    first.save_checkpoint(tmp_path / "state")
    for finish, seen in ((False, []), (True, ["start", "end"])):
        module, again = Line(), trainer(3)
        if finish:
            compat.always_finish(again)
        again.fit(module, data(), ckpt_path=tmp_path / "state", weights_only=True)
        assert module.seen == seen


@pytest.mark.parametrize("kept", [True, False])
def test_the_loop_does_not_ask_process_0_before_every_batch(monkeypatch, kept):
    """As Lightning's does where there are several processes."""
    asked, several = Mock(), trainer(1)
    monkeypatch.setattr(torch.distributed, "broadcast", asked)
    if not kept:
        compat.without_broadcasts(several)

    class AsOneOfTwo(L.Callback):
        def on_train_start(self, trainer, pl_module):
            monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
            monkeypatch.setattr(type(trainer), "world_size", 2)

        def on_train_batch_start(self, *_):
            monkeypatch.setattr(type(several), "world_size", 1)

    several.callbacks.append(AsOneOfTwo())
    several.fit(Line(), data())
    assert asked.call_count == kept


class FromStep(Line):
    """Goes on at the checkpoint's step, with data from its beginning."""

    def on_load_checkpoint(self, checkpoint):
        checkpoint["loops"]["fit_loop"] = compat.loops_at(self.trainer, checkpoint["global_step"])


class Recorder(DummyLogger):
    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, {name: value for name, value in metrics.items() if name != "epoch"}))


class Logs(FromStep):
    """Logs a at every step, and b at even ones."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if batch_idx % 2:
            compat.forget_logged(self.trainer, ("train/b",))
            names = ("train/a", "train/b") if self.global_step % 2 == 0 else ("train/a",)
            self.log_dict(dict.fromkeys(names, float(self.global_step)))


def test_loops_begin_anew_at_a_step_of_another_accumulation(tmp_path):
    """Steps and rows go on from there, batches from the beginning; Lightning itself would skip batches or steps."""
    first = trainer(3)
    first.fit(Line(), data())
    first.save_checkpoint(tmp_path / "state")
    recorder, module = Recorder(), Logs()
    trainer(5, recorder).fit(module, data(), ckpt_path=tmp_path / "state", weights_only=True)
    assert module.seen == ["start", (3, 0), (3, 1), (4, 2), (4, 3), "end"]
    assert [step for step, _ in recorder.rows] == [3, 4]


def test_what_is_not_logged_again_is_in_no_later_row():
    recorder = Recorder()
    trainer(4, recorder).fit(Logs(), data())
    assert recorder.rows == [
        (0, {"train/a": 1.0}),
        (1, {"train/a": 2.0, "train/b": 2.0}),
        (2, {"train/a": 3.0}),
        (3, {"train/a": 4.0, "train/b": 4.0}),
    ]
    compat.forget_logged(trainer(1), ("train/a",))  # before there is anything


def test_the_processes_that_share_weights_can_be_set():
    strategy = ModelParallelStrategy()
    assert strategy._data_parallel_size == "auto", "which is the machines alone"
    compat.set_data_parallel_size(strategy, 6)
    assert strategy._data_parallel_size == 6


def test_the_anonymous_setting_of_wandb_is_not_passed_on(tmp_path):
    pytest.importorskip("wandb")
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    assert "anonymous" in logger._wandb_init, "a Lightning that does not pass it needs no help"
    assert "anonymous" not in compat.without_anonymous(logger)._wandb_init


@pytest.fixture
def deepspeed(monkeypatch):
    """The package, on a machine without a GPU."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    return pytest.importorskip("deepspeed")


def test_deepspeeds_config_has_batch_and_precision(deepspeed):
    strategy = L.pytorch.strategies.DeepSpeedStrategy(stage=2)
    strategy._precision_plugin = Mock(precision="bf16-mixed")
    strategy._lightning_module = Mock(trainer=Mock(accumulate_grad_batches=4, gradient_clip_val=None))
    strategy._auto_select_batch_size = lambda: 2
    config = compat.deepspeed_config(strategy)
    assert config["bf16"]["enabled"] and config["gradient_accumulation_steps"] == 4 and config is strategy.config


def test_deepspeeds_engine_tells_the_norm_of_a_gradient(deepspeed):
    class Engine:
        norm = None

        def get_global_grad_norm(self):
            return self.norm

    assert hasattr(deepspeed.DeepSpeedEngine, "get_global_grad_norm")
    assert isinstance(L.pytorch.strategies.DeepSpeedStrategy.deepspeed_engine, property)
    strategy = type("Strategy", (), {"deepspeed_engine": Engine()})()
    assert compat.deepspeed_gradient_norm(strategy) is None
    Engine.norm = torch.tensor(2.5)
    assert compat.deepspeed_gradient_norm(strategy) == 2.5


def test_zero_3_leaves_no_patch_behind(deepspeed):
    honest = torch.nn.functional.linear
    try:
        init = deepspeed.runtime.zero.partition_parameters.InsertPostInitMethodToModuleSubClasses
        init.linear_bk = honest
        torch.nn.functional.linear = lambda *arguments: None
        compat.undo_deepspeed_patches()
        assert torch.nn.functional.linear is honest
    finally:
        torch.nn.functional.linear = honest
        del init.linear_bk
