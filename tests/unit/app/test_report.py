"""The command: which folders it reads, what it finds there, and what it says of others."""

import json
import math
import shutil
from pathlib import Path

import pytest

from pose import files
from pose.app import report
from pose.app.report import main, read, write_beside, write_report
from pose.errors import DataError
from pose.evaluation.task import Estimate
from pose.files import write_json
from pose.reporting.lines import lines_of
from pose.reporting.results_csv import write_results

PROVENANCE = {
    "command": "python train.py rope=yarn", "commit": "0123456789abcdef", "uncommitted_changes": True,
    "python": "3.11.7",
    "packages": {"torch": "2.13.0", "transformers": "5.23.0", "lightning": None}, "processor": "x86_64",
    "cpu_threads": 2, "gpu": None, "settings": {"model's max_position_embeddings": 256},
}  # fmt: skip
CONFIG = """\
model: {path: assets/tiny}
pose: {_target_: pose.positions.PoSE, target_len: 2048, train_len: 256, num_chunks: 2}
rope: {_target_: pose.rope.Yarn, factor: 8.0, attention_factor: null}
data: {documents: [a.jsonl, b.jsonl]}
eval: {tasks: [perplexity], documents: held.jsonl}
seed: 3
"""


@pytest.fixture
def run(tmp_path):
    """Makes the folder of a run."""

    def run_(name="run", config=CONFIG, overrides=None):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(config)
        (folder / "provenance.json").write_text(json.dumps(PROVENANCE))
        (folder / "metrics.csv").write_text("step,train/loss,cost/peak_memory_gib\n9,3.5,2.5\n19,3.25,1.5\n")
        (folder / "coverage.csv").write_text("distance,probability,pair_share\n1,1,0.75\n2,0.5,0.25\n")
        found = {"untuned": {"ppl@256": 9.0}, "extended": {"ppl@256": 3.0}}
        numbers = {"cost/seconds": 10.0, "train/steps": 20, "cost/tokens": 5000, "cost/flops": 6e9}
        (folder / "metrics.json").write_text(json.dumps(found["extended"] | numbers | found))
        if overrides is not None:
            (folder / ".hydra").mkdir()
            (folder / ".hydra" / "overrides.yaml").write_text("".join(f"- {override}\n" for override in overrides))
        return folder

    return run_


@pytest.fixture
def evaluation(tmp_path):
    folder = tmp_path / "evaluation"
    folder.mkdir()
    estimate = {"value": 3.0, "low": 2.5, "high": 3.5, "num": 4}
    checkpoints = {
        name: {"path": f"in/{name}", "window": window, "target": 1024, "identity": {"checkpoint": name},
               "took": {"seconds": 2.0, "peak_memory_gib": 1.0}, "metrics": {"ppl@256": estimate}}
        for name, window in (("base", 256), ("mine", 512))
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps({"checkpoints": checkpoints}))
    (folder / "provenance.json").write_text(json.dumps(PROVENANCE | {"command": "python evaluate.py ckpt=X"}))
    (folder / "config.yaml").write_text("eval: {tasks: [perplexity], documents: held.jsonl, lengths: [256, 512]}\n")
    (folder / "metrics.json").write_text("{}")
    return folder


def test_a_run_from_a_model_that_was_extended_has_that_ones_own_window(run):
    folder = run()
    provenance = json.loads((folder / "provenance.json").read_text())
    provenance["settings"] |= {"model's pose": {"rope": "linear", "window": 64, "factor": 4.0}}
    (folder / "provenance.json").write_text(json.dumps(provenance))
    assert read(folder)[0].window == 64


def test_a_run_is_read(run):
    folder = run()
    (source,) = read(folder)
    assert source.kind == "training" and (source.window, source.target) == (256, 2048)
    assert source.models == {
        "untuned": {"ppl@256": Estimate(9.0, num=0)},
        "extended": {"ppl@256": Estimate(3.0, num=0)},
    }
    assert source.cost["training"] == {
        "seconds": 10.0, "steps": 20, "tokens": 5000, "tokens_per_second": 500.0, "peak_memory_gib": 2.5, "flops": 6e9,
    }  # fmt: skip
    assert [row["train/loss"] for row in source.logged] == ["3.5", "3.25"]
    assert [list(column) for column in source.coverage] == [[1, 2], [1, 0.5], [0.75, 0.25]]
    facts = {
        "Model": "assets/tiny", "Window": "256 → 2,048 tokens",
        "Sampler": "PoSE (num_chunks=2), examples of 256 tokens",
        "RoPE": "Yarn (factor=8.0)", "Data": "a.jsonl, b.jsonl", "Measured on": "held.jsonl", "Seed": "3", "State": "",
        "Command": "python train.py rope=yarn", "Commit": "0123456789ab and uncommitted changes",
        "Versions": "torch 2.13.0, transformers 5.23.0, Python 3.11.7", "Machine": "x86_64 CPU, 2 threads",
    }  # fmt: skip
    assert facts.items() <= source.facts.items()
    estimates = {model: {"ppl@256": Estimate(n, n - 1, n + 1, 5)} for model, n in (("untuned", 9.0), ("extended", 3.0))}
    write_results(folder / "results.csv", estimates)
    assert read(folder)[0].models == estimates, "with intervals, as newer runs leave them"


