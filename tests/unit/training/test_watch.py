"""What is measured while a model trains: when, that it changes nothing, the best model, the gate on short texts."""

import copy
import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch.loggers.logger import DummyLogger
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pose.app import schema
from pose.app.preflight import plan_training
from pose.app.run import Run
from pose.data.datamodule import PoseDataModule
from pose.errors import ConfigError, DataError
from pose.evaluation.options import EvalOptions
from pose.evaluation.suite import Suite
from pose.evaluation.task import Estimate, Metric
from pose.files import write_json
from pose.modeling.attention import BACKENDS
from pose.positions import PoSE
from pose.training.callbacks import Export, Throughput
from pose.training.checkpoints import Checkpoints, find_checkpoint
from pose.training.module import PoseModule
from pose.training.watch import BEST_FILE, Watch, WatchOptions, check_best, read_best, summary

CONF = Path(__file__).resolve().parents[3] / "conf"
TOKENIZER = AutoTokenizer.from_pretrained("assets/tiny")
STEPS = 5
schema.register()


@pytest.fixture
def documents(tmp_path) -> Path:
    file = tmp_path / "documents.jsonl"
    texts = [f"{i} and {i} is {i}, and the {i} of a book is a leaf. " * 60 for i in range(6)]
    file.write_text("".join(json.dumps({"id": f"doc{i}", "text": text}) + "\n" for i, text in enumerate(texts)))
    return file


@pytest.fixture
def data(documents, tmp_path):
    """Two examples a batch, two batches a step."""
    data = PoseDataModule(
        [documents], TOKENIZER, PoSE(32, 128), num_examples=60, micro_batch=2, global_batch=4, seed=5,
        cache_dir=tmp_path,
    )  # fmt: skip
    data.prepare_data()
    data.setup()
    return data


@pytest.fixture
def suite(documents, tmp_path) -> Suite:
    """Of all that needs no more than a tokenizer and a text."""
    options = EvalOptions(
        tasks=["perplexity", "passkey"], documents=documents, lengths=[128, 200], windows=2, tail=150, bin=90,
        stride=120, trials=2, max_documents=2, batch_tokens=400,
    )  # fmt: skip
    return Suite(options, TOKENIZER, documents, tmp_path)


class FakeSuite:
    """Gives prepared metrics in turn, and notes the steps at which it was asked and the mode of the model."""

    def __init__(self, *metrics: dict, lengths=(64,)):
        self.prepared, self.lengths, self.tasks = list(metrics), list(lengths), []
        self.seen = []

    def run(self, model, progress=True):
        model.eval()
        self.seen.append((model.training, torch.is_grad_enabled(), progress))
        return {name: Estimate(value) for name, value in self.prepared[len(self.seen) - 1].items()}

    def metrics(self):
        return {}  # names tell enough


class Recorder(DummyLogger):
    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, metrics))

    @property
    def watched(self) -> list[tuple]:
        return [(step, metrics) for step, metrics in self.rows if any(name.startswith("val/") for name in metrics)]


