"""Which lines a page has: what is compared, over seeds, and which models are one."""

import math
from dataclasses import replace

import pytest

from pose.evaluation.task import Estimate
from pose.reporting.lines import DOCUMENTS, EARLIER, MAX_SHOWN, Source, lines_of


def run(name, seed="0", rope="yarn", ppl=3.0, untuned=9.0):
    models = {"untuned": {"ppl@8": Estimate(untuned)}, "extended": {"ppl@8": Estimate(ppl, ppl - 1, ppl + 1, 5)}}
    return Source(name, f"runs/{name}", "training", {"RoPE": rope}, {"seed": seed, "rope": rope}, models)


def evaluation(name, identity="a", **metrics):
    models = {"mine": {f"{family}@8": Estimate(value) for family, value in metrics.items()}}
    return Source(name, f"runs/{name}", "evaluation", models=models, identities={"mine": identity})


def shown(lines):
    return [line.name for line in lines if line.is_shown]


def test_a_run_alone_has_a_line_for_each_model():
    lines, name_of = lines_of([run("one")])
    assert shown(lines) == ["untuned", "extended"] and name_of == {"one": "extended"}
    assert lines[1].estimates["ppl@8"] == Estimate(3.0, 2.0, 4.0, 5) and lines[1].spread == "95 % interval"
    nothing, name_of = lines_of([Source("one", "runs/one", "training")])
    assert shown(nothing) == ["one"] and name_of == {"one": "one"}, "a run without an evaluation has a training"


def test_runs_that_differ_in_their_seed_are_shown_by_their_mean():
    jobs = [run(f"rope={rope} seed={seed}", str(seed), rope, ppl) for rope, seed, ppl in
            (("yarn", 0, 2.0), ("yarn", 1, 4.0), ("linear", 0, 5.0))]  # fmt: skip
    lines, name_of = lines_of(jobs)
    assert shown(lines) == ["untuned", "rope=yarn (2 seeds)", "rope=linear seed=0"]
    mean = lines[1]
    assert mean.estimates["ppl@8"] == Estimate(3.0, 2.0, 4.0, 5) and mean.spread == "lowest to highest of 2 seeds"
    assert [line.name for line in lines if not line.is_shown] == ["rope=yarn seed=0", "rope=yarn seed=1"]
    assert name_of["rope=yarn seed=1"] == "rope=yarn (2 seeds)", "whose colour the training has"
    assert "linear" in lines[2].about and "linear" not in mean.about, "what the filter looks at"


@pytest.mark.parametrize(
    ("settings", "are_one"),
    [({"resume": "auto"}, True), ({"logger.name": "wandb"}, True), ({"finetune.lr": "1"}, False)],
)
def test_a_seed_that_was_resumed_is_of_the_mean(settings, are_one):
    """What a run was started with changes nothing in what it learned."""
    runs = [run(str(seed), str(seed)) for seed in range(3)]
    runs[2] = replace(runs[2], config=dict(runs[2].config) | settings)
    assert any(line.name.endswith("(3 seeds)") for line in lines_of(runs)[0]) is are_one


def test_a_run_and_its_copy_that_was_resumed_elsewhere_are_no_two_seeds():
    runs = [run("0", "0"), run("1", "1"), run("1 again", "1")]
    runs[2] = replace(runs[2], config=dict(runs[2].config) | {"resume": "runs/1"})
    names = [line.name for line in lines_of(runs)[0] if line.is_shown]
    assert any(name.endswith("(2 seeds)") for name in names) and "1 again" in names


def test_a_seed_whose_schedule_was_made_longer_is_not_of_the_mean():
    runs = [run(str(seed), str(seed)) for seed in range(3)]
    runs[2] = replace(runs[2], facts={EARLIER: "python train.py trainer.max_steps=20"})
    assert any(line.name.endswith("(2 seeds)") for line in lines_of(runs)[0])


def test_a_mean_tells_of_how_many_seeds_it_is():
    jobs = [run(f"seed={seed}", str(seed), ppl=ppl) for seed, ppl in ((0, 2.0), (1, 4.0))]
    begun = Source("seed=2", "runs/2", "training", {"RoPE": "yarn"}, {"seed": "2", "rope": "yarn"})
    lines, name_of = lines_of([*jobs, begun])
    assert lines[1].name == "all (2 of 3 seeds)" == name_of["seed=2"]
    assert lines[1].spread == "lowest to highest of 2 of 3 seeds" and lines[1].estimates["ppl@8"].value == 3.0


def test_the_filter_finds_a_job_by_its_own_settings():
    """The command of a sweep has those of all its jobs."""

    def job(i, rope, warmup):
        facts = {"RoPE": rope, "Command": "python train.py -m rope=yarn,linear"}
        config = {"rope": rope, "finetune.warmup_steps": warmup, "finetune.schedule": "linear"}
        return Source(f"job {i}", f"runs/{i}", "training", facts, config, {"extended": {"ppl@8": Estimate(3.0)}})

    lines, _ = lines_of([job(0, "yarn", "10"), job(1, "linear", "20")])
    assert ["linear" in line.about for line in lines] == [False, True], "a setting of both is not in it either"
    assert ["finetune.warmup_steps=20" in line.about for line in lines] == [False, True]


