"""The map of the object store: what lies where, whose it is, and that no key has two meanings."""

import hashlib
from pathlib import Path

import pytest

from knapper.ids import RunId, SessionId, TinkerPath
from knapper.state import inventory, layout
from knapper.state.layout import ObjectKind
from knapper.state.secrets import Secret

ROOT, TOPS = Path(__file__).parents[2], ("", "knapper")
SESSION = SessionId("ses-" + "0123456789abcdef" * 2)
RUN = RunId(f"{SESSION}:train:7")
PLACE = f"runs/{hashlib.sha256(RUN.encode()).hexdigest()[:8]}-{RUN}"
FIVE, THREE = "00000000000000000005", "00000000000000000003"
OTHERS = {"round": "steps", "secret": "links", "sha256": "0" * 64}
NUMBERS = ("n", "seq", "epoch", "day", "hour", "us")


def example(kind: ObjectKind) -> tuple[str | int, ...]:
    """Fields of a key of this kind."""
    names = [piece.partition(">")[0] for piece in kind.pattern.split("<")[1:]]
    return tuple(n if name in NUMBERS else OTHERS.get(name, f"a_{name}") for n, name in enumerate(names))


@pytest.mark.parametrize("kind", ObjectKind, ids=lambda kind: kind.name.lower())
def test_a_key_tells_its_kind_and_its_fields(kind: ObjectKind) -> None:
    fields = example(kind)
    key = kind.key(*fields)
    assert [each for each in ObjectKind if each.matches(key)] == [kind]
    assert layout.kind_of(key) is kind
    assert kind.parse(key) == tuple(f"{each:020d}" if isinstance(each, int) else each for each in fields)
    for n in range(len(fields)):
        assert key.startswith(kind.under(*fields[:n]))
    with pytest.raises(ValueError, match="fields, not"):
        kind.key(*fields, "one more")


@pytest.mark.parametrize("kind", ObjectKind, ids=lambda kind: kind.name.lower())
def test_a_number_has_twenty_digits_and_a_choice_its_words(kind: ObjectKind) -> None:
    fields, names = example(kind), [piece.partition(">")[0] for piece in kind.pattern.split("<")[1:]]
    for n, name in enumerate(names):
        words = {"round": ("steps", "evaluations"), "secret": ("functions", "links", "tokens")}.get(name, ())
        for word in words:
            assert kind.parse(kind.key(*fields[:n], word, *fields[n + 1 :]))[n] == word
        if words or name in NUMBERS:
            assert layout.kind_of(kind.key(*fields[:n], "other", *fields[n + 1 :])) is not kind


def test_uploads_lie_below_one_prefix() -> None:
    assert ObjectKind.UPLOAD.under() == layout.UPLOADS


@pytest.mark.parametrize("kind", ObjectKind, ids=lambda kind: kind.name.lower())
def test_the_record_and_the_writers_of_a_kind_exist(kind: ObjectKind) -> None:
    content = inventory.TABLE[kind]
    names = {
        inventory.Empty: layout.EMPTY, inventory.BundlePart: layout.PART, inventory.NamedByHash: layout.NAMED_BY_HASH,
        inventory.SecretOrBare: Secret.__name__,
    }  # fmt: skip
    assert kind.holds == (content.__name__ if isinstance(content, type) else names[type(content)])
    writers = [writer.replace(".", "/") for writer in kind.writers.split(", ") if writer]
    assert [writer for writer in writers if not any((ROOT / top / f"{writer}.py").is_file() for top in TOPS)] == []


def test_where_things_of_a_run_lie_and_whose_they_are() -> None:
    assert layout.run_prefix(RUN) == f"{PLACE}/"
    assert layout.run_of(f"{PLACE}/") == layout.run_of(f"{PLACE}/in/0") == RUN
    assert layout.operation(RUN, 5) == f"{layout.operations(RUN)}{FIVE}" == f"{PLACE}/in/{FIVE}"
    assert layout.commit(RUN, 5) == f"{layout.commits(RUN)}{FIVE}" == f"{PLACE}/out/{FIVE}"
    assert layout.manifest(RUN, 5) == f"{layout.manifests(RUN)}{FIVE}" == f"{PLACE}/manifest/{FIVE}"
    assert layout.end(RUN, 5) == f"{layout.ends(RUN)}{FIVE}" == f"{PLACE}/end/{FIVE}"
    assert layout.accounted(RUN) == f"{PLACE}/used/"
    assert layout.last_number(layout.commit(RUN, 5)) == 5


def test_where_bundles_lie_and_whose_they_are() -> None:
    assert layout.snapshot(RUN, 5, 3) == f"{layout.snapshots(RUN)}{FIVE}-{THREE}/" == f"{PLACE}/snap/{FIVE}-{THREE}/"
    assert layout.export(RUN, 5, 3) == f"{layout.exports(RUN)}{FIVE}-{THREE}/" == f"adapters/{RUN}/{FIVE}-{THREE}/"
    for bundle in (layout.snapshot(RUN, 5, 3), layout.export(RUN, 5, 3)):
        assert layout.parse_bundle(bundle) == (5, 3)
        assert layout.bundle_of(bundle + layout.INDEX) == bundle
    assert layout.run_of_export(layout.export(RUN, 5, 3)) == RUN
    assert layout.exports(RUN).startswith(layout.exports_of(SESSION))


def test_where_things_of_a_session_lie_and_whose_they_are() -> None:
    sampler = f"{SESSION}:sample:4"
    keys = [ObjectKind.SESSION.key(SESSION), ObjectKind.SAMPLER.key(sampler), layout.export(RUN, 5, 3)]
    assert [layout.owner_of(key) for key in keys] == [SESSION] * 3
    assert keys[0].startswith(layout.session(SESSION))
    assert keys[1].startswith(layout.samplers_of(SESSION))
    assert layout.sampler_of(keys[1]) == sampler
    assert layout.session_of_mark(ObjectKind.COLLECT_NOW.key(SESSION, "created")) == SESSION


def test_where_checkpoints_and_their_labels_lie() -> None:
    version = f"{layout.checkpoint(TinkerPath(RUN, 'weights', 'a'), 'local')}{FIVE}"
    assert version == f"checkpoints/local/{RUN}/weights/a/{FIVE}"
    assert layout.label_of(version, "1-0-2-m-") == f"labels/local/{RUN}/weights/a/{FIVE}/1-0-2-m-"


@pytest.mark.parametrize(
    "key", ["", "runs/x/in/5", f"sessions/a/heard/{FIVE}/b", "jobs/a/b", "secrets/x", f"keys/{FIVE}"]
)
def test_another_key_is_of_no_kind(key: str) -> None:
    assert layout.kind_of(key) is None
    for kind in ObjectKind:
        with pytest.raises(ValueError, match="is none of"):
            kind.parse(key)


def test_keys_that_stores_have_by_now_stay_what_they_are() -> None:
    """A new kind is a new line there; a line that is there changes no more."""
    lines = (ROOT / "tests/golden/keys.txt").read_text(encoding="utf-8").splitlines()
    assert [f"{kind.name} {kind.pattern}" for kind in ObjectKind] == lines
