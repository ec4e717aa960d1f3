"""Turns become sequences by their token ids: each sampled token is trained once, where it was drawn."""

from typing import Any

from knapper.jobs import captured
from knapper.jobs.captured import TrainingSequence


def turn(prompt: list[int], *answers: list[int], retry: int = 0) -> dict[str, Any]:
    """The log-probability of a token is a tenth of it."""
    sequences = [{"tokens": tokens, "logprobs": [token / 10 for token in tokens]} for tokens in answers]
    return {"prompt": prompt, "sequences": sequences, "retry": retry}


def joined(*turns: dict[str, Any]) -> list[TrainingSequence]:
    found = captured.joined(captured.answers(turns))
    for sequence in found:
        sampled = [sequence.tokens[n] for first, end in sequence.sampled for n in range(first, end)]
        assert [token / 10 for token in sampled] == sequence.logprobs
    return found


def shown(sequences: list[TrainingSequence]) -> list[tuple[list[int], list[tuple[int, int]]]]:
    return [(each.tokens, each.sampled) for each in sequences]


def test_a_prompt_that_goes_on_where_a_turn_ended_is_one_sequence_with_it() -> None:
    first, second, third = turn([1, 2], [3, 4]), turn([1, 2, 3, 4, 5], [6]), turn([1, 2, 3, 4, 5, 6], [7, 8])
    whole = [([1, 2, 3, 4, 5, 6, 7, 8], [(2, 4), (5, 6), (6, 8)])]
    assert shown(joined(first, second, third)) == whole
    assert shown(joined(third, first, second)) == whole, "the clocks of two gateways may differ"


def test_a_prompt_that_was_written_anew_begins_another_sequence() -> None:
    assert shown(joined(turn([1, 2], [3, 4]), turn([1, 2, 3, 9, 5], [6]))) == [
        ([1, 2, 3, 4], [(2, 4)]),
        ([1, 2, 3, 9, 5, 6], [(5, 6)]),
    ]


def test_a_sampled_token_is_trained_once_however_often_it_is_read() -> None:
    """Two turns go on from the same one: the second reads what the first also learns."""
    assert shown(joined(turn([1], [2]), turn([1, 2, 3], [4]), turn([1, 2, 5], [6]))) == [
        ([1, 2, 3, 4], [(1, 2), (3, 4)]),
        ([1, 2, 5, 6], [(3, 4)]),
    ]
    assert shown(joined(turn([1], [2], [7]), turn([1, 7, 3], [4]))) == [
        ([1, 2], [(1, 2)]),
        ([1, 7, 3, 4], [(1, 2), (3, 4)]),
    ]


def test_the_longest_of_several_beginnings_goes_on() -> None:
    assert shown(joined(turn([1], [2]), turn([1], [2, 3]), turn([1, 2, 3, 4], [5]))) == [
        ([1, 2], [(1, 2)]),
        ([1, 2, 3, 4, 5], [(1, 3), (4, 5)]),
    ]


def test_what_a_retry_replaced_was_never_read_and_is_not_trained() -> None:
    lost, again = turn([1, 2], [3]), turn([1, 2], [4], retry=1)
    assert shown(joined(turn([1, 2], [9]), lost, again)) == [([1, 2, 9], [(2, 3)]), ([1, 2, 4], [(2, 3)])]
    assert shown(joined(turn([5], [6]), again)) == [([5, 6], [(1, 2)]), ([1, 2, 4], [(2, 3)])]


def test_nothing_to_learn_is_no_sequence() -> None:
    assert joined(turn([1, 2], []), turn([], [3])) == []