def test_what_a_damaged_table_of_results_lacks_is_of_the_metrics(run, capsys):
    """A model must not leave the page because the file was cut."""
    folder = run()
    write_results(folder / "results.csv", {"untuned": {"ppl@256": Estimate(9.0, 8.0, 10.0, 5)}})
    models = read(folder)[0].models
    assert models == {
        "untuned": {"ppl@256": Estimate(9.0, 8.0, 10.0, 5)},
        "extended": {"ppl@256": Estimate(3.0, num=0)},
    }
    assert f"{folder / 'results.csv'} is damaged" in capsys.readouterr().out


@pytest.mark.parametrize("twice", [("sweep", "sweep/1"), ("sweep/1", "sweep"), ("sweep", "link"), ("link/0", "sweep")])
def test_a_run_that_is_given_twice_is_on_the_page_once(run, tmp_path, monkeypatch, twice, capsys):
    monkeypatch.chdir(tmp_path)
    for seed in "01":
        run(f"sweep/{seed}", CONFIG.replace("seed: 3", f"seed: {seed}"), overrides=[f"seed={seed}"])
    (tmp_path / "link").symlink_to("sweep")
    sources = read(*map(Path, twice))
    assert sorted(source.name for source in sources) == ["seed=0", "seed=1"]
    assert "which the page has once" in capsys.readouterr().out
    names = [line.name for line in lines_of(sources)[0]]
    assert any(name.endswith("(2 seeds)") for name in names), names


def test_what_is_not_known_is_left_out(run):
    """Neither a machine called None nor a training of all weights without a config that says so."""
    folder = run()
    (folder / "provenance.json").write_text('{"command": "x", "commit": "abc"}')
    assert read(folder)[0].facts["Machine"] == ""
    (folder / "config.yaml").write_text("{a: [")
    (source,) = read(folder)
    assert not source.facts.keys() & {"Training", "Sampler", "RoPE", "Model"}
    write_report([folder], folder / "report.html")
    assert "<h1>Training run</h1>" in (folder / "report.html").read_text()


def test_what_trained_is_said(run):
    """The objective, and how many of the examples are retrieval, which a page of passkeys must not leave out."""
    config = CONFIG.replace("a.jsonl, b.jsonl]", "a.jsonl], synthetic: {passkey: 0.2, copy: 0, key_value: 0.15}")
    config += "objective: {_target_: pose.training.objectives.SelfDistill, weight: 1.0}\n"
    facts = read(run(config=config))[0].facts
    assert facts["Objective"] == "SelfDistill (weight=1.0)"
    assert facts["Data"] == "a.jsonl; retrieval examples: 20% passkey, 15% key_value"


def test_examples_of_full_length_training_are_as_long_as_the_target(run):
    full = "pose: {_target_: pose.positions.Full, target_len: 2048, train_len: 256}"
    folder = run(config="\n".join(full if line.startswith("pose:") else line for line in CONFIG.splitlines()))
    assert read(folder)[0].facts["Sampler"] == "Full, examples of 2048 tokens"


def test_what_an_older_run_has_cost_is_read(run):
    """It has its costs under train/."""
    folder = run()
    for name in ("metrics.json", "metrics.csv"):
        (folder / name).write_text((folder / name).read_text().replace("cost/", "train/"))
    (source,) = read(folder)
    assert {"seconds": 10.0, "tokens": 5000, "peak_memory_gib": 2.5}.items() <= source.cost["training"].items()


