"""Whether a run starts, goes on, or is complete. Whole runs: tests/integration/test_resume.py."""

import json
import os
import shlex
import shutil
import sys
import time
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.conf import ConfigSourceInfo
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from pose.app import schema
from pose.errors import CheckpointError, ConfigError
from pose.files import CONF, REPOSITORY, sha256
from pose.training import launch, loggers
from pose.training.checkpoints import Checkpoint
from pose.training.folder import alone_in, run_id
from pose.training.resume import check_finished, check_resume, find_resume, finished_steps, resume_command

schema.register()


def config(**keys):
    return OmegaConf.create(
        {
            "resume": "auto",
            "trust_pickle": False,
            "trainer": {"max_steps": 9},
            "eval": {"tasks": ["passkey"]},
            "model": {"path": "a"},
        }
        | keys
    )


def start_in(run_dir: Path) -> str:
    """Gives a folder the id of a run, as a run does."""
    with alone_in(run_dir):
        return run_id(run_dir)


@pytest.mark.parametrize("left", ["results.json", "search.csv", "settings.json"])
def test_the_folder_of_an_evaluation_or_a_search_is_left_alone(tmp_path, left):
    for resume in (None, "auto"):
        assert find_resume(config(resume=resume), tmp_path) is None
    (tmp_path / left).write_text("{}")
    for resume in (None, "auto"):
        with pytest.raises(ConfigError, match=rf"holds what (an evaluation|a search) has left \({left}\)"):
            find_resume(config(resume=resume), tmp_path)


def test_a_best_model_is_not_overwritten_by_another_run(tmp_path):
    """Of a run that ended before its first checkpoint; the same run may begin anew."""
    (tmp_path / "best").mkdir()
    with pytest.raises(ConfigError, match="holds a run already"):
        find_resume(config(resume=None), tmp_path)
    assert find_resume(config(), tmp_path) is None


def write_checkpoint(run_dir: Path, step: int, digest: str | None = "wrong", when: float = 0.0) -> Path:
    folder = run_dir / "checkpoints" / f"step-{step}"
    folder.mkdir(parents=True)
    (folder / "state").write_text("x")
    files = {"state": [1, digest or sha256(folder / "state")]}
    manifest = {"step": step, "settings": {}, "files": files, "run": run_id(run_dir), "time": when}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def finish(run_dir: Path, steps: object = 9):
    """Makes a run look complete."""
    (run_dir / "model").mkdir()
    (run_dir / "model" / "config.json").write_text("{}")
    (run_dir / "metrics.json").write_text(json.dumps({"train/steps": steps}))


@pytest.fixture
def two(tmp_path):
    """Two finished runs, A and B, each with one checkpoint."""
    for name, step in (("A", 8), ("B", 9)):
        start_in(tmp_path / name)
        write_checkpoint(tmp_path / name, step, None)
        finish(tmp_path / name)
    return tmp_path / "A", tmp_path / "B"


def test_the_choice_of_the_process_that_started_this_one_is_taken(tmp_path, monkeypatch):
    """It has read every byte: the others look at sizes alone, and choose nothing."""
    older, _ = write_checkpoint(tmp_path, 3), write_checkpoint(tmp_path, 6)
    with pytest.raises(CheckpointError, match="is whole"):
        find_resume(config(), tmp_path)
    monkeypatch.setenv(launch.PARENT, str(os.getppid()))
    monkeypatch.setenv(launch.CHECKPOINT, str(older))
    assert find_resume(config(), tmp_path).step == 3
    monkeypatch.setenv(launch.CHECKPOINT, "")
    assert find_resume(config(resume=None), tmp_path) is None
    (older / "state").write_text("xx")
    monkeypatch.setenv(launch.CHECKPOINT, str(older))
    with pytest.raises(CheckpointError, match="step-3 is damaged"):
        find_resume(config(), tmp_path)


@pytest.mark.parametrize(
    ("strategy", "place", "run", "refused"),
    [
        ("FSDP", "other/checkpoints", "other", True),
        ("FSDP", "run/checkpoints", "own", False),
        ("FSDP", "run/checkpoints", "other", True),
        ("FSDP", "run/checkpoints", None, True),
        ("FSDP", "run/../other/checkpoints", "own", True),
        ("FSDP", "other/../run/checkpoints", "own", False),
        ("FSDP", "run/link/checkpoints", "own", True),
        ("FSDP", "other/back/checkpoints", "own", False),
        ("FSDP", "run/nested/checkpoints", "own", True),
        ("any", "other/checkpoints", "other", False),
    ],
)
def test_what_another_run_wrote_is_unpickled_only_where_it_is_asked_for(tmp_path, strategy, place, run, refused):
    """Whose it is is what it says, at the place that it leads to, however that is spelt."""
    ids = {"own": start_in(tmp_path / "run"), "other": start_in(tmp_path / "other"), None: None}
    (tmp_path / "run" / "nested").mkdir()
    (tmp_path / "run" / "link").symlink_to(tmp_path / "other")
    (tmp_path / "other" / "back").symlink_to(tmp_path / "run")
    checkpoint = Checkpoint(tmp_path / place / "step-3", 3, {"strategy": strategy}, ids[run])
    arguments = checkpoint, {"strategy": strategy}, tmp_path / "run"
    if refused:
        with pytest.raises(ConfigError, match="trust_pickle=true"):
            check_resume(config(), *arguments)
        check_resume(config(trust_pickle=True), *arguments)
    else:
        check_resume(config(), *arguments)


