"""What every exchange does: files that people put in and take out."""

import asyncio
import hashlib
import json
import os
import random
import time
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from knapper import limits
from knapper.errors import InvalidField, NotFound, StoreError, TooLarge
from knapper.exchange import Exchange
from knapper.exchange.directory import DirectoryExchange
from knapper.exchange.gcs import GcsExchange
from tests.sim.disk import Disk


def test_what_is_published_can_be_read_replaced_and_removed(exchange: Exchange) -> None:
    async def story() -> None:
        name = "jobs/local/adding/metrics.jsonl"
        assert await exchange.read(name, 100) is None
        await exchange.publish(name, b"one\n")
        first = await exchange.read(name, 100)
        await exchange.publish(name, b"one\ntwo\n")
        second = await exchange.read(name, 100)
        assert first is not None
        assert second is not None
        assert (first.data, second.data) == (b"one\n", b"one\ntwo\n")
        assert first.generation != second.generation
        await exchange.remove(name)
        await exchange.remove(name)
        assert await exchange.read(name, 100) is None

    asyncio.run(story())


def test_a_list_names_what_begins_so_with_its_size_and_generation(exchange: Exchange) -> None:
    async def story() -> None:
        for name in ("inbox/a/x/job.yaml", "inbox/a/x/data.jsonl", "inbox/a/xy/job.yaml", "jobs/a/x/bill.json"):
            await exchange.publish(name, name.encode())
        entries = await exchange.list("inbox/a/x/")
        assert [(entry.name, entry.size) for entry in entries] == [
            ("inbox/a/x/data.jsonl", 20), ("inbox/a/x/job.yaml", 18),
        ]  # fmt: skip
        blob = await exchange.read("inbox/a/x/job.yaml", 100)
        assert blob is not None
        assert blob.generation == entries[1].generation
        assert [entry.name for entry in await exchange.list("inbox/")][-1] == "inbox/a/xy/job.yaml"
        assert await exchange.list("inbox/b/") == []

    asyncio.run(story())


def test_more_than_is_asked_for_is_refused_and_just_as_much_is_read(exchange: Exchange) -> None:
    async def story() -> None:
        await exchange.publish("inbox/a/x/data.jsonl", b"x" * 1000)
        blob = await exchange.read("inbox/a/x/data.jsonl", 1000)
        assert blob is not None
        assert len(blob.data) == 1000
        with pytest.raises(TooLarge, match="999"):
            await exchange.read("inbox/a/x/data.jsonl", 999)

    asyncio.run(story())


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../x", "inbox/../../x", "inbox//x", "inbox/a\0b"])
def test_no_name_leads_out_of_it(exchange: Exchange, name: str) -> None:
    with pytest.raises(ValueError, match="bad"):
        asyncio.run(exchange.read(name, 10))
    with pytest.raises(ValueError, match="bad"):
        asyncio.run(exchange.publish(name, b""))


def test_the_directory_holds_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "secret").write_text("x")
    with pytest.raises(ValueError, match="begins with inbox/ or jobs/ or uploads/"):
        asyncio.run(DirectoryExchange(tmp_path).read("store/secret", 10))


def test_symbolic_links_in_the_inbox_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("x")
    exchange = DirectoryExchange(tmp_path / "data")
    folder = tmp_path / "data" / "inbox" / "local" / "job"
    folder.mkdir(parents=True)
    (folder / "data.jsonl").symlink_to(tmp_path / "secret" / "key")
    (folder.parent / "linked").symlink_to(tmp_path / "secret")
    os.mkfifo(folder / "pipe")
    with pytest.raises(StoreError, match="symbolic links are not followed"):
        asyncio.run(exchange.read("inbox/local/job/data.jsonl", 10))
    with pytest.raises(StoreError, match="symbolic link"):
        asyncio.run(exchange.read("inbox/local/linked/key", 10))
    assert asyncio.run(exchange.list("inbox/")) == []


def test_a_write_that_was_torn_is_not_listed(tmp_path: Path) -> None:
    exchange = DirectoryExchange(tmp_path)
    asyncio.run(exchange.publish("inbox/a/x/job.yaml", b"kind: rl"))
    (tmp_path / "inbox" / "a" / "x" / ".publishing-1-2").write_bytes(b"kin")
    assert [entry.name for entry in asyncio.run(exchange.list("inbox/"))] == ["inbox/a/x/job.yaml"]