def test_the_filter_finds_what_a_run_alone_is():
    facts = {"RoPE": "Yarn (factor=8.0)", "Command": "python train.py pose=pose"}
    source = Source("one", "runs/one", "training", facts, {"seed": "0"}, {"extended": {"ppl@8": Estimate(3.0)}})
    (line,), _ = lines_of([source])
    assert "Yarn" in line.about and "seed=0" in line.about and "pose=pose" not in line.about


def test_the_same_run_twice_is_no_two_seeds():
    lines, _ = lines_of([run("a"), run("b")])
    assert shown(lines) == ["untuned", "a, b (2 runs)"]
    runs = [replace(run(name, name[1:]), folder=f"{name}") for name in ("a0", "b0", "c0", "a1", "b1", "c1")]
    assert shown(lines_of(runs)[0])[1:] == ["a0, b0, c0, ... (6 runs of 2 seeds)"]


def test_sweeps_of_the_same_seeds_are_two_means(tmp_path):
    """Before and after a change of the code: six runs are not six seeds."""
    before, after = (
        [
            replace(run(f"{sweep}/{seed} seed={seed}", seed, ppl=ppl), folder=f"{tmp_path}/{sweep}/{seed}")
            for seed in "012"
        ]
        for sweep, ppl in (("before", 3.0), ("after", 5.0))
    )
    lines, name_of = lines_of([*before, *after])
    assert shown(lines) == ["untuned", "before (3 seeds)", "after (3 seeds)"]
    assert [line.estimates["ppl@8"].value for line in lines[1:3]] == [3.0, 5.0]
    assert name_of["after/1 seed=1"] == "after (3 seeds)"
    commits = [replace(one, folder="runs/x", facts={"Commit": str(i)}) for i, one in enumerate((before[0], after[0]))]
    assert not any("runs)" in line.name for line in lines_of(commits)[0])


def test_a_sweep_by_another_path_is_the_same(tmp_path):
    """Given from two folders, relative once and absolute once."""
    (tmp_path / "link").symlink_to(tmp_path)
    copies = [replace(run("a", "0"), config={"seed": "0", "resume": "x"}) for _ in range(2)]
    folders = [tmp_path / "0", tmp_path / "link" / "1"]
    runs = [replace(one, name=folder.name, folder=str(folder)) for one, folder in zip(copies, folders, strict=True)]
    assert shown(lines_of(runs)[0])[1:] == ["0, 1 (2 runs)"]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_seed_whose_number_is_none_leaves_the_mean_without_bounds(place):
    """Whatever its place: as a share of a gain that is none."""
    values = [0.5, 0.7]
    values.insert(place, math.nan)
    jobs = [run(f"seed={i}", str(i), ppl=value) for i, value in enumerate(values)]
    (mean,) = [line for line in lines_of(jobs)[0] if line.name == "all (3 seeds)"]
    assert math.isnan(mean.estimates["ppl@8"].value)
    assert mean.estimates["ppl@8"].low is None and mean.estimates["ppl@8"].high is None


def test_all_is_what_is_everything():
    jobs = [replace(run(f"seed={i}", str(i)), folder=f"sweep/{i}") for i in range(2)]
    other = replace(evaluation("checked", ppl=4.0), folder="evaluations/checked")
    assert shown(lines_of(jobs)[0])[1:] == ["all (2 seeds)"]
    assert shown(lines_of([*jobs, other])[0])[1:] == ["sweep (2 seeds)", "mine"]


def test_untuned_models_that_differ_are_shown_when_asked_for():
    lines, _ = lines_of([run("a"), run("b", rope="ntk", untuned=8.0)])
    assert shown(lines) == ["a", "b"]
    assert [line.name for line in lines[2:]] == ["a: untuned", "b: untuned"]


def test_a_model_that_two_evaluations_measured_is_one_line():
    lines, _ = lines_of([evaluation("x", ppl=3.0), evaluation("y", passkey=1.0), evaluation("z", "b", passkey=0.5)])
    assert [line.name for line in lines] == ["mine", "z: mine"], "other weights of the same name are another"
    assert lines[0].estimates == {"ppl@8": Estimate(3.0), "passkey@8": Estimate(1.0)}


