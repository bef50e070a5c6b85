"""Messages on the terminal."""

import subprocess
import sys

import pytest

SCRIPT = """
import logging, sys
from pose.app.console import log_to_terminal
log_to_terminal()
log = logging.getLogger("pose.test")
for i in range(20_000):
    log.{level}(f"line {{i}}")
print("to the end", file=sys.{other})
"""


@pytest.mark.parametrize(("level", "closed", "other"), [("info", "stdout", "stderr"), ("error", "stderr", "stdout")])
def test_a_reader_that_reads_no_further_is_no_error(level, closed, other):
    """As of `command | head -1`: what is at work goes on to its end, and nothing is said of it."""
    script = SCRIPT.format(level=level, other=other)
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    stream = getattr(process, closed)
    assert stream.readline() == "line 0\n"
    stream.close()
    assert getattr(process, other).read() == "to the end\n"
    assert process.wait(60) == 0