def test_one_name_may_be_published_by_several_at_once(tmp_path: Path) -> None:
    exchange = DirectoryExchange(tmp_path)

    async def story() -> None:
        await asyncio.gather(*(exchange.publish("jobs/a/x/metrics.jsonl", bytes([n]) * 100_000) for n in range(64)))

    asyncio.run(story())
    (written,) = (tmp_path / "jobs" / "a" / "x").iterdir()
    assert len(set(written.read_bytes())) == 1


def test_who_writes_to_the_inbox_overwrites_nothing_elsewhere(tmp_path: Path) -> None:
    """Links lie in wait under every name that the pid and a count give, and in the place of what is published."""
    victim = tmp_path / "authorized_keys"
    victim.write_text("precious")
    exchange = DirectoryExchange(tmp_path / "data")
    folder = tmp_path / "data" / "inbox" / "local" / "evil"
    folder.mkdir(parents=True)
    for n in range(2000):
        (folder / f".publishing-{os.getpid()}-{n}").symlink_to(victim)
    (folder / "job.error.json").symlink_to(victim)
    for name in ("job.error.json", "data.jsonl"):
        asyncio.run(exchange.publish(f"inbox/local/evil/{name}", b"ours"))
        assert (folder / name).read_bytes() == b"ours"
        assert not (folder / name).is_symlink()
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("depth", [1, 2, 3], ids=["inbox", "tenant", "job"])
def test_no_folder_of_the_inbox_that_is_a_link_leads_out(tmp_path: Path, depth: int) -> None:
    """Whatever is done: read, listed, told of, written or removed."""
    exchange = DirectoryExchange(tmp_path / "data")
    outside = tmp_path / "outside"
    outside.joinpath(*["local", "job"][depth - 1 :]).mkdir(parents=True, exist_ok=True)
    theirs = outside.joinpath(*["local", "job"][depth - 1 :], "secret.jsonl")
    theirs.write_text("precious")
    link = (tmp_path / "data").joinpath(*["inbox", "local", "job"][:depth])
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.is_dir():
        link.rmdir()
    link.symlink_to(outside)
    name = "inbox/local/job/secret.jsonl"
    assert (tmp_path / "data" / name).read_text() == "precious", "the link leads there"
    for attempt in (
        exchange.read(name, 100), exchange.entry(name), exchange.publish(name, b"ours"), exchange.remove(name),
        exchange.publish("inbox/local/job/new", b"ours"), exchange.list("inbox/local/job/"),
    ):  # fmt: skip
        with pytest.raises(StoreError, match="symbolic link"):
            asyncio.run(attempt)
    if depth > 1:
        assert asyncio.run(exchange.list("inbox/")) == []
    assert [path.name for path in outside.rglob("*") if path.is_file()] == ["secret.jsonl"]
    assert theirs.read_text() == "precious"


def test_a_link_that_is_removed_leaves_what_it_led_to(tmp_path: Path) -> None:
    exchange = DirectoryExchange(tmp_path)
    (tmp_path / "victim").write_text("precious")
    asyncio.run(exchange.publish("inbox/local/job/a", b"x"))
    (tmp_path / "inbox/local/job/b").symlink_to(tmp_path / "victim")
    asyncio.run(exchange.remove("inbox/local/job/b"))
    assert (tmp_path / "victim").read_text() == "precious"
    assert [path.name for path in (tmp_path / "inbox/local/job").iterdir()] == ["a"]


def test_what_somebody_hides_in_the_inbox_hides_nothing_else(tmp_path: Path) -> None:
    exchange = DirectoryExchange(tmp_path)
    asyncio.run(exchange.publish("inbox/local/job/job.yaml", b"kind: rl"))
    folder = tmp_path / "inbox" / "local" / "other"
    folder.mkdir()
    (tmp_path / "inbox" / "local" / os.fsdecode(b"\xff\xfe")).write_bytes(b"no text for a name")
    deep = folder
    for _ in range(40):
        deep = deep / ("d" * 30)
    deep.mkdir(parents=True)
    (deep / "x").touch()
    os.mkfifo(folder / "pipe")
    (folder / "unreadable").write_bytes(b"x")
    (folder / "unreadable").chmod(0)
    (folder / "closed").mkdir(mode=0)
    names = [entry.name for entry in asyncio.run(exchange.list("inbox/"))]
    readable = ["inbox/local/other/unreadable"] if os.geteuid() == 0 else []
    assert names == ["inbox/local/job/job.yaml", *readable]