def fit(data, *callbacks, steps=STEPS, ckpt_path=None, lr=1e-2, precision="32-true") -> tuple[PoseModule, Recorder]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(TOKENIZER), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            attention_dropout=0.1, max_position_embeddings=128, attn_implementation=BACKENDS["sdpa"],
        )
    )  # fmt: skip
    model.train()
    module = PoseModule(
        lambda strategy: model, expected=None, target_len=128, lr=lr, betas=(0.9, 0.99), weight_decay=0.1,
        warmup_steps=0, max_steps=STEPS, schedule="constant",
    )  # fmt: skip
    recorder = Recorder()
    trainer = L.Trainer(
        max_steps=steps, max_epochs=-1, accumulate_grad_batches=2, accelerator="cpu", logger=recorder,
        callbacks=list(callbacks), enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        log_every_n_steps=1, precision=precision,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return module, recorder


def weights(module: PoseModule) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize(("before", "steps"), [(True, [-1, 1, 3, 4]), (False, [1, 3, 4])])
def test_it_measures_before_the_first_step_every_n_steps_and_after_the_last(data, before, steps):
    """The step of a row is that of the optimizer step before it, as Lightning counts them: from 0."""
    fake = FakeSuite(*({"ppl@64": 9.0 - i} for i in range(4)))
    module, recorder = fit(data, Watch(fake, 2, before=before))
    assert recorder.watched == [(step, {"val/ppl@64": 9.0 - i}) for i, step in enumerate(steps)]
    assert fake.seen == [(False, False, False)] * len(steps)
    assert module.model.training, "and trains on in train mode"
    losses = [step for step, metrics in recorder.rows if "train/loss" in metrics]
    assert losses == list(range(STEPS))


def test_it_changes_no_weight_and_no_loss(data, suite):
    """With dropout, which a stray random number would move."""
    plain, without = fit(data)
    watched, recorder = fit(data, Watch(suite, 1))
    assert torch.equal(weights(plain), weights(watched))
    rows = [row for row in recorder.rows if row not in recorder.watched]
    assert [metrics["train/loss"] for _, metrics in rows] == [metrics["train/loss"] for _, metrics in without.rows]
    values = [metrics["val/ppl@200"] for _, metrics in recorder.watched]
    assert len(values) == STEPS + 1 and values[-1] < 0.8 * values[0], "it is the model that trains"


def test_a_metric_is_that_of_the_model_after_the_step(data, suite):
    """As measured on a copy of it, outside of the training."""
    copies = []

    class Copy(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 2 and not copies:
                copies.append(copy.deepcopy(pl_module.model))

    _, recorder = fit(data, Copy(), Watch(suite, 2))
    expected = {f"val/{name}": estimate.value for name, estimate in suite.run(copies[0], progress=False).items()}
    assert dict(recorder.watched)[1] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "found", "best_step"),
    [
        ("passkey@64", [0.9, 0.1, 0.5, 0.5], 4),
        ("passkey@64", [0.9, math.nan, math.nan, 0.0], 5),
        ("tail_ppl@64", [1.0, 7.0, 8.0, 9.0], 2),
        ("tail_ppl@64", [1.0, 7.0, 7.0, math.nan], 2),
        ("bits_per_byte@64", [1.0, math.nan, 7.0, 3.0], 5),
        ("ruler/cwe@64", [1.0, 0.25, 0.5, 0.25], 4),
    ],
)
def test_the_best_step_is_kept_the_first_of_equals_and_never_one_before_training(
    data, tmp_path, name, found, best_step
):
    exported = []
    export = Export(TOKENIZER, tmp_path / "best", torch.float32)
    export.save = lambda trainer, module: (exported.append(trainer.global_step), export.folder.mkdir(exist_ok=True))
    watch = Watch(FakeSuite(*({name: value} for value in found)), 2, best=name, export=export)
    fit(data, watch)
    assert watch.found["step"] == exported[-1] == best_step
    assert read_best(tmp_path / "best") == watch.found
    assert watch.found["metric"] == name and watch.found["value"] == found[[0, 2, 4, 5].index(best_step)]


def test_the_best_folder_has_the_model_of_its_step(data, tmp_path):
    """A plain folder whose logits are those of the live model then; the live one is as it would have been."""
    live, tokens = {}, torch.arange(40)[None]

    class Logits(L.Callback):
        @torch.no_grad()
        def on_train_batch_end(self, trainer, pl_module, *_):
            pl_module.model.eval()
            live[trainer.global_step] = pl_module.model(tokens).logits
            pl_module.model.train()

    export = Export(TOKENIZER, tmp_path / "best", torch.float32)
    found = [{"ppl@64": value} for value in (9.0, 5.0, 3.0, 4.0)]
    watch = Watch(FakeSuite(*found), 2, best="ppl@64", export=export)
    watched, _ = fit(data, Logits(), watch)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "best", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, live[4], rtol=1e-5, atol=1e-5)
    assert (live[4] - live[5]).abs().max() > 1e-3, "another step has others"
    plain, _ = fit(data)
    assert torch.equal(weights(plain), weights(watched))
    assert sorted(path.name for path in tmp_path.glob("*best*")) == ["best"]


