"""The LightningModule's way with losses that are not finite, and with memory that runs out."""

import json
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from omegaconf import OmegaConf
from safetensors import SafetensorError
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pose.app.runtime import explained_memory_errors, readable_errors
from pose.data.datamodule import PoseDataModule
from pose.errors import Interrupted, TrainingError
from pose.modeling.attention import BACKENDS
from pose.positions import PoSE
from pose.training import module as pose_module
from pose.training import objectives
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


class Recorder(DummyLogger):
    """Notes what is logged, by step."""

    def __init__(self):
        super().__init__()
        self.rows = {}

    def log_metrics(self, metrics, step=None):
        self.rows.setdefault(step, {}).update(metrics)


def fit(
    data, callbacks=(), steps=15, ckpt_path=None, logger=False, log_every=1, clip=None, precision="32-true", **options
) -> tuple[PoseModule, L.Trainer]:
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
        lambda strategy: model, expected=None, target_len=64, betas=(0.9, 0.99), weight_decay=0.1,
        warmup_steps=0, max_steps=steps, **{"schedule": "constant", "lr": 1e-2} | options,
    )  # fmt: skip
    trainer = L.Trainer(
        max_steps=steps, max_epochs=-1, accumulate_grad_batches=2, accelerator="cpu", logger=logger,
        callbacks=[Weights(), *callbacks], enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=log_every, gradient_clip_val=clip, precision=precision,
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
        honest = objectives.loss_and_example_losses
        seen = []

        def loss_and_example_losses(hidden, head, labels, scored):
            loss, by_example = honest(hidden, head, labels, scored)
            bad = torch.tensor([broken(row, len(seen) * 2 + i) for i, row in enumerate(labels)])
            seen.append(labels)
            nan = hidden.sum() * torch.nan
            return loss + (nan if bad.any() else 0), torch.where(bad, torch.nan, by_example)

        monkeypatch.setattr(objectives, "loss_and_example_losses", loss_and_example_losses)

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
    assert message.count("example (") == 1 and caught.value.changes == ("trainer.on_nonfinite=skip",)


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

    def reduce(self, tensor, reduce_op):
        if reduce_op != "max":
            return tensor
        asked.append(tensor.item())
        return torch.full_like(tensor, len(asked) == 4)

    monkeypatch.setattr("lightning.pytorch.strategies.SingleDeviceStrategy.reduce", reduce)
    module, trainer = fit(data, on_nonfinite="skip")
    assert module.num_skipped == 1 and asked == [0.0] * 15
    before = next(callback.before for callback in trainer.callbacks if isinstance(callback, Weights))
    assert [step for step in range(14) if torch.equal(before[step], before[step + 1])] == [3]


def test_the_logged_loss_is_the_mean_since_the_last(data, monkeypatch):
    honest, losses = objectives.loss_and_example_losses, []

    def record(*arguments):
        losses.append(honest(*arguments))
        return losses[-1]

    monkeypatch.setattr(objectives, "loss_and_example_losses", record)
    _, trainer = fit(data)
    torch.testing.assert_close(
        trainer.callback_metrics["train/loss"], torch.stack([loss for loss, _ in losses[-2:]]).mean()
    )


@pytest.mark.parametrize("log_every", [1, 4])
def test_the_device_is_waited_for_once_a_step(data, monkeypatch, log_every):
    """All that is checked, shown and logged of a step comes in one transfer; what is logged is on the CPU by then."""
    transfers, logged, to_host = [], [], pose_module._to_host
    monkeypatch.setattr(pose_module, "_to_host", lambda tensors: transfers.append(set(tensors)) or to_host(tensors))
    reduced, reduce = [], PoseModule._reduce_recent
    monkeypatch.setattr(PoseModule, "_reduce_recent", lambda self: reduced.append(1) or reduce(self))
    monkeypatch.setattr(PoseModule, "log_dict", lambda self, metrics: logged.append(metrics))
    module, _ = fit(data, steps=12, log_every=log_every, logger=Recorder())
    assert len(transfers) == 12 and len(reduced) == len(logged) == 12 // log_every
    at = [step for step, names in enumerate(transfers, 1) if "numbers" in names]
    assert at == [step for step in range(1, 13) if step % log_every == 0]
    assert all(value.device.type == "cpu" and value.dim() == 0 for metrics in logged for value in metrics.values())
    assert module.shown_loss == pytest.approx(logged[-1]["train/loss"].item(), rel=0.5)


# What is logged


@pytest.fixture
def mixed(data, tmp_path):
    """Half of the examples are retrieval tasks."""
    data = PoseDataModule(
        data.documents, TOKENIZER, PoSE(64, 128), num_examples=60, micro_batch=2, global_batch=4, seed=5,
        cache_dir=tmp_path, synthetic={"copy": 0.5},
    )  # fmt: skip
    data.prepare_data()
    data.setup()
    return data


@pytest.mark.parametrize("log_every", [1, 4])
def test_losses_of_text_and_of_retrieval_are_logged_apart(mixed, monkeypatch, log_every):
    """Each the mean over its examples since the last ones logged, told by where a loss is taken."""
    honest, seen = objectives.loss_and_example_losses, []

    def record(hidden, head, labels, scored):
        loss, by_example = honest(hidden, head, labels, scored)
        kinds = ["retrieval" if (row == -100).any() else "text" for row in labels]
        seen.extend(zip(kinds, by_example.tolist(), strict=True))
        return loss, by_example

    monkeypatch.setattr(objectives, "loss_and_example_losses", record)
    recorder = Recorder()
    fit(mixed, logger=recorder, log_every=log_every)
    del seen[: len(seen) - 60]  # of the guards
    kinds = [mixed.describe(batch, row).endswith("a retrieval task") for batch in range(30) for row in range(2)]
    assert kinds == [kind == "retrieval" for kind, _ in seen] and 20 < sum(kinds) < 40
    steps = range(log_every, 16, log_every)
    assert sorted(recorder.rows) == [step - 1 for step in steps]
    for step in steps:
        window, row = seen[4 * (step - log_every) : 4 * step], recorder.rows[step - 1]
        for kind in ("text", "retrieval"):
            losses = [loss for one, loss in window if one == kind]
            found = row.get(f"train/loss_{kind}")
            assert (found is None) == (not losses), "nothing of an earlier row is said again"
            assert found is None or found == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_without_retrieval_there_is_one_curve(data):
    recorder = Recorder()
    fit(data, logger=recorder)
    assert all("train/loss" in row and "train/loss_text" not in row for row in recorder.rows.values())


@pytest.mark.parametrize("clip", [None, 0.5])
def test_the_rate_and_the_norm_of_the_gradient_are_those_of_the_step(data, clip):
    """Before clipping, and without it too."""

    class Look(L.Callback):
        def __init__(self):
            self.norms, self.rates = {}, {}

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            squares = [p.grad.double().square().sum() for p in pl_module.parameters()]
            self.norms[trainer.global_step] = torch.stack(squares).sum().sqrt().item()
            self.rates[trainer.global_step] = optimizer.param_groups[0]["lr"]

    look, recorder = Look(), Recorder()
    fit(data, [look], logger=recorder, clip=clip, schedule="linear")
    assert {step: row["train/grad_norm"] for step, row in recorder.rows.items()} == pytest.approx(look.norms, rel=1e-4)
    assert {step: row["train/lr"] for step, row in recorder.rows.items()} == pytest.approx(look.rates)
    assert look.rates[0] == 1e-2 and look.rates[14] == pytest.approx(1e-2 / 15)
    assert max(look.norms.values()) > 0.5, "what is clipped is logged as it was"


def test_what_is_logged_changes_no_weight(data):
    weights = []
    for log_every in (1, 7, 100):
        module, _ = fit(data, logger=Recorder(), log_every=log_every)
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])


