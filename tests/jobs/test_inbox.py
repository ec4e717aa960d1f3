"""Files in any order, any number of looks at once: a job starts once, or says what is wrong where people look."""

import asyncio
import itertools
import json

import pytest

from knapper import limits
from knapper.errors import InvalidField
from knapper.ids import LOCAL_TENANT
from knapper.jobs import control, inbox, spec
from knapper.jobs.job_files import Folders
from knapper.jobs.names import Start
from knapper.jobs.rows import RlRow
from knapper.state.job_records import Started, read
from tests.jobs.services import lines, serve, services

YAML = "kind: rl\ndata: p.jsonl\nsteps: 3\nreward: {code: reward.py}\nevaluate: {data: e.jsonl}\n"
FILES = {
    "job.yaml": YAML,
    "p.jsonl": lines({"prompt": "1+1=", "answer": 2}, {"prompt": [{"role": "user", "content": "hi"}]}),
    "e.jsonl": lines({"prompt": "2+2=", "answer": 4}),
    "reward.py": "def reward(prompt, completion, answer):\n    return 1.0\n",
}


@pytest.mark.parametrize("order", list(itertools.permutations(FILES)), ids=" ".join)
def test_files_come_in_any_order_and_the_job_starts_once(
    order: tuple[str, ...],
) -> None:
    async def story() -> None:
        here, folder, _ = services()
        await serve(here.store)
        starts = []
        for name in order:
            folder.put("j", {name: FILES[name]})
            starts += await asyncio.gather(*(inbox.look(here, LOCAL_TENANT, "j") for _ in range(3)))
        assert [found is not None for found in starts].count(True) == 1
        (begun,) = [found for found in starts if found is not None]
        record = await read(here.store, begun.started, Started)
        assert record is not None
        assert (record.rows, record.base_model, sorted(record.files)) == (
            2,
            "tiny",
            ["e.jsonl", "p.jsonl", "reward.py"],
        )
        assert await here.store.get(begun.content(record.files["p.jsonl"])) == FILES["p.jsonl"].encode()
        assert await here.store.list("expected/") == []
        assert "inbox/local/j/job.error.json" not in folder.files

    asyncio.run(story())


def test_a_byte_order_mark_is_skipped_in_every_file() -> None:
    async def story() -> None:
        here, folder, _ = services()
        await serve(here.store)
        folder.put("j", {name: b"\xef\xbb\xbf" + content.encode() for name, content in FILES.items()})
        begun = await inbox.look(here, LOCAL_TENANT, "j")
        assert begun is not None, folder.files.get("inbox/local/j/job.error.json")
        opened = await Folders(here.store).read(begun)
        assert opened.rows == [RlRow("1+1=", 2), RlRow([{"role": "user", "content": "hi"}])]
        assert opened.held_out == [RlRow("2+2=", 4)]

    asyncio.run(story())


def test_a_corrected_job_yaml_is_another_start_and_ends_the_first() -> None:
    async def story() -> None:
        here, folder, _ = services()
        await serve(here.store)
        folder.put("j", FILES)
        first = await inbox.look(here, LOCAL_TENANT, "j")
        assert first is not None
        assert await inbox.look(here, LOCAL_TENANT, "j") is None
        folder.put("j", {"job.yaml": YAML + "seed: 1\n"})
        second = await inbox.look(here, LOCAL_TENANT, "j")
        assert second is not None
        assert (await control.now(here.store, first)).state == "cancelled"
        assert await here.store.list("working/") == [second.working]
        assert first.run != second.run

    asyncio.run(story())


