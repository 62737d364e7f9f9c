"""In a log: one line a minute, and one at the end."""

from __future__ import annotations

import io
import logging

import pytest

from cxr_cache.cli.main import start_logging
from cxr_cache.cli.progress import Progress


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run(n_images: int, seconds_each: float, n_before: int = 0) -> list[str]:
    clock, stream = Clock(), io.StringIO()
    shown = Progress("images", stream, clock)
    shown.update(n_before, n_images)
    for n in range(n_before + 1, n_images + 1):
        clock.now += seconds_each
        shown.n_failed = n // 1000
        shown.update(n, n_images)
    shown.close()
    return [line.split(" ", 1)[1] for line in stream.getvalue().splitlines()]  # without the time


def test_a_log_gets_one_line_a_minute_and_one_at_the_end():
    lines = run(5760, 0.0625)
    assert len(lines) == 6
    assert lines[0] == ("960 of 5,760 images (17%), 16.0 a second, about 5 min 0 s left")
    assert lines[-1] == "5,760 of 5,760 images (100%), 5 failed, 16.0 a second, after 6 min 0 s"


def test_slow_things_are_counted_by_the_minute():
    lines = run(4, 150.0)
    assert len(lines) == 4
    assert lines[0] == "1 of 4 images (25%), 0.4 a minute, about 7 min 30 s left"


def test_what_was_done_before_does_not_make_the_rate():
    assert run(1000, 0.1, n_before=100)[0].startswith("700 of 1,000 images (70%), 10.0 a second")


def test_a_job_without_anything_to_do_says_nothing():
    stream = io.StringIO()
    Progress("images", stream).close()
    assert stream.getvalue() == ""


@pytest.mark.parametrize(("verbosity", "expected"), [(0, ["Warning: c"]), (1, ["b", "Warning: c"])])
def test_v_tells_what_is_done(verbosity, expected, capsys):
    start_logging(verbosity)
    logger = logging.getLogger("cxr_cache.somewhere")
    logger.debug("a")
    logger.info("b")
    logger.warning("c")
    logging.getLogger("another.library").info("d")
    assert capsys.readouterr().err.splitlines() == expected
    start_logging(0)


def test_vv_tells_everything_once(capsys):
    start_logging(1)
    start_logging(2)
    logging.getLogger("cxr_cache.somewhere").debug("a")
    logging.getLogger("another.library").info("d")
    assert capsys.readouterr().err.splitlines() == ["a", "d"]
    start_logging(0)