def test_between_logged_steps_nothing_that_is_logged_is_reduced(data, monkeypatch):
    """A reduction over all processes is one for each logged row, not for each batch; of a flag it is one a step."""
    calls, flags = [], []
    reduce = SingleDeviceStrategy.reduce

    def counted(self, tensor, *arguments, **options):
        (flags if options.get("reduce_op") == "max" else calls).append(self.lightning_module.global_step)
        return reduce(self, tensor, *arguments, **options)

    monkeypatch.setattr(SingleDeviceStrategy, "reduce", counted)
    fit(data, log_every=5)
    assert [step for step in calls if step] == [4] * 3 + [9] * 3 + [14] * 3 and flags == list(range(15))


@pytest.mark.parametrize("stop", [7, 8])
def test_a_run_that_goes_on_logs_what_it_would_have(mixed, tmp_path, stop):
    """Also of the examples between the last row and the checkpoint."""
    whole, rest = Recorder(), Recorder()
    fit(mixed, logger=whole, log_every=4, steps=15)
    _, trainer = fit(mixed, log_every=4, steps=stop)
    trainer.save_checkpoint(tmp_path / "state")
    fit(mixed, logger=rest, log_every=4, steps=15, ckpt_path=tmp_path / "state")
    assert rest.rows == {step: row for step, row in whole.rows.items() if step >= stop} != {}


