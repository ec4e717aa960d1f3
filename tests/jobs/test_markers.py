"""What is awaited ends, whatever becomes of it; and of many jobs one that is broken keeps none of the others."""

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from knapper import limits
from knapper.errors import Unavailable
from knapper.events import cloudevents
from knapper.exchange.directory import DirectoryExchange
from knapper.ids import LOCAL_TENANT
from knapper.jobs import inbox, revive
from knapper.jobs.revive import Seen
from knapper.jobs.services import JobServices
from knapper.rewards.rollouts import ScorableRollout
from knapper.rewards.scorer import RewardScore
from knapper.rewards.spec import Reward
from knapper.store.memory import MemoryStore
from tests.jobs.services import Folder, lines, serve, services
from tests.jobs.test_inbox import FILES, YAML
from tests.jobs.test_works import PROMPTS, RL
from tests.jobs.works import House, Works, run, variety


class Counting(MemoryStore):
    """How often anybody asked it to write or to delete."""

    writes = 0

    async def put_if_absent(self, name: str, data: bytes) -> bool:
        self.writes += 1
        return await super().put_if_absent(name, data)

    async def delete(self, name: str) -> None:
        self.writes += 1
        await super().delete(name)


class Published(Folder):
    published = 0

    async def publish(self, name: str, data: bytes) -> None:
        self.published += 1
        await super().publish(name, data)


AFTERWARDS: dict[str, Callable[[Folder], object]] = {
    "corrected, and wrong": lambda folder: folder.put("j", {"job.yaml": "kind: nonsense\n"}),
    "corrected, and no YAML": lambda folder: folder.put("j", {"job.yaml": b"\xff"}),
    "corrected, and too large": lambda folder: folder.put("j", {"job.yaml": "#" * (limits.job_yaml_bytes_max + 1)}),
    "corrected, and right": lambda folder: folder.put("j", FILES),
    "corrected, and still without its files": lambda folder: folder.put("j", {"job.yaml": YAML + "seed: 1\n"}),
    "its files came, and are wrong": lambda folder: folder.put("j", {**FILES, "p.jsonl": "{"}),
    "taken away": lambda folder: folder.files.clear(),
    "left alone": lambda _: None,
}


@pytest.mark.parametrize("change", AFTERWARDS.values(), ids=AFTERWARDS.keys())
def test_what_is_awaited_costs_no_writes_and_ends(change: Callable[[Folder], object]) -> None:
    async def story() -> None:
        _, _, clock = services()
        store, folder = Counting(), Published()
        here = JobServices(store, folder, services()[0].notifier, clock)
        await serve(store)
        folder.put("j", {"job.yaml": YAML})
        assert await inbox.look(here, LOCAL_TENANT, "j") is None
        assert len(await store.list("expected/")) == 1
        change(folder)
        (first,) = await store.list("expected/")
        await inbox.look(here, LOCAL_TENANT, "j")  # as for every upload
        assert first not in await store.list("expected/") or change is AFTERWARDS["left alone"]
        await revive.due(here, Seen())
        before, published = store.writes, folder.published
        for _ in range(20):
            await revive.due(here, Seen())
        assert (store.writes, folder.published) == (before, published), "nothing has changed"
        clock.at += limits.job_missing_s
        await revive.due(here, Seen())
        assert await store.list("expected/") == []
        before = store.writes
        await inbox.look(here, LOCAL_TENANT, "j")
        assert store.writes - before <= 1
        assert await store.list("expected/") == []

    asyncio.run(story())