def test_a_run_that_goes_on_watches_as_if_it_had_never_stopped(data, tmp_path):
    """From a checkpoint before the best step; what was exported beyond it stands until it comes again."""
    values = [9.0, 5.0, 6.0, 4.0, 4.5, 4.0]
    increases = [0.0, 0.06, 0.08, 0.08, 0.12, 0.18]

    def watch(folder, first=0):
        export = Export(TOKENIZER, tmp_path / folder / "best", torch.float32)
        short = FakeSuite(*({"ppl@64": 10 * (1 + increase)} for increase in increases[first:]))
        fake = FakeSuite(*({"tail_ppl@64": value} for value in values[first:]))
        watch = Watch(fake, 1, short=short, max_short_increase=0.05, best="tail_ppl@64", export=export)
        watch.untuned = 10.0
        return watch

    def checkpoints(folder, saved=None):
        return Checkpoints(tmp_path / folder / "checkpoints", 2, 9, {}, saved)

    whole = watch("whole")
    expected, rows = fit(data, checkpoints("whole"), whole)
    fit(data, checkpoints("run"), watch("run"), steps=4)
    best = read_best(tmp_path / "run" / "best")
    assert best["step"] == 3 and best["max_steps"] == 4
    file = tmp_path / "run" / "best" / BEST_FILE
    write_json(file, best | {"max_steps": whole.found["max_steps"]})  # as if it had been killed
    checkpoint = find_checkpoint(tmp_path / "run" / "checkpoints")
    earlier = checkpoint.folder.with_name("step-2")
    resumed = watch("run", first=3)
    got, more = fit(data, checkpoints("run", saved=2), resumed, ckpt_path=earlier / "state")
    assert torch.equal(weights(got), weights(expected))
    assert more.watched == [row for row in rows.watched if row[0] >= 2]
    assert resumed.found == whole.found and whole.found["step"] == 3
    expected_state = {"watched": 5, "warned": pytest.approx(0.18), "increase": pytest.approx(0.18)}
    assert resumed.state_dict() == whole.state_dict() == expected_state
    theirs, ours = (AutoModelForCausalLM.from_pretrained(tmp_path / name / "best") for name in ("whole", "run"))
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), ours.parameters(), strict=True))


@pytest.mark.parametrize(("max_steps", "taken"), [(6, True), (9, False)])
def test_a_best_of_a_step_that_comes_again_under_another_schedule_is_left(data, tmp_path, max_steps, taken):
    """It was of other weights than the step will have."""
    export = Export(TOKENIZER, tmp_path / "best", torch.float32)
    watch = Watch(FakeSuite(*[{"tail_ppl@64": 5.0}] * 9), 1, best="tail_ppl@64", export=export)
    fit(data, Checkpoints(tmp_path / "checkpoints", 2, 9, {}), watch, steps=4)
    best = read_best(tmp_path / "best") | {"step": 4, "max_steps": 6}
    write_json(tmp_path / "best" / BEST_FILE, best)
    resumed = Watch(FakeSuite({"tail_ppl@64": 5.0}), 1, best="tail_ppl@64", export=export)
    resumed.load_state_dict({"watched": 2, "warned": None})
    trainer = SimpleNamespace(
        is_global_zero=True, global_step=2, max_steps=max_steps, strategy=SimpleNamespace(broadcast=lambda one: one)
    )
    resumed.on_train_start(trainer, None)
    assert (resumed.found == best) is taken and (taken or resumed.found is None)