def test_one_that_goes_on_from_an_older_version_logs_again(mixed, tmp_path):
    """Its checkpoints have the losses alone."""
    _, trainer = fit(mixed, log_every=4, steps=6)
    trainer.save_checkpoint(tmp_path / "state")
    state = torch.load(tmp_path / "state", weights_only=True)
    for name in ("recent_by_kind", "least_loss"):
        del state["pose"][name]
    torch.save(state, tmp_path / "state")
    recorder = Recorder()
    fit(mixed, logger=recorder, log_every=4, ckpt_path=tmp_path / "state")
    assert {"train/loss", "train/loss_text", "train/lr"} <= recorder.rows[7].keys()


def test_the_guards_say_what_they_found(data, capsys):
    fit(data)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Checked")]
    for words in (
        "frequencies are fp32",
        "the first chunk reaches the last, 64 positions apart",
        "loss is the model's",
    ):
        assert words in line


# A loss that has got lost


def test_a_training_that_has_diverged_says_so_and_exports_nothing(data, capsys):
    """Once on the way, and as an error at the end, in place of a guard's or an export's."""
    ended = []

    class End(L.Callback):
        def on_train_end(self, *_):
            ended.append(True)

    with pytest.raises(TrainingError) as caught:
        fit(data, [End()], lr=3.0, log_every=4)
    message = str(caught.value)
    for words in ("diverged: at step 15", "nats per token, where guessing gives 8.3", "finetune.lr (it is 3)"):
        assert words in message
    assert caught.value.anew and caught.value.changes == ("finetune.lr=0.3",) and caught.value.is_everywhere
    assert not ended
    assert capsys.readouterr().out.count("Warning: the training has diverged: at step 4") == 1


