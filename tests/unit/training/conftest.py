import pytest

from pose.training import signals


@pytest.fixture(autouse=True)
def never_asked_to_stop():
    """No test has signals of another."""
    signals.asked.clear()