def test_a_run_that_went_without_a_watch_goes_on_with_one(data, tmp_path):
    """Two batches a step: the first one after the checkpoint ends at its step, which is not measured without before."""
    fit(data, Checkpoints(tmp_path, 2, 1, {}), steps=4)
    for before, steps in ((False, [4]), (True, [3, 4])):
        watch = Watch(FakeSuite(*[{"ppl@64": 3.0}] * len(steps)), 2, before=before)
        _, recorder = fit(data, watch, ckpt_path=find_checkpoint(tmp_path).state)
        assert [step for step, _ in recorder.watched] == steps


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_it_measures_in_the_precision_it_trains_in(data, precision):
    class Noting(FakeSuite):
        def run(self, model, progress=True):
            mixed.append(torch.is_autocast_enabled("cpu"))
            return super().run(model, progress)

    mixed = []
    fit(data, Watch(Noting(*[{"ppl@64": 3.0}] * 2), 9), precision=precision)
    assert mixed == [precision == "bf16-mixed"] * 2


@pytest.mark.parametrize(
    ("name", "sign"),
    [
        ("ppl@64", -1), ("tail_ppl@64", -1), ("sliding_ppl@64", -1), ("position_ppl@0-64", -1),
        ("bits_per_byte@64", -1), ("passkey@64", 1), ("needle@64", 1), ("needle@64/0.5", 1), ("ruler/vt@64", 1),
        ("harness/boolq", 1), ("needle_gain@64", 1), ("needle_gain@64/0.5", 1), ("needle_gain_kept@64", 1),
    ],
)  # fmt: skip
def test_what_is_better(name, sign):
    watch = Watch(FakeSuite(), 1, best=name)
    watch.found = {"value": 0.5}
    assert [watch._improves({name: 0.5 + sign * change}) for change in (0.1, 0.0, -0.1)] == [True, False, False]


def test_a_best_value_belongs_to_what_was_measured():
    def under(**units):
        return Watch(
            SimpleNamespace(tasks=[SimpleNamespace(name=n, units=lambda n=n: units[n]) for n in units]), 1
        )._under()

    prints = [under(a={"8": 1}), under(a={"8": 2}), under(b={"8": 1}), under(a={"8": 1}, b={"8": 1})]
    assert len(set(prints)) == 4 and under(a={"8": 1}) == prints[0]


def test_a_best_of_another_metric_or_measurement_or_shape_is_not_taken_over(data, tmp_path, capsys):
    export = Export(TOKENIZER, tmp_path / "best", torch.float32)
    export.save = lambda trainer, module: export.folder.mkdir(exist_ok=True)
    watch = Watch(FakeSuite(*[{"ppl@64": 3.0}] * 4), 2, best="ppl@64", export=export)
    fit(data, Checkpoints(tmp_path, 2, 1, {}), watch, steps=4)
    kept = watch.found
    shapes = ({"value": "3.0"}, {"step": None}, {"step": "2"}, {"metric": 1}, {"under": ["x"]}, {"value": [3.0]})
    for change in ({}, {"metric": "ppl@32"}, {"under": "other"}, None, *shapes):
        content = "{" if change is None else json.dumps(kept | change)
        (tmp_path / "best" / "pose_best.json").write_text(content)
        again = Watch(FakeSuite({"ppl@64": 4.0}), 2, best="ppl@64", export=export)
        fit(data, again, ckpt_path=find_checkpoint(tmp_path).state)
        assert again.found["step"] == (2 if change == {} else 5)
        said = capsys.readouterr().out
        assert ("the best model there is ignored" in said) == (change is None or change in shapes)


