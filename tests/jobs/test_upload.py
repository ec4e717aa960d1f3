"""Which start a folder is: every byte that the job depends on decides, and nothing else does."""

import asyncio
import json

import pytest

from knapper import limits
from knapper.errors import InvalidField
from knapper.exchange import Blob
from knapper.ids import LOCAL_TENANT
from knapper.jobs import control, inbox, listings, names, upload
from knapper.jobs.names import Start
from knapper.jobs.services import JobServices
from knapper.state.job_records import Started, encode, read
from tests.jobs.services import Folder, serve, services
from tests.jobs.test_inbox import FILES


class Bucket(Folder):
    """A generation is a number that counts uploads, as in a bucket."""

    uploads = 0

    async def read(self, name: str, bytes_max: int) -> Blob | None:
        found = await super().read(name, bytes_max)
        self.uploads += 1
        return None if found is None else Blob(found.data, str(self.uploads))


async def look(here: JobServices) -> Start | None:
    return await inbox.look(here, LOCAL_TENANT, "j")


@pytest.mark.parametrize("name", FILES)
def test_one_corrected_byte_of_any_file_is_another_start_that_uses_it(name: str) -> None:
    async def story() -> None:
        here, folder, _ = services()
        await serve(here.store)
        folder.put("j", FILES)
        first = await look(here)
        assert first is not None
        folder.put("j", {name: FILES[name] + "\n"})
        second = await look(here)
        assert second is not None
        assert second.run != first.run
        assert (await control.now(here.store, first)).state == "cancelled"
        record = await read(here.store, second.started, Started)
        assert record is not None
        used = record.job_yaml if name == names.JOB_YAML else await here.store.get(second.content(record.files[name]))
        assert used == FILES[name].encode() + b"\n"
        assert (await listings.newest(here.store, LOCAL_TENANT, "j")).start == second

    asyncio.run(story())


@pytest.mark.parametrize("name", FILES)
def test_a_failed_job_is_begun_anew_by_a_corrected_file(name: str) -> None:
    async def story() -> None:
        here, folder, _ = services()
        await serve(here.store)
        folder.put("j", FILES)
        first = await look(here)
        assert first is not None
        await control.change(here.store, first, "failed", "reward.py raised", 0.0)
        folder.put("j", {name: FILES[name] + "\n"})
        assert await look(here) is not None
        (told,) = await listings.briefs(here.store, await listings.listed(here.store, LOCAL_TENANT))
        assert (told["state"], told["reason"]) == ("running", "")

    asyncio.run(story())


@pytest.mark.parametrize("kind", [Folder, Bucket], ids=["a directory", "a bucket"])
def test_the_same_files_again_are_the_same_start_wherever_they_lie(kind: type[Folder]) -> None:
    async def story() -> None:
        here, folder, _ = services()
        await serve(here.store)
        folder.put("j", FILES)
        first = await look(here)
        other = JobServices(here.store, kind(dict(folder.files)), here.notifier, here.clock)
        assert await look(other) is None
        assert await look(other) is None
        assert (await listings.newest(here.store, LOCAL_TENANT, "j")).start == first

    asyncio.run(story())


def test_files_that_job_yaml_does_not_name_change_nothing() -> None:
    async def story() -> None:
        here, folder, _ = services()
        await serve(here.store)
        folder.put("j", FILES)
        assert await look(here) is not None
        folder.put("j", {"notes.txt": "mine"})
        assert await look(here) is None

    asyncio.run(story())


def test_once_more_is_another_start_each_time_and_never_beside_one_that_runs() -> None:
    async def story() -> None:
        here, folder, _ = services()
        await serve(here.store)
        folder.put("j", FILES)
        begun = [await inbox.again(here, LOCAL_TENANT, "j")]  # nothing to repeat: it is the first
        for _ in range(3):
            newest = begun[-1]
            assert newest is not None
            with pytest.raises(InvalidField, match="cancel it first"):
                await inbox.again(here, LOCAL_TENANT, "j")
            await control.change(here.store, newest, "completed", "", 0.0)
            assert await look(here) is None
            begun.append(await inbox.again(here, LOCAL_TENANT, "j"))
        assert None not in begun
        assert len(set(begun)) == 4
        assert (await listings.newest(here.store, LOCAL_TENANT, "j")).start == begun[-1]

    asyncio.run(story())


