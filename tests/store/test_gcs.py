"""What the contract does not say of the bucket store: lost answers, rivals, large objects, and what it tells people."""

import asyncio
import random
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from knapper import limits
from knapper.errors import Corrupt, InvalidField, StoreError
from knapper.settings import Settings
from knapper.store import forget_torn_writes
from knapper.store import gcs as gcs_module
from knapper.store.factory import open_store
from knapper.store.gcs import GcsStore
from tests.store import proxy
from tests.store.emulator import Emulator, NewBucket
from tests.store.proxy import FAULTS, Fault, Proxy

NewStore = Callable[[], GcsStore]


@pytest.fixture
def way(gcs: Emulator) -> Iterator[Proxy]:
    with proxy.before(gcs.url) as started:
        yield started


@pytest.fixture
def new_store(gcs: Emulator, way: Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[NewStore]:
    """Clients of one bucket, each as another process would have it, all of them through the proxy."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", way.url)
    bucket, draw, opened = gcs.make_bucket(), random.Random(5), []

    def make() -> GcsStore:
        opened.append(GcsStore(bucket, "p/", lambda: f"{draw.getrandbits(128):032x}", patience_s=0.8))
        return opened[-1]

    yield make
    for store in opened:
        store.close()


def follow(way: Proxy, *script: Fault, then: Fault = "") -> None:
    """The next requests meet these faults, in this order."""
    left = list(script)
    way.choose = lambda _method, _path: left.pop(0) if left else then


def on_uploads(fault: Fault) -> Callable[[str, str], Fault]:
    return lambda method, _path: fault if method == "POST" else ""


# -- one fault ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["503", "429", "before", "after", "torn", "slow"])
def test_one_fault_changes_no_answer(new_store: NewStore, way: Proxy, fault: Fault) -> None:
    async def story() -> None:
        store = new_store()
        follow(way, fault)
        assert await store.put_if_absent("a/b", b"first")
        follow(way, fault)
        assert not await store.put_if_absent("a/b", b"second")
        follow(way, fault)
        assert await store.get("a/b") == b"first"
        follow(way, "" if fault == "torn" else fault)  # the library does not try again for half of a refusal
        assert await store.get("a/c") is None
        follow(way, fault)
        assert await store.list("a/") == ["a/b"]
        follow(way, "", fault)
        await store.delete("a/b")
        follow(way)
        assert await store.get("a/b") is None
        assert way.met[fault] == (5 if fault == "torn" else 6)

    asyncio.run(story())


def test_of_two_writers_whose_answers_are_lost_the_same_one_wins_for_both(new_store: NewStore, way: Proxy) -> None:
    """The first request of one is lost, a rival wins meanwhile, its own answer is lost too: both must know."""

    async def story() -> None:
        ours, rival = new_store(), new_store()
        uploads: list[Fault] = ["before", "after"]
        way.choose = lambda method, _path: uploads.pop(0) if method == "POST" and uploads else ""
        one, other = await asyncio.gather(ours.put_if_absent("x", b"same"), rival.put_if_absent("x", b"same"))
        assert one != other, "one of them won, although what they wrote is equal"

    asyncio.run(story())


def test_an_upload_of_which_no_answer_ever_comes_is_looked_up(new_store: NewStore, way: Proxy) -> None:
    async def story() -> None:
        way.choose = on_uploads("after")
        assert await new_store().put_if_absent("x", b"ours")
        assert not await new_store().put_if_absent("x", b"theirs")

    asyncio.run(story())


def test_a_store_that_stays_away_is_an_error_that_says_so(new_store: NewStore, way: Proxy) -> None:
    async def story() -> None:
        store = new_store()
        way.choose = on_uploads("503")
        with pytest.raises(StoreError, match=r"cannot write x in gs://.*503"):
            await store.put_if_absent("x", b"")
        way.choose = lambda _method, _path: "before"
        for verb in (store.get("x"), store.list("x"), store.put_if_absent("x", b"")):
            with pytest.raises(StoreError, match="in gs://"):
                await verb
        follow(way)
        assert await store.put_if_absent("x", b"now")

    asyncio.run(story())


def test_a_bucket_that_may_only_be_read_says_which_role_is_missing(new_store: NewStore, way: Proxy) -> None:
    async def story() -> None:
        store = new_store()
        assert await store.put_if_absent("x", b"1")
        way.choose = lambda method, _path: "" if method == "GET" else "403"
        before = len(way.requests)
        for verb in (store.put_if_absent("y", b""), store.delete("x")):
            with pytest.raises(StoreError, match=r"permission denied; .* roles/storage.objectUser"):
                await verb
        assert len(way.requests) - before == 3, "it is not asked again: the answer would be the same"
        assert await store.get("x") == b"1"

    asyncio.run(story())


def test_a_missing_bucket_does_not_look_like_an_empty_one(new_bucket: NewBucket) -> None:
    store = new_bucket("gs://nobody-made-this")
    verbs: list[Awaitable[object]] = [
        store.get("x"), store.list(""), store.put_if_absent("x", b""), store.delete("x"),
    ]  # fmt: skip

    async def story() -> None:
        for verb in verbs:
            with pytest.raises(StoreError, match="the bucket does not exist; create it, or correct KNAPPER_STORE"):
                await verb

    asyncio.run(story())


def test_missing_credentials_are_said_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    store = open_store(Settings.load({"KNAPPER_STORE": "gs://bucket"}))
    with pytest.raises(StoreError, match=r"cannot read x in gs://bucket: no valid credentials \(File .*none.json"):
        asyncio.run(store.get("x"))


def test_a_body_that_was_changed_on_its_way_is_refused(new_store: NewStore, way: Proxy) -> None:
    async def story() -> None:
        store = new_store()
        await store.put_if_absent("x", b"bytes")
        follow(way, "flipped")
        with pytest.raises(StoreError, match="Checksum mismatch"):
            await store.get("x")
        assert await store.get("x") == b"bytes"

    asyncio.run(story())


# -- many faults -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
def test_rivals_in_a_storm_of_faults_always_agree_on_who_won(new_store: NewStore, way: Proxy, seed: int) -> None:
    draw = random.Random(seed)
    way.choose = lambda _method, _path: draw.choice(FAULTS) if draw.random() < 0.5 else ""

    async def attempt(store: GcsStore, name: str, data: bytes) -> bool | None:
        try:
            return await store.put_if_absent(name, data)
        except StoreError:
            return None  # unknown

    async def story() -> None:
        rivals = [new_store() for _ in range(3)]
        for number in range(8):
            name = f"race/{number}"
            won = await asyncio.gather(*(attempt(rival, name, b"%d" % n) for n, rival in enumerate(rivals)))
            way.choose, storm = (lambda _method, _path: ""), way.choose
            assert won.count(True) <= 1, f"seed {seed}: {name}: {won}"
            assert None in won or True in won, f"seed {seed}: {name}: nobody won"
            if True in won:
                assert await rivals[0].get(name) == b"%d" % won.index(True), f"seed {seed}: {name}"
            way.choose = storm

    asyncio.run(story())
    assert sum(way.met.values()) > 10, "hardly a fault happened"


# -- large objects -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(gcs_module, "part_bytes_max", 1000)
    return 1000


def test_nothing_is_ever_uploaded_but_under_a_condition(new_store: NewStore, way: Proxy) -> None:
    """Resumable uploads, which the library uses above 8 MiB, are where emulators forget the condition."""
    data = random.Random(2).randbytes(gcs_module.part_bytes_max + 1)

    async def story() -> None:
        store = new_store()
        assert await store.put_if_absent("at the limit", data[:-1])
        assert await store.put_if_absent("past the limit", data)
        assert await store.get("at the limit") == data[:-1]
        assert await store.get("past the limit") == data
        assert not await store.put_if_absent("past the limit", data[::-1])
        uploads = [request for request in way.requests if request.startswith("POST")]
        assert len(uploads) == 1 + 3 + 3
        assert all(upload.endswith("uploadType=multipart&ifGenerationMatch=0") for upload in uploads)

    asyncio.run(story())


def test_of_many_large_writers_one_wins_and_the_parts_of_the_others_go(new_store: NewStore, small_parts: int) -> None:
    async def story() -> None:
        rivals = [new_store() for _ in range(4)]
        bodies = [random.Random(n).randbytes(small_parts * 4 + n) for n in range(4)]
        won = await asyncio.gather(*(r.put_if_absent("x", body) for r, body in zip(rivals, bodies, strict=True)))
        assert sum(won) == 1
        assert await rivals[0].get("x") == bodies[won.index(True)]
        assert len(parts_of(rivals[0])) in (4, 5)
        assert await rivals[0].list("") == ["x"], "parts are not objects"
        await rivals[0].delete("x")
        assert parts_of(rivals[0]) == []

    asyncio.run(story())


def parts_of(store: GcsStore) -> list[str]:
    return [blob.name for blob in store._bucket().list_blobs(prefix="p/.parts/")]


@pytest.mark.parametrize("damage", ["flipped", "lost", "cut", "pointer"])
def test_a_damaged_part_is_refused(new_store: NewStore, small_parts: int, damage: str) -> None:
    async def story() -> None:
        store = new_store()
        await store.put_if_absent("x", bytes(small_parts * 3))
        blob = store._bucket().blob(parts_of(store)[1])
        if damage == "pointer":
            store._blob("x").upload_from_string(gcs_module._POINTER + b"\x84")
        elif damage == "lost":
            blob.delete()
        else:
            blob.upload_from_string(bytes(small_parts - 1) + (b"\1" if damage == "flipped" else b""))
        with pytest.raises(Corrupt, match="object x"):
            await store.get("x")

    asyncio.run(story())


def test_what_looks_like_a_pointer_comes_back_as_it_was(new_store: NewStore) -> None:
    async def story() -> None:
        store = new_store()
        assert await store.put_if_absent("x", gcs_module._POINTER + b"\x84")
        assert await store.get("x") == gcs_module._POINTER + b"\x84"

    asyncio.run(story())


def test_parts_of_a_dead_writer_are_swept_after_a_week_and_no_others(new_store: NewStore, small_parts: int) -> None:
    async def story() -> None:
        store = new_store()
        await store.put_if_absent("whole", bytes(small_parts * 3))
        kept = parts_of(store)
        store._create(".parts/dead/000000", b"torn", {gcs_module._OF: "whole"})
        store._create(".parts/dead2/000000", b"torn", {gcs_module._OF: "never made"})
        assert await forget_torn_writes(store, time.time() + limits.torn_after_s - 60) == 0
        assert await forget_torn_writes(store, time.time() + limits.torn_after_s + 60) == 2
        assert parts_of(store) == kept
        assert await store.get("whole") == bytes(small_parts * 3)

    asyncio.run(story())


def test_no_name_reaches_the_parts(new_store: NewStore) -> None:
    for verb in (new_store().get, new_store().delete):
        with pytest.raises(ValueError, match="the store's own"):
            asyncio.run(verb(".parts/x/000000"))


# -- opening -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    ["s3://b", "gs://", "gs://B", "gs://ab", "gs://bucket//x", "gs://bucket/../x", "gs://bucket/.parts", "bucket"],
)
def test_an_address_that_is_none_is_refused_with_what_is_allowed(address: str) -> None:
    with pytest.raises(InvalidField, match=r"KNAPPER_STORE is .*; allowed: .*gs://BUCKET"):
        open_store(Settings.load({"KNAPPER_STORE": address}))


def test_two_prefixes_of_a_bucket_are_two_stores(gcs: Emulator, new_bucket: NewBucket) -> None:
    bucket = gcs.make_bucket()

    async def story() -> None:
        one, other = new_bucket(f"gs://{bucket}/one"), new_bucket(f"gs://{bucket}/one-more/")
        assert await one.put_if_absent("a", b"1")
        assert await other.put_if_absent("a", b"2")
        assert (await one.list(""), await one.get("a")) == (["a"], b"1")

    asyncio.run(story())


def test_a_directory_store_imports_nothing_of_google_cloud_and_a_bucket_without_it_says_what_to_install() -> None:
    code = """
import sys
sys.modules["google.cloud.storage"] = None  # as if it were not installed
from knapper.errors import InvalidField
from knapper.settings import Settings
from knapper.store.factory import open_store
import gateway.app
assert not [name for name in sys.modules if name.startswith(("google.api_core", "requests"))]
try:
    open_store(Settings.load({"KNAPPER_STORE": "gs://bucket"}))
except InvalidField as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "pip install 'knapper[gcp]'" in ran.stdout
