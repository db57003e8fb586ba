"""How long a training still takes."""

import pytest

from sa_inject.trainer.time_left import TimeLeft


def taken(first: float, *others: float, before: float = 0.0) -> TimeLeft:
    """Steps of these lengths, after a pause of `before` seconds."""
    time_left, now = TimeLeft(), 100.0
    time_left.begin_pause(now)
    now += before
    time_left.begin_step(now)
    for seconds in (first, *others):
        now += seconds
        time_left.end_step(now)
    return time_left


def test_there_is_no_estimate_before_three_steps():
    for steps in ((1.0,), (1.0, 1.0)):
        assert taken(*steps).left(10) is None
    assert taken(1.0, 1.0, 1.0).left(10) == pytest.approx(10.0)


def test_the_first_step_does_not_count():
    assert taken(60.0, 2.0, 2.0).left(10) == pytest.approx(20.0)


def test_what_precedes_the_first_step_counts_for_what_is_to_come_alone():
    time_left = taken(1.0, 1.0, 1.0, before=30.0)
    assert time_left.left(10) == pytest.approx(10.0)
    assert time_left.left(10, pauses=2) == pytest.approx(70.0)


def test_pauses_are_no_part_of_a_step():
    time_left = taken(1.0, 1.0, 1.0)
    time_left.begin_pause(103.0)
    time_left.begin_pause(105.0)  # validation, and then samples
    time_left.begin_step(111.0)
    time_left.end_step(112.0)
    assert time_left.seconds_a_step == pytest.approx(1.0)
    assert time_left.left(10, pauses=1) == pytest.approx(10.0 + 4.0)  # the mean of pauses of 0 and 8 seconds


def test_steps_that_became_slower_count_more_than_those_of_long_ago():
    assert taken(*[1.0] * 100, *[3.0] * 50).left(1) == pytest.approx(3.0)
