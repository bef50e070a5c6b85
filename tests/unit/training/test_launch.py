"""Who starts the processes of a job, how they are called, and how they end together."""

import json
import os
import re
import shlex
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.conf import ConfigSourceInfo
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from omegaconf import OmegaConf
from torch.distributed import TCPStore

from pose.app import callbacks, schema
from pose.app.runtime import readable_errors
from pose.errors import ConfigError, Interrupted, TrainingError
from pose.training import launch, signals

CONF = Path(__file__).resolve().parents[3] / "conf"
BATCH_SCRIPT = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "8", "SLURM_PROCID": "0"}
SRUN = BATCH_SCRIPT | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "5"}
TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "GROUP_RANK": "1", "TORCHELASTIC_RUN_ID": "none"}
schema.register()


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """No launcher around the test, and no Hydra job left after it."""
    for name in list(os.environ):
        if re.match("SLURM_|SUBMITIT_|TORCHELASTIC_|MASTER_|POSE_", name) or name in TORCHRUN:
            monkeypatch.delenv(name)
    before = HydraConfig.instance().cfg
    yield
    HydraConfig.instance().cfg = before


@pytest.fixture
def environment(monkeypatch):
    """Sets environment variables."""
    return lambda variables: [monkeypatch.setenv(name, value) for name, value in variables.items()]


@pytest.fixture
def job():
    """Puts Hydra where it is when it runs a job with the given overrides."""
    with initialize_config_dir(str(CONF), version_base="1.3"):

        def start(*overrides):
            cfg = compose("train", list(overrides), return_hydra_config=True)
            HydraConfig.instance().set_config(cfg)
            return cfg

        yield start


# Who starts them


@pytest.mark.parametrize(
    ("variables", "started", "kind"),
    [
        ({}, None, LightningEnvironment),
        (TORCHRUN, 4, TorchElasticEnvironment),
        (BATCH_SCRIPT, None, LightningEnvironment),  # python train.py in a batch script, without srun
        (SRUN, 8, SLURMEnvironment),
        (SRUN | {"SLURM_JOB_NAME": "bash"}, 8, SLURMEnvironment),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"}, None, LightningEnvironment),
        (SRUN | TORCHRUN, 4, TorchElasticEnvironment),  # torchrun, started on each machine by srun
        ({"RANK": "0", "WORLD_SIZE": "2"}, None, LightningEnvironment),  # a pod's, in which torchrun is yet to start
    ],
)
def test_who_has_started_the_process_is_found_out(environment, variables, started, kind):
    environment(variables)
    (found,) = launch.plugins()
    assert type(found) is kind and launch.num_started() == started
    if kind is not LightningEnvironment:
        assert found.creates_processes_externally and found.world_size() == started
        assert found.global_rank() == int(variables["RANK" if "RANK" in variables else "SLURM_PROCID"])
    if kind is SLURMEnvironment:
        assert not found.auto_requeue


def trainer(devices, nodes=1):
    return SimpleNamespace(num_devices=devices, num_nodes=nodes)


@pytest.mark.parametrize(
    ("variables", "devices", "nodes", "needed"),
    [
        ({}, 1, 1, False),
        ({}, 2, 1, True),
        (BATCH_SCRIPT, 8, 1, True),
        (SRUN, 8, 1, False),
        (SRUN, 4, 2, False),
        (TORCHRUN, 4, 1, False),
        ({"SUBMITIT_EXECUTOR": "slurm"}, 1, 1, True),
        (SRUN | {"SUBMITIT_EXECUTOR": "slurm"}, 8, 1, False),
    ],
)
def test_processes_are_started_where_nothing_else_has(environment, variables, devices, nodes, needed):
    environment(variables)
    assert launch.is_needed(trainer(devices, nodes)) is needed