@pytest.mark.parametrize(
    ("losses", "diverged"),
    [
        ([8.4, 8.3, 8.35], False),  # random weights, and too few steps
        ([8.4, 7.0, 3.0], False),
        ([3.0, 8.32, 8.32], True),  # a model that could do something, and guesses now
        ([3.0, 8.32, 4.0], False),  # it came back
        ([8.4, 1e7, 2350.0], True),
        ([12.0, 11.0, 10.5], False),  # a far rescaling, which training takes back
        ([2.0, 2.2, 7.0], False),
    ],
)
def test_it_has_diverged_when_it_guesses_and_was_better(data, monkeypatch, losses, diverged):
    def loss_and_example_losses(hidden, head, labels, scored):
        loss = losses[min(len(seen) // 2, 2)] + 0 * head(hidden).sum()
        seen.append(loss)
        return loss, loss.detach().expand(len(labels))

    seen = []
    monkeypatch.setattr(objectives, "loss_and_example_losses", loss_and_example_losses)
    if diverged:
        with pytest.raises(TrainingError, match="diverged"):
            fit(data, steps=3)
    else:
        fit(data, steps=3)


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


def test_what_was_not_logged_yet_comes_back_on_the_device_that_trains(monkeypatch):
    """Before the module is there: Lightning moves it after this hook, where the model is on one GPU or under DDP."""
    module = PoseModule(
        lambda strategy: None, expected=None, target_len=64, betas=(0.9, 0.99), weight_decay=0.0, warmup_steps=0,
        max_steps=4, schedule="constant", lr=1e-2,
    )  # fmt: skip
    module.trainer = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device("meta")), global_rank=0, world_size=1, fit_loop=None
    )
    kept = {
        "recent_losses": torch.ones(1, 3, 1), "recent_by_kind": torch.ones(1, 3, 2 * len(pose_module.KINDS)),
        "least_loss": torch.ones(1), "skipped": (0, 0),
    }  # fmt: skip
    monkeypatch.setattr(pose_module, "loops_at", lambda *_: {})
    module.on_load_checkpoint({"pose": kept, "global_step": 3, "loops": {}})
    assert module.device.type == "cpu"
    found = [*module._recent_losses, *module._recent_by_kind, module._least_loss]
    assert len(found) == 7 and {tensor.device.type for tensor in found} == {"meta"}


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
            "watch": {"every_n_steps": None},
            "objective": {"_target_": "pose.training.objectives.LanguageModel"},
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
    assert caught.value.changes == ("trainer.micro_batch=4",) and "watch" not in str(caught.value)
    cfg.watch.every_n_steps = 10
    with pytest.raises(TrainingError, match=r"a smaller watch\.batch_tokens"), explained_memory_errors(cfg):
        raise error
    cfg.trainer.micro_batch = 1
    with pytest.raises(TrainingError) as caught, explained_memory_errors(cfg):
        raise error
    assert caught.value.changes == ("model.gradient_checkpointing=true",)
    cfg.trainer.micro_batch, cfg.model.gradient_checkpointing = 1, True
    with pytest.raises(TrainingError) as caught, explained_memory_errors(cfg):
        raise error
    assert "micro_batch" not in str(caught.value) and "gradient_checkpointing" not in str(caught.value)
    assert caught.value.changes == ()


@pytest.mark.parametrize("leave_out", ["eval.before=false", "watch.max_short_increase=null"])
def test_out_of_memory_while_measuring_names_what_lowers_that(leave_out):
    cfg = OmegaConf.create({"trainer": {"micro_batch": 8}, "eval_dtype": "float32"})
    with pytest.raises(TrainingError, match="while measuring") as caught, explained_memory_errors(cfg, [leave_out]):
        raise OOM[0]
    assert leave_out in str(caught.value) and "micro_batch" not in str(caught.value)
    assert caught.value.changes == ("eval_dtype=bfloat16",)
    cfg.eval_dtype = "bfloat16"
    with pytest.raises(TrainingError) as caught, explained_memory_errors(cfg, [leave_out]):
        raise OOM[0]
    assert caught.value.changes == (leave_out,)


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
        strategy = SimpleNamespace(root_device=torch.device("cpu"))
        data.trainer = SimpleNamespace(global_step=step, global_rank=rank, world_size=world, strategy=strategy)
        return [batch["input_ids"] for batch in data.train_dataloader()]

    alone = torch.cat(batches(0, 1)).reshape(15, 4, -1)
    for world in (2, 4):
        parts = [torch.cat(batches(rank, world)).reshape(15, 4 // world, -1) for rank in range(world)]
        assert torch.equal(torch.stack(parts, 2).flatten(1, 2), alone)
    assert torch.equal(torch.cat(batches(0, 1, step=7)).reshape(8, 4, -1), alone[7:])


def test_processes_that_have_read_other_text_are_refused(data, monkeypatch):
    """Of one cache at two places the name may differ, not the digest."""
    digest = data.fingerprint.rpartition("-")[2]
    monkeypatch.setattr(pose_module, "gather", lambda value: [value, value])
    fit(data, steps=1)
    shown = []
    monkeypatch.setattr(pose_module, "gather", lambda value: shown.append(value) or [value, "0" * 16])
    with pytest.raises(TrainingError, match=r"^data.documents are not the same everywhere: process 1 has"):
        fit(data, steps=1)
    assert shown == [digest] and len(digest) == 16
