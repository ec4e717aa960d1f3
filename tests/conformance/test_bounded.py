"""A small run trains for hundreds of steps, through the real SDK and a real server, and nobody sweeps.

What lies in the store must not grow with the steps.
"""

import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tinker
from tinker import types

from tests.conformance import data
from tests.conformance.server import Server, wait_until

STEPS = 300
KEEP_S = 1.0
SETTINGS = {
    "KNAPPER_KEEP_RESULTS_S": str(KEEP_S),
    "KNAPPER_KEEP_SAMPLERS_S": str(KEEP_S),
    "KNAPPER_KEEP_ORPHANS_S": str(KEEP_S),
}
GREEDY = types.SamplingParams(max_tokens=2, temperature=0.0)


@pytest.fixture
def bounded(model: Path, tmp_path: Path, sampler_name: str) -> Iterator[Server]:
    with Server.start(model, tmp_path / "data", settings={"KNAPPER_SAMPLER": sampler_name, **SETTINGS}) as server:
        yield server
    assert "Traceback" not in server.log(), server.log()[-4000:]


@dataclass(frozen=True)
class Stored:
    """Objects and bytes, by what they are: a folder of the run's own, or one at the top."""

    objects: Counter[str]
    sizes: Counter[str]

    @staticmethod
    def of(server: Server) -> "Stored":
        objects, sizes = Counter[str](), Counter[str]()
        root = server.data / "store"
        for path in root.rglob("*"):
            try:
                if path.is_file() and not path.relative_to(root).parts[0].startswith("."):
                    parts = path.relative_to(root).parts
                    kind = parts[2] if parts[0] == "runs" else parts[0]
                    objects[kind] += 1
                    sizes[kind] += path.stat().st_size
            except FileNotFoundError:
                continue  # it was collected at this moment
        return Stored(objects, sizes)


def state_bytes(server: Server) -> int:
    """Of the run's newest snapshot: what it takes to store the state once."""
    snapshots = sorted((server.data / "store").glob("runs/*/snap/*"))
    return sum(path.stat().st_size for path in snapshots[-1].iterdir())


def settled(server: Server) -> Stored:
    """What is there once the chores have had their time."""
    time.sleep(4 * KEEP_S)
    return Stored.of(server)


def test_three_hundred_steps_leave_no_more_than_half_of_them(bounded: Server, model: Path) -> None:
    rng = np.random.default_rng(1)
    found: list[Stored] = []
    with tinker.ServiceClient(base_url=bounded.url, api_key="tml-local") as service:
        client = service.create_lora_training_client(str(model), rank=4, seed=1).result()
        first = sampler = client.save_weights_and_get_sampling_client().result()
        prompt = types.ModelInput.from_ints([5, 6, 7])
        for step in range(1, STEPS + 1):
            passed = client.forward_backward(data.batch(rng), "cross_entropy")
            client.optim_step(types.AdamParams(learning_rate=1e-3)).result()
            passed.result()
            if step % 3 == 0:
                sampler = client.save_weights_and_get_sampling_client().result()
                sampler.sample(prompt, num_samples=1, sampling_params=GREEDY).result()
            if step % (STEPS // 2) == 0:
                found.append(settled(bounded))
        half, whole = found
        told = {kind: (half.objects[kind], whole.objects[kind]) for kind in half.objects | whole.objects}
        for kind, (before, after) in told.items():
            if kind != "manifest":  # one a snapshot, for ever, of some 400 bytes
                assert after <= before + 40, told
        assert whole.objects["samplers"] <= 2, told
        assert len({path.parent for path in (bounded.data / "store").glob("runs/*/snap/*/*")}) == 2
        manifests = whole.objects["manifest"]
        assert manifests <= 2 + STEPS * 3 / 20, told
        assert whole.sizes["manifest"] <= 600 * manifests
        state = state_bytes(bounded)
        of_run = sum(whole.sizes[kind] for kind in ("snap", "in", "out", "manifest"))
        assert whole.sizes["snap"] <= 2.5 * state, "with pending gradients at most"
        assert of_run <= 6 * state, whole.sizes
        print(f"\nafter {STEPS // 2} and {STEPS} steps: {told}; the run takes {of_run / state:.1f} times its state")

        assert sampler.sample(prompt, num_samples=1, sampling_params=GREEDY).result().sequences
        gone = r"is gone: newer weights of its run .* keep weights under a name"
        with pytest.raises(tinker.NotFoundError, match=gone):
            first.sample(prompt, num_samples=1, sampling_params=GREEDY).result()


def test_a_run_that_an_engine_holds_is_deleted_behind_its_back(bounded: Server, model: Path) -> None:
    rng = np.random.default_rng(1)
    store = bounded.data / "store"
    with tinker.ServiceClient(base_url=bounded.url, api_key="tml-local") as service:
        client = service.create_lora_training_client(str(model), rank=4, seed=1).result()
        client.forward_backward(data.batch(rng), "cross_entropy").result()
        client.save_state("kept").result()
        client.save_weights_and_get_sampling_client().result()
        run = client.get_info().model_id
        reply = delete(bounded, run)
        assert reply == 200
        wait_until(lambda: not [*store.glob("adapters/**/index")], "its adapters are gone")
        left = [path for path in (store / "runs").rglob("*") if path.is_file()]
        assert {path.parent.name for path in left} == {"end", "out"}
        assert sum(path.stat().st_size for path in left) < 1000
        with pytest.raises(tinker.NotFoundError, match="was deleted on"):
            client.forward_backward(data.batch(rng), "cross_entropy").result()
        other = service.create_lora_training_client(str(model), rank=4, seed=1).result()
        other.forward_backward(data.batch(rng), "cross_entropy").result()


def delete(server: Server, run: str) -> int:
    asked = urllib.request.Request(
        f"{server.url}/api/v1/training_runs/{run}", method="DELETE", headers={"X-API-Key": "tml-local"}
    )
    with urllib.request.urlopen(asked, timeout=30) as reply:
        return int(reply.status)
