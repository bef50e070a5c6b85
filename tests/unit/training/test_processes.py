"""What the processes of a job tell each other before they are a group."""

import os
import threading
import time
import warnings

import pytest
import torch
from torch.distributed import TCPStore

from pose.errors import ConfigError, TrainingError
from pose.training import processes


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No launcher around the test; short waits; calls counted anew."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC_", "MASTER_")) or name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(processes, "POLL", 0.01)
    monkeypatch.setattr(processes, "BEAT", 0.05)
    monkeypatch.setattr(processes, "PATIENCE", 1.0)
    processes._calls.clear()


@pytest.fixture(params=["store", "files"])
def job(request, monkeypatch, tmp_path):
    """Two processes, as threads: each has its rank."""
    if request.param == "store":
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(store.port))
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
    else:
        store = None
        monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
        monkeypatch.setenv("SLURM_JOB_ID", "77")
    of_thread = threading.local()
    monkeypatch.setattr(processes, "rank", lambda: of_thread.rank)

    def run(*asks):
        """What each process gets, or the error that it ends with; it makes what it is asked for by asks[rank]."""
        got = [None] * len(asks)

        def work(rank):
            of_thread.rank = rank
            try:
                got[rank] = asks[rank]()
            except BaseException as error:
                got[rank] = error

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(asks))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        return got

    run.store = store
    return run


def test_all_get_what_process_zero_makes_however_long_it_takes(job, tmp_path):
    """Longer than the patience: it shows that it is alive."""
    made = []

    def make():
        time.sleep(1.5)
        made.append(len(made))
        return {"ppl": 7.25, "n": (1, 2)}

    got = job(*[lambda: processes.from_rank_zero(tmp_path, "untuned", make)] * 2)
    assert got == [{"ppl": 7.25, "n": [1, 2]}] * 2 and made == [0]


def test_each_call_has_its_own_answer(job, tmp_path):
    def ask():
        first = processes.from_rank_zero(tmp_path, "untuned", lambda: 1)
        return first, processes.from_rank_zero(tmp_path, "untuned", lambda: 2)

    assert job(ask, ask) == [(1, 2)] * 2


def test_when_process_zero_fails_the_others_end_too(job, tmp_path):
    def make():
        raise ConfigError("eval.documents is nowhere")

    first, second = job(*[lambda: processes.from_rank_zero(tmp_path, "untuned", make)] * 2)
    assert isinstance(first, ConfigError)
    assert isinstance(second, TrainingError) and "eval.documents is nowhere" in str(second) and second.is_everywhere


def test_a_process_zero_that_is_gone_is_not_waited_for_without_end(job, tmp_path):
    """Killed while it measures, or on a machine that does not share the folder."""
    _, error = job(lambda: None, lambda: processes.from_rank_zero(tmp_path, "untuned", lambda: 1))
    assert isinstance(error, TrainingError)
    for words in ("process 1 waits", "(untuned)", "has had no sign of it", "for 1 s"):
        assert words in str(error)
    assert ("share that folder?" in str(error)) == (job.store is None)


def test_a_store_that_is_gone_is_an_error(job, tmp_path, monkeypatch):
    if job.store is None:
        pytest.skip("of stores")

    def check(self, keys):
        raise RuntimeError("Connection reset by peer")

    monkeypatch.setattr(processes, "TCPStore", type("Broken", (TCPStore,), {"check": check}))
    _, error = job(lambda: None, lambda: processes.from_rank_zero(tmp_path, "untuned", lambda: 1))
    assert isinstance(error, TrainingError) and "is gone" in str(error) and "Connection reset" in str(error)


def test_what_an_earlier_start_left_is_no_answer(job, tmp_path, monkeypatch):
    """A job that is queued again has the same number and folder; torchrun starts all anew at the same store."""
    ask = [lambda: processes.from_rank_zero(tmp_path, "untuned", lambda: 1)] * 2
    assert job(*ask) == [1, 1]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    processes._calls.clear()

    def late():
        time.sleep(0.3)
        return processes.from_rank_zero(tmp_path, "untuned", lambda: 2)

    assert job(late, lambda: processes.from_rank_zero(tmp_path, "untuned", lambda: 2)) == [2, 2]
    folders = list((tmp_path / processes.FOLDER).glob("*"))
    assert len(folders) == (1 if job.store is None else 0), "the earlier one is taken away"


def test_a_process_alone_asks_nobody(tmp_path):
    assert processes.from_rank_zero(tmp_path, "untuned", lambda: (1, 2)) == [1, 2]
    assert not list(tmp_path.iterdir())
    assert processes.gather({"a": 1}) == [{"a": 1}]


def test_a_group_gathers_without_a_word_of_warning():
    """Lightning's own all_gather calls what torch has deprecated."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            (found,) = processes.gather({"losses": torch.ones(3)})
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(found["losses"], torch.ones(3))