@pytest.mark.parametrize(
    ("variables", "devices", "nodes", "message"),
    [
        ({}, 8, 2, r"trainer.num_nodes=2.*torchrun --nnodes=2 --nproc_per_node=8.*srun"),
        (TORCHRUN, 1, 1, r"4 process\(es\) were started.*trainer.devices=1 on trainer.num_nodes=1 need 1"),
        (TORCHRUN | {"WORLD_SIZE": "1"}, 2, 1, r"1 process\(es\) were started.*trainer.devices=2.*need 2"),
        (SRUN, 8, 2, r"8 process\(es\) were started.*need 16"),
    ],
)
def test_processes_that_do_not_fit_the_trainer_are_named(environment, variables, devices, nodes, message):
    environment(variables)
    with pytest.raises(ConfigError, match=message):
        launch.is_needed(trainer(devices, nodes))


def test_the_folder_of_a_run_alone_is_hydras(job):
    job()
    assert launch.join(Path("x")) == Path("x")


def test_under_srun_the_folder_has_to_be_given(environment, job):
    environment(SRUN)
    job()
    with pytest.raises(ConfigError, match=r"hydra.run.dir=outputs/\$\{now.*8 processes.*hydra.run.dir=outputs/\$SLURM"):
        launch.join(Path("outputs/2026-01-01/00-00-00"))
    job("hydra.run.dir=outputs/77")
    assert launch.join(Path("outputs/77")) == Path("outputs/77")


def test_under_torchrun_the_folder_is_rank_zeros(environment, job):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    job()
    for attempt in ("0", "1"):  # torchrun starts all anew when one has failed
        environment(TORCHRUN | agent | {"RANK": "0", "TORCHELASTIC_RESTART_COUNT": attempt})
        assert launch.join(Path(f"at/{attempt}0")) == Path(f"at/{attempt}0")
        environment({"RANK": "1"})
        assert launch.join(Path(f"at/{attempt}1")) == Path(f"at/{attempt}0")
    assert [store.get(f"pose/run_dir/{attempt}") for attempt in "01"] == [b"at/00", b"at/10"]  # no late reader errs


def test_a_sweep_is_not_for_torchrun(environment, job):
    environment(TORCHRUN)
    job("hydra.mode=MULTIRUN")
    with pytest.raises(ConfigError, match=r"4 processes were started for a sweep.*python train.py -m"):
        launch.join(Path("sweep/0"))
    environment(SRUN | {"SUBMITIT_EXECUTOR": "slurm"})
    assert launch.join(Path("sweep/0")) == Path("sweep/0")