def test_what_is_published_outlives_a_power_cut(tmp_path: Path) -> None:
    """Whoever submits a job hears that its files are there."""
    for seed in range(30):
        (tmp_path / f"{seed}").mkdir()
        with Disk(tmp_path / f"{seed}", random.Random(seed)) as disk:
            exchange = DirectoryExchange(disk.root)
            asyncio.run(exchange.publish("inbox/local/j/job.yaml", b"before"))
            asyncio.run(exchange.publish("inbox/local/j/job.yaml", b"kind: sft"))
            disk.cut()
            blob = asyncio.run(DirectoryExchange(disk.root).read("inbox/local/j/job.yaml", 100))
            assert blob is not None
            assert blob.data == b"kind: sft"


def test_what_is_extended_has_just_the_bytes_that_it_should_have(exchange: Exchange) -> None:
    """Whatever lay there: nothing, a beginning, half a line, more than there should be, or something else."""
    name, whole = "jobs/a/x/metrics.jsonl", b'{"step":1}\n{"step":2}\n'
    for before in (None, b"", whole[:11], whole[:17], whole, whole + b"{", b"other\n", b"\0" * 11):
        asyncio.run(exchange.remove(name) if before is None else exchange.publish(name, before))
        asyncio.run(exchange.extend(name, whole))
        blob = asyncio.run(exchange.read(name, 100))
        assert blob is not None
        assert blob.data == whole, before


def test_who_follows_a_file_that_is_extended_reads_each_line_once(tmp_path: Path) -> None:
    exchange, name = DirectoryExchange(tmp_path), "jobs/a/x/metrics.jsonl"
    lines = [b"%d\n" % n * 40 for n in range(300)]
    asyncio.run(exchange.extend(name, lines[0]))
    with (tmp_path / name).open("rb") as follower:  # as `tail -f` does: it has the file open
        heard = [follower.read()]
        for n in range(2, 301):
            asyncio.run(exchange.extend(name, b"".join(lines[:n])))
            heard.append(follower.read())
    assert heard == lines


def test_what_several_extend_at_once_is_there_once(tmp_path: Path) -> None:
    """A process that was taken for dead writes what its successor writes."""
    lines = [b"%d\n" % n for n in range(64)]

    async def story() -> None:
        writers = [DirectoryExchange(tmp_path) for _ in range(8)]
        for n in range(1, 65):
            await asyncio.gather(*(each.extend("jobs/a/x/m.jsonl", b"".join(lines[:n])) for each in writers))

    asyncio.run(story())
    assert (tmp_path / "jobs/a/x/m.jsonl").read_bytes() == b"".join(lines)


def test_what_is_extended_is_no_other_file(tmp_path: Path) -> None:
    """Under the name lies another name of an empty file of ours, a link to one, or a pipe that nobody reads."""
    exchange, name, victim = DirectoryExchange(tmp_path / "data"), "jobs/a/x/m.jsonl", tmp_path / "victim"
    asyncio.run(exchange.extend(name, b"one\n"))
    victim.touch()
    path = tmp_path / "data" / name
    for lies_there in ("another name", "a link", "a pipe"):
        path.unlink()
        if lies_there == "another name":
            os.link(victim, path)
        elif lies_there == "a link":
            path.symlink_to(victim)
        else:
            os.mkfifo(path)
        asyncio.run(exchange.extend(name, b"one\ntwo\n"))
        assert path.is_file()
        assert not path.is_symlink()
        assert path.read_bytes() == b"one\ntwo\n"
        assert victim.read_bytes() == b""


def test_what_was_extended_outlives_a_power_cut_and_goes_on_from_whatever_that_left(tmp_path: Path) -> None:
    name, lines = "jobs/a/x/m.jsonl", [b"%d\n" % n * 50 for n in range(12)]
    for seed in range(30):
        (tmp_path / f"{seed}").mkdir()
        with Disk(tmp_path / f"{seed}", random.Random(seed)) as disk:
            for n in range(1, 12):
                asyncio.run(DirectoryExchange(disk.root).extend(name, b"".join(lines[:n])))
            disk.cut()
            assert (disk.root / name).read_bytes() == b"".join(lines[:11])
            with (disk.root / name).open("ab") as torn:  # the next line was under way: nobody synced it
                torn.write(lines[11])
            disk.cut()
            asyncio.run(DirectoryExchange(disk.root).extend(name, b"".join(lines)))
            assert (disk.root / name).read_bytes() == b"".join(lines)


