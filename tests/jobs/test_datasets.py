"""Data files: every form means the same row, what is wrong is named with its line, and everything is bounded."""

import json
from typing import Any

import pytest

from knapper import limits
from knapper.errors import InvalidField
from knapper.jobs import datasets, rows, spec
from knapper.jobs.yaml_document import JobError
from tests.jobs.services import lines

CHAT = {
    "messages": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
}


def sequence(**changes: Any) -> dict[str, Any]:
    return {"tokens": [1, 2, 3, 4], "sampled": [[1, 2], [3, 4]], "logprobs": [-0.5, -1.5]} | changes


EPISODE = {"reward": 1, "sequences": [sequence()]}


@pytest.mark.parametrize(
    ("kind", "row", "says"),
    [
        ("rl", {"answer": 1}, "prompt"),
        ("rl", {"prompt": ""}, "prompt"),
        ("rl", {"prompt": []}, "prompt"),
        ("rl", {"prompt": [{"role": "user"}]}, "prompt.*content"),
        ("rl", {"prompt": "a", "anwser": 1}, "anwser.*prompt, answer"),
        ("rl", 5, "object"),
        ("sft", {"messages": [{"role": "user", "content": "a"}]}, "no assistant"),
        ("sft", {"prompt": "a", "completion": ""}, "completion"),
        (
            "sft",
            {"prompt": "a", "completion": "b", "messages": []},
            "no field of this name",
        ),
        (
            "dpo",
            {"prompt": "a", "chosen": "b", "rejected": "b"},
            "another text than `chosen`",
        ),
        ("dpo", {"prompt": "a", "chosen": "b"}, "rejected"),
        ("episodes", {"reward": 1}, "sequences"),
        ("episodes", {"reward": 1, "sequences": []}, "sequences"),
        ("episodes", EPISODE | {"reward": 1.1e6}, "reward"),
        ("episodes", EPISODE | {"sequences": [sequence(tokens=[1])]}, "tokens"),
        ("episodes", EPISODE | {"sequences": [sequence(tokens=[1, -2, 3, 4])]}, "tokens"),
        ("episodes", EPISODE | {"sequences": [sequence(sampled=[[0, 2]])]}, r"sampled\[0\] is \[0, 2\]; .* 1 <= first"),
        ("episodes", EPISODE | {"sequences": [sequence(sampled=[[1, 5]])]}, "end <= 4"),
        ("episodes", EPISODE | {"sequences": [sequence(sampled=[[1, 3], [2, 4]])]}, "3 <= first"),
        ("episodes", EPISODE | {"sequences": [sequence(), sequence(sampled=[[2, 2]])]}, r"sequences\[1\].sampled\[0\]"),
        ("episodes", EPISODE | {"sequences": [sequence(logprobs=[-1.0])]}, "logprobs is 1; allowed: 2"),
        ("episodes", EPISODE | {"sequences": [sequence(logprobs=[-1.0, 0.5])]}, r"\[1\] is 0.5; allowed: "),
        ("episodes", EPISODE | {"sequences": [sequence(logprobs=[-1e39, -1.0])]}, r"\[0\] is -1e\+39; allowed: "),
        ("episodes", EPISODE | {"sequences": [sequence(weights=[1])]}, "weights"),
    ],
)
def test_a_wrong_row_is_named_with_its_line(kind: str, row: object, says: str) -> None:
    good = {
        "rl": {"prompt": "a"},
        "sft": CHAT,
        "dpo": {"prompt": "a", "chosen": "b", "rejected": "c"},
        "episodes": EPISODE,
    }[kind]
    more = "reward: {name: length, max: 1}" if kind == "rl" else ""
    job = spec.parse(f"kind: {kind}\ndata: d.jsonl\nsteps: 1\n{more}\n".encode()).job
    data = (lines(good) + "\n" + lines(row)).encode()
    with pytest.raises(JobError, match=f"d.jsonl, line 3: .*{says}") as caught:
        datasets.rows(job, "d.jsonl", data)
    assert caught.value.report()["file"] == "d.jsonl"


