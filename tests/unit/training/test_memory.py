"""What is left of a job when it has ended."""

import gc
import weakref

import pytest

from pose.errors import TrainingError
from pose.training import memory


class Model:
    """Holds itself, as a trainer and its module do."""

    def __init__(self):
        self.itself = self


def job(error: BaseException | None, left: list):
    model = Model()
    left.append(weakref.ref(model))
    if error is not None:
        try:
            raise KeyError("cause")
        except KeyError as cause:
            raise error from cause


@pytest.mark.parametrize("error", [None, TrainingError("x"), RuntimeError("x"), SystemExit(143)])
def test_nothing_of_a_job_is_left_even_where_its_error_is_kept(error):
    left, kept = [], None
    gc.disable()
    try:
        try:
            with memory.freed():
                job(error, left)
        except BaseException as raised:
            kept = raised
        assert kept is error and left[0]() is None
    finally:
        gc.enable()
    if error is not None:
        assert kept.__traceback__.tb_next.tb_frame.f_code.co_name == "job", "where it was raised is still known"