def test_a_process_whose_parent_is_gone_ends(environment, monkeypatch):
    calls = []
    libc = SimpleNamespace(prctl=lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(launch.ctypes, "CDLL", lambda name: libc)  # this process has not to end with its parent
    environment({"POSE_PARENT": str(os.getppid())})
    assert launch.join(Path("x")) == Path("x")
    assert calls == [(1, 9)] or sys.platform != "linux"
    environment({"POSE_PARENT": "1" if os.getppid() != 1 else "2"})
    with pytest.raises(SystemExit) as error:
        launch.join(Path("x"))
    assert error.value.code == 137


# How they are called


@pytest.mark.parametrize(
    "name",
    ["plain", "a b=c,d", "it's", 'say "x"', "[1]", "{a: b}", "x#y", "${now:%Y}", "back\\slash\\", "ü\t(x)", "null"],
)
def test_any_folder_reaches_the_process(job, tmp_path, name):
    job("seed=3")
    arguments = launch.command(1, tmp_path / name)
    assert arguments[:2] == [sys.executable, str(CONF.parent / "train.py")]
    composed = job(*arguments[6:])
    assert composed.hydra.run.dir == str(tmp_path / name) and composed.seed == 3


def test_the_job_is_handed_on_and_the_sweep_is_not(job, tmp_path):
    (tmp_path / "conf dir" / "pose").mkdir(parents=True)
    (tmp_path / "conf dir" / "pose" / "mine.yaml").write_text("defaults: [pose]\nnum_chunks: 3\n")
    settings = (
        "pose=mine", "data.documents='a b=c,d.jsonl'", "model.path=\"it's, [x]\"", "seed=${hydra:job.num}",
        "pose.target_len=${num_threads}",
        "num_threads=4096",
        f"hydra.searchpath=['file://{tmp_path}/conf dir']", "hydra.job.chdir=true",
    )  # fmt: skip
    sweep = (
        "hydra.mode=MULTIRUN", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=x",
        "++hydra.sweep.subdir=y", "hydra.run.dir=z", "hydra.sweeper.max_batch_size=2",
        "hydra.job_logging.root.level=WARN",
    )  # fmt: skip
    job(*settings, *sweep, "hydra.job.num=7", "hydra.job.id=job_7")
    for rank in (0, 1):
        given = launch.command(rank, tmp_path)
        assert given[2:6] == ["--config-path", str(CONF), "--config-name", "train"]
        assert set(settings) <= set(given)
        assert set(sweep) & set(given) == ({"hydra.job_logging.root.level=WARN"} if rank == 0 else set())
        assert ("hydra/job_logging=pose_worker" in given) is (rank == 1)
        child = job(*given[6:])
        assert (child.pose.num_chunks, child.data.documents, child.model.path) == (3, "a b=c,d.jsonl", "it's, [x]")
        assert (child.seed, child.pose.target_len) == (7, 4096)
        assert child.hydra.job.chdir and child.hydra.mode.name == "RUN"
        assert child.hydra.output_subdir is None and "launcher" not in " ".join(child.hydra.overrides.hydra)
        job(*settings, *sweep, "hydra.job.num=7", "hydra.job.id=job_7")


def test_a_config_folder_of_the_command_line_is_handed_on(job, tmp_path):
    cfg = job()
    OmegaConf.set_readonly(cfg.hydra, False)
    cfg.hydra.runtime.config_sources = [
        ConfigSourceInfo("/a b", "file", "command-line"),
        ConfigSourceInfo("hydra.conf", "pkg", "hydra"),
        ConfigSourceInfo("/conf", "file", "main"),
    ]
    HydraConfig.instance().set_config(cfg)
    given = launch.command(0, tmp_path)
    assert given[given.index("--config-dir") + 1] == "/a b" and given[given.index("--config-path") + 1] == "/conf"


def test_workers_of_a_sweep_find_the_package(monkeypatch, job):
    """Those of submitit are started in the folder of the sweep's command, which may be any."""
    monkeypatch.setenv("PYTHONPATH", "my")
    cfg = job("hydra.mode=MULTIRUN", "hydra.sweep.dir=x")
    callbacks.Workers().on_multirun_start(config=cfg)
    assert os.environ["PYTHONPATH"].split(os.pathsep) == [str(CONF.parent), "my"]
    monkeypatch.delenv("PYTHONPATH")
    callbacks.Workers().on_multirun_start(config=cfg)
    assert os.environ["PYTHONPATH"] == str(CONF.parent)


def commands_of_the_docs():
    """What stands after train.py in the bash blocks of docs/CLUSTERS.md."""
    text = (CONF.parent / "docs" / "CLUSTERS.md").read_text()
    blocks = "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    return [shlex.split(line.split("train.py", 1)[1]) for line in blocks.splitlines() if "train.py" in line]


@pytest.mark.parametrize("arguments", commands_of_the_docs(), ids=" ".join)
def test_the_commands_of_the_docs_compose(job, arguments):
    overrides = OverridesParser.create().parse_overrides([a for a in arguments if a not in ("-m", "...")])
    task = [o for o in overrides if not o.is_hydra_override()]
    hydra = [o.input_line for o in overrides if o.is_hydra_override()]
    (jobs,) = BasicSweeper.split_arguments(task, None)
    assert len(jobs) == (3 if "-m" in arguments else 1)
    for overrides in jobs:
        cfg = job(*overrides, *hydra)
        if "experiment=paper_table1_16k" in overrides:
            assert (cfg.trainer.devices, cfg.trainer.global_batch, cfg.trainer.max_steps) == (8, 64, 1000)
            assert cfg.finetune.lr == 2e-5 and cfg.strategy.stage == 3
        if "-m" in arguments and "experiment=paper_table1_16k" in overrides:
            given = instantiate(cfg.hydra.launcher).params
            assert (given["nodes"], given["tasks_per_node"], given["gpus_per_node"]) == (1, 1, cfg.trainer.devices)
            assert (given["max_num_timeout"], given["signal_delay_s"], given["timeout_min"]) == (10, 600, 24 * 60)


# How they end


@pytest.fixture
def processes(job, monkeypatch, tmp_path):
    """Runs Python code for each process, in place of train.py; returns how many seconds that took."""
    job()
    monkeypatch.setattr(launch, "GRACE", 0.4)
    monkeypatch.setattr(launch, "POLL", 0.02)
    helpers = (
        "import json, os, signal, socket, sys, time\n"
        "def on(number, then): signal.signal(number, lambda *_: then())\n"
        f"def tell(name): open(os.path.join({str(tmp_path)!r}, name), 'w').close()\n"
        f"def wait_for(name):\n while not os.path.exists(os.path.join({str(tmp_path)!r}, name)): time.sleep(0.01)\n"
    )

    def start(*codes):
        monkeypatch.setattr(launch, "command", lambda rank, run_dir: [sys.executable, "-c", helpers + codes[rank]])
        begin = time.monotonic()
        launch.run(len(codes), tmp_path)
        return time.monotonic() - begin

    return start


@pytest.fixture
def send(tmp_path):
    """Sends this process a signal when the files of all names are there."""

    def wait(number, names):
        while not all((tmp_path / name).exists() for name in names):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threads = []

    def later(number, *names):
        threads.append(threading.Thread(target=wait, args=(number, names), daemon=True))
        threads[-1].start()

    yield later
    for thread in threads:
        thread.join(10)


def test_each_process_knows_its_rank_and_meets_the_others(processes, tmp_path, monkeypatch):
    monkeypatch.setenv("NODE_RANK", "5")
    before = dict(os.environ)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    code = (
        "socket.create_connection((os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT'])), 5)\n"
        f"json.dump(dict(os.environ), open({str(tmp_path)!r} + '/' + os.environ['RANK'], 'w'))\n"
    )
    processes(code, code, code)
    found = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(3)]
    assert [(e["RANK"], e["LOCAL_RANK"], e["WORLD_SIZE"]) for e in found] == [(str(r), str(r), "3") for r in range(3)]
    assert len({e["MASTER_PORT"] for e in found}) == 1 and all(int(e["OMP_NUM_THREADS"]) >= 1 for e in found)
    assert dict(os.environ) == before
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == handlers


