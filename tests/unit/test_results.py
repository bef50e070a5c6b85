"""benchmarks.results: arms, fingerprints, the runner, verdicts, pages. Nothing is trained here."""

import json
import re
import shutil
import threading
from dataclasses import replace

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from benchmarks import cpu
from benchmarks.results import __main__ as results
from benchmarks.results import pages, records, runner
from benchmarks.results.arms import (
    CANDIDATE_SEEDS,
    EVALUATE,
    LR_SEED,
    RATE_OF,
    RATES,
    REFERENCE,
    SEARCH,
    TRAIN,
    Arm,
    AsLong,
    Scale,
    arms,
    arms_of_methods,
    arms_of_tiny,
    candidate_arm,
    candidates,
    rate_arm,
)
from benchmarks.results.claims import (
    Check,
    Claim,
    Missing,
    Numbers,
    Verdict,
    checked,
    claims,
    verdict,
)
from benchmarks.results.records import Fingerprints, current, measured, read_runs, record, training, write_runs
from benchmarks.results.runner import Failed, Runner
from pose.app import schema
from pose.errors import DataError
from pose.files import CONF, REPOSITORY, write_json

schema.register()
SCALE = Scale()
SHIPPED = records._shipped()
ARMS = arms(SCALE)


# ----- arms -----


def test_every_arm_is_a_command_that_composes():
    """With the configs of today, of training, evaluation and search; of arms that differ in numbers alone the first."""
    kinds: dict[tuple[str, ...], tuple[str, list[str]]] = {}
    for arm in ARMS.values():
        config = {TRAIN: "train", EVALUATE: "evaluate", SEARCH: "search"}[arm.script]
        of_arm = [REFERENCE.sub("FOLDER", override) for override in arm.overrides]
        for name, overrides in ((config, of_arm), *(("also", ["ckpt=x", *more]) for more in arm.also.values())):
            kinds.setdefault((name, *(re.sub(r"\d+", "0", override) for override in overrides)), (name, overrides))
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for name, overrides in kinds.values():
            cfg = compose("evaluate" if name == "also" else name, overrides)
            assert name != "also" or cfg.eval.tasks == ["perplexity"]
    assert {name for name, _ in kinds.values()} == {"train", "evaluate", "search", "also"}


def test_the_untuned_model_is_measured_as_the_trained_ones_are():
    """Otherwise tail_ppl would be of other tokens, and no ratio would mean anything."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for untuned, trained in (
            ("untuned.8x", "linear.pose.8x"), ("untuned.16x", "linear.randpos.16x"),
            ("untuned_books.16x", "lm.16x"), ("untuned_books.32x", "searched.32x"),
        ):  # fmt: skip
            first, second = (
                OmegaConf.to_container(
                    compose(config, [REFERENCE.sub("x", o) for o in ARMS[name].overrides]).eval, resolve=True
                )
                for config, name in (("evaluate", untuned), ("train", trained))
            )
            del first["before"], second["before"], first["stride"], second["stride"]
            assert first == second, untuned
            assert ARMS[untuned].also == ARMS[trained].also


def test_what_is_to_measure_nothing_measures_nothing():
    """An experiment's eval.tasks come after the choice of eval."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for name in ("cost.full.32x", "cost.pose.8x", "base.phi"):
            assert compose("train", list(ARMS[name].overrides)).eval.tasks == [], name


def test_arms_of_a_comparison_differ_in_what_they_are_named_after():
    lm, randpos = ARMS["lm.16x"].overrides, ARMS["linear.randpos.8x"].overrides
    assert set(ARMS["rcd3.16x"].overrides) - set(lm) == {"rope.rcd_shift=true", "rope.rcd_periods=3"}
    assert set(randpos) - set(ARMS["linear.short.8x"].overrides) == {"pose=randpos"}
    assert all(ARMS[f"{name}.16x"].seeds == (0, 1, 2) for name in ("lm", "searched", "self_distill_seconds"))
    full = ARMS["linear.full_tokens.8x"]
    batch, target = int(full.value("trainer.global_batch", "")), int(full.value("pose.target_len", ""))
    assert batch * target == 16 * 256  # as many tokens a step as PoSE's 16 examples of the window


def test_the_mixed_windows_have_the_divisors_of_yarn():
    from pose.rope import RopeGeometry, Yarn

    divisors = json.loads(ARMS["yarn_mixed.16x"].value("rope.long_factor", ""))
    geometry = RopeGeometry(500.0, 64, 256)
    expected = geometry.theta() / Yarn().resolve(geometry, 4096).inv_freq(geometry)
    assert divisors == pytest.approx(expected.tolist(), rel=1e-5) and divisors[-1] == 16


def test_every_claim_has_its_arms_and_they_are_run():
    named = {name for claim in claims(SCALE).values() for name in claim.arms}
    named |= {name for names in arms_of_methods(SCALE).values() for name in names} | set(arms_of_tiny(SCALE))
    assert named == set(ARMS)  # what no claim needs is not run, and what one needs is there


# ----- what tells a run from another -----


def test_a_fingerprint_changes_with_what_decides_the_numbers(monkeypatch, tmp_path):
    one = Arm("one", ("experiment=e", "rope=yarn"), seeds=(0, 1))
    two = Arm("two", ("rope.factors={one}/x",), seeds=(0, 1))
    files = {"experiment/e": "a: 1  # comment\nb: null", "rope/yarn": "beta: 32", "model/tiny": "path: x",
             "train": "defaults:\n- model: tiny"}  # fmt: skip
    for file, text in files.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / f"{file}.yaml").write_text(text)
    monkeypatch.setattr(records, "CONF", tmp_path)

    def of(*changed: Arm, seed: int = 0) -> list[str]:
        records._values.cache_clear(), records._defaults.cache_clear()
        every = {arm.name: arm for arm in (one, two, *changed)}
        fingerprints = Fingerprints(every)
        return [fingerprints.of(every[name], seed) for name in ("one", "two")]

    before = of()
    assert before == of() and all(a != b for a, b in zip(before, of(seed=1), strict=True))
    assert all(a != b for a, b in zip(before, of(replace(one, overrides=("experiment=e", "rope=ntk"))), strict=True))
    assert all(a != b for a, b in zip(before, of(replace(one, overrides=(*one.overrides, "x=1"))), strict=True))
    (tmp_path / "experiment/e.yaml").write_text("a: 1\nc: null")  # a comment, and keys that are null
    assert of() == before
    for file in ("experiment/e", "rope/yarn", "model/tiny"):  # given, given, by default
        (tmp_path / f"{file}.yaml").write_text("a: 2")
        now = of()
        assert all(a != b for a, b in zip(before, now, strict=True)), file
        before = now
    monkeypatch.setattr(records, "_shipped", lambda: ["another", "base", "model", *SHIPPED[3:]])
    assert all(a != b for a, b in zip(before, of(), strict=True))
    records._values.cache_clear(), records._defaults.cache_clear()