def test_an_evaluation_is_read(evaluation):
    (source,) = read(evaluation)
    assert source.kind == "evaluation" and (source.window, source.target) == (256, 1024)
    assert source.models["mine"] == {"ppl@256": Estimate(3.0, 2.5, 3.5, 4)} and list(source.models) == ["base", "mine"]
    assert source.cost["measuring base"] == {"seconds": 2.0, "peak_memory_gib": 1.0}
    assert source.identities["base"] != source.identities["mine"]
    assert source.facts["Checkpoints"] == "base: in/base; mine: in/mine" and source.facts["Lengths"] == "256, 512"


def test_numbers_of_an_earlier_evaluation_are_told_with_its_settings(evaluation):
    """One with others has begun in its folder, and written its config.yaml and provenance.json alone."""
    made_with = PROVENANCE | {"overrides": ["ckpt={base:a,mine:b}", "dtype=float32"]}
    more = {"eval": {"trials": 4, "lengths": [256]}, "provenance": made_with}
    content = json.loads((evaluation / "results.json").read_text()) | more
    (evaluation / "results.json").write_text(json.dumps(content))
    config = "ckpt: {base: a, mine: c}\ndtype: bfloat16\neval: {tasks: [passkey], trials: 8, lengths: [256]}\n"
    (evaluation / "config.yaml").write_text(config)
    for overrides, is_stale in (
        (["ckpt={base:a,mine:c}", "dtype=float32"], True),
        (["ckpt={base:a,mine:b}", "dtype=bfloat16"], True),
        (["dtype=float32", "ckpt={base:a,mine:b}", "num_threads=1"], False),
    ):
        (evaluation / "provenance.json").write_text(json.dumps(PROVENANCE | {"overrides": overrides}))
        (source,) = read(evaluation)
        assert ("an earlier start" in source.facts["State"]) is is_stale
        assert source.config["eval.trials"] == ("4" if is_stale else "8") and ("dtype" in source.config) is not is_stale


@pytest.mark.parametrize("results", [{}, {"base": {}}])
def test_an_evaluation_that_was_ended_is_one_and_says_so(evaluation, results):
    """Before its first checkpoint there is a config.yaml alone."""
    config = (evaluation / "config.yaml").read_text()
    (evaluation / "config.yaml").write_text(config + "ckpt: {base: in/base, mine: in/mine}\n")
    (evaluation / "results.json").write_text(json.dumps({"checkpoints": results}))
    if not results:
        (evaluation / "results.json").unlink()
        (evaluation / "metrics.json").unlink()
    (source,) = read(evaluation)
    assert source.kind == "evaluation"
    assert source.facts["State"] == f"not finished: {len(results)} of 2 checkpoints"
    write_report([evaluation], evaluation / "report.html")
    assert f"<h1>Evaluation of {'base' if results else 'several checkpoints'}</h1>" in (
        evaluation / "report.html"
    ).read_text(encoding="utf-8")


@pytest.mark.parametrize("ckpt", ["base", "[base, mine]", "{base: in/base, mine: in/mine}"])
def test_an_evaluation_of_all_that_was_asked_for_is_finished(evaluation, ckpt):
    with open(evaluation / "config.yaml", "a") as file:
        file.write(f"ckpt: {ckpt}\n")
    assert read(evaluation)[0].facts["State"] == ""


def test_a_job_that_was_refused_is_in_its_sweep(run, tmp_path):
    """Hydra has kept what it was given; nothing else is there."""
    run("sweep/0", overrides=["rope=yarn"])
    (tmp_path / "sweep" / "1" / ".hydra").mkdir(parents=True)
    (tmp_path / "sweep" / "1" / ".hydra" / "overrides.yaml").write_text("- rope=longrope\n")
    done, refused = read(tmp_path / "sweep")
    assert refused.kind == "training"
    assert (done.name, refused.name) == ("rope=yarn", "rope=longrope")
    assert refused.facts["State"].startswith("not begun")
    write_report([tmp_path / "sweep"], tmp_path / "page.html")
    assert "<h1>Sweep sweep: 2 jobs</h1>" in (tmp_path / "page.html").read_text(encoding="utf-8")
    lines, _ = lines_of([done, refused])
    assert next(line for line in lines if line.name == "rope=longrope").is_shown is False