@pytest.mark.parametrize(
    ("codes", "status", "message"),
    [
        (("", "sys.exit(3)"), 3, "process 1 of 2 ended with status 3"),
        (("os.kill(os.getpid(), 9)", ""), 137, r"process 0 of 2 was killed by SIGKILL \(.*memory"),
        (("os.kill(os.getpid(), 11)", "time.sleep(60)"), 139, "process 0 of 2 was killed by SIGSEGV"),
        # The first that failed, not the lowest; the other ends by itself, with a status of its own.
        (("wait_for('1'); time.sleep(0.1); sys.exit(7)", "tell('1'); sys.exit(5)"), 5, "process 1 of 2 .* status 5"),
        # One that SIGTERM ends, and one that nothing but SIGKILL does.
        (("tell('0'); time.sleep(60)", "wait_for('0'); sys.exit(4)"), 4, "process 1 of 2 ended with status 4"),
        (
            ("signal.signal(15, signal.SIG_IGN); tell('0'); time.sleep(60)", "wait_for('0'); sys.exit(4)"),
            4,
            "process 1 of 2 ended with status 4",
        ),
    ],
)
def test_when_one_fails_all_end_and_its_status_is_the_jobs(processes, codes, status, message):
    begin = time.monotonic()
    with pytest.raises(TrainingError, match=message) as error:
        processes(*codes)
    assert error.value.status == status and time.monotonic() - begin < 10