def test_tensorboard_drops_what_was_logged_beyond_the_step(tmp_path):
    assert loggers.build_loggers("tensorboard", tmp_path, 7)[1]._kwargs["purge_step"] == 7
    assert loggers.build_loggers("tensorboard", tmp_path)[1]._kwargs["purge_step"] == loggers.BEFORE, "and all of it"


# Where paths lead, not how they are spelt


@pytest.mark.parametrize(
    "spelt",
    ["A/../B", "B", "A/link", "A/link/checkpoints", "A/link/checkpoints/step-9", "A/step", "A/checkpoints/../../B"],
)
def test_a_finished_run_is_not_replaced_by_another(two, tmp_path, monkeypatch, spelt):
    a, b = two
    (a / "link").symlink_to(b)
    (a / "step").symlink_to(b / "checkpoints" / "step-9")
    monkeypatch.chdir(tmp_path)
    for run_dir in (a, Path("A"), tmp_path / "B" / ".." / "A"):
        with pytest.raises(ConfigError, match="holds a run already"):
            find_resume(config(resume=spelt), run_dir)


@pytest.mark.parametrize("spelt", ["A", "B/../A", "link", "link/checkpoints", "A/checkpoints/step-8"])
def test_a_run_goes_on_with_what_is_its_own(two, tmp_path, monkeypatch, spelt):
    (tmp_path / "link").symlink_to(two[0])
    monkeypatch.chdir(tmp_path)
    found = find_resume(config(resume=spelt), tmp_path / "A")
    assert found.step == 8 and found.is_own(tmp_path / "A")


def test_neither_by_a_checkpoint_that_was_put_among_its_own(two, capsys):
    """A link, a copy: auto passes over them, and asked for by name they are refused."""
    a, b = two
    (a / "checkpoints" / "step-9").symlink_to(b / "checkpoints" / "step-9")
    shutil.copytree(b / "checkpoints" / "step-9", a / "checkpoints" / "step-10")
    assert find_resume(config(), a).step == 8
    said = capsys.readouterr().out
    assert "step-9 is of another run" in said and "step-10 is of another run" in said
    for step in (9, 10):
        with pytest.raises(ConfigError, match="holds a run already"):
            find_resume(config(resume=str(a / "checkpoints" / f"step-{step}")), a)


def test_nor_are_its_checkpoints_pruned_through_a_link(two, tmp_path):
    """Whose folder leads into another run's writes there, and removes what is too old for it."""
    _, b = two
    run = tmp_path / "new"
    start_in(run)
    (run / "checkpoints").symlink_to(b / "checkpoints")
    for resume in ("auto", None, str(b)):
        with pytest.raises(ConfigError, match=r"leads to .*B/checkpoints, with the checkpoints of another run"):
            find_resume(config(resume=resume), run)


def test_checkpoints_on_another_disk_stay_a_runs_own(tmp_path):
    """A user's own link: what is written there names the run."""
    run = tmp_path / "run"
    start_in(run)
    (tmp_path / "scratch").mkdir()
    (run / "checkpoints").symlink_to(tmp_path / "scratch")
    assert find_resume(config(), run) is None
    write_checkpoint(run, 3, None)
    found = find_resume(config(), run)
    assert found.step == 3 and found.is_own(run)
    check_resume(config(), Checkpoint(found.folder, 3, {"strategy": "FSDP"}, found.run), {"strategy": "FSDP"}, run)
    assert find_resume(config(resume=str(run / "checkpoints" / "step-3")), run).step == 3


def test_a_run_of_an_older_version_goes_on(tmp_path):
    """Its checkpoints name no run: they are its own where they lie, but for what would be unpickled."""
    write_checkpoint(tmp_path, 3, None)
    start_in(tmp_path)
    assert find_resume(config(), tmp_path).step == 3
    assert find_resume(config(resume=str(tmp_path)), tmp_path).step == 3


def test_a_file_where_the_checkpoints_belong_is_named_at_once(tmp_path):
    (tmp_path / "checkpoints").write_text("mine")
    with pytest.raises(ConfigError, match="checkpoints is a file"):
        find_resume(config(), tmp_path)