def user(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **more}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def human(text: str) -> dict[str, Any]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, Any]:
    return {"from": "gpt", "value": text}


SYSTEM = {"role": "system", "content": "s"}
CHATTED = rows.ChatRow([user("a"), assistant("b")])
PAIRED = rows.PairRow([user("a")], [assistant("b")], [assistant("c")])


@pytest.mark.parametrize(
    ("kind", "sent", "meant"),
    [
        ("rl", {"prompt": "a"}, rows.RlRow("a")),
        ("rl", {"prompt": [user("a", name="ada")], "answer": 1}, rows.RlRow([user("a", name="ada")], 1)),
        ("rl", {"prompt": [human("a")]}, rows.RlRow([user("a")])),
        ("sft", {"messages": [user("a"), assistant("b")]}, CHATTED),
        ("sft", {"messages": [user("a", name="ada"), assistant("b") | {"refusal": None, "annotations": []}]},
         rows.ChatRow([user("a", name="ada"), assistant("b")])),
        ("sft", {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, assistant("b")]}, CHATTED),
        ("sft", {"messages": [human("a"), gpt("b")]}, CHATTED),
        ("sft", {"conversations": [human("a"), gpt("b")]}, CHATTED),
        ("sft", {"id": "x_0", "conversations": [human("a"), gpt("b") | {"weight": None}], "tools": ""}, CHATTED),
        ("sft", {"messages": [user("a") | {"weight": None}, assistant("b") | {"weight": None}]}, CHATTED),
        ("sft", {"messages": [user("a"), assistant("b") | {"weight": 1}]}, rows.ChatRow(CHATTED.messages, [None, 1])),
        ("sft", {"system": "s", "conversations": [human("a") | {"weight": 0}, gpt("b") | {"weight": 1}]},
         rows.ChatRow([SYSTEM, *CHATTED.messages], [None, 0, 1])),
        ("sft", {"prompt": [user("a")], "completion": [assistant("b") | {"weight": 1}]},
         rows.CompletionRow([user("a")], [assistant("b")], [1])),
        ("sft", {"conversations": [user("a"), assistant("b")]}, CHATTED),
        ("sft", {"conversations": [{"from": "user", "value": "a"}, {"from": "chatgpt", "value": "b"}]}, CHATTED),
        ("sft", {"conversations": [{"from": "system", "value": "s"}, human("a"), gpt("b")]},
         rows.ChatRow([SYSTEM, user("a"), assistant("b")])),
        ("sft", {"system": "s", "conversations": [human("a"), gpt("b")]},
         rows.ChatRow([SYSTEM, user("a"), assistant("b")])),
        ("sft", {"prompt": "a", "completion": "b"}, rows.CompletionRow("a", "b")),
        ("sft", {"prompt": [user("a")], "completion": [assistant("b")]},
         rows.CompletionRow([user("a")], [assistant("b")])),
        ("dpo", {"prompt": "a", "chosen": "b", "rejected": "c"}, rows.PairRow("a", "b", "c")),
        ("dpo", {"prompt": [user("a")], "chosen": "b", "rejected": "c"}, rows.PairRow([user("a")], "b", "c")),
        ("dpo", {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}, PAIRED),
        ("dpo", {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}, PAIRED),
        ("dpo", {"prompt": "a", "chosen": [user("a"), assistant("b")],
                 "rejected": [user("a"), assistant("c")]}, PAIRED),
        ("dpo", {"chosen": [user("a"), assistant("x"), user("y"), assistant("b")],
                 "rejected": [user("a"), assistant("x"), user("y"), assistant("c"), user("z"), assistant("d")]},
         rows.PairRow([user("a"), assistant("x"), user("y")], [assistant("b")],
                      [assistant("c"), user("z"), assistant("d")])),
        ("dpo", {"conversations": [human("a")], "chosen": gpt("b"), "rejected": gpt("c")}, PAIRED),
        ("dpo", {"conversations": [human("a")], "chosen": [gpt("b")], "rejected": [gpt("c")]}, PAIRED),
    ],
)  # fmt: skip
def test_every_form_of_a_row_is_read_as_what_it_means(kind: spec.Kind, sent: object, meant: rows.Row) -> None:
    assert rows.read(kind, json.dumps(sent).encode()) == meant