def test_the_tokenizers_of_trainings_are_remarked_on(run, tmp_path):
    """Where they are known, which those of older runs are not."""
    folders = [run("a"), run("b")]
    write_report(folders, tmp_path / "page.html")
    assert "The tokenizers differ" not in (tmp_path / "page.html").read_text(encoding="utf-8")
    for folder, tokenizer in zip(folders, ("0123", "4567"), strict=True):
        (folder / "provenance.json").write_text(json.dumps(PROVENANCE | {"tokenizer": tokenizer}))
    write_report(folders, tmp_path / "page.html")
    assert "The tokenizers differ" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_starts_with_other_settings_are_told(run):
    """A schedule that was made longer is another one; what a run was resumed with, or measured by, changes nothing."""
    folder = run()
    start = {"overrides": ["trainer.max_steps=20", "seed=3"]}
    for overrides, step, said in (
        (["trainer.max_steps=40", "seed=3", "resume=auto"], 20, "trainer.max_steps=20"),
        (["trainer.max_steps=40", "seed=3", "resume=auto"], 0, ""),  # the earlier start left no checkpoint
        (["trainer.max_steps=20", "seed=3", "resume=auto", "+logger.mode=online", "eval=long"], 10, ""),
    ):
        now = PROVENANCE | {"overrides": overrides, "earlier": [start], "from_step": step}
        (folder / "provenance.json").write_text(json.dumps(now))
        assert read(folder)[0].facts["Earlier starts"] == said


def test_a_name_that_is_no_text_has_a_page(run):
    folder = run()
    (folder / "config.yaml").write_text(CONFIG + 'name: "\\udcff.txt"\n')
    write_report([folder], folder / "report.html")
    assert "?.txt" in (folder / "report.html").read_text(encoding="utf-8")