def test_how_a_run_goes_on_is_told_to_the_process_that_says_it(processes):
    """By one that fails with something to change."""
    code = (
        f"sys.path.insert(0, {str(launch.REPOSITORY)!r})\n"
        "from pose.errors import TrainingError\n"
        "from pose.training import launch\n"
        "launch.tell(TrainingError('x', changes=('trainer.micro_batch=2',), anew=True))\n"
        "sys.exit(1)"
    )
    with pytest.raises(TrainingError, match="process 1 of 2 ended with status 1") as caught:
        processes("time.sleep(0)", code)
    assert (*caught.value.changes,) == ("trainer.micro_batch=2",) and caught.value.anew


SAVES = (
    "on({0}, lambda: (time.sleep(1.2), tell('saved' + os.environ['RANK']), os._exit({2}))); tell('{1}'); time.sleep(60)"
)


@pytest.fixture
def terminal():
    """What signals do in a process of a terminal; a shell has the processes in its background ignore SIGINT."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "status", "name"),
    [
        (signal.SIGTERM, 143, "SIGTERM"),
        (signal.SIGUSR1, 143, "SIGUSR1"),
        (signal.SIGHUP, 143, "SIGHUP"),
        (signal.SIGINT, 130, "Ctrl-C"),
    ],
)
def test_a_request_to_stop_is_passed_on_and_waited_for(processes, send, tmp_path, terminal, number, status, name):
    """Longer than a failure's grace: one saves, the other has ended already."""
    send(number, "ready0", "ready1")
    with pytest.raises(Interrupted, match=f"stopped by {name}") as error:
        processes(
            SAVES.format(int(number), "ready0", status),
            f"on({int(number)}, lambda: os._exit({status})); tell('ready1'); time.sleep(60)",
        )
    assert error.value.status == status and (tmp_path / "saved0").exists()


def test_a_second_interrupt_is_waited_for_no_longer_than_a_failure(processes, send, tmp_path, terminal, monkeypatch):
    """The processes end at once by themselves; one that cannot is killed."""
    monkeypatch.setattr(signals, "AGAIN", 0.2)
    send(signal.SIGINT, "ready0")
    send(signal.SIGINT, "heard")
    code = (
        "signal.signal(15, signal.SIG_IGN); on(2, lambda: (time.sleep(0.3), tell('heard'))); tell('ready0')\n"
        "while True: time.sleep(1)"
    )
    begin = time.monotonic()
    with pytest.raises(Interrupted, match="stopped by Ctrl-C") as error:
        processes(code)
    assert error.value.status == 130 and time.monotonic() - begin < 20


@pytest.mark.parametrize(
    ("end", "error", "status"),
    [
        ("sys.exit(1)", TrainingError, 1),  # its disk is full
        ("os.kill(os.getpid(), 9)", TrainingError, 137),
        ("(signal.signal(15, signal.SIG_DFL), os.kill(os.getpid(), 15))", Interrupted, 143),  # as before it trains
    ],
)
def test_one_that_fails_when_it_is_asked_to_stop_has_failed(processes, send, end, error, status):
    send(signal.SIGTERM, "ready0")
    with pytest.raises(error) as caught:
        processes(f"on(15, lambda: {end}); tell('ready0'); time.sleep(60)")
    assert caught.value.status == status


