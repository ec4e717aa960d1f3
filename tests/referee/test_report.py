"""What the referee writes: scores of what was judged, and nothing of a server's that is more than text."""

import pytest

from knapper.referee import report
from knapper.referee.court import Check, Court, NotTried, Observation, Outcome, Ruling, Violation, tried


def finding(outcome: Outcome, name: str = "a check", seen: str = "") -> Ruling:
    return Ruling("semantics", name, outcome, seen, {}, 0.1)


def court(patience_s: float = 5.0) -> Court:
    ticks = iter(range(1000))
    return Court("http://nowhere", "tml-local", "model", lambda: float(next(ticks)), patience_s=patience_s)


def test_what_was_not_tried_or_only_measured_is_in_no_score() -> None:
    findings = [finding("passed"), finding("failed"), finding("missing"), finding("not tried"), finding("measured")]
    assert report.scores(findings) == {"semantics": (1, 3)}
    assert report.failed(findings)
    assert not report.failed([finding("passed"), finding("not tried"), finding("measured")])


def test_what_a_server_says_stays_in_its_cell() -> None:
    page = report.page("A | server", "m`", "0.0", [finding("failed", seen="<img src=x> | [a](b)\n# heading\n")])
    [row] = [line for line in page.splitlines() if line.startswith("| a check")]
    assert row == r"| a check | failed | \<img src=x\> \| \[a\](b) # heading |"
    assert page.startswith("# A \\| server")


@pytest.mark.parametrize(
    ("raised", "outcome", "seen"),
    [
        (Violation("3 instead of 4"), "failed", "3 instead of 4"),
        (NotTried("no command"), "not tried", "no command"),
        (ValueError("what?"), "failed", "ValueError: what?"),
    ],
)
def test_an_exception_of_a_check_is_what_it_found(raised: Exception, outcome: str, seen: str) -> None:
    def call(_: Court) -> Observation:
        raise raised

    [found] = tried(court(), [Check("semantics", "a check", call)])
    assert (found.outcome, found.seen) == (outcome, seen)


def test_a_server_that_never_answers_fails_and_the_next_check_has_its_turn() -> None:
    import threading

    never = threading.Event()

    def waits(_: Court) -> Observation:
        never.wait()
        return Observation("")

    found = list(
        tried(court(0.05), [Check("methods", "waits", waits), Check("methods", "ok", lambda _: Observation("yes"))])
    )
    never.set()
    assert [(each.outcome, each.seen) for each in found] == [
        ("failed", "no answer within 0 s"), ("passed", "yes"),
    ]  # fmt: skip