def test_jobs_of_a_sweep_are_named_by_what_they_were_given(run, tmp_path):
    """In their order, 10 after 2, without what all of them were given; of a long value its beginning."""
    factors = "rope.long_factor=[" + ",".join(["1.25"] * 16) + "]"
    for job, rope in ((10, "rope=ntk"), (2, "rope=yarn"), (11, factors)):
        run(f"sweep/{job}", overrides=["experiment=smoke", rope])
    (tmp_path / "sweep" / "3").mkdir()
    names = ["rope=yarn", "rope=ntk", factors[:45] + "..."]
    assert [source.name for source in read(tmp_path / "sweep")] == names
    write_report([tmp_path / "sweep"], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "<h1>Sweep sweep: 3 jobs</h1>" in text and 'data-line="rope=ntk"' in text


def test_jobs_of_several_sweeps_are_named_by_what_not_all_of_them_were_given(run, tmp_path):
    """And without what has no effect, as a job has that was resumed."""
    for rope in ("yarn", "ntk"):
        for seed in range(2):
            resumed = ["resume=auto"] * (rope == "ntk" and seed == 1)
            overrides = ["experiment=smoke", f"rope={rope}", f"seed={seed}", *resumed]
            run(f"{rope}/{seed}", CONFIG + f"seed: {seed}\nrope: {rope}\n", overrides)
    sources = read(tmp_path / "yarn", tmp_path / "ntk")
    assert [source.name for source in sources] == [f"rope={rope} seed={i}" for rope in ("yarn", "ntk") for i in (0, 1)]
    write_report([tmp_path / "yarn", tmp_path / "ntk"], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert 'data-line="rope=yarn (2 seeds)"' in text and 'data-line="rope=ntk (2 seeds)"' in text


def test_sweeps_that_were_given_the_same_are_told_apart_by_their_folders(run, tmp_path):
    for sweep in ("before", "after"):
        for seed in range(2):
            run(f"{sweep}/{seed}", CONFIG + f"seed: {seed}\n", [f"seed={seed}"])
    write_report([tmp_path / "before", tmp_path / "after"], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    for name in ("before/0 seed=0", "before (2 seeds)", "after/0 seed=0", "after (2 seeds)"):
        assert f'data-line="{name}"' in text


def test_a_run_that_is_not_finished_has_what_it_logged(run):
    folder = run()
    (folder / "metrics.json").unlink()
    (source,) = read(folder)
    assert source.facts["State"].startswith("not finished") and source.logged and source.models == {}
    write_report([folder], folder / "report.html")


def test_a_run_that_is_not_finished_has_cost_what_it_logged_last(run):
    folder = run()
    (folder / "metrics.json").unlink()
    (folder / "metrics.csv").write_text(
        "step,cost/seconds,cost/tokens,cost/step_seconds,eval/ppl@8\n9,5,640,0.5,\n19,9,1280,0.25,\n19,,,,3.5\n"
    )
    expected = {"seconds": 9, "tokens": 1280, "steps": 20, "step_seconds": 0.375, "tokens_per_second": 1280 / 9}
    assert read(folder)[0].cost["training"] == expected
    (folder / "metrics.json").write_text(json.dumps({"train/steps": 10, "cost/seconds": 5}))  # of fewer steps
    (folder / "config.yaml").write_text(CONFIG + "trainer: {max_steps: 40}\n")
    assert read(folder)[0].cost["training"] == expected


def test_a_run_that_goes_on_with_more_steps_is_not_finished(run):
    """Its metrics.json is of the steps before."""
    folder = run(config=CONFIG + "trainer: {max_steps: 3000}\n")
    (source,) = read(folder)
    assert source.facts["State"] == "not finished: what was measured is of 20 of 3,000 steps"
    (source,) = read(run("done", config=CONFIG + "trainer: {max_steps: 20}\n"))
    assert source.facts["State"] == "" and source.facts["Ended"]
    (folder / "metrics.json").unlink()
    assert read(folder)[0].facts["Ended"] == "", "it has none, whenever it began"


def test_data_sets_are_named_by_path_and_fields(run):
    config = CONFIG.replace("documents: held.jsonl", "documents: {path: emozilla/pg19, name: null, split: test}")
    (source,) = read(run(config=config))
    assert source.facts["Measured on"] == "emozilla/pg19 split=test" and source.facts["Data"] == "a.jsonl, b.jsonl"


def test_documents_that_are_set_aside_are_named_by_what_they_are_of(run):
    """Two runs on two texts were measured on different documents, though neither names some."""
    (source,) = read(run(config=CONFIG.replace("documents: held.jsonl", "documents: null")))
    assert source.facts["Measured on"] == "what is set aside of a.jsonl, b.jsonl"


@pytest.mark.parametrize(
    ("path", "title"),
    [("/a/b/smollm2", "smollm2"), ("/a/RUN/model", "RUN/model"), ("org/name", "org/name"), ("null", "random weights")],
)
def test_the_title_names_the_model_without_the_places_of_a_machine(run, path, title):
    folder = run(config=CONFIG.replace("assets/tiny", path))
    write_report([folder], folder / "page.html")
    assert f"<h1>{title}: 256 → 2,048 tokens, " in (folder / "page.html").read_text()


def test_a_model_of_random_weights_is_called_so(run):
    assert read(run(config=CONFIG.replace("assets/tiny", "null")))[0].facts["Model"] == "random weights"


@pytest.mark.parametrize(
    "name", ["config.yaml", "provenance.json", "metrics.json", "metrics.csv", "coverage.csv", "results.csv"]
)
@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe\0", b"[1, 2]", b"{a: [", b'{"settings": 3, "packages": [], "x": {"y": {}}}']
)
def test_a_damaged_file_leaves_its_part_out(run, name, content, capsys):
    folder = run()
    (folder / name).write_bytes(content)
    write_report([folder], folder / "report.html")
    if name in ("provenance.json", "metrics.json") and not content.startswith(b'{"settings"'):
        assert f"{folder / name} is damaged" in capsys.readouterr().out
    assert "assets/tiny" in (folder / "report.html").read_text() or name == "config.yaml"


def test_a_step_takes_the_median_of_what_was_logged(run):
    """The first steps compile, and the last may wait for a checkpoint."""
    folder = run()
    (folder / "metrics.csv").write_text(
        "step,train/loss,cost/step_seconds,cost/mfu\n9,3,9.0,0.1\n19,3,2.0,0.4\n29,3,2.5,0.3\n30,3,7.0,0.2\n31,3,,\n"
    )
    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps(metrics | {"cost/step_seconds": 7.0, "cost/mfu": 0.2}))
    cost = read(folder)[0].cost["training"]
    assert (cost["step_seconds"], cost["mfu"]) == (4.75, 0.25)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_coverage_that_is_no_number_is_left_out(run, value):
    folder = run()
    (folder / "coverage.csv").write_text(f"distance,probability,pair_share\n1,1,0.75\n{value},0.5,0.25\n")
    write_report([folder], folder / "report.html")
    assert "Probability of a distance" not in (folder / "report.html").read_text()


def test_whole_files_are_not_called_damaged(run, capsys):
    folder = run()
    write_report([folder], folder / "report.html")
    (folder / "metrics.json").unlink()
    write_report([folder], folder / "report.html")
    assert "damaged" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "content", ["", "[]", '{"checkpoints": 3}', '{"checkpoints": {"a": 1, "b": {"metrics": [], "took": 2}}}']
)
def test_a_damaged_evaluation_has_a_page(evaluation, content):
    (evaluation / "results.json").write_text(content)
    write_report([evaluation], evaluation / "report.html")


def test_a_model_without_an_identity_is_no_other_one(evaluation):
    """Or all whose evaluations say none would be one line of a page."""
    content = json.loads((evaluation / "results.json").read_text())
    del content["checkpoints"]["base"]["identity"]
    (evaluation / "results.json").write_text(json.dumps(content))
    assert set(read(evaluation)[0].identities) == {"mine"}


def test_the_command_writes_beside_one_folder_and_here_for_several(run, evaluation, tmp_path, monkeypatch, capsys):
    folder = run()
    main([str(folder)])
    assert "<h1>assets/tiny: 256 → 2,048 tokens, PoSE and Yarn</h1>" in (folder / "report.html").read_text()
    assert f"{folder}/report.html" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    main([str(folder), str(evaluation)])
    text = (tmp_path / "report.html").read_text()
    assert all(f'data-line="{name}"' in text for name in ("run", "base", "mine"))
    main([str(evaluation), "--out", "mine.html"])
    assert "<h1>Evaluation of base, mine</h1>" in (tmp_path / "mine.html").read_text()


def test_runs_of_one_name_are_told_apart_by_where_they_are(run, tmp_path):
    """And those that are named by a time by their day, too."""
    folders = [run("a/run"), run("b/run", CONFIG + "x: 1"), run("2026-01-02/10-11-12", CONFIG + "x: 2")]
    write_report(folders, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert all(f'data-line="{name}"' in text for name in ("run", "b/run", "2026-01-02/10-11-12"))


@pytest.mark.parametrize(
    ("folder", "words"),
    [("nowhere", "nowhere is no folder"), (".", "neither it nor a folder in it has config.yaml or metrics.json")],
)
def test_a_folder_that_holds_nothing_is_named(tmp_path, monkeypatch, capsys, folder, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main([folder])
    said = capsys.readouterr().err
    assert ended.value.code == 1 and words in said and not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("out", "words"), [(".", "is a folder"), ("nowhere/x.html", "nowhere/x.html cannot be written")]
)
def test_a_page_that_cannot_be_written_is_named(run, tmp_path, monkeypatch, capsys, out, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main([str(run()), "--out", out])
    assert words in capsys.readouterr().err


def test_a_page_is_there_whole_or_not_at_all(run, monkeypatch):
    folder = run()
    write_report([folder], folder / "report.html")
    before = (folder / "report.html").read_text()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(DataError, match="No space left"):
        write_report([folder], folder / "report.html")
    assert (folder / "report.html").read_text() == before and not list(folder.glob("*.partial"))


def test_what_has_ended_does_not_fail_for_its_page(run, monkeypatch, capsys):
    """Whatever is wrong: a warning says how to try again."""
    folder = run()

    def broken(*_):
        raise ZeroDivisionError("of a chart")

    monkeypatch.setattr(report, "write_report", broken)
    write_beside(folder)
    assert f"Warning: {folder}/report.html was not written (of a chart)" in capsys.readouterr().out
    shutil.rmtree(folder)
    monkeypatch.undo()
    write_beside(folder)
    assert "is no folder" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["search.csv", "needles.csv", "factors.yaml"])
def test_a_search_is_no_training_that_has_not_ended(tmp_path, name):
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / name).write_text("")
    with pytest.raises(DataError, match=rf"is of a search, which has no page: what it found is in {name}"):
        read(tmp_path)


def test_a_folder_in_which_a_run_has_only_begun_is_none(tmp_path):
    """Hydra's own folder has a config.yaml, and is no job of a sweep."""
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "config.yaml").write_text(CONFIG)
    (tmp_path / "evaluate.log").write_text("")
    with pytest.raises(DataError, match="is no run, sweep or evaluation"):
        read(tmp_path)


def test_what_is_not_a_number_has_a_place(tmp_path):
    """JSON has none: metrics.json of any language's reader has null, and a page shows that it was measured."""
    write_json(tmp_path / "metrics.json", {"a": [float("nan"), float("inf"), 1.5], "b": {"c": float("nan")}, "d": 2})

    def refuse(word):
        raise AssertionError(word)

    content = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=refuse)
    assert content == {"a": [None, None, 1.5], "b": {"c": None}, "d": 2}
    found = report._estimates({"kept": {"value": None, "low": None, "high": None, "num": 5}, "other": None, "x": 1.0})
    assert found["kept"].num == 5 and math.isnan(found["kept"].value) and math.isnan(found["other"].value)
    assert found["x"].value == 1.0