def test_a_fingerprint_follows_what_an_experiment_chooses(monkeypatch, tmp_path):
    for file, text in {
        "experiment/cpu": "defaults: [gpu, _self_]\nsteps: 2", "experiment/gpu": "defaults: [{override /model: real}]",
        "model/real": "a: 1", "model/tiny": "a: 1", "model/other": "a: 3", "train": "defaults: [{model: tiny}]",
    }.items():  # fmt: skip
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / f"{file}.yaml").write_text(text)
    monkeypatch.setattr(records, "CONF", tmp_path)

    def of(*overrides: str) -> list:
        records._values.cache_clear(), records._defaults.cache_clear()
        return [one[:2] for one in records._chosen(Arm("a", overrides))]

    assert of("experiment=cpu") == [["experiment", "cpu"], ["experiment", "gpu"], ["model", "real"]]
    assert of("experiment=cpu", "model=other")[-1] == ["model", "other"] and of() == [["model", "tiny"]]
    for file, text in {
        "pose/pose": "n: 2", "pose/three": "defaults: [pose, _self_]\nn: 3", "pose/full": "n: 1",
        "pose/mix": "defaults: [{pose@sampler: pose}, _self_]", "watch/default": "trials: 2", "eval/quick": "w: 1",
        "eval/proofs": "w: 2", "evaluate": "defaults: [{eval: quick}]",
        "train": "defaults: [{pose: pose}, {watch: default}, {eval: quick}]",
    }.items():  # fmt: skip
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / f"{file}.yaml").write_text(text)
    assert of("pose=three") == [["pose", "three"], ["pose", "pose"], ["eval", "quick"]], "and what it is made of"
    assert of("pose=mix")[:2] == [["pose", "mix"], ["pose", "pose"]]
    assert ["pose", "full"] in of("pose=mix", "pose@pose.sampler=full")
    assert of("watch.every_n_steps=5")[-1] == ["watch", "default"]
    more = records._chosen(Arm("a", (), also={"proofs": ("eval=proofs",)}))
    assert [one[:2] for one in more][-1] == ["eval", "proofs"], "what is measured besides"
    records._values.cache_clear(), records._defaults.cache_clear()


def test_what_is_read_of_a_run(tmp_path):
    run, proofs = tmp_path / "run", tmp_path / "proofs"
    run.mkdir(), proofs.mkdir()
    write_json(run / "metrics.json", {
        "tail_ppl@256": 45.1234567, "position_ppl@0-256": 1.0, "needle_gain@256/0.5": 1.0, "passkey@256": 1.0,
        "coverage/probability_beyond_window": 0.25, "cost/seconds": 200.0, "train/steps": 250, "cost/tokens": 1024,
        "untuned": {"tail_ppl@256": 40.0, "position_ppl@0-256": 2.0},
    })  # fmt: skip
    write_json(proofs / "metrics.json", {"tail_ppl@256": 50.0})
    (run / "metrics.csv").write_text(
        "epoch,step,cost/step_seconds,val/tail_ppl@2048\n0,-1,,70\n0,9,3.0,\n0,19,0.7,\n0,29,0.5,\n0,49,,60.5\n"
    )
    assert measured(Arm("a", (), also={"proofs": ()}), tmp_path) == {
        "tail_ppl@256": 45.1235, "passkey@256": 1.0, "coverage/probability_beyond_window": 0.25,
        "untuned: tail_ppl@256": 40.0, "proofs: tail_ppl@256": 50.0, "after 0: tail_ppl@2048": 70.0,
        "after 50: tail_ppl@2048": 60.5,
    }  # fmt: skip
    assert training(tmp_path) == {"seconds": 200.0, "steps": 250.0, "tokens": 1024.0, "step_seconds": 0.7}


def test_a_search_is_read_too(tmp_path):
    (tmp_path / "run").mkdir()
    answers = {"searched": {"nll": 3.5, "heldout_nll": 4.2}, "yarn": {"nll": 4.8, "heldout_nll": 4.0}}
    write_json(tmp_path / "run" / "factors.yaml", {"candidates": 120, "needle_answers": answers})
    assert measured(Arm("s", (), SEARCH), tmp_path) == {
        "candidates": 120, "searched: nll": 3.5, "searched: heldout_nll": 4.2, "yarn: nll": 4.8,
        "yarn: heldout_nll": 4.0,
    }  # fmt: skip


def line(arms_of, name: str, seed: int, metrics=(), took=(), **more) -> dict:
    """A line of runs.json."""
    return {
        "arm": name, "seed": seed, "fingerprint": Fingerprints(arms_of).of(arms_of[name], seed),
        "metrics": dict(metrics), "training": dict(took), "seconds": 100.0, "all_seconds": 100.0, "commit": "abc1234",
        "torch": "2.13.0", "processor": "A CPU", "date": "2026-11-27", "is_compiled": True, "peak_mib": 800.0, **more,
    }  # fmt: skip


def test_runs_are_written_and_read_a_line_each(tmp_path):
    file = tmp_path / "results" / "runs.json"
    assert read_runs(file) == {}
    runs = [line(ARMS, "lm.16x", seed, {"tail_ppl@256": 45.0}) for seed in (1, 0)]
    write_runs(file, runs)
    assert read_runs(file) == {("lm.16x", 0): runs[1], ("lm.16x", 1): runs[0]}
    assert len(file.read_text().splitlines()) == 4
    file.write_text('{"runs": 3}')
    with pytest.raises(DataError, match="runs"):
        read_runs(file)


def test_runs_of_other_overrides_seeds_or_models_are_not_current():
    runs = {("lm.16x", 0): line(ARMS, "lm.16x", 0)}
    assert current(runs, ARMS) == runs
    changed = ARMS | {"lm.16x": replace(ARMS["lm.16x"], overrides=("rope=ntk",))}
    assert current(runs, changed) == {} and current(runs, {}) == {}
    runs = {("lm.16x", seed): line(ARMS, "lm.16x", seed) for seed in (0, 1)}
    assert set(current(runs, ARMS | {"lm.16x": replace(ARMS["lm.16x"], seeds=(0,))})) == {("lm.16x", 0)}


# ----- the runner -----


SMALL = {
    arm.name: arm
    for arm in (
        Arm("search", ("search.trials=1",), SEARCH),
        Arm("a", ("x=1",), seeds=(0, 1)),
        Arm("b", ("rope.factors={search}",), seeds=(0, 1)),
        Arm("slow", ("y=1",), seeds=(0, 1)),
        Arm("slow_seconds", ("y=1",), seeds=(0, 1), as_long=AsLong("a", "slow")),
        Arm("a_as_b", ("x=1",), seeds=(0, 1), as_long=AsLong("b", "a")),
    )
}


class Fake(Runner):
    """Its commands take no time: they write what a run leaves."""

    fails: frozenset = frozenset()

    def commands(self, name, seed):
        folder = self.folder(name, seed) / "run"
        code = (
            f"import pathlib, json; p = pathlib.Path({str(folder)!r}); p.mkdir(exist_ok=True); "
            f"(p / 'metrics.json').write_text(json.dumps({{'tail_ppl@256': {seed}}})); "
            "(p / 'factors.yaml').write_text('candidates: 1\\nneedle_answers: {searched: {nll: 1, heldout_nll: 2}}'); "
            "(p / 'model').mkdir(); print('SomeError: no luck'); "
            f"raise SystemExit({int((name, seed) in self.fails)})"
        )
        return [("run", ["-c", code])]