def test_a_job_that_cannot_be_looked_at_keeps_no_other_and_is_not_awaited_for_ever(tmp_path: Path) -> None:
    def put(job: str, **files: str) -> None:
        folder = tmp_path / "inbox" / LOCAL_TENANT / job
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name.replace("_", ".")).write_text(text)

    async def story() -> None:
        made, _, clock = services()
        here = JobServices(made.store, DirectoryExchange(tmp_path), made.notifier, clock)
        await serve(here.store)
        for job in ("broken", "good"):
            put(job, job_yaml=YAML)
            assert await inbox.look(here, LOCAL_TENANT, job) is None
        for name in ("damaged", "damaged-too"):
            await here.store.put_if_absent(f"working/{LOCAL_TENANT}/{name}/{'0' * 16}", b"")
            await here.store.put_if_absent(f"jobs/{LOCAL_TENANT}/{name}/{'0' * 16}/started", b"damaged")
        broken = tmp_path / "inbox" / LOCAL_TENANT / "broken" / "job.yaml"
        broken.rename(tmp_path / "elsewhere")
        broken.symlink_to(tmp_path / "elsewhere")
        put("good", p_jsonl=str(FILES["p.jsonl"]), e_jsonl=str(FILES["e.jsonl"]), reward_py=str(FILES["reward.py"]))
        found = await revive.due(here, Seen())
        assert [(event.type, event.subject.split("/")[1]) for event in found] == [(cloudevents.JOB_STARTED, "good")]
        assert len(await here.store.list("expected/")) == 1
        clock.at += limits.job_missing_s
        await revive.due(here, Seen())
        assert await here.store.list("expected/") == []

    asyncio.run(story())


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    return House(tmp_path_factory.mktemp("model"))


def test_a_job_whose_function_cannot_go_on_says_what_it_waits_for_and_goes_on(house: House) -> None:
    async def story() -> None:
        works = Works(house)

        async def away(_reward: Reward, _rollouts: list[ScorableRollout]) -> list[RewardScore]:
            raise Unavailable("the sandbox did not start: \x1b[31m")

        works.judge = away  # type: ignore[assignment]
        begun = await works.submit({"job.yaml": RL, "p.jsonl": PROMPTS, "e.jsonl": PROMPTS})
        for _ in range(60):
            await works.deliver() if works._queue else None
            for event in await revive.due(works.services, works._seen, quiet_s=0):
                await works.post(event)
        status = json.loads(works.output("status.json"))
        assert (status["state"], status["reason"]) == ("running", "waits: the sandbox did not start: \\x1b[31m")
        assert len(await works.store.list(begun.controls)) == 1, "it is said once"
        works.judge = variety
        await works.run(begun)
        status = json.loads(works.output("status.json"))
        assert (status["state"], status["reason"]) == ("completed", "")

    run(story)


@pytest.mark.parametrize(
    ("reward", "answers", "says"),
    [
        ("{name: numeric}", [1, "1e400"], "answer is '1e400'; numeric allows"),
        ("{name: numeric}", [1, None], "answer is None; numeric allows"),
        ("{name: exact_match}", ["a", [1]], r"answer is \[1\]; exact_match allows"),
        ("[{name: length, max: 1}, {name: python_tests}]", ["assert f() == 1", []], "python_tests allows Python"),
        ("{name: sql, database: reward.py}", ["select 1", 1], "sql allows a query"),
        ("{name: maths}", ["1", True], "maths allows a text or a number"),
    ],
)
def test_an_answer_that_nothing_can_be_compared_with_is_named_before_the_job_starts(
    reward: str, answers: list[object], says: str
) -> None:
    async def story() -> None:
        here, folder, _ = services()
        await serve(here.store)
        rows = lines({"prompt": "a", "answer": answers[0]}) + "\n" + lines({"prompt": "a", "answer": answers[1]})
        yaml = f"kind: rl\ndata: p.jsonl\nsteps: 3\nreward: {reward}\nevaluate: {{data: e.jsonl}}\n"
        right = lines({"prompt": "a", "answer": answers[0]})
        for named, files in (("p.jsonl", (rows, right)), ("e.jsonl", (right, rows))):
            folder.put("j", {"job.yaml": yaml, "p.jsonl": files[0], "e.jsonl": files[1], "reward.py": "1"})
            assert await inbox.look(here, LOCAL_TENANT, "j") is None
            report = json.loads(folder.files["inbox/local/j/job.error.json"])
            assert (report["file"], report["line"], report["field"]) == (named, 3, "answer")
            assert re.search(says, report["error"])
        folder.put("j", {"p.jsonl": right, "e.jsonl": right})
        assert await inbox.look(here, LOCAL_TENANT, "j") is not None

    asyncio.run(story())
