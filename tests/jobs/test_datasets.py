"""Data files: what is wrong is named with its line, and everything is bounded."""

import pytest

from knapper import limits
from knapper.jobs import datasets, spec
from knapper.jobs.documents import JobError
from tests.jobs.places import lines

CHAT = {
    "messages": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
}


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
    ],
)
def test_a_wrong_row_is_named_with_its_line(kind: str, row: object, says: str) -> None:
    good = {
        "rl": {"prompt": "a"},
        "sft": CHAT,
        "dpo": {"prompt": "a", "chosen": "b", "rejected": "c"},
    }[kind]
    more = "reward: {name: length, max: 1}" if kind == "rl" else ""
    job = spec.parse(f"kind: {kind}\ndata: d.jsonl\nsteps: 1\n{more}\n".encode()).job
    data = (lines(good) + "\n" + lines(row)).encode()
    with pytest.raises(JobError, match=f"d.jsonl, line 3: .*{says}") as caught:
        datasets.rows(job, "d.jsonl", data)
    assert caught.value.report()["file"] == "d.jsonl"


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