@pytest.mark.parametrize("status", [130, 143])
def test_processes_that_were_asked_to_stop_and_did_are_no_failure(processes, status):
    """Without a signal to this one: a scheduler has sent it to them alone."""
    with pytest.raises(Interrupted, match="was asked to stop") as error:
        processes(f"sys.exit({status})", "")
    assert error.value.status == status


def test_a_signal_that_is_ignored_stays_ignored(processes, send, terminal):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    send(signal.SIGINT, "ready0")
    processes("on(2, lambda: os._exit(1)); tell('ready0'); time.sleep(0.5)")


def test_a_run_that_was_asked_to_stop_when_it_was_done_is_done(processes, send):
    send(signal.SIGTERM, "ready0")
    processes("on(15, lambda: os._exit(0)); tell('ready0'); time.sleep(60)")


def test_a_sweep_that_was_asked_to_stop_stops(processes, send, job):
    job("hydra.mode=MULTIRUN")
    send(signal.SIGTERM, "ready0")
    with pytest.raises(Interrupted):
        processes("on(15, lambda: os._exit(0)); tell('ready0'); time.sleep(60)")


def test_a_worker_of_joblib_ends_its_job_and_begins_no_other(job, monkeypatch, capsys):
    """With a status of its own it would have the workers beside it killed, in the middle of their checkpoints."""
    monkeypatch.setattr(signals, "asked", {})
    job("hydra.mode=MULTIRUN", "hydra/launcher=joblib", "hydra.sweep.dir=x")
    begun = []
    for error in (Interrupted("asked to stop at step 3"), SystemExit(130), SystemExit(143)):
        with readable_errors():
            begun.append(launch.join(Path("x/0")))
            raise error
    assert len(begun) == 3 and "asked to stop at step 3" in capsys.readouterr().err
    with pytest.raises(SystemExit), readable_errors():
        raise SystemExit(1)
    signals.asked[signal.SIGINT] = 0.0
    with readable_errors():
        begun.append(launch.join(Path("x/1")))
    assert len(begun) == 3 and "not started: the sweep was asked to stop" in capsys.readouterr().err
    job("hydra.mode=MULTIRUN", "hydra.sweep.dir=x")
    with pytest.raises(SystemExit) as caught, readable_errors():
        launch.join(Path("x/1"))
        raise Interrupted("of a sweep whose jobs follow each other")
    assert caught.value.code == 143


def test_a_sweep_of_joblib_waits_for_its_workers(job, terminal, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", "seed=0,1"])
    cfg = job("hydra.mode=MULTIRUN", "hydra/launcher=joblib", "hydra.sweep.dir=x")
    workers = callbacks.Workers()
    workers.on_multirun_start(cfg)
    workers.on_multirun_end(cfg)
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(SystemExit) as caught:
        workers.on_multirun_end(cfg)
    assert caught.value.code == 130
    said = capsys.readouterr()
    assert "Ctrl-C: waiting for the running jobs" in said.out
    assert said.err.endswith("To go on: python train.py -m seed=0,1 hydra.sweep.dir=x resume=auto\n")
    monkeypatch.setattr(signals, "AGAIN", 0.0)
    with pytest.raises(SystemExit):
        os.kill(os.getpid(), signal.SIGINT)
    callbacks.Workers().on_multirun_start(job("hydra.mode=MULTIRUN", "hydra.sweep.dir=x"))
    assert signal.getsignal(signal.SIGINT) == workers.requests, "with another launcher a job has its own handlers"


def test_the_launcher_around_hears_of_its_signal_when_all_is_saved(processes, send, tmp_path, monkeypatch):
    """submitit's SIGUSR2 puts the job back into the queue, which ends it: the checkpoint comes first."""
    heard = []
    before = signal.signal(signal.SIGUSR2, lambda *_: heard.append((tmp_path / "saved0").exists()))
    try:
        send(signal.SIGUSR2, "ready0")
        with pytest.raises(Interrupted):
            processes(SAVES.format(15, "ready0", 143))
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert heard == [True]