@pytest.mark.parametrize(
    ("metrics", "key", "are_one"),
    [
        (("ppl", "tail_ppl"), "dtype", False),
        (("ppl", "tail_ppl"), DOCUMENTS, False),
        (("ppl", "tail_ppl"), "eval.tail", False),
        (("ppl", "tail_ppl"), "eval.trials", True),
        (("passkey", "needle_gain"), "eval.trials", False),
        (("passkey", "ruler/vt"), "eval.depths", False),
        (("passkey", "needle_gain"), DOCUMENTS, True),
        (("ppl", "passkey"), DOCUMENTS, True),
        (("ppl", "tail_ppl"), "device", True),
        (("harness/boolq", "harness/piqa"), "eval.limit", False),
        (("harness/boolq", "harness/piqa"), "eval.num_fewshot", False),
        (("harness/boolq", "passkey"), "eval.limit", True),
    ],
)
def test_numbers_under_other_conditions_are_another_line(metrics, key, are_one):
    """One model, two numbers that do not meet: beside each other only where what they depend on is the same."""
    jobs = [
        replace(
            evaluation(name, **{metric: 1.0}),
            **({"facts": {key: value}} if key == DOCUMENTS else {"config": {key: value, "eval.seed": "0"}}),
        )
        for name, metric, value in zip("xy", metrics, ("1", "2"), strict=True)
    ]
    lines, _ = lines_of(jobs)
    assert [line.name for line in lines] == ["mine"] + ["y: mine"] * (not are_one)


@pytest.mark.parametrize(("lengths", "are_one"), [((8, 16), False), ((8, 8), True)])
def test_perplexities_whose_longest_length_differs_are_other_tokens(lengths, are_one):
    """None of their names need occur twice."""
    names = (f"ppl@{lengths[0]}", f"tail_ppl@{lengths[1]}")
    jobs = [
        Source(name, name, "evaluation", models={"mine": {metric: Estimate(1.0)}}, identities={"mine": "a"})
        for name, metric in zip("xy", names, strict=True)
    ]
    assert [line.name for line in lines_of(jobs)[0]] == ["mine"] + ["y: mine"] * (not are_one)


def test_the_untuned_model_of_trainings_and_that_of_an_evaluation_are_told_apart():
    other = Source("e", "e", "evaluation", models={"untuned": {"ppl@8": Estimate(5.0)}}, identities={"untuned": "a"})
    runs = [replace(one, facts={**one.facts, "Model": "in/base"}) for one in (run("a"), run("b", rope="ntk"))]
    lines, _ = lines_of([*runs, other])
    values = {line.name: line.estimates["ppl@8"].value for line in lines if "untuned" in line.name}
    assert values == {"untuned": 9.0, "e: untuned": 5.0}
    assert lines[0].about == "in/base", "which it is found by, and not by methods that it has none of"


def test_a_number_that_is_none_is_no_difference():
    """needle_gain_kept is nan by design where there is nothing to keep."""
    jobs = [evaluation("x", ppl=3.0, needle_gain_kept=float("nan")), evaluation("y", needle_gain_kept=float("nan"))]
    assert [line.name for line in lines_of(jobs)[0]] == ["mine"]
    lines, _ = lines_of([run("a", untuned=float("nan")), run("b", rope="ntk", untuned=float("nan"))])
    assert shown(lines) == ["untuned", "a", "b"]


def test_a_run_that_is_not_finished_has_no_part_in_a_mean():
    jobs = [run(f"seed={seed}", str(seed), ppl=ppl) for seed, ppl in ((0, 2.0), (1, 4.0), (2, 80.0))]
    jobs[2] = replace(jobs[2], facts=jobs[2].facts | {"State": "not finished: what was measured is of 1 of 9 steps"})
    lines, name_of = lines_of(jobs)
    assert lines[1].name == "all (2 of 3 seeds)" == name_of["seed=2"] and lines[1].estimates["ppl@8"].value == 3.0


def test_seeds_of_an_evaluation_tell_lines_apart():
    jobs = []
    for ev in "01":
        for seed in "01":
            job = run(f"eval.seed={ev} seed={seed}", seed)
            jobs.append(replace(job, config=job.config | {"eval.seed": ev}))
    assert shown(lines_of(jobs)[0]) == ["untuned", "eval.seed=0 (2 seeds)", "eval.seed=1 (2 seeds)"]


def test_what_two_evaluations_found_differently_stays_apart():
    """On other documents, say."""
    lines, _ = lines_of([evaluation("x", ppl=3.0), evaluation("y", ppl=4.0, passkey=1.0)])
    assert [(line.name, line.estimates["ppl@8"].value) for line in lines] == [("mine", 3.0), ("y: mine", 4.0)]
    assert "passkey@8" not in lines[0].estimates


def test_names_are_all_different_and_in_one_line():
    twice = [run("a"), run("a", rope="ntk"), run("b\nc", rope="linear")]
    lines, _ = lines_of(twice)
    names = [line.name for line in lines]
    assert len(set(names)) == len(names) and "b c" in names


def test_lines_look_different_and_no_more_are_shown_than_can():
    lines, _ = lines_of([run(str(i), rope=str(i)) for i in range(20)])
    visible = [line for line in lines if line.is_shown]
    assert len(visible) == MAX_SHOWN == len({(line.style.color, line.style.dash) for line in visible})
    assert all(line.is_shown for line in lines[:MAX_SHOWN])
    assert not any(line.style.color == "#000000" for line in lines), "which a dark page would swallow"
