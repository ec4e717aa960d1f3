"""Pauses between attempts."""

from knapper.concurrency.retry import Attempts
from knapper.web.backoff import Backoff


def test_pauses_double_up_to_the_longest_and_begin_anew_after_a_success() -> None:
    backoff = Backoff(0.2, 1.0)
    assert [backoff.next() for _ in range(5)] == [0.2, 0.4, 0.8, 1.0, 1.0]
    assert backoff.failures == 5
    backoff.reset()
    assert (backoff.failures, backoff.next()) == (0, 0.2)


def test_what_fails_for_days_is_still_tried() -> None:
    """2.0**1024 is no number: after so many failures the pause stays the longest."""
    backoff = Backoff(5.0, 30.0)
    assert {backoff.next() for _ in range(3000)} == {5.0, 10.0, 20.0, 30.0}
    attempts = Attempts("the model", lambda: 100.0)
    attempts.failed("no memory", times=3000)
    assert attempts.refusal().retry_after_s == 30.0