@pytest.mark.parametrize(
    ("kind", "sent", "says"),
    [
        ("sft", {"conversations": [human("a"), {"from": "observation", "value": "{}"}]}, "from is 'observation'"),
        ("sft", {"conversations": [human("a"), gpt("b") | {"weight": 2}]}, r"conversations\[1\].weight is 2; .*1"),
        ("sft", {"messages": [user("a"), assistant("b") | {"weight": 0.5}]}, r"messages\[1\].weight"),
        ("sft", {"messages": [user("a"), assistant("b") | {"weight": True}]}, r"messages\[1\].weight"),
        ("sft", {"prompt": [user("a") | {"weight": 0}], "completion": "b"}, r"prompt\[0\].weight is 0; .*none here"),
        ("rl", {"prompt": [user("a") | {"weight": 1}]}, r"prompt\[0\].weight is 1; allowed: none here"),
        ("dpo", {"prompt": [user("a")], "chosen": [assistant("b") | {"weight": 1}], "rejected": [assistant("c")]},
         r"chosen\[0\].weight is 1; allowed: none here"),
        ("dpo", {"conversations": [human("a") | {"weight": 0}], "chosen": gpt("b"), "rejected": gpt("c")},
         r"conversations\[0\].weight is 0; allowed: none here"),
        ("sft", {"conversations": [human("a"), assistant("b")]}, r"conversations\[1\]"),
        ("sft", {"conversations": [human("a"), gpt("b")], "tools": "[{}]"}, "tools is"),
        ("sft", {"system": "s", "conversations": [SYSTEM, user("a"), assistant("b")]}, "system is 's'"),
        ("sft", {"conversations": []}, "conversations is 'a list of 0'"),
        ("sft", {"messages": [user("a"), {"role": "assistant", "content": None, "tool_calls": [{}]}]}, "tools are not"),
        ("sft", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, r"\[0\].type is 'image_url'"),
        ("sft", {"messages": [user("a", nmae="ada")]}, r"messages\[0\].nmae .*Did you mean name\?"),
        ("sft", {"prompt": "a", "completion": [assistant("b")]}, "completion .*a text, as `prompt` is one"),
        ("sft", {"prompt": [user("a")], "completion": [user("b")]}, "first message of completion is 'user'"),
        ("sft", {"prompt": [user("a")], "completion": [user("a"), assistant("b")]}, "only the messages that follow"),
        ("sft", {"prompt": [user("a"), assistant("b")], "completion": [assistant("c")]}, "prompt's last message"),
        ("dpo", {"chosen": "a b", "rejected": "a c"}, "prompt is None; allowed: a value: .*whole conversations"),
        ("dpo", {"chosen": [user("a"), assistant("b")], "rejected": [user("x"), assistant("c")]}, "begins as `chosen`"),
        ("dpo", {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("b")]}, "ends otherwise"),
        ("dpo", {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), user("c")]}, "message of rejected is"),
        ("dpo", {"prompt": "z", "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
         "prompt is 'z'"),
        ("dpo", {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": "c"}, "of the same form as `chosen`"),
    ],
)  # fmt: skip
def test_what_may_mean_two_things_is_refused_with_what_is_allowed(kind: spec.Kind, sent: object, says: str) -> None:
    with pytest.raises(InvalidField, match=says):
        rows.read(kind, json.dumps(sent).encode())


@pytest.mark.parametrize("kind", rows.FORMS)
@pytest.mark.parametrize("sent", [{"text": "a"}, {"instruction": "a", "output": "b"}, {}, {"answer": 1, "text": "a"}])
def test_a_row_of_an_unknown_form_is_told_of_all_forms(kind: spec.Kind, sent: object) -> None:
    with pytest.raises(InvalidField) as caught:
        rows.read(kind, json.dumps(sent).encode())
    for form in rows.FORMS[kind]:
        assert form.shown in str(caught.value)


@pytest.mark.parametrize(
    ("loss_on", "weights", "says"),
    [
        ("completions", [0, 0], r"d, line 2: messages: weights is \[0, 0\]; allowed: one message to learn at least"),
        ("all", [0, 0], "one message to learn"),
        (["user"], [0, None], "one message to learn"),
        ("completions", [1, 1], r"line 2: messages\[0\].weight is 1; allowed: 0 or none.*the user says"),
        (["user"], [1, 1], r"messages\[1\].weight is 1; .*the assistant says.*name the role in `loss_on`"),
    ],
)
def test_weights_that_leave_nothing_or_contradict_loss_on_are_refused(
    loss_on: str | list[str], weights: list[int | None], says: str
) -> None:
    said = [user("a") | {"weight": weights[0]}, assistant("b") | {"weight": weights[1]}]
    with pytest.raises(JobError, match=says):
        datasets.sft("d", lines({"messages": [user("a"), assistant("b")]}, {"messages": said}).encode(), loss_on)


def test_a_completions_weights_leave_something_to_learn() -> None:
    row = {"prompt": [user("a")], "completion": [assistant("b") | {"weight": 0}]}
    with pytest.raises(JobError, match=r"completion: weights is \[0\]; allowed: one message"):
        datasets.sft("d", lines(row).encode(), "completions")


def test_a_misspelt_field_is_told_which_was_meant() -> None:
    with pytest.raises(JobError, match=r"^d, line 1: promt is 'a'.*Did you mean prompt\?"):
        datasets.dpo("d", lines({"promt": "a", "chosen": "b", "rejected": "c"}).encode())


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('{"prompt": "a", "prompt": "b"}', "prompt"),
        ('{"prompt": [{"role": "user", "content": "a", "role": "system"}]}', "role"),
        ('{"prompt": "a", "answer": {"x": 1, "\\u0078": 2}}', "x"),
    ],
)
def test_a_key_that_is_there_twice_is_refused(text: str, key: str) -> None:
    with pytest.raises(JobError, match=f"d, line 2: {key} is 'there a second time'; allowed: each field once"):
        datasets.rl("d", b'{"prompt": "a"}\n' + text.encode())


