"""Stop strings are found in text, not in tokens: across token borders and inside multi-byte characters."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models

from knapper.engine.sampling.stop import StopCriteria
from tests.engine.tiny import eos, sentencepiece, tiny_model


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tiny_model(tmp_path) / "tokenizer.json"))


def end_of(stops: StopCriteria, tokens: list[int]) -> int | None:
    """How many tokens the text has when it ends."""
    return next((count for count in range(1, len(tokens) + 1) if stops.ended(tokens[:count])), None)


@pytest.mark.parametrize("stop", ["cat and", "猫", "the", "\n\nUser:", "é 猫", eos])
@pytest.mark.parametrize("before", ["", "the cats and the 犬 in a hut. " * 20])
def test_a_string_ends_the_text_at_the_token_that_completes_it(tokenizer: Tokenizer, stop: str, before: str) -> None:
    before = before.replace(stop, "")
    tokens = tokenizer.encode(before + "x" + stop + " more").ids
    count = end_of(StopCriteria((), (stop,), tokenizer), tokens)
    assert count is not None
    assert stop in tokenizer.decode(tokens[:count], skip_special_tokens=False)
    assert stop not in tokenizer.decode(tokens[: count - 1], skip_special_tokens=False)


def test_half_a_character_is_no_stop(tokenizer: Tokenizer) -> None:
    # 猫 is e7 8c ab, 猪 is e7 8c aa: two bytes alike.
    assert end_of(StopCriteria((), ("猫",), tokenizer), tokenizer.encode("猪猪猪").ids) is None


def test_the_first_of_several_stops_counts(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("abcdef").ids
    assert end_of(StopCriteria((), ("ef", "cd"), tokenizer), tokens) == 4
    assert end_of(StopCriteria((tokens[1],), ("cd",), tokenizer), tokens) == 2
    assert end_of(StopCriteria((), (), None), tokens) is None


def test_tokens_without_text_do_not_hide_a_string(tokenizer: Tokenizer) -> None:
    class Silent:
        """Special tokens decode to nothing, as in tokenizers that drop them."""

        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            assert not skip_special_tokens
            return tokenizer.decode(ids, skip_special_tokens=True)

    end = tokenizer.token_to_id(eos)
    assert end is not None
    (x, y) = tokenizer.encode("xy").ids
    assert end_of(StopCriteria((), ("xy",), Silent()), [x, *[end] * 100, y]) == 102  # type: ignore[arg-type]


def test_a_leading_space_that_decoding_drops_is_still_found() -> None:
    tokenizer = Tokenizer(models.WordLevel({"▁": 0, "a": 1, "bb": 2}, unk_token="a"))
    tokenizer.decoder = decoders.Metaspace()
    assert tokenizer.decode([0, 1, 2]) == "abb"
    assert end_of(StopCriteria((), (" ab",), tokenizer), [1, 1, 0, 1, 2, 1]) == 5


@pytest.mark.parametrize("stop", ["漢漢", "é!", "🦊", "猫 the"])
@pytest.mark.parametrize("length", range(12))
def test_a_string_is_found_behind_any_number_of_characters_that_are_bytes(stop: str, length: int) -> None:
    """A window that begins inside one of them must not make all bytes behind it no text."""
    tokenizer = sentencepiece()
    tokens = tokenizer.encode("犬" * length + stop + "犬").ids
    count = end_of(StopCriteria((), (stop,), tokenizer), tokens)
    assert count is not None
    assert tokenizer.decode(tokens[:count]).endswith(stop)