def test_content_that_was_replaced_and_comes_back_is_begun_again() -> None:
    async def story() -> None:
        here, folder, _ = services()
        await serve(here.store)
        seen = []
        for seed in ("", "seed: 1\n", "", "seed: 1\n"):
            folder.put("j", FILES | {"job.yaml": FILES["job.yaml"] + seed})
            seen.append(await look(here))
            assert await look(here) is None
        assert None not in seen
        assert len(set(seen)) == 4
        assert await here.store.list("working/") == [seen[-1].working]  # type: ignore[union-attr]

    asyncio.run(story())


def test_content_that_somebody_cancelled_stays_so() -> None:
    async def story() -> None:
        here, folder, _ = services()
        await serve(here.store)
        folder.put("j", FILES)
        begun = await look(here)
        assert begun is not None
        await control.ask(here.store, begun, "cancelled", "cancelled by its owner", 0.0)
        assert await look(here) is None

    asyncio.run(story())


class LateReader(Folder):
    """Its first look at the folder is as old as the moment at which it was made."""

    def __init__(self, files: dict[str, bytes], now: Folder) -> None:
        super().__init__(files)
        self._now = now
        self._left = len(FILES)

    async def read(self, name: str, bytes_max: int) -> Blob | None:
        if self._left:
            self._left -= 1
            return await super().read(name, bytes_max)
        return await self._now.read(name, bytes_max)


def test_a_look_that_slept_while_its_content_was_replaced_begins_nothing() -> None:
    async def story() -> None:
        here, folder, _ = services()
        await serve(here.store)
        folder.put("j", FILES)
        first = await look(here)
        assert first is not None
        slept = JobServices(here.store, LateReader(dict(folder.files), folder), here.notifier, here.clock)
        folder.put("j", {"job.yaml": FILES["job.yaml"] + "seed: 1\n"})
        second = await look(here)
        assert await look(slept) is None
        assert second is not None
        assert await here.store.list("working/") == [second.working]

    asyncio.run(story())


def test_right_content_after_something_wrong_takes_the_error_away() -> None:
    async def story() -> None:
        here, folder, _ = services()
        await serve(here.store)
        folder.put("j", FILES)
        first = await look(here)
        folder.put("j", {"p.jsonl": "{"})
        assert await look(here) is None
        assert "inbox/local/j/job.error.json" in folder.files
        folder.put("j", FILES)
        assert await look(here) is None
        assert "inbox/local/j/job.error.json" not in folder.files
        assert (await listings.newest(here.store, LOCAL_TENANT, "j")).start == first

    asyncio.run(story())


def test_a_job_that_an_earlier_version_started_is_not_started_again() -> None:
    async def story() -> None:
        here, folder, _ = services()
        await serve(here.store)
        folder.put("j", FILES)
        made = await look(here)
        assert made is not None
        record = await read(here.store, made.started, Started)
        assert record is not None
        old, older = Start.of(LOCAL_TENANT, "j", record.generation), services()[0]
        content = {
            each: getattr(record, each) for each in record.__struct_fields__ if each not in ("start", "generations")
        }
        await serve(older.store)
        await older.store.put_if_absent(old.started, encode(Started(start=old.id, **content)))
        there = JobServices(older.store, folder, older.notifier, older.clock)
        assert await look(there) is None
        folder.put("j", {"reward.py": FILES["reward.py"] + "\n"})
        assert await look(there) is not None

    asyncio.run(story())


def test_a_gateway_that_starts_anew_reads_no_folder_that_did_not_change() -> None:
    async def story() -> None:
        here, folder, _ = services()
        await serve(here.store)
        folder.put("j", FILES)
        assert not await upload.unchanged(here.store, LOCAL_TENANT, "j", {})
        await look(here)
        listed = {each.name.rpartition("/")[2]: each.generation for each in await here.exchange.list("inbox/local/j/")}
        assert await upload.unchanged(here.store, LOCAL_TENANT, "j", listed)
        for name in FILES:
            assert not await upload.unchanged(here.store, LOCAL_TENANT, "j", listed | {name: "another"})

    asyncio.run(story())


def test_files_of_a_time_out_are_awaited_no_more_and_start_the_job_when_they_come() -> None:
    async def story() -> None:
        here, folder, clock = services()
        await serve(here.store)
        folder.put("j", {"job.yaml": FILES["job.yaml"]})
        assert await look(here) is None
        assert len(await here.store.list("expected/")) == 1
        clock.at += limits.job_missing_s
        assert await look(here) is None
        assert await here.store.list("expected/") == []
        assert json.loads(folder.files["inbox/local/j/job.error.json"])["field"] == "data"
        folder.put("j", FILES)
        assert await look(here) is not None
        assert await here.store.list("expected/") == []

    asyncio.run(story())
