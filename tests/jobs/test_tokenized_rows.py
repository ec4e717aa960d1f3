"""Which tokens an example has, and which of them the loss counts."""

import numpy as np
import pytest

from knapper.catalogue.chat_templates import Template
from knapper.catalogue.conversations import Message
from knapper.catalogue.tokenizer import Language
from knapper.errors import InvalidField, UserError
from knapper.jobs.rows import ChatRow, CompletionRow, PairRow, Weights
from knapper.jobs.tokenized_rows import Example, RowTokenizer, pack
from tests.engine.tiny import _tokenizer as tokenizer
from tests.engine.tiny import bos, eos
from tests.jobs.works import CHAT

LANGUAGE = Language(tokenizer(), Template(CHAT, {}), tokenizer().token_to_id(eos))


def message(role: str, content: str, **more: str) -> Message:
    return {"role": role, "content": content, **more}


def texts(tokens_max: int = 200, template: str = CHAT) -> RowTokenizer:
    return RowTokenizer(
        Language(LANGUAGE.tokenizer, Template(template, {}), LANGUAGE.end),
        0.0,
        tokens_max,
    )


def counted(example: Example) -> str:
    """The text of the tokens that count, with `|` where others lie between."""
    runs: list[list[int]] = [[]]
    for token, counts in zip(example.tokens_T.tolist(), example.counts_T, strict=True):
        if counts:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return "|".join(LANGUAGE.tokenizer.decode(run, skip_special_tokens=False) for run in runs if run)


CHATTED = ChatRow(
    messages=[message("system", "be"), message("user", "hi"), message("assistant", "yo"), message("user", "é?"),
     message("assistant", "the end")]
)  # fmt: skip


@pytest.mark.parametrize(
    ("loss_on", "told"),
    [
        ("completions", f"yo{eos}|the end{eos}"),
        (["assistant"], f"yo{eos}|the end{eos}"),
        (["user"], f"{bos}user\nhi{eos}|{bos}user\né?{eos}"),
    ],
)
def test_a_chat_counts_what_the_roles_said(loss_on: str | list[str], told: str) -> None:
    assert counted(texts().sft(CHATTED, loss_on)) == told


@pytest.mark.parametrize(
    ("loss_on", "weights", "told"),
    [
        ("completions", [None, None, 0, None, None], f"the end{eos}"),
        ("completions", [0, 0, 1, 0, 0], f"yo{eos}"),
        (["user", "assistant"], [None, 0, 1, None, 0], f"yo{eos}|{bos}user\né?{eos}"),
    ],
)
def test_a_message_of_weight_0_does_not_count(loss_on: str | list[str], weights: Weights, told: str) -> None:
    assert counted(texts().sft(ChatRow(CHATTED.messages, weights), loss_on)) == told


def test_all_counts_every_token_but_those_of_messages_of_weight_0() -> None:
    everything = texts().sft(CHATTED, "all")
    less = texts().sft(ChatRow(CHATTED.messages, [None, None, 0, None, 1]), "all")
    assert less.tokens_T.tolist() == everything.tokens_T.tolist()
    left_out = Example(less.tokens_T, everything.counts_T & ~less.counts_T)
    assert counted(left_out) == f"yo{eos}"


@pytest.mark.parametrize("loss_on", ["completions", "all"])
def test_a_completions_messages_have_weights_of_their_own(loss_on: str) -> None:
    prompt, said = CHATTED.messages[:2], CHATTED.messages[2:]
    told = texts().sft(CompletionRow(prompt, said, [0, None, 1]), loss_on)
    whole = texts().sft(ChatRow(CHATTED.messages, [None, None, 0, None, 1]), loss_on)
    assert told.tokens_T.tolist() == whole.tokens_T.tolist()
    assert told.counts_T.tolist() == whole.counts_T.tolist()


def test_all_counts_every_token_but_the_first() -> None:
    example = texts().sft(CHATTED, "all")
    assert example.counted == len(example.tokens_T) - 1
    assert not example.counts_T[0]


def test_a_completion_counts_with_the_token_that_ends_it() -> None:
    example = texts().sft(CompletionRow(prompt="in", completion="the"), "completions")
    assert counted(example) == f"the{eos}"
    chat = texts().sft(CompletionRow(prompt=[message("user", "a")], completion="b"), "completions")
    assert LANGUAGE.tokenizer.decode(chat.tokens_T.tolist(), skip_special_tokens=False) == (
        f"{bos}user\na{eos}\n{bos}assistant\nb{eos}"
    )
    assert counted(chat) == f"b{eos}"
    chosen, rejected = texts().pair(PairRow(prompt="in", chosen="b", rejected="a"))
    assert (counted(chosen), counted(rejected)) == (f"b{eos}", f"a{eos}")


def test_messages_after_a_prompt_count_as_a_chat_of_both_does() -> None:
    prompt, said = [message("user", "a")], [message("assistant", "b"), message("user", "c"), message("assistant", "d")]
    told = texts().sft(CompletionRow([message("assistant", "x"), *prompt], said), "completions")
    assert counted(told) == f"b{eos}|d{eos}", "what the prompt's assistant said is no completion"
    chosen, rejected = texts().pair(PairRow(prompt, [message("assistant", "b")], [message("assistant", "d")]))
    assert (counted(chosen), counted(rejected)) == (f"b{eos}", f"d{eos}")
    whole = texts().sft(ChatRow([*prompt, message("assistant", "b")]), "completions")
    assert chosen.tokens_T.tolist() == whole.tokens_T.tolist()


def test_a_template_gets_the_names_of_those_who_speak() -> None:
    named = "{% for m in messages %}{{ m.role }}{{ m.name | default('') }}:{{ m.content }}\n{% endfor %}"
    tokens = texts(template=named).prompt([message("user", "a", name="the")])
    assert LANGUAGE.tokenizer.decode(tokens) == "userthe:a\n"


def test_a_template_that_rewrites_earlier_messages_is_refused_instead_of_guessed() -> None:
    forgetful = "{% for m in messages %}{{ m.role }}:{{ m.content if loop.last else '...' }}\n{% endfor %}"
    with pytest.raises(UserError, match="changes message 2 when others follow it"):
        texts(template=forgetful).sft(CHATTED, "completions")


def test_a_row_fits_exactly_or_is_an_error() -> None:
    row = CompletionRow(prompt="in", completion="the")
    size = len(texts().sft(row, "completions").tokens_T)
    assert texts(size).sft(row, "completions").counted == 2
    with pytest.raises(InvalidField, match=f"is {size}; allowed: at most {size - 1}"):
        texts(size - 1).sft(row, "completions")


def test_packing_loses_no_token_and_cuts_no_row() -> None:
    examples = [Example(np.arange(n, dtype=np.int32), np.arange(n) > 0) for n in (5, 3, 2, 7, 1, 1, 8)]
    packed = pack(examples, 8)
    assert [len(each.tokens_T) for each in packed] == [8, 2, 8, 1, 8]
    assert np.concatenate([each.tokens_T for each in packed]).tolist() == [
        t for n in (5, 3, 2, 7, 1, 1, 8) for t in range(n)
    ]
    assert sum(each.counted for each in packed) == sum(each.counted for each in examples)


def test_a_datum_predicts_each_next_token_with_its_weight() -> None:
    datum = Example(np.array([4, 5, 6], np.int32), np.array([False, False, True])).datum(0.5)
    assert datum.tokens.tolist() == [4, 5]
    assert datum.inputs["target_tokens"].tolist() == [5, 6]
    assert datum.inputs["weights"].tolist() == [0.0, 0.5]
