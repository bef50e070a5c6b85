"""A network that fails in between: what is asked again, and how often."""

import httpx
import pytest
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from pose.data.network import RETRIES, may_pass
from pose.errors import CheckpointError
from pose.modeling.checkpoints import hub


def response(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://hub/x"))


def wrapped(cause: Exception) -> OSError:
    """As transformers raises it."""
    try:
        raise OSError("We couldn't connect to the hub to load the files") from cause
    except OSError as error:
        return error


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (HfHubHTTPError("server", response=response(503)), True),
        (HfHubHTTPError("slow down", response=response(429)), True),
        (HfHubHTTPError("no", response=response(403)), False),
        (RepositoryNotFoundError("none", response=response(404)), False),
        (httpx.ConnectError("reset"), True),
        (httpx.ReadTimeout("slow"), True),
        (ConnectionResetError("reset"), True),
        (FileNotFoundError("x"), False),
        (ValueError("x"), False),
    ],
)
def test_what_may_pass(error, passes):
    assert may_pass(error, local=True) is passes


@pytest.fixture
def load_failing(monkeypatch):
    """Loads from a hub that raises the given errors first; returns the result and the waits."""
    monkeypatch.setattr(hub, "hub_answers", lambda: True)
    waits = []
    monkeypatch.setattr(hub._with_retries, "__defaults__", (waits.append,))

    def load_(errors):
        errors = iter(errors)

        def load(path, revision):
            for error in errors:
                raise error
            return path

        return hub.from_hub("weights", load, "owner/name", None), waits

    return load_


def test_a_download_goes_on_after_failures(load_failing, capsys):
    errors = [wrapped(httpx.ConnectError("reset")), wrapped(LocalEntryNotFoundError("offline")), ConnectionError("x")]
    assert load_failing(errors) == ("owner/name", [1, 2, 4])
    assert "Downloading the weights of owner/name failed" in capsys.readouterr().out


def test_in_the_end_the_error_is_clear(load_failing, capsys):
    with pytest.raises(CheckpointError, match=r"the weights of owner/name cannot be loaded: We couldn't connect"):
        load_failing([wrapped(httpx.ConnectError("reset")) for _ in range(RETRIES + 1)])
    assert f"attempt {RETRIES} of {RETRIES}" in capsys.readouterr().out


@pytest.mark.parametrize("cause", [RepositoryNotFoundError("none", response=response(404)), EntryNotFoundError("none")])
def test_what_will_not_pass_is_not_tried_again(load_failing, capsys, cause):
    with pytest.raises(CheckpointError):
        load_failing([wrapped(cause)] * 2)
    assert "attempt" not in capsys.readouterr().out