@pytest.mark.parametrize(
    ("increases", "steps"),
    [
        # More than 5 % above, then more than 5 points above what was last warned of; never before the first step.
        ([0.5, 0.04, 0.06, 0.10, 0.12, 0.03], [2, 4]),
        # Rescaling has raised it, and training takes it back: nothing at step 1, however much is left.
        ([0.44, 0.44, 0.30, 0.20, 0.08, 0.04], []),
        # It ends above the limit, though it still falls.
        ([0.44, 0.43, 0.30, 0.20, 0.10, 0.07], [5]),
        # It has stopped falling.
        ([0.44, 0.40, 0.20, 0.20, 0.19, 0.18], [3]),
        # Training itself raises it.
        ([0.00, 0.10, 0.11, 0.12, 0.13, 0.14], [2]),
        ([0.00, 0.03, 0.02, 0.03, 0.02, 0.03], []),
    ],
)
def test_the_gate_warns_of_what_training_does_not_take_back(data, capsys, increases, steps):
    short = FakeSuite(*({"ppl@64": 10 * (1 + increase)} for increase in increases))
    watch = Watch(FakeSuite(*[{"ppl@96": 7.0}] * 6), 1, short=short, max_short_increase=0.05)
    watch.untuned = 10.0
    _, recorder = fit(data, watch)
    logged = [metrics["val/short_ppl_increase"] for _, metrics in recorder.watched]
    assert logged == pytest.approx(increases)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Warning")]
    assert [int(line.split("at step ")[1][0]) for line in warnings] == steps
    if warnings:
        increase = increases[steps[0]]
        for word in (
            "window of 64 tokens", f"{10 * (1 + increase):.2f}", f"{increase:.1%} above", "10.00",
            "watch.max_short_increase=0.05", "more steps (trainer.max_steps)", "finetune.lr",
        ):  # fmt: skip
            assert word in warnings[0]


def test_a_run_of_one_watch_says_at_its_end_that_short_texts_are_harder(data, capsys):
    short = FakeSuite({"ppl@64": 14.4}, {"ppl@64": 14.0})
    watch = Watch(FakeSuite(*[{"ppl@96": 7.0}] * 2), STEPS, short=short, max_short_increase=0.05)
    watch.untuned = 10.0
    fit(data, watch)
    assert f"at step {STEPS}, 40.0% above" in capsys.readouterr().out


@pytest.mark.parametrize(("untuned", "limit"), [(None, 0.05), (10.0, None)])
def test_without_a_limit_or_an_untuned_model_nothing_is_warned_of(data, capsys, untuned, limit):
    short = FakeSuite(*[{"ppl@64": 99.0}] * 2)
    watch = Watch(FakeSuite(*[{"ppl@96": 7.0}] * 2), 9, short=short, max_short_increase=limit)
    watch.untuned = untuned
    fit(data, watch)
    assert "Warning" not in capsys.readouterr().out


def test_measuring_is_no_time_of_training(data):
    class Slow(FakeSuite):
        def run(self, model, progress=True):
            time.sleep(0.2)
            return super().run(model, progress)

    throughput = Throughput()
    begin = time.perf_counter()
    _, recorder = fit(data, throughput, Watch(Slow(*[{"ppl@64": 3.0}] * 6), 1, throughput=throughput))
    taken = time.perf_counter() - begin - 6 * 0.2
    assert 0 < throughput.seconds < taken
    seconds = [metrics["cost/step_seconds"] for _, metrics in recorder.rows if "cost/step_seconds" in metrics]
    assert len(seconds) == STEPS and sum(seconds) < taken, "of a step too"


@pytest.mark.parametrize("best", ["passkey@1024", "paskey@128", "tail_ppl@128", "loss", "position_ppl@0-91"])
def test_a_misspelt_best_is_refused_and_what_there_is_named(suite, best):
    options = WatchOptions(every_n_steps=5, best=best)
    with pytest.raises(ConfigError) as caught:
        check_best(options, suite)
    message = str(caught.value)
    assert f"watch.best='{best}'" in message and "ppl@128, bits_per_byte@128, ppl@200" in message
    assert "passkey@128, passkey@200" in message
    options.best = "position_ppl@90-180"
    check_best(options, suite)