def test_what_is_missing_comes_in_order_with_what_it_needs(tmp_path):
    made = Fake(SMALL, tmp_path, {})
    assert made.missing([("b", 1)]) == [("search", 0), ("b", 1)]
    assert made.missing([("slow_seconds", 1)]) == [("a", 1), ("slow", 1), ("slow_seconds", 1)]
    wanted = [(name, seed) for seed in (1, 0) for name in ("b", "a")]
    assert made.missing(wanted) == [("search", 0), ("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    made.runs["a", 0] = line(SMALL, "a", 0)
    assert made.missing([("a", 0), ("a", 1)]) == [("a", 1)]
    made.runs["a", 0]["fingerprint"] = "another"
    assert made.missing([("a", 0)]) == [("a", 0)]
    # Its numbers are known, but b needs its files
    made.runs["search", 0] = line(SMALL, "search", 0)
    assert made.missing([("search", 0), ("b", 0)]) == [("search", 0), ("b", 0)]
    assert made.missing([("search", 0)]) == []
    # The numbers alone are needed
    made.runs |= {(name, seed): line(SMALL, name, seed) for name in ("a", "slow") for seed in (0, 1)}
    assert made.missing([("slow_seconds", 0)]) == [("slow_seconds", 0)]


def test_one_that_fails_takes_no_other_with_it(tmp_path, capsys):
    saved = []
    made = Fake(SMALL, tmp_path, {})
    made.fails, made.save = {("search", 0)}, lambda: saved.append(len(made.runs))
    made.run(made.missing([("b", 0), ("a", 0), ("a", 1)]), jobs=2)
    assert set(made.runs) == {("a", 0), ("a", 1)} and sorted(saved) == [1, 2]
    assert made.runs["a", 1]["metrics"] == {"tail_ppl@256": 1.0} and made.runs["a", 1]["peak_mib"] > 1
    assert "SomeError: no luck" in made.failures["search", 0]
    assert "it needs search, seed 0, which has failed" in made.failures["b", 0]
    assert not (tmp_path / "b" / "s0" / "run").exists()
    printed = capsys.readouterr().out
    assert "[4/4]" in printed and "FAILED: status 1" in printed


def test_what_is_finished_is_kept(tmp_path):
    first = Fake(SMALL, tmp_path, {})
    first.run(first.missing([("b", 0)]), jobs=1)
    assert not (tmp_path / "b" / "s0" / "run" / "model").exists()  # measured: it only takes room
    second = Fake(SMALL, tmp_path, {})
    second.collect()
    assert second.runs == first.runs and second.missing([("b", 0)]) == []
    changed = SMALL | {"b": replace(SMALL["b"], overrides=("rope.factors={search}", "z=2"))}
    third = Fake(changed, tmp_path, {})
    third.collect()
    assert third.missing([("b", 0)]) == [("b", 0)]  # and not the search


@pytest.mark.parametrize(("day", "is_taken"), [("2000-01-01", False), ("9999-01-01", True)])
def test_a_finished_run_takes_the_place_of_older_ones_alone(tmp_path, day, is_taken):
    made = Fake(SMALL, tmp_path, {})
    made.run(made.missing([("a", 0)]), jobs=1)
    folder = made.folder("a", 0)
    (folder / "run.json").write_text(json.dumps(json.loads((folder / "run.json").read_text()) | {"date": day}))
    again = Fake(SMALL, tmp_path, {("a", 0): made.runs["a", 0]})
    again.collect()
    assert (again.runs["a", 0]["date"] == day) is is_taken


def test_a_kept_model_stays(tmp_path):
    made = Fake({"base": Arm("base", (), keep=True)}, tmp_path, {})
    made.run([("base", 0)], jobs=1)
    assert (tmp_path / "base" / "s0" / "run" / "model").is_dir() and not made.failures


def test_two_runners_do_not_do_the_same(tmp_path):
    made = Fake(SMALL, tmp_path, {})
    folder = made.folder("a", 0)
    folder.mkdir(parents=True)
    with runner.alone(folder):
        made.run([("a", 0)], jobs=1)
    assert "another process is at work" in made.failures["a", 0] and not (folder / "run").exists()


def test_a_runner_that_is_ended_ends_its_commands(tmp_path):
    class Endless(Fake):
        def commands(self, name, seed):
            return [("run", ["-c", "import time; time.sleep(600)"])]

    made = Endless(SMALL, tmp_path, {})
    threading.Timer(1.0, made.end).start()
    made.run([("a", 0), ("a", 1)], jobs=1)
    assert set(made.failures) == {("a", 0), ("a", 1)} and "stopped" in made.failures["a", 1]


def test_equal_seconds_are_steps(tmp_path):
    made = Runner(SMALL, tmp_path, {})
    with pytest.raises(Failed, match="a is not done, whose steps are timed"):
        made.commands("slow_seconds", 0)
    for name, seconds in (("a", 0.5), ("b", 0.4), ("slow", 1.0)):
        for seed in (0, 1):
            made.runs[name, seed] = line(SMALL, name, seed, took={"steps": 250, "step_seconds": seconds})
    made.runs["search", 0] = line(SMALL, "search", 0, seconds=60.0)
    assert made.steps(SMALL["slow_seconds"], 0) == 125  # 250 steps of 0.5 s, in steps of 1 s
    assert made.steps(SMALL["a_as_b"], 1) == (250 * 0.4 + 60) / 0.5
    ((_, command),) = made.commands("slow_seconds", 1)
    assert "trainer.max_steps=125" in command and "seed=1" in command
    # A run that other work slowed down does not count
    for name in ("a", "slow"):
        made.runs[name, 1]["training"]["step_seconds"] *= 3
    assert made.steps(SMALL["slow_seconds"], 0) == 125
    for name in ("a", "slow"):
        made.runs[name, 1]["training"]["step_seconds"] /= 3
    # Times of another kind of processor are left out; those of two kinds alone are no budget
    made.runs["a", 0] |= {"processor": "Another", "training": {"steps": 250, "step_seconds": 9.0}}
    assert made.steps(SMALL["slow_seconds"], 0) == 125
    made.runs["a", 1]["processor"] = "Another"
    with pytest.raises(Failed, match=r"a and slow, which were taken on different processors \(A CPU, Another\)"):
        made.steps(SMALL["slow_seconds"], 0)
    made.runs["search", 0]["processor"] = "Another"
    with pytest.raises(Failed, match="different processors"):
        made.steps(SMALL["a_as_b"], 0)
    made.runs["search", 0]["processor"] = "A CPU"
    for seed in (0, 1):
        made.runs["a", seed] |= {"processor": "A CPU", "training": {"steps": 20, "step_seconds": 0.5}}
    with pytest.raises(Failed, match="10 steps left in the time of a"):
        made.steps(SMALL["slow_seconds"], 0)


def test_an_estimate_is_by_runs_on_this_kind_of_processor(tmp_path, monkeypatch):
    made, gpu = Runner(SMALL, tmp_path, {}), "NVIDIA H100"
    made.runs["a", 0] = line(SMALL, "a", 0) | {"processor": gpu, "all_seconds": 7.0}
    made.runs["a", 1] = line(SMALL, "a", 1) | {"processor": cpu()[0], "all_seconds": 900.0}
    made.runs["b", 0] = line(SMALL, "b", 0) | {"processor": gpu, "all_seconds": 7.0}
    monkeypatch.setattr(runner, "GPU", tmp_path / "none")
    assert made.estimate("a") == 900 and made.estimate("b") == runner.guess(SMALL["b"]) != 7
    monkeypatch.setattr(runner, "GPU", tmp_path)
    assert made.estimate("a") == made.estimate("b") == 7


def test_commands_are_what_a_user_would_type(tmp_path):
    made = Runner(ARMS, tmp_path, {}, is_compiled=True)
    (_, train), (also, evaluate) = made.commands("linear.randpos.8x", 2)
    run = tmp_path / "linear.randpos.8x" / "s2" / "run"
    assert train[:2] == ["train.py", "experiment=paper_tiny"] and also == "proofs"
    assert {"seed=2", "trainer.compile=true", "num_threads=1", f"hydra.run.dir={run}"} <= set(train)
    assert evaluate[:2] == ["evaluate.py", f"ckpt={run}"] and not any("seed=" in o for o in evaluate)
    assert "dtype=float32" in evaluate, "a GPU measures in bf16 by itself"
    made.is_compiled = False
    assert "trainer.compile=false" in made.commands("linear.randpos.8x", 2)[0][1], "a GPU compiles by itself"
    ((_, searched),) = made.commands("searched.32x", 1)
    assert f"rope.factors={tmp_path / 'search.32x' / 's0' / 'run'}" in searched
    ((_, search),) = made.commands("search.32x", 0)
    assert search[:2] == ["-m", "pose.search"] and "trainer.compile=true" not in search
    (_, untuned), (_, proofs) = made.commands("untuned.8x", 0)
    assert proofs[:2] == untuned[:2] == ["evaluate.py", "ckpt=assets/tiny"]
    assert not any(o.startswith("seed=") for o in untuned) and "dtype=float32" in untuned


@pytest.mark.parametrize(("gpu", "wanted"), [("A GPU", "A GPU"), (None, cpu()[0])])
def test_a_run_is_of_the_processor_that_computed(tmp_path, gpu, wanted):
    """Times of one kind alone are compared."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "provenance.json").write_text(json.dumps({"gpu": gpu}))
    (tmp_path / "run" / "metrics.json").write_text("{}")
    assert record(ARMS["untuned_books.16x"], 0, "f", tmp_path)["processor"] == wanted


# ----- which runs -----


def test_patterns_choose_runs():
    names = {"table4": ("a", "b"), "fig2": ("b",)}
    chosen = lambda *patterns: results.chosen(patterns, names, SMALL)  # noqa: E731
    assert chosen("*") == chosen("table4") == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    assert chosen("fig2", "table4/a/0") == [("b", 0), ("b", 1), ("a", 0)]
    assert chosen("*/*/1") == [("a", 1), ("b", 1)]
    with pytest.raises(SystemExit, match="--only table9 is none of the runs"):
        chosen("table4", "table9")


# ----- verdicts -----


def claim(*checks: Check) -> Claim:
    return Claim(
        "c", "A claim", "the paper's", "ours", checks, {"row of a": "a", "row of b": "b"}, {"ppl": "tail_ppl@256"}
    )


HIGH = Check("a over b", lambda n: n.ratio("a", "tail_ppl@256", "b"), least=1.5, paper="3.00")
LOW = Check("b", lambda n: n("b", "tail_ppl@256"), most=10.0, form=".1f")


def runs_of(**metrics) -> dict:
    return {(name, seed): line(SMALL, name, seed, {"tail_ppl@256": value})
            for name, values in metrics.items() for seed, value in enumerate(values)}  # fmt: skip


@pytest.mark.parametrize(
    ("metrics", "shares", "expected"),
    [
        ({"a": [20, 30], "b": [10, 10]}, [1, 1], Verdict.HOLDS),
        ({"a": [20, 14], "b": [10, 10]}, [0.5, 1], Verdict.IN_PART),
        ({"a": [20, 30], "b": [11, 12]}, [1, 0], Verdict.IN_PART),
        ({"a": [14, 14], "b": [11, 12]}, [0, 0], Verdict.NOT_HERE),
        ({"b": [10, 10]}, [None, 1], Verdict.HOLDS),
        ({"a": [10]}, [None, None], Verdict.NOT_TESTED),
        ({"a": [20], "b": [10, 10]}, [1, 1], Verdict.HOLDS),  # one seed has no a yet
        ({}, [None, None], Verdict.NOT_TESTED),
    ],
)
def test_a_verdict_follows_from_the_numbers(metrics, shares, expected):
    found = checked(claim(HIGH, LOW), runs_of(**metrics), SMALL, (0, 1))
    assert [one.share for one in found] == shares and verdict(found) == expected


def test_a_premise_is_shown_and_no_verdict_goes_by_it():
    """The untuned model breaks whatever is trained: that alone holds nothing, and its failing refutes nothing."""
    premise = replace(HIGH, is_premise=True)
    for values, expected in (([10, 10], Verdict.HOLDS), ([11, 12], Verdict.NOT_HERE)):
        for a in ([30, 40], [1, 2]):
            found = checked(claim(premise, LOW), runs_of(a=a, b=values), SMALL, (0, 1))
            assert verdict(found) == expected
    assert pages._tally(found) == "0 of 1" and pages._check(found[0])[-1] == "no (premise)"
    assert verdict(checked(claim(premise), runs_of(a=[30], b=[10]), SMALL, (0, 1))) == Verdict.NOT_TESTED


def test_an_arm_that_trained_once_has_no_part_in_a_spread():
    """And a number of such arms alone is one number, not one for each seed of its claim."""
    runs = runs_of(a=[20, 30]) | {("search", 0): line(SMALL, "search", 0, {"tail_ppl@256": 10.0})}
    mixed = replace(HIGH, value=lambda n: n.ratio("a", "tail_ppl@256", "search"))
    alone = replace(HIGH, value=lambda n: n("search", "tail_ppl@256"))
    of_mixed, of_alone, of_a = checked(
        claim(mixed, alone, replace(HIGH, value=lambda n: n("a", "tail_ppl@256"))), runs, SMALL, (0, 1)
    )
    assert of_mixed.values == [2.0, 3.0] and pages._check(of_mixed)[3] == "2.50 (2.00–3.00); `search`: one run"
    assert of_alone.values == [10.0] and pages._check(of_alone)[3] == "10.00"
    assert of_a.values == [20, 30] and not of_a.once


def test_rounding_does_not_hide_on_which_side_of_its_bound_a_number_is():
    (found,) = checked(claim(replace(LOW, form=".1f")), runs_of(b=[10.04]), SMALL, (0,))
    assert pages._check(found)[1:] == ["≤ 10.0", "–", "10.04", "no"]
    share = Check("b", lambda n: n("b", "tail_ppl@256"), least=0.9, form=".0%")
    (found,) = checked(claim(share), runs_of(b=[0.897]), SMALL, (0,))
    assert pages._check(found)[1:] == ["≥ 90%", "–", "89.7%", "no"]


def test_arms_of_other_targets_are_compared_through_the_untuned_model():
    """Windows of another longest length score other tokens."""

    def of(arm, seed, metric):
        own = 2.0 if arm in ("linear.randpos.16x", "untuned.16x") else 1.0
        return own * (1.5 if "randpos" in arm else 1.0)

    found = checked(claims(SCALE)["table1"], synthetic(SCALE, of), ARMS, (0,))
    (text,) = (one.values for one in found if one.check.says.startswith("RandPos 16×") and "proofs" in one.check.says)
    assert text == [1.0]


def test_the_seeds_of_a_page_are_those_that_were_run():
    runs = {("a", 1): line(SMALL, "a", 1)}
    assert pages._seeds(runs, SMALL["a"]) == "1 (not run: 0)" and pages._num_runs(runs, SMALL["a"]) == "1"
    assert pages._seeds({}, SMALL["a"]) == "(not run: 0, 1)"
    told = pages._commands(ARMS["linear.pose.8x"])
    assert told.count("`") == 4 and "python evaluate.py ckpt=RUN eval=perplexity" in told


def test_a_bound_is_met_at_its_edge():
    assert Check("", float, least=-0.05).holds(0.95 - 1.0) and not Check("", float, least=-0.05).holds(-0.06)
    assert Check("", float, most=1.1).holds(1.1) and not Check("", float, most=1.1).holds(1.11)


def test_numbers_of_a_run():
    runs = {("search", 0): line(SMALL, "search", 0, {"nll": 3.0}, {"steps": 5})}
    numbers = Numbers(runs, SMALL, seed=1)
    assert numbers("search", "nll") == 3.0  # it has no other seed
    assert numbers("search", "training/steps") == 5 and numbers("search", "peak_mib/") == 800.0
    for arm, metric in (("search", "other"), ("a", "nll"), ("search", "training/seconds"), ("search", "nothing/")):
        with pytest.raises(Missing, match=arm):
            numbers(arm, metric)


def test_times_of_different_processors_have_no_ratio():
    runs = {(name, 0): line(SMALL, name, 0, {"nll": 3.0}, {"step_seconds": seconds}, processor=cpu)
            for name, seconds, cpu in (("a", 1.0, "X"), ("b", 2.0, "X"), ("slow", 3.0, "Y"))}  # fmt: skip
    numbers = Numbers(runs, SMALL, seed=0)
    assert numbers.ratio("b", "training/step_seconds", "a") == 2.0 and numbers.ratio("slow", "nll", "a") == 1.0
    for cost in ("training/step_seconds", "peak_mib/"):
        with pytest.raises(Missing, match="slow and a on one kind of processor"):
            numbers.ratio("slow", cost, "a")


def test_a_table_has_costs_of_one_kind_of_processor():
    """The others' quality stands beside them."""
    runs = synthetic(SCALE)
    for run, one in runs.items():
        one["processor"] = "A GPU" if run[0] == "linear.pose.8x" else "A CPU"
    text = pages._numbers(claims(SCALE)["fig3"], runs, ARMS)
    ours, cost = (
        next(row for row in text.splitlines() if f"| {name} |" in row) for name in ("PoSE 8×", "PoSE, to 2,048")
    )
    assert ours.split("|")[3:5] == [" – ", " – "] and "–" not in ours.split("|")[5]
    assert "–" not in cost.split("|")[2] + cost.split("|")[3]


def synthetic(scale: Scale, of=lambda arm, seed, metric: 1.0) -> dict:
    """A run of every arm, with every metric that a check or a table asks for."""
    every = arms(scale)
    lengths = {scale.at(2**n) for n in range(8)} | set(scale.lengths(1, 8, 16))
    kinds = [f"{kind}@{n}" for kind in ("tail_ppl", "ppl", "passkey", "needle_gain") for n in lengths]
    names = [*kinds, *(f"proofs: {kind}" for kind in kinds), *(f"untuned: {kind}" for kind in kinds),
             *(f"after {step}: {kind}" for step in (50, 100, 150, 200, 250) for kind in kinds),
             "coverage/probability_beyond_window", "coverage/probability_last_window"]  # fmt: skip
    return {
        (arm.name, seed): line(
            every, arm.name, seed, {name: of(arm.name, seed, name) for name in names},
            {"steps": 250, "step_seconds": 0.5, "seconds": 125} if arm.script == TRAIN else {},
        )
        for arm in every.values() for seed in arm.seeds
    }  # fmt: skip


def test_every_check_of_the_paper_has_a_number():
    """From the runs that are declared for its claim, and no others."""
    runs = synthetic(SCALE)
    for one in claims(SCALE).values():
        own = {(name, seed): run for (name, seed), run in runs.items() if name in one.arms}
        for result in checked(one, own, ARMS, SCALE.seeds):
            num = 1 if result.check.is_premise else len(ARMS[result.check.arm].seeds) if result.check.arm else 3
            assert len(result.values) == num and not result.missing, (one.name, result.check.says, result.missing)


def test_an_arm_with_seeds_of_its_own_is_checked_for_all_of_them():
    """A single bad seed decides, whatever its number."""
    runs, claim = synthetic(SCALE), claims(SCALE)["fig2"]
    of_default = next(check for check in claim.checks if check.arm == "default.pose")
    assert ARMS["default.pose"].seeds == (0, 1, 2, 3, 4)
    bad = runs["default.pose", 4]
    for key in [key for key in bad["metrics"] if key.startswith("passkey@")]:
        bad["metrics"][key] = 0.0
    found = next(one for one in checked(claim, runs, ARMS, SCALE.seeds) if one.check.says == of_default.says)
    assert len(found.values) == 5 and found.values[4] == 0.0 and found.share < 1


def test_the_papers_own_ratios():
    """Against its table, by hand."""
    found = {check.says: check.paper for one in claims(SCALE).values() for check in one.checks}
    assert found["RandPos 8× over PoSE 8× at 2,048 tokens, reports"] == f"{15.16 / 4.60:.2f}"
    assert found["untuned, 2,048 over 256 tokens, proofs"] == "> 353"
    assert found["64×: NTK over YaRN at 16,384 tokens"] == f"{34.80 / 11.33:.2f}"
    assert found["32×: NTK, 8,192 over 2,048 tokens"] == f"{38.73 / 7.98:.2f}"
    assert found["64×: NTK, 8,192 over 4,096 tokens"] == f"{14.84 / 8.04:.2f}"
    assert found["aligned and random apart at 2,048 tokens, proofs"] == f"{2.60 / 2.56:.2f}"


# ----- pages -----


def test_a_number_is_the_mean_over_seeds_with_its_spread():
    assert pages.spread([], str) == "–"
    assert pages.spread([45.12, 45.13], lambda v: pages.number(v, "tail_ppl@256")) == "45.1"
    assert pages.spread([44.0, 46.0], lambda v: pages.number(v, "tail_ppl@256")) == "45.0 (44.0–46.0)"
    assert pages.spread([0.9, 1.0], lambda v: pages.number(v, "passkey@256")) == "95 (90–100)"
    assert pages.number(12345.6, "tail_ppl@256") == "12,346" and pages.number(0.123, "needle_gain@256") == "0.12"


def test_the_page_has_verdicts_numbers_and_what_is_not_run():
    """No check can hold or fail here but by these numbers: RandPos twice as bad as everything else."""
    runs = synthetic(SCALE, lambda arm, seed, metric: (2.0 if "randpos" in arm else 1.0) + 0.1 * seed)
    text = pages.results({key: run for key, run in runs.items() if key[0] != "linear.n3.8x"}, ARMS, SCALE)
    summary = dict(re.findall(r"^\| \[([^\]]+)\]\S+ \| \*\*([^*]+)\*\*", text, re.MULTILINE))
    assert summary["Table 4: content of the chunks"] == "holds"
    assert summary["Table 5: number of chunks"] == "holds in part"  # untuned does not break; RandPos does
    row = "| N = 256 (RandPos) over N = 2 at 2,048 tokens | ≥ 1.20 | 2.97 | 1.91 (1.83–2.00) | yes |"
    assert row in text and "Not run yet: `linear.n3.8x`." in text
    assert "| N = 3 over N = 2 at 2,048 tokens | ≤ 1.03 | 1.00 | – | not tested |" in text
    assert "not tested" not in pages.results(runs, ARMS, SCALE).replace("**Not tested**: no check", "").lower()
    headings = {pages.anchor(title) for title in re.findall(r"^## (.+)$", text, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= headings
    assert "- **PoSE, 39.3 M tokens, to 32,768**: perplexity of the last tokens" in text  # of docs/smollm2.json


def test_the_tables_of_methods_tell_what_beats_lm():
    gains = {"searched.16x": 3.0, "lm_as_searched.16x": 2.0, "self_distill_seconds.16x": 3.0, "end_anchor.16x": 0.5,
             "cope.16x": 3.0, "yarn_mixed.16x": 3.0}  # fmt: skip

    def of(arm: str, seed: int, metric: str) -> float:
        if metric == "needle_gain@4096":
            return gains.get(arm, 1.0) + 0.1 * seed
        return 60.0 if metric == "tail_ppl@256" and arm == "cope.16x" else 45.0 + seed

    runs = synthetic(SCALE, of)
    for seed in SCALE.seeds:
        runs["lm_as_searched.16x", seed]["training"]["steps"] = 450  # as long as 250 steps and 100 s of search
        runs["self_distill_seconds.16x", seed]["training"]["step_seconds"] *= 1.05
    text = pages.method_tables(runs, ARMS, SCALE)["methods16x"]
    cells = [line.split(" | ") for line in text.splitlines() if line.startswith("| `")]
    rows = {row[0].split(" ")[1]: row[-1].removesuffix(" |").partition(";")[0] for row in cells}
    assert rows["`searched`"] == "**better**" and rows["`end_anchor`"] == "worse"
    # A standard deviation of 0.1 in both, an error of 0.1·√(2/3), 4 degrees of freedom
    assert "| **better**, ppl higher; +2.00 (+1.77 to +2.23) |" in text  # of cope
    assert rows["`cope`"] == "**better**, ppl higher" and rows["`rcd3`"] == "not significant" and rows["`lm`"] == "–"
    # Not end_anchor (worse), cope (perplexity)
    assert text.endswith("perplexity at the window no higher: `yarn_mixed`, `self_distill`, `searched`.")
    assert "| `searched` (`rope=searched rope.factors={search.16x}`) | 3 | 250 | 3.8 |" in text  # 125 s, and the search
    assert "rope.long_factor=[...]" in text and "| untuned | 1 | – | – |" in text
    elsewhere = {
        key: run | {"processor": "Another"} if "self_distill_seconds" in key[0] else run for key, run in runs.items()
    }
    found = pages.method_tables(elsewhere, ARMS, SCALE)["methods16x"]
    assert found.endswith("perplexity at the window no higher: `yarn_mixed`, `searched`.")
    assert "| `self_distill_seconds` | 3 | 250 | – |" in found  # no minutes
    slow = {
        key: run | {"training": run["training"] | {"step_seconds": 1.2 * run["training"]["step_seconds"]}}
        if key[0] == "self_distill_seconds.16x" else run
        for key, run in runs.items()
    }  # fmt: skip
    found = pages.method_tables(slow, ARMS, SCALE)["methods16x"]
    assert found.endswith("perplexity at the window no higher: `yarn_mixed`, `searched`.")
    two_seeds = {key: run for key, run in runs.items() if key[1] < 2}
    assert "better" not in pages.method_tables(two_seeds, ARMS, SCALE)["methods16x"].partition("Against lm")[0]


def test_the_learning_rates_that_were_tried():
    ppl = {"tail_ppl@256": 47.04, "tail_ppl@4096": 50.0}
    runs = {(f"lr.{name}.{lr}", 10): line(ARMS, f"lr.{name}.{lr}", 10, {"needle_gain@4096": gain} | ppl)
            for name, lr, gain in (("lm", "5e-4", 0.7), ("lm", "1e-3", 0.9), ("searched", "2_5e-4", 1.2))}  # fmt: skip
    text = pages.method_tables(runs, ARMS, SCALE)["lr"]
    assert "| `lm` | – | 0.70; 47.0; 50.0 | 0.90; 47.0; 50.0 | 1e-3 | 1e-3 |" in text
    assert "| `searched` | 1.20; 47.0; 50.0 | – | – | 2.5e-4 | 5e-4 |" in text and "`long_short`" not in text


def test_the_comparison_has_the_learning_rates_that_were_found():
    """The best of the runs, by needle gain at the target; methods that share what is trained share the rate."""
    runs = current(read_runs(REPOSITORY / "docs" / "results" / "runs.json"), ARMS)
    for name, rate in RATE_OF.items():
        gains = {lr: runs[rate_arm(name, lr), LR_SEED]["metrics"]["needle_gain@4096"] for lr in RATES}
        assert rate == max(gains, key=lambda lr: gains[lr])
    for name, of in {
        "rcd10": "lm",
        "short_pi": "lm",
        "yarn_mixed": "searched_mixed",
        "searched_plain": "searched",
        "long_short_seconds": "long_short",
    }.items():
        assert ARMS[f"{name}.16x"].value("finetune.lr", "") == RATE_OF[of]


def test_the_default_is_compared_on_seeds_that_chose_nothing():
    """Each with lm of its own target and seeds; lm's other runs, of the other comparison, have no part in it."""
    metrics = {"tail_ppl@256": 47.0, "needle_gain@4096": 1.0, "needle_gain@8192": 1.0}
    runs = {("lm.16x", 0): line(ARMS, "lm.16x", 0, metrics | {"needle_gain@4096": 9.0})}
    for times, gain in ((16, 2.5), (32, 1.5)):
        for name in candidates(times):
            more = 0.0 if name == "lm" else gain - 1
            for seed in CANDIDATE_SEEDS:
                found = {key: value + (seed - 3) / 2 + more * ("gain" in key) for key, value in metrics.items()}
                arm = candidate_arm(name, times)
                runs[arm, seed] = line(ARMS, arm, seed, found)
    text = pages.method_tables(runs, ARMS, SCALE)["candidate"]
    assert "9.0" not in text and text.count("| `far_answers` (`data.skip_before_question=true`) |") == 2
    assert " 4,096 tokens, seeds 3, 4, 5. " in text and " 8,192 tokens, seeds 3, 4, 5. " in text
    first, second = (part.splitlines() for part in text.split(" tokens, seeds 3, 4, 5")[1:])
    told = [
        {row.split("`")[1]: row.split(" | ")[-1] for row in rows if row.startswith("| `")} for rows in (first, second)
    ]
    # Seeds half a nat apart: a standard deviation of 0.5, an error of 0.5·√(2/3), 4 degrees of freedom, t = 2.776
    better, among = "**better**; +1.50 (+0.37 to +2.63) |", "not significant; +0.50 (-0.63 to +1.63) |"
    assert told == [
        {name: "– |" if name == "lm" else better for name in candidates(16)},
        {name: "– |" if name == "lm" else among for name in candidates(32)},
    ]
    for name in ("lm", "far_answers"):
        runs[candidate_arm(name, 16), 6] = runs[candidate_arm(name, 16), 3] | {"seed": 6}
    text = pages.method_tables(runs, ARMS, SCALE)["candidate"]
    assert " 4,096 tokens, seeds 3, 4, 5; of `lm` and `far_answers` 6 too. " in text
    assert not set(CANDIDATE_SEEDS) & {LR_SEED, *SCALE.seeds}


def test_objectives_stand_against_the_default_by_its_seeds():
    """At the learning rates of the objectives, chosen on another seed; lm has no part in it."""
    for name in ("self_distill", "long_short"):
        timed = ARMS[candidate_arm(f"{name}_seconds", 16)]
        assert timed.as_long == AsLong(candidate_arm("lm", 16), candidate_arm(name, 16))
        assert timed.overrides == ARMS[candidate_arm(name, 16)].overrides
        for arm in (name, f"{name}_seconds", f"far_{name}"):
            assert ARMS[candidate_arm(arm, 16)].value("finetune.lr", "") == RATE_OF[name]
    runs = {}
    for name, gain in {"lm": 9.0, "far_answers": 2.0, "far_self_distill": 3.5, "far_long_short": 2.5}.items():
        for seed in CANDIDATE_SEEDS:
            metrics = {"tail_ppl@256": 47.0 + seed, "needle_gain@4096": gain + (seed - 3) / 2}
            runs[candidate_arm(name, 16), seed] = line(ARMS, candidate_arm(name, 16), seed, metrics)
    text = pages.method_tables(runs, ARMS, SCALE)["distilled"]
    rows = [row for row in text.splitlines() if row.startswith("| `")]
    assert {row.split("`")[1]: row.split(" | ")[-1] for row in rows} == {
        "far_answers": "– |", "far_self_distill": "**better**; +1.50 (+0.37 to +2.63) |",
        "far_long_short": "not significant; +0.50 (-0.63 to +1.63) |",
    }  # fmt: skip
    assert "Against far_answers: the difference" in text and "against far_answers |" in text and "`lm`" not in text


@pytest.mark.parametrize(
    ("mine", "theirs", "low", "high"),
    [
        # scipy 1.17.1: ttest_ind(mine, theirs, equal_var=False).confidence_interval(), of 7.74 and 2.16 degrees
        ((1, 2, 3, 4, 5, 6, 7), (3, 5, 7, 9, 11, 13), -8.0177, 0.0177),
        ((2.0, 2.5, 3.0), (1.0, 1.1, 1.2), 0.2190, 2.5810),
        ((1.0, 1.0, 1.0), (2.0, 2.0, 2.0), -1.0, -1.0),
    ],
)
def test_the_interval_of_a_difference_is_welchs(mine, theirs, low, high):
    found = pages.difference(mine, theirs)
    assert found == pytest.approx((sum(mine) / len(mine) - sum(theirs) / len(theirs), low, high), abs=0.02)
    assert pages.difference(mine[:2], theirs) is None and pages.difference(mine, theirs[:2]) is None


def test_runs_of_different_processors_are_not_compared():
    """Seeds of lm on another one decide nothing, beside three or alone."""
    gain, short = "needle_gain@4096", "tail_ppl@256"

    def told(of_lm, of_far="aaa"):
        runs = {
            (candidate_arm(name, 16), 3 + i): line(
                ARMS, candidate_arm(name, 16), 3 + i, {gain: value + i % 3 / 9, short: 40.0}, processor=processor
            )
            for name, value, of in (("far_answers", 2.0, of_far), ("lm", 1.0, of_lm))
            for i, processor in enumerate(of)
        }
        if len(of_lm) > 3:
            runs[candidate_arm("lm", 16), 6]["metrics"][gain] = 9.0
        table = pages.method_tables(runs, ARMS, SCALE)["candidate"]
        row = next(row for row in table.splitlines() if row.startswith("| `far_answers`"))
        return row.split(" | ")[-1].partition(";")[0].removesuffix(" |")

    assert [told(of) for of in ("aaa", "bbb", "aab", "aaab", "aaaa")] == [
        "**better**", "–", "–", "**better**", "not significant"
    ]  # fmt: skip
    assert [told(of, of_far="abbb") for of in ("abb", "bbba", "aaa")] == ["–", "**better**", "–"]


def test_no_line_of_runs_is_lost_to_other_settings(monkeypatch, tmp_path, capsys):
    """A YAML file that is edited for a try-out makes lines stale; --pages writes none of them, and says so."""
    docs = tmp_path / "docs"
    shutil.copytree(REPOSITORY / "docs", docs)
    shutil.copy(REPOSITORY / "README.md", tmp_path)
    monkeypatch.setattr(results, "DOCS", docs)
    monkeypatch.setattr("benchmarks.results.pages.draw", lambda *_: None)
    file = docs / "results" / "runs.json"
    runs = read_runs(file)
    runs["lm.16x", 0]["fingerprint"] = "of other settings"
    write_runs(file, runs.values())
    assert results.main(["--pages"]) == 0
    assert read_runs(file) == runs and "1 of " in capsys.readouterr().out
    assert "| `lm` | 2 |" in (docs / "METHODS.md").read_text()


def test_what_a_search_found_before_any_training():
    """A column for each target and text; a target without a search has none."""
    found = {"candidates": 120, "searched: nll": 4.8, "searched: heldout_nll": 3.5, "ntk, rcd_shift: nll": 7.1,
             "ntk, rcd_shift: heldout_nll": 5.4}  # fmt: skip
    text = pages.method_tables({("search.16x", 0): line(ARMS, "search.16x", 0, found)}, ARMS, SCALE)["search"]
    assert text.splitlines()[0] == "|  | 4,096 tokens, searched on | 4,096 tokens, held out |"
    assert "| `searched` | 4.80 | 3.50 |" in text and "| `ntk, rcd_shift` | 7.10 | 5.40 |" in text


def test_the_tables_without_runs_say_so():
    tables = pages.method_tables({}, ARMS, SCALE)
    assert all("not run yet" in text.lower() or "No runs yet" in text for text in tables.values()) and len(tables) == 6


def test_tables_have_their_places():
    text = "A\n<!-- from python -m benchmarks.results: x -->\nold\n<!-- until here: x -->\nB"
    found = pages.placed(text, {"x": "new"}, "F.md")
    assert found == text.replace("old", "new") and pages.placed(found, {"x": "new"}, "F.md") == found
    with pytest.raises(DataError, match=r"F.md has no place for y: put <!-- from"):
        pages.placed(text, {"y": "new"}, "F.md")
    with pytest.raises(DataError, match=r"F.md has no place for x"):
        pages.placed(text.replace("old", text.splitlines()[1]), {"x": "new"}, "F.md")


def test_the_default_run_is_told_where_it_is_shown():
    none = pages.tiny_tables({}, ARMS, SCALE) | pages.readme_tables({}, ARMS, SCALE)
    assert set(none) == {"tiny", "default"} and all("No runs yet" in text for text in none.values())
    metrics = {f"{model}tail_ppl@{n}": n / 10 + i for i, model in enumerate(("", "untuned: ", "scaled: "))
               for n in (256, 512, 1024, 2048)}  # fmt: skip
    metrics |= {"untuned: passkey@2048": 0.05, "untuned: needle_gain@2048": 0.25}
    found = [metrics | {"passkey@2048": 0.9 + seed / 10, "needle_gain@2048": 2.0 + seed} for seed in (0, 1)]
    runs = {("default.pose", seed): line(ARMS, "default.pose", seed, found[seed]) for seed in (0, 1)}
    readme = pages.readme_tables(runs, ARMS, SCALE)
    assert f"({pages.PICTURE.removeprefix('docs/')})" in (REPOSITORY / "docs" / "TINY.md").read_text()
    assert readme["default"] == (
        "Perplexity at 2,048 tokens falls from 205.8 to 204.8, where the untuned model has 26.6 at 256. Passkeys found "
        "there rise from 5 to 95 (90–100) %, needle gain from 0.25 to 2.50 (2.00–3.00) nats."
    )
    control = metrics | {"passkey@2048": 1.0, "needle_gain@2048": 1.5}
    runs["default.short_pi", 0] = line(ARMS, "default.short_pi", 0, control)
    runs["default.pose", 0]["metrics"] |= {"scaled: passkey@2048": 0.2, "scaled: needle_gain@2048": 2.25}
    assert pages.readme_tables(runs, ARMS, SCALE)["default"].endswith(
        " nats. Scaling alone, without training, has 206.8, 20 % and 2.25 nats; the same training without skips (1 "
        "seed) 204.8, 100 % and 1.50 nats."
    )
    tiny = pages.tiny_tables(runs, ARMS, SCALE)["tiny"]
    head, _, untuned, scaled, *_ = tiny.splitlines()
    assert head.startswith("|  | ppl@256 | @512 | @1,024 | @2,048 | passkey@256 | @512 | @1,024 | @2,048 |")
    assert untuned.startswith("| untuned | 26.6 | 52.2 | 103.4 | 205.8 | – | – | – | 5 |")
    assert scaled.startswith("| scaled, nothing trained | 27.6 |")
    assert "| `pose=pose` (the default) | 25.6 |" in tiny and "`pose=full`" not in tiny
    assert "python train.py 'eval.tasks=[perplexity,passkey,needle_gain]' -m seed=0,1,2,3,4\n" in tiny


def test_the_default_run_is_drawn_once_it_has_run(monkeypatch, tmp_path):
    drawn = {}
    monkeypatch.setattr("pose.reporting.plots.plot_results", lambda results, png, *marks: drawn.update({png: results}))
    metrics = {"tail_ppl@256": 44.0, "untuned: passkey@2048": 0.0}
    runs = {("default.pose", i): line(ARMS, "default.pose", i, metrics | {"tail_ppl@2048": 45.0 + i}) for i in (0, 1)}
    pages.draw(runs, ARMS, SCALE, tmp_path)
    assert drawn[tmp_path / pages.PICTURE] == {
        "untuned": {"passkey@2048": (0.0, 0.0, 0.0, 2)}, "scaled": {},
        "extended": {"tail_ppl@256": (44.0, 44.0, 44.0, 2), "tail_ppl@2048": (45.5, 45.0, 46.0, 2)},
    }  # fmt: skip


def test_the_committed_pages_are_those_of_the_committed_runs():
    texts = results.texts(REPOSITORY / "docs")
    made = pages.pages(read_runs(REPOSITORY / "docs" / "results" / "runs.json"), ARMS, SCALE, texts)
    for name, text in made.items():
        assert text == (REPOSITORY / "docs" / name).read_text(), "make them again: python -m benchmarks.results --pages"


# ----- checking -----


def test_new_runs_are_compared_with_the_spread(capsys):
    known = runs_of(a=[44.0, 46.0], b=[1.0, 1.0])
    new = runs_of(a=[46.04, 43.9])
    assert not results.compare([("a", 0), ("a", 1)], new, known, SMALL)
    printed = capsys.readouterr().out
    assert "a, seed 0: 1 of 1 numbers within the spread" in printed  # 46.04 reads 46.0
    assert "a, seed 1: 0 of 1 numbers" in printed and "tail_ppl@256 is 43.9, and was 44.0 to 46.0" in printed
    assert results.compare([("a", 0)], new, known, SMALL)
    assert not results.compare([("a", 0)], new, {}, SMALL)
    assert "no run of it is known" in capsys.readouterr().out


def test_a_run_that_measures_nothing_is_known_and_one_that_lost_a_number_is_not_the_same(capsys):
    """Base models are trained for what begins with them."""
    bare = {("a", 0): line(SMALL, "a", 0, {})}
    assert results.compare([("a", 0)], bare, bare, SMALL)
    assert "it measures nothing" in capsys.readouterr().out
    known = {("a", 0): line(SMALL, "a", 0, {"tail_ppl@256": 44.0, "passkey@256": 1.0})}
    new = {("a", 0): line(SMALL, "a", 0, {"tail_ppl@256": 44.0})}
    assert not results.compare([("a", 0)], new, known, SMALL)
    printed = capsys.readouterr().out
    assert "1 of 2 numbers within the spread" in printed and "passkey@256 is not there" in printed


def test_the_commands_of_evaluations_are_those_that_ran():
    """Of the model that was evaluated, and exact."""
    arm = ARMS["untuned.8x"]
    commands = pages._commands(arm)
    assert "ckpt=RUN" not in commands and commands.count("ckpt=assets/tiny") == 1 + len(arm.also) > 1
    assert commands.count("dtype=float32") == 1 + len(arm.also)
    trained = next(one for one in ARMS.values() if one.script == TRAIN and one.also)
    assert pages._commands(trained).count("ckpt=RUN") == len(trained.also)


def test_of_a_single_training_the_spread_is_that_of_rounding(capsys):
    one = {run: of for run, of in runs_of(a=[48.0, 48.0]).items() if run == ("a", 0)}
    assert results.compare([("a", 0)], runs_of(a=[49.3, 0.0]), one, SMALL)
    assert not results.compare([("a", 0)], runs_of(a=[49.4, 0.0]), one, SMALL)
    assert "tail_ppl@256 is 49.4, and was 48.0" in capsys.readouterr().out
    of_evaluation = {name: replace(arm, script=EVALUATE) for name, arm in SMALL.items()}
    known, new = ({("a", 0): line(of_evaluation, "a", 0, {"tail_ppl@256": value})} for value in (48.0, 48.1))
    assert not results.compare([("a", 0)], new, known, of_evaluation), "an evaluation is not chance"
    elsewhere = {run: of | {"processor": "Another"} for run, of in runs_of(a=[49.3, 49.4]).items()}
    assert results.compare([("a", 0)], elsewhere, runs_of(a=[47.0, 48.0]), SMALL), "rounds otherwise"
    assert not results.compare([("a", 1)], elsewhere, runs_of(a=[47.0, 48.0]), SMALL)
    assert not results.compare([("a", 0)], runs_of(a=[49.3, 0.0]), runs_of(a=[47.0, 48.0]), SMALL)
    assert pages.rounding(3.0, "needle_gain@4096") == 0.81 and pages.rounding(3.0, "needle_gain_kept@4096") == 0.4
