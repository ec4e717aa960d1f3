"""What each save and load answers and leaves behind, to the letter."""

import asyncio
import json
from typing import Any

import pytest

from knapper import ids
from knapper.ids import TinkerPath
from knapper.state import layout
from knapper.state.checkpoints import Checkpoint, Checkpoints
from knapper.state.journal import bundles
from knapper.state.journal.accept import pack
from knapper.state.journal.records import Creation, Kind
from knapper.state.sessions import Sampler, Samplers
from tests.sim.ledger import SIZE
from tests.state.journal.test_exports import RUN, SPEC, Bench, clock

WEIGHTS_BYTES, OPTIMIZER_BYTES = 4 * SIZE, 4 * 4 * SIZE + 8


async def applied(*asked: tuple[Kind, dict[str, Any]]) -> tuple[Bench, list[dict[str, Any]]]:
    """Answers of a new run's operations, without that of its creation."""
    bench = Bench()
    await bench.acceptor.create(Creation(spec=SPEC), b"made")
    for seq, (kind, fields) in enumerate(asked, 1):
        body = json.dumps({"model_id": RUN, "seq_id": seq, **fields}).encode()
        await bench.acceptor.accept(RUN, seq, kind, pack(body))
    return bench, (await bench.apply("first"))[1:]


NAMED: list[tuple[Kind, str, dict[str, Any], int]] = [
    ("save_weights", "weights", {"user_metadata": {"a": "b"}}, WEIGHTS_BYTES + OPTIMIZER_BYTES),
    ("save_weights_for_sampler", "sampler_weights", {"user_metadata": {"a": "b"}}, WEIGHTS_BYTES),
    ("save_weights_external", "external_weights", {}, WEIGHTS_BYTES),
]


@pytest.mark.parametrize("ttl_s", [None, 3600])
@pytest.mark.parametrize(("kind", "room", "more", "size"), NAMED)
def test_a_named_save_answers_its_path_and_is_a_checkpoint(
    kind: Kind, room: str, more: dict[str, Any], size: int, ttl_s: int | None
) -> None:
    async def story() -> None:
        bench, [_, answer] = await applied(("optim_step", {}), (kind, {"path": "a", "ttl_seconds": ttl_s, **more}))
        path = f"tinker://{RUN}/{room}/a"
        assert answer == {"type": kind, "path": path} | ({"size_bytes": size} if room == "external_weights" else {})
        found = await Checkpoints(bench.store, clock).resolve(TinkerPath.parse(path), "local")
        assert found == Checkpoint(
            path=path, tenant="local", base_model="m", rank=4, bundle=layout.export(RUN, 2, 1), seq=2,
            size_bytes=size, saved_at=1000.0, expires_at=0.0 if ttl_s is None else 4600.0,
            user_metadata=more.get("user_metadata", {}),
        )  # fmt: skip
        index = await bundles.read_index(bench.store, found.bundle)
        assert index is not None
        assert (index.spec, index.seq, index.epoch, sum(part.size for part in index.parts)) == (SPEC, 2, 1, size)

    asyncio.run(story())


@pytest.mark.parametrize("kind", ["snapshot", "inflight"])
def test_a_save_without_a_name_is_a_sampler(kind: str) -> None:
    async def story() -> None:
        fields = {"sampling_session_seq_id": 7, "kind": kind}
        bench, [answer] = await applied(("save_weights_for_sampler", fields))
        sampler = ids.make_sampler_id(ids.session_of(RUN), 7)
        assert answer == {"type": "save_weights_for_sampler", "sampling_session_id": sampler}
        assert await Samplers(bench.store).get(sampler, "local") == Sampler(
            sampler=sampler, tenant="local", base_model="m", bundle=layout.export(RUN, 1, 1), kind=kind, run=RUN,
            seq=1,
        )  # fmt: skip

    asyncio.run(story())


WRONG: list[tuple[Kind, dict[str, Any], str]] = [
    ("save_weights", {"path": ".a"}, "path is '.a'; allowed: 1 to 128 letters"),
    ("save_weights_external", {"path": ".a"}, "path is '.a'; allowed: 1 to 128 letters"),
    ("save_weights_for_sampler", {"path": ".a"}, "path is '.a'; allowed: 1 to 128 letters"),
    ("save_weights_for_sampler", {}, "path is None; allowed: a name, or sampling_session_seq_id for an unnamed"),
    (
        "save_weights_external",
        {"path": "a", "age_encryption_recipients": ["x"]},
        "age_encryption_recipients[0] is 'x...'; allowed: native public keys",
    ),
    ("load_weights", {"path": "a", "optimizer": False}, "path is 'a'; allowed: tinker://<run>/"),
    ("load_weights", {"path": f"tinker://{RUN}/weights/none", "optimizer": False}, "does not exist"),
]


@pytest.mark.parametrize(("kind", "fields", "said"), WRONG)
def test_what_cannot_be_saved_or_loaded_is_answered_by_name_and_leaves_nothing(
    kind: Kind, fields: dict[str, Any], said: str
) -> None:
    async def story() -> None:
        bench, [answer] = await applied((kind, fields))
        assert said in answer["error"]
        assert answer["category"] == "user"
        assert await bench.store.list("adapters/") == []
        assert await bench.store.list("checkpoints/") == []

    asyncio.run(story())


def test_a_name_is_taken_unless_a_state_may_be_overwritten() -> None:
    async def story() -> None:
        saves: list[tuple[Kind, dict[str, Any]]] = [
            (kind, {"path": "a"} | ({"overwrite": overwrite} if kind == "save_weights" else {}))
            for kind, *_ in NAMED
            for overwrite in (False, False, True)
        ]
        bench, answers = await applied(*saves)
        taken = ["error" in answer for answer in answers]
        assert taken == [False, True, False, False, True, True, False, True, True]
        assert all("exists already" in answer["error"] for answer in answers if "error" in answer)
        found = await Checkpoints(bench.store, clock).resolve(TinkerPath(RUN, "weights", "a"), "local")
        assert found.seq == 3

    asyncio.run(story())


def test_an_optimizer_is_loaded_from_states_alone() -> None:
    async def story() -> None:
        loads: list[tuple[Kind, dict[str, Any]]] = [
            ("load_weights", {"path": f"tinker://{RUN}/{room}/a", "optimizer": optimizer})
            for room in ("weights", "sampler_weights")
            for optimizer in (False, True)
        ]
        bench, answers = await applied(
            ("save_weights", {"path": "a"}), ("save_weights_for_sampler", {"path": "a"}), *loads
        )
        assert answers[2:5] == [{"loaded": True}] * 3
        path = f"tinker://{RUN}/sampler_weights/a"
        assert answers[5]["error"].startswith(f"path is '{path}'; allowed: a checkpoint with optimizer state")
        await bundles.delete(bench.store, layout.export(RUN, 1, 1))
        await bench.accept(7, "load_weights", path=f"tinker://{RUN}/weights/a", optimizer=False)
        [gone] = await bench.apply("second")
        assert gone["error"] == f"checkpoint tinker://{RUN}/weights/a has no files any more; load another one"

    asyncio.run(story())