def test_the_best_depth_of_a_needle_is_named_as_it_is_measured(documents, tmp_path):
    """0.333333 is no name of 1/3, and was accepted."""
    options = EvalOptions(tasks=["needle"], lengths=[256], trials=1, depths=[1 / 3], haystack=documents)
    suite = Suite(options, TOKENIZER, None, tmp_path)
    with pytest.raises(ConfigError, match=r"'needle@256/0\.333333' is not measured: .*needle@256/0\.3333333333333333"):
        check_best(WatchOptions(every_n_steps=5, best="needle@256/0.333333"), suite)
    check_best(WatchOptions(every_n_steps=5, best="needle@256/0.3333333333333333"), suite)


def test_the_best_step_by_the_gain_of_needles(data, documents, tmp_path):
    """Measured on the model that trains; a share that is not given is never the best."""
    options = EvalOptions(tasks=["needle_gain"], lengths=[300], trials=5, haystack=documents)
    suite = Suite(options, TOKENIZER, None, tmp_path, window=256)
    check_best(WatchOptions(every_n_steps=2, best="needle_gain_kept@300"), suite)
    export = Export(TOKENIZER, tmp_path / "best", torch.float32)
    export.save = lambda trainer, module: export.folder.mkdir(exist_ok=True)
    watch = Watch(suite, 2, best="needle_gain@300", export=export)
    module, recorder = fit(data, watch)
    found = {step: metrics["val/needle_gain@300"] for step, metrics in recorder.watched}
    best = max(list(found)[1:], key=found.get)
    assert (watch.found["step"], watch.found["value"]) == (best + 1, found[best]) and len(set(found.values())) == 4
    again = suite.run(module.model, progress=False)
    assert found[STEPS - 1] == pytest.approx(again["needle_gain@300"].value, rel=1e-4, abs=1e-7)
    kept = Watch(suite, 2, best="needle_gain_kept@300")
    assert not kept._improves({"needle_gain_kept@300": math.nan}) and kept._improves({"needle_gain_kept@300": -0.1})
    plain, _ = fit(data)
    assert torch.equal(weights(plain), weights(module))


def test_a_best_whose_direction_nobody_knows_is_refused():
    suite = SimpleNamespace(metrics=lambda: {"harness/mine": Metric("mine", None, ".3f")})
    with pytest.raises(ConfigError, match=r"'harness/mine' cannot be chosen: .*whether higher is better"):
        check_best(WatchOptions(every_n_steps=5, best="harness/mine"), suite)


def test_the_line_shows_each_thing_once():
    metrics = {
        "ppl@48": 12.0, "ppl@96": 13.0, "tail_ppl@96": 14.123456, "bits_per_byte@48": 1.0, "position_ppl@0-40": 3.0,
        "passkey@96": 0.85, "needle@96": 0.5, "needle@96/0.25": 0.5, "harness/boolq": 0.625,
        "short_ppl_increase": 0.0234,
    }  # fmt: skip
    assert summary(metrics) == (
        "ppl@48 12.0, tail_ppl@96 14.1, passkey@96 85%, needle@96 50%, harness/boolq 62.5%, "
        "perplexity of short texts +2.3%"
    )


def test_the_line_has_no_percentages_of_what_is_no_share():
    described = {"harness/mine": Metric("mine", False, ".3f"), "harness/other": Metric("other", True, ".1%")}
    values = {"harness/mine": 0.875, "harness/other": 0.875, "harness/unknown": 0.875}
    assert summary(values, described) == "harness/mine 0.875, harness/other 87.5%, harness/unknown 0.875"


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def plan(tmp_path, cache):
    def plan_(*overrides, experiment="smoke"):
        common = [f"experiment={experiment}", "eval=none", f"cache_dir={cache}", "trainer.accelerator=cpu"]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("train", [*common, *overrides])
        return plan_training(cfg, tmp_path)

    return plan_


def test_off_it_costs_nothing(plan):
    planned = plan("watch.documents=nowhere.jsonl", "watch.tasks=[perplexity]")
    assert planned.watch is None
    assert not any(isinstance(callback, Watch) for callback in planned.trainer.callbacks)


