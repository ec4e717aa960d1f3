"""Text comes out whole: no half characters, no stop strings, nothing twice and nothing lost."""

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.decoders import DecodeStream

from gateway.openai.detokenizer import Characters, Detokenizer, TextDelta
from knapper.wire.progress import Ending, TokenEvent
from tests.engine.tiny import eos, sentencepiece, tiny_model

WORLD = "the naïve 漢字 and 🦊🏽‍🚀 in ünïcödé — ok"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_file(str(tiny_model(tmp_path_factory.mktemp("tiny")) / "tokenizer.json"))


def tell(
    tokenizer: Tokenizer, tokens: list[int], ending: Ending = "length", stops: tuple[str, ...] = (), prompt: str = ""
) -> list[TextDelta]:
    text = Detokenizer(tokenizer, tokenizer.encode(prompt).ids, stops)
    last = len(tokens) - 1
    return [text.add(TokenEvent(0, i, token, -1.0 - i, ending if i == last else "")) for i, token in enumerate(tokens)]


def joined(deltas: list[TextDelta]) -> str:
    return "".join(delta.text for delta in deltas)


def test_pieces_add_up_and_no_character_is_cut(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode(WORLD).ids
    deltas = tell(tokenizer, tokens)
    assert joined(deltas) == WORLD
    assert not any("\ufffd" in delta.text for delta in deltas)
    assert len([delta for delta in deltas if delta.text]) > 20, "it is told as it comes"
    assert [scored.token for delta in deltas for scored in delta.tokens] == tokens


def test_bytes_that_are_no_text_are_shown_as_such_and_do_not_hold_up_the_rest(tokenizer: Tokenizer) -> None:
    tokens = random.Random(1).choices(range(256), k=400)
    deltas = tell(tokenizer, tokens)
    assert joined(deltas) == tokenizer.decode(tokens)
    broken = tokenizer.encode("漢").ids[:1] * 300
    characters = Characters(tokenizer, [])
    texts = [characters.add(token) for token in broken]
    assert max(i for i, text in enumerate(texts) if text) > 200, "characters that never end are let go"
    assert len("".join(texts) + characters.pending()) == 300


def test_an_unfinished_character_at_the_end_is_told(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("a漢").ids[:-1]
    assert joined(tell(tokenizer, tokens)) == "a\ufffd"
    assert joined(tell(tokenizer, [*tokens, tokenizer.encode(eos).ids[0]], "stop")) == "a\ufffd"


def test_the_token_that_ends_a_text_is_not_part_of_it(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("the and").ids
    end = tokenizer.encode(eos).ids[0]
    deltas = tell(tokenizer, [*tokens, end], "stop")
    assert joined(deltas) == "the and"
    assert [scored.token for delta in deltas for scored in delta.tokens] == tokens
    ordinary = tokenizer.encode("!").ids  # a stop token need not be special
    assert joined(tell(tokenizer, tokens + ordinary, "stop")) == "the and"
    assert joined(tell(tokenizer, [*tokens, end, *ordinary])) == "the and!", "a special token has no text"


@pytest.mark.parametrize("stop", ["in ", "🦊🏽", "d 🦊", "k"])
def test_a_stop_string_is_cut_off_and_no_part_of_it_was_told(tokenizer: Tokenizer, stop: str) -> None:
    tokens = tokenizer.encode(WORLD).ids
    end = next(i for i in range(1, len(tokens) + 1) if stop in tokenizer.decode(tokens[:i]))
    deltas = tell(tokenizer, tokens[:end], "stop", ("never", stop))
    assert joined(deltas) == WORLD[: WORLD.index(stop)]
    scored = [scored for delta in deltas for scored in delta.tokens]
    assert all(one.offset < WORLD.index(stop) for one in scored)
    assert [one.token for one in scored] == tokens[: len(scored)]


def test_what_only_begins_like_a_stop_string_is_told_in_the_end(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("the andthe").ids
    deltas = tell(tokenizer, tokens, stops=("theory", "the end"))
    assert joined(deltas) == "the andthe"
    assert deltas[0].text == ""
    assert [scored.offset for delta in deltas for scored in delta.tokens] == [0, 3, 7]


def test_random_texts_stop_where_their_stop_string_begins(tokenizer: Tokenizer) -> None:
    rng = random.Random(2)
    for _ in range(300):
        tokens = tokenizer.encode("".join(rng.choices("aabthe é漢", k=30))).ids
        stop = "".join(rng.choices("abthe é", k=rng.randint(1, 4)))
        whole = tokenizer.decode(tokens)
        if stop in whole:
            end = next(i for i in range(1, len(tokens) + 1) if stop in tokenizer.decode(tokens[:i]))
            assert joined(tell(tokenizer, tokens[:end], "stop", (stop,))) == whole[: whole.index(stop)]
        else:
            assert joined(tell(tokenizer, tokens, stops=(stop,))) == whole


def wordpiece() -> Tokenizer:
    """As BERT's: spaces stand between words, and before some word pieces none."""
    vocabulary = ["[UNK]", "the", "##s", "and", "!", "don", "'", "t", "##é", "."]
    tokenizer = Tokenizer(models.WordPiece(vocab={word: n for n, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def stream(tokenizer: Tokenizer, before: list[int], tokens: list[int]) -> list[str]:
    """The library's own decoder: right wherever tokens are whole characters (docs/decisions/0028)."""
    theirs = DecodeStream(ids=before, skip_special_tokens=True)
    return [theirs.step(tokenizer, token) or "" for token in tokens]


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece", "wordpiece"])
def test_whole_texts_come_in_the_pieces_of_the_librarys_stream(kind: str, tokenizer: Tokenizer) -> None:
    decoder = {"byte-level": lambda: tokenizer, "sentencepiece": sentencepiece, "wordpiece": wordpiece}[kind]()
    words = ["the", "thes", "and", "!", "don't", "é", "."] + ["漢", "🦊🏽‍🚀", "\n"] * (kind != "wordpiece")
    special = [] if kind == "wordpiece" else [decoder.encode(eos if kind == "byte-level" else "</s>").ids[-1]]
    rng, whole_count = random.Random(3), 0
    for _ in range(1000):
        before, tokens = ([
            token for word in rng.choices(words, k=rng.randint(0, 8))
            for token in decoder.encode(word).ids + special * (rng.random() < 0.1)
        ] for _ in range(2))  # fmt: skip
        characters = Characters(decoder, before)
        parts = [characters.add(token) for token in tokens]
        assert parts == stream(decoder, before, tokens), (before, tokens)
        assert characters.pending() == ""
        whole_count += len("".join(parts))
    assert whole_count > 5000


def test_bytes_that_are_no_text_end_no_request_of_a_sentencepiece_model() -> None:
    """The library's stream raises there: what ByteFallback makes of a byte changes with the bytes behind it."""
    decoder = sentencepiece()
    tokens = [decoder.get_vocab()[each] for each in ("<0x05>", "<0xB8>", "<0xBA>", "!")]
    with pytest.raises(Exception, match="Invalid prefix"):
        stream(decoder, [], tokens)
    characters = Characters(decoder, [])
    assert [characters.add(token) for token in tokens] == ["\x05", "", "", "\ufffd\ufffd!"]


@pytest.mark.parametrize("prompt", ["the", "漢漢", "🦊🏽‍🚀</s>", "a\n\n</s></s></s></s></s>"])
def test_a_space_between_prompt_and_text_is_kept(prompt: str) -> None:
    """By tokenizers that drop a space at the beginning of what they decode."""
    tokenizer = sentencepiece()
    text = Detokenizer(tokenizer, tokenizer.encode(prompt).ids, ())
    tokens = [1, 0, *(tokenizer.get_vocab()[f"<0x{byte:02X}>"] for byte in "漢".encode()), 2]
    texts = [text.add(TokenEvent(0, i, token, 0.0)).text for i, token in enumerate(tokens)]
    assert texts == [" and", " the", "", "", "漢", "!"]
    assert tokenizer.decode([1]) == "and", "or the test proves nothing"


def test_a_text_can_begin_behind_an_echo(tokenizer: Tokenizer) -> None:
    text = Detokenizer(tokenizer, tokenizer.encode("prompt").ids, (), offset=6)
    scored = [
        one
        for i, token in enumerate(tokenizer.encode("the and").ids)
        for one in text.add(TokenEvent(0, i, token, 0.0)).tokens
    ]
    assert [one.offset for one in scored] == [6, 9]


def test_the_tiny_model_has_what_these_tests_need(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert len(tokenizer.encode("漢").ids) == 3
    assert len(tokenizer.encode("the and").ids) == 2