def test_a_byte_order_mark_before_a_line_is_no_part_of_it() -> None:
    one = b'\xef\xbb\xbf{"prompt": "a"}\n'
    assert datasets.rl("d", one) == [rows.RlRow("a")]
    assert datasets.rl("d", one + one + b"\xef\xbb\xbf") == [rows.RlRow("a")] * 2, "files put together"
    assert datasets.line_of("d", b"\xef\xbb\xbf\n" + one, 0) == 2
    with pytest.raises(JobError, match="its content is 'empty'"):
        datasets.rl("d", b"\xef\xbb\xbf\n")
    with pytest.raises(JobError, match="line 1"):
        datasets.rl("d", '{"prompt": "a"}\n'.encode("utf-16"))


def test_roles_that_no_row_has_are_an_error() -> None:
    with pytest.raises(JobError, match=r"roles.*tool"):
        datasets.sft("d", lines(CHAT).encode(), ["tool"])
    with pytest.raises(JobError, match="names roles"):
        datasets.sft("d", lines({"prompt": "a", "completion": "b"}).encode(), ["assistant"])


def test_as_many_rows_as_are_allowed_and_one_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "job_rows_max", 3)
    assert len(datasets.rl("d", lines(*[{"prompt": "a"}] * 3).encode())) == 3
    with pytest.raises(JobError, match="line 4: its number of rows is 4; allowed: at most 3"):
        datasets.rl("d", lines(*[{"prompt": "a"}] * 4).encode())


def test_an_episode_has_its_log_probabilities_where_it_was_sampled() -> None:
    (row,) = datasets.episodes("d", lines(EPISODE | {"episode": "g/a", "group": "g"}).encode())
    assert (row.episode, row.group, row.reward) == ("g/a", "g", 1.0)
    (only,) = row.sequences
    assert only.tokens_T.tolist() == [1, 2, 3, 4]
    assert only.sampled_T.tolist() == [False, True, False, True]
    assert only.logprobs_T.tolist() == [0.0, -0.5, 0.0, -1.5]