def test_on_it_measures_the_window_and_the_target(plan, tmp_path):
    watch = plan("watch.every_n_steps=2", "watch.best=passkey@512").watch
    assert watch.suite.lengths == [256, 512] and watch.short.lengths == [256]
    assert watch.suite.document_ids == watch.short.document_ids != []
    assert watch.short.options.tasks == ["perplexity"]
    assert watch.export.folder == tmp_path / "best"


def test_short_texts_are_of_the_same_documents(plan, tmp_path):
    """Also where some are too short for the target."""
    texts = {"long": "a leaf of a book " * 400, "short": "a leaf of a book " * 60}
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in texts.items()))
    watch = plan("watch.every_n_steps=2", f"watch.documents={file}").watch
    assert watch.suite.document_ids == watch.short.document_ids == ["long"]
    watch = plan("watch.every_n_steps=2", f"watch.documents={file}", "watch.tasks=[passkey]").watch
    assert watch.short.document_ids == ["long", "short"], "passkey needs none"


@pytest.mark.parametrize("override", ["watch.lengths=[128]", "watch.tasks=[passkey]"])
def test_documents_that_are_short_of_the_window_are_no_error(plan, tmp_path, capsys, override):
    """Short texts are watched by default, and what was asked for does not need them."""
    file = tmp_path / "own.jsonl"
    file.write_text(json.dumps({"id": "a", "text": "a leaf of a book " * 30}) + "\n")
    watch = plan("watch.every_n_steps=2", f"watch.documents={file}", override).watch
    assert watch.short is None
    assert "short texts are not watched, since no document has 256 tokens (the model's own" in capsys.readouterr().out


@pytest.mark.parametrize("override", ["watch.max_short_increase=null", "watch.documents=null"])
def test_without_something_to_compare_there_is_no_gate(plan, override):
    assert plan("watch.every_n_steps=2", "watch.tasks=[passkey]", override).watch.short is None


def test_a_model_from_random_weights_has_nothing_to_lose(plan):
    documents = "data.documents=assets/corpora/books.train.jsonl.gz"
    assert plan("watch.every_n_steps=2", documents, experiment="pretrain_tiny").watch.short is None


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        (["watch.best=passkey@512"], ConfigError, ["watch.best=passkey@512", "watch.every_n_steps"]),
        (["watch.every_n_steps=0"], ConfigError, ["watch.every_n_steps=0", "at least 1"]),
        (["watch.every_n_steps=2", "watch.max_short_increase=0"], ConfigError, ["max_short_increase=0", "above 0"]),
        (["watch.every_n_steps=2", "watch.best=passkey@2048"], ConfigError, ["passkey@2048", "passkey@512"]),
        (["watch.every_n_steps=2", "watch.trials=0"], ConfigError, ["watch.trials=0"]),
        (["watch.every_n_steps=2", "watch.tasks=[]"], ConfigError, ["watch.tasks is empty"]),
        (["watch.every_n_steps=2", "watch.tasks=[riddle]"], ConfigError, ["watch.tasks", "riddle"]),
        (["watch.every_n_steps=2", "watch.lengths=[999999]"], DataError, ["999999", "watch.lengths"]),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_by_its_own_name(plan, overrides, error, words):
    with pytest.raises(error) as caught:
        plan(*overrides)
    assert all(word in str(caught.value) for word in words)
    assert "eval.trials" not in str(caught.value)


def test_the_final_models_are_compared_too(tmp_path, capsys):
    for after, limit, words in ((10.6, 0.05, "10.60 after the training, 6.0% above"), (10.4, 0.05, ""), (99, None, "")):
        run = Run(SimpleNamespace(watch=SimpleNamespace(max_short_increase=limit)), tmp_path)
        run.plan = SimpleNamespace(geometry=SimpleNamespace(window=64))
        run.warn_of_short({"untuned": {"ppl@64": 10.0}, "extended": {"ppl@64": after}})
        out = capsys.readouterr().out
        assert words in out and bool(out) == bool(words)
    run.warn_of_short({"extended": {"ppl@64": 99.0}})
    assert not capsys.readouterr().out