@pytest.mark.parametrize(
    ("files", "line", "says"),
    [
        ({"job.yaml": YAML.replace("steps: 3", "steps: none")}, 3, "steps"),
        (
            {"job.yaml": YAML + "base_model: other\n"},
            6,
            "base_model is 'other'; allowed: tiny",
        ),
        ({"p.jsonl": lines({"prompt": "a"}) + "\n{"}, 3, "p.jsonl, line 3"),
        ({"p.jsonl": lines({"promt": "a"})}, 1, "promt"),
        ({"p.jsonl": "\n"}, 1, "empty"),
        ({"reward.py": b"\xff"}, 4, "reward.py"),
        ({"job.yaml": "#" * (limits.job_yaml_bytes_max + 1)}, 1, "job.yaml has"),
    ],
)
def test_what_is_wrong_is_said_beside_job_yaml_until_it_is_right(
    files: dict[str, str | bytes], line: int, says: str
) -> None:
    async def story() -> None:
        here, folder, _ = services()
        await serve(here.store)
        folder.put("j", {**FILES, **files})
        assert await inbox.look(here, LOCAL_TENANT, "j") is None
        report = json.loads(folder.files["inbox/local/j/job.error.json"])
        assert says in report["error"]
        assert report["line"] == line
        assert len(await here.store.list("tenants/local/jobs/")) == 1  # where `knapper jobs` looks
        folder.put("j", FILES)
        assert await inbox.look(here, LOCAL_TENANT, "j") is not None
        assert "inbox/local/j/job.error.json" not in folder.files

    asyncio.run(story())


def test_files_that_do_not_come_are_an_error_after_ten_minutes_and_start_the_job_when_they_do() -> None:
    async def story() -> None:
        here, folder, clock = services()
        await serve(here.store)
        folder.put("j", {name: FILES[name] for name in ("job.yaml", "p.jsonl", "reward.py")})
        assert await inbox.look(here, LOCAL_TENANT, "j") is None
        clock.at += limits.job_missing_s - 1
        assert await inbox.look(here, LOCAL_TENANT, "j") is None
        assert "inbox/local/j/job.error.json" not in folder.files
        clock.at += 1
        assert await inbox.look(here, LOCAL_TENANT, "j") is None
        report = json.loads(folder.files["inbox/local/j/job.error.json"])
        assert (report["line"], report["field"], report["value"]) == (
            5,
            "evaluate.data",
            "'e.jsonl'",
        )
        folder.put("j", FILES)
        assert await inbox.look(here, LOCAL_TENANT, "j") is not None

    asyncio.run(story())


def test_states_follow_their_order_whoever_comes_first() -> None:
    async def story() -> None:
        here, _, _ = services()
        one = Start(LOCAL_TENANT, "j", "0" * 16)
        assert (await control.now(here.store, one)).state == "running"
        won = await asyncio.gather(
            *(control.change(here.store, one, state, "", 0.0) for state in ("completed", "cancelled", "failed"))
        )
        assert sorted(won) == [False, False, True]
        assert not await control.change(here.store, one, "running", "", 0.0)
        two = Start(LOCAL_TENANT, "k", "0" * 16)
        for state in ("cancelled", "running", "failed", "running"):
            await control.ask(here.store, two, state, "", 0.0)
        assert await control.runs(here.store, two)

    asyncio.run(story())


def test_subjects_of_events_are_checked() -> None:
    one = Start(LOCAL_TENANT, "j", "0123456789abcdef")
    assert Start.parse(str(one)) == one
    for wrong in (
        "",
        "a/b",
        "a/b/c",
        "../b/0123456789abcdef",
        "a/B/0123456789abcdef",
        "a/b/0123456789abcdef/d",
    ):
        with pytest.raises(InvalidField, match="allowed"):
            Start.parse(wrong)


def test_spec_of_a_started_job_survives() -> None:
    job = spec.parse(YAML.encode()).job
    assert spec.decode(spec.encode(job)) == job


def test_a_data_file_of_the_size_that_is_allowed_and_one_byte_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "job_file_bytes_max", 200)

    async def story() -> None:
        here, folder, _ = services()
        await serve(here.store)
        padded = lines({"prompt": "a"})
        folder.put("j", {**FILES, "p.jsonl": padded + "\n" * (201 - len(padded))})
        assert await inbox.look(here, LOCAL_TENANT, "j") is None
        assert (
            "p.jsonl has 201 bytes; allowed: 200" in json.loads(folder.files["inbox/local/j/job.error.json"])["error"]
        )
        folder.put("j", {**FILES, "p.jsonl": padded + "\n" * (200 - len(padded))})
        assert await inbox.look(here, LOCAL_TENANT, "j") is not None

    asyncio.run(story())