def test_an_opened_object_is_read_in_pieces_from_anywhere(exchange: Exchange) -> None:
    data = random.Random(1).randbytes(9_000_001)

    async def read(begin: int, end: int) -> list[bytes]:
        opened = await exchange.open("jobs/a/x/large")
        assert opened is not None
        assert (opened.entry.size, opened.entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        return [piece async for piece in opened.read(begin, end)]

    async def story() -> None:
        assert await exchange.open("jobs/a/x/large") is None
        before = time.time()
        await exchange.publish("jobs/a/x/large", data)
        for begin, end in ((0, len(data)), (4_194_303, 4_194_305), (len(data) - 1, len(data)), (3, 8_388_609)):
            pieces = await read(begin, end)
            assert b"".join(pieces) == data[begin:end]
            assert max(map(len, pieces)) <= 4 * limits.MIB, "never all of it at once"
        (entry,) = await exchange.list("jobs/a/x/")
        assert entry.sha256 == hashlib.sha256(data).hexdigest()
        assert before - 5 <= entry.modified_at <= time.time() + 5

    asyncio.run(story())


def test_parts_become_one_object_or_nothing(exchange: Exchange) -> None:
    pieces = [random.Random(n).randbytes(300_000) for n in range(32)]
    names = [f"uploads/a/x/{n:03d}" for n in range(32)]
    whole = b"".join(pieces)

    async def story() -> None:
        for name, piece in zip(names, pieces, strict=True):
            await exchange.publish(name, piece)
        with pytest.raises(InvalidField, match="sha256"):
            await exchange.compose("inbox/a/x/d.jsonl", names, "0" * 64)
        with pytest.raises(NotFound, match="is not there"):
            await exchange.compose("inbox/a/x/d.jsonl", [*names[:31], "uploads/a/x/none"], "0" * 64)
        assert await exchange.list("inbox/") == []
        await exchange.compose("inbox/a/x/d.jsonl", names, hashlib.sha256(whole).hexdigest())
        blob = await exchange.read("inbox/a/x/d.jsonl", len(whole))
        assert blob is not None
        assert blob.data == whole
        (entry,) = await exchange.list("inbox/")
        assert entry.sha256 == hashlib.sha256(whole).hexdigest()

    asyncio.run(story())


def test_nobody_signs_for_a_directory_or_without_a_key(exchange: Exchange) -> None:
    assert asyncio.run(exchange.presign("GET", "jobs/a/x/large", 0)) is None


def test_a_service_accounts_key_signs_for_one_object_one_hour_and_one_size(tmp_path: Path) -> None:
    """The library's own signature, checked with the key's public half; the bucket itself is not asked."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    account = {"type": "service_account", "client_email": "k@p.iam", "private_key": pem, "token_uri": "https://t"}
    path = tmp_path / "key.json"
    path.write_text(json.dumps(account))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("STORAGE_EMULATOR_HOST", raising=False)
        patch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(path))
        signed = asyncio.run(GcsExchange("bucket", "team/").presign("PUT", "uploads/a/x/000", 77))
    assert signed is not None
    assert signed.headers == {"x-goog-content-length-range": "0,77"}
    url, query = urlsplit(signed.url), dict(parse_qsl(urlsplit(signed.url).query))
    assert url.path.endswith("/bucket/team/uploads/a/x/000") or (url.netloc, url.path) == (
        "bucket.storage.googleapis.com", "/team/uploads/a/x/000",
    )  # fmt: skip
    assert query["X-Goog-Expires"] == "3600"
    assert query["X-Goog-SignedHeaders"] == "host;x-goog-content-length-range"
    canonical = "\n".join([
        "PUT", url.path, url.query.rpartition("&X-Goog-Signature=")[0], f"host:{url.netloc}",
        "x-goog-content-length-range:0,77", "", "host;x-goog-content-length-range", "UNSIGNED-PAYLOAD",
    ])  # fmt: skip
    scope = query["X-Goog-Credential"].partition("/")[2]
    text = "\n".join([
        "GOOG4-RSA-SHA256", query["X-Goog-Date"], scope, hashlib.sha256(canonical.encode()).hexdigest(),
    ])  # fmt: skip
    key.public_key().verify(
        bytes.fromhex(query["X-Goog-Signature"]), text.encode(), padding.PKCS1v15(), hashes.SHA256()
    )