# Files of the wrong shape


@pytest.mark.parametrize("steps", ["9", None, [9], {"a": 1}, float("inf"), float("nan"), "x"])
def test_a_memory_of_the_wrong_shape_is_none(tmp_path, steps):
    finish(tmp_path, steps)
    assert finished_steps(tmp_path) is None


@pytest.mark.parametrize("content", ["[]", "{", '{"settings": [1]}', '{"settings": "seed"}', '"x"', "[" * 100_000])
def test_a_provenance_of_the_wrong_shape_stops_nothing(tmp_path, content, capsys):
    (tmp_path / "provenance.json").write_text(content)
    check_finished({"seed": 0}, tmp_path)
    assert ("does not record the run's settings" in capsys.readouterr().out) == ("settings" in content)
    (tmp_path / "provenance.json").write_text('{"settings": {"seed": 1}}')
    with pytest.raises(ConfigError, match="seed=0, which was 1"):
        check_finished({"seed": 0}, tmp_path)


def test_a_lock_that_is_a_folder_is_named(tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(ConfigError, match=r"\.lock is a folder.*remove it"), alone_in(tmp_path):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written to"), alone_in(tmp_path / "file"):
        pass


@pytest.mark.parametrize("content", ["", "x", "0" * 31, "0" * 33, "../../../../../../../../../../etc", b"\xff"])
def test_an_id_of_the_wrong_shape_is_replaced(tmp_path, content):
    (tmp_path / ".run").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert run_id(tmp_path) is None
    assert len(start_in(tmp_path)) == 32


# The command that goes on


@pytest.fixture
def job(monkeypatch):
    """Puts Hydra where it is when it runs a job with the given overrides, started in the repository."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "SUBMITIT_", "TORCHELASTIC_", "POSE_")) or name in launch.RANKS:
            monkeypatch.delenv(name)
    before = HydraConfig.instance().cfg
    with initialize_config_dir(str(CONF), version_base="1.3"):

        def start(*overrides, cwd=REPOSITORY):
            cfg = compose("train", list(overrides), return_hydra_config=True)
            OmegaConf.set_readonly(cfg.hydra, False)
            cfg.hydra.runtime.cwd = str(cwd)
            HydraConfig.instance().set_config(cfg)
            return cfg

        yield start
    HydraConfig.instance().cfg = before


def test_it_is_the_jobs_own_with_its_folder(job):
    """The default's folder has the second in its name: the same command would start another run."""
    job("experiment=smoke", "trainer.max_steps=7")
    run_dir = REPOSITORY / "outputs" / "2026-01-02" / "03-04-05"
    assert resume_command(run_dir) == (
        "python train.py experiment=smoke trainer.max_steps=7 hydra.run.dir=outputs/2026-01-02/03-04-05 resume=auto"
    )
    with_more = resume_command(run_dir, "trainer.max_steps=9", "trainer.on_nonfinite=skip")
    assert "max_steps=7" not in with_more and with_more.endswith(
        " resume=auto trainer.max_steps=9 trainer.on_nonfinite=skip"
    )
    job("experiment=smoke", "hydra.run.dir=mine", "resume=null")
    assert resume_command(REPOSITORY / "mine") == "python train.py experiment=smoke hydra.run.dir=mine resume=auto"
    assert resume_command(REPOSITORY / "mine", "finetune.lr=1e-5", anew=True) == (
        "python train.py experiment=smoke finetune.lr=1e-5"
    ), "in another folder"


def test_a_folder_of_documents_may_be_renamed(tmp_path):
    """The digest is of names and content of the files; only the name before it is the folder's."""

    def old(fingerprint):
        settings = {"strategy": "any", "data.documents": fingerprint}
        return Checkpoint(tmp_path / "checkpoints" / "step-3", 3, settings, None)

    now = {"strategy": "any", "data.documents": "books-0123456789abcdef, without 2 of data.leave_out: 00ff"}
    check_resume(config(), old("mine-0123456789abcdef, without 2 of data.leave_out: 00ff"), now, tmp_path)
    for other in ("mine-0123456789abcdff, without 2 of data.leave_out: 00ff", "books-0123456789abcdef", None):
        with pytest.raises(ConfigError, match=r"data\.documents='books-0123456789abcdef, .*which was "):
            check_resume(config(), old(other), now, tmp_path)


@pytest.mark.parametrize(
    "name",
    ["plain", "a b=c,d", "it's", 'say "x"', "[1]", "{a: b}", "x#y", "${now:%Y}", "back\\slash", "ü\t(x)", "null"],
)
def test_a_shell_and_hydra_read_it_back(job, tmp_path, name):
    settings = ("data.documents='a b=c,d.jsonl'", "data.synthetic={passkey: 0.1, copy: 0.2}", "seed=${num_threads}")
    job(*settings, "num_threads=3", cwd=tmp_path)
    python, script, *arguments = shlex.split(resume_command(tmp_path / name))
    assert (python, script) == ("python", str(REPOSITORY / "train.py"))
    composed = job(*arguments)
    assert composed.hydra.run.dir == name and composed.resume == "auto"
    assert composed.data.documents == "a b=c,d.jsonl" and composed.data.synthetic["copy"] == 0.2 and composed.seed == 3


def test_hydras_own_settings_and_places_are_kept_and_the_sweeps_are_not(job, tmp_path, monkeypatch):
    job("hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=x", "hydra.job.chdir=true", "seed=2")
    expected = "python train.py seed=2 hydra.job.chdir=true hydra.run.dir=r resume=auto"
    assert resume_command(REPOSITORY / "r") == expected
    job("hydra.searchpath=['file://my conf']", "seed=2")
    assert shlex.split(resume_command(REPOSITORY / "r"))[2:4] == ["seed=2", "hydra.searchpath=['file://my conf']"]
    cfg = job("seed=2")
    OmegaConf.set_readonly(cfg.hydra, False)
    cfg.hydra.runtime.config_sources = [ConfigSourceInfo("/other", "file", "main")]
    cfg.hydra.job.config_name = "mine"
    HydraConfig.instance().set_config(cfg)
    assert shlex.split(resume_command(REPOSITORY / "r"))[2:6] == ["--config-path", "/other", "--config-name", "mine"]


def test_who_started_the_processes_starts_them_again(job, monkeypatch):
    job()
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert resume_command(REPOSITORY / "r").startswith(
        "torchrun --standalone --nproc_per_node=2 train.py hydra.run.dir"
    )
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert resume_command(REPOSITORY / "r").startswith("torchrun --nnodes=2 --nproc_per_node=1 train.py ")
    monkeypatch.setenv(launch.PARENT, "1")
    assert resume_command(REPOSITORY / "r").startswith("python train.py ")
    for name in (launch.PARENT, *launch.RANKS):
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    assert resume_command(REPOSITORY / "r").startswith("srun python train.py ")


def test_a_run_that_was_to_go_on_from_elsewhere_still_is_until_it_has_written(job, tmp_path):
    job("resume=B/checkpoints/step-3", "trust_pickle=true", cwd=tmp_path)
    assert resume_command(tmp_path / "A").endswith(" hydra.run.dir=A resume=B/checkpoints/step-3")
    write_checkpoint(tmp_path / "A", 3, when=1.0)
    assert resume_command(tmp_path / "A").endswith(" hydra.run.dir=A resume=B/checkpoints/step-3"), "an old one"
    write_checkpoint(tmp_path / "A", 4, when=time.time())
    assert resume_command(tmp_path / "A").endswith(" trust_pickle=true hydra.run.dir=A resume=auto")


def test_of_a_sweep_all_of_it_goes_on(job, monkeypatch):
    line = ["train.py", "-m", "rope=linear,yarn", "seed=1", "hydra.sweep.dir=old", "resume=null"]
    monkeypatch.setattr(sys, "argv", line)
    numbered = ("hydra.mode=MULTIRUN", "hydra.job.num=1", "hydra.job.id=1")
    job("rope=yarn", "seed=1", "hydra.sweep.dir=outputs/sweeps/x", *numbered)
    expected = "python train.py -m rope=linear,yarn seed=1 hydra.sweep.dir=outputs/sweeps/x resume=auto"
    assert resume_command(REPOSITORY / "outputs/sweeps/x/1", sweep=True) == expected
    alone = "python train.py rope=yarn seed=1 hydra.run.dir=outputs/sweeps/x/1 resume=auto"
    assert resume_command(REPOSITORY / "outputs/sweeps/x/1") == alone
    monkeypatch.setattr(sys, "argv", ["worker.py"])  # of a launcher
    assert resume_command(REPOSITORY / "outputs/sweeps/x/1", sweep=True) == alone
    job("seed=${hydra:job.num}", *numbered)
    found = shlex.split(resume_command(REPOSITORY / "r"))
    parsed = {o.key_or_group: o.value() for o in OverridesParser.create().parse_overrides(found[2:])}
    assert (parsed["hydra.job.num"], parsed["hydra.job.id"]) == ("1", "1"), "its settings name them"


def test_without_hydra_there_is_a_command_too(tmp_path):
    before, HydraConfig.instance().cfg = HydraConfig.instance().cfg, None
    try:
        assert resume_command(tmp_path) == f"python train.py hydra.run.dir={tmp_path} resume=auto"
    finally:
        HydraConfig.instance().cfg = before
