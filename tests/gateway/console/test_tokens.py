"""The heat map of tokens: a shade is of the probabilities that its legend names."""

from math import log

from gateway.console.tokens import Token, legend


def shade(probability: float) -> int:
    return Token(position=0, token=0, logprob=log(probability), text="a", name="").shade


def test_the_legend_names_every_shade_by_the_least_probability_that_has_it() -> None:
    *named, last = legend()
    least = [float(words.removeprefix("≥ ").removesuffix(" %")) / 100 for words in named]
    assert least == sorted(least, reverse=True)
    for number, bound in enumerate(least):  # words are rounded to two digits
        assert shade(min(1.0, bound * 1.05)) == number
        assert shade(bound * 0.95) == number + 1
    assert (last, shade(1e-9)) == ("less", len(named))
