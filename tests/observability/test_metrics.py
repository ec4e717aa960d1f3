"""Metrics count what happens, and whatever a dashboard or an alert asks for exists."""

import asyncio
import json
import re
import time
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import pytest
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from gateway.metrics_page import Ages
from knapper.engine.executor import Executor
from knapper.engine.run_machine import TrainingMachine
from knapper.engine.sampling.sampler import EngineSampler
from knapper.errors import StoreError, UserError
from knapper.ids import RunId
from knapper.observability import metrics
from knapper.serving.readings import readings
from knapper.state.journal.counted import CountedMachine
from knapper.state.journal.machine import Files, Outcome
from knapper.state.journal.records import Operation, Spec
from knapper.store.counted import CountedStore
from knapper.store.memory import MemoryStore
from tests.engine.runs import datum, request, spec, tiny_trainer
from tests.engine.sampling.test_scheduler import AdapterDict
from tests.gateway.running import gateway

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "knative/components/monitoring"


def value(name: str, **labels: str) -> float:
    """As a scrape reads it; 0 if it is not there."""
    for family in text_string_to_metric_families(metrics.text().decode()):
        for sample in family.samples:
            if sample.name == name and sample.labels == labels:
                return sample.value
    return 0.0


def existing() -> set[str]:
    """Names of samples, of every process: those of the registry, and those that the engine reads."""
    found = set()
    for family in metrics.REGISTRY.collect():
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
        found |= {family.name + suffix for suffix in suffixes}
    for module in ("serving/readings.py", "vllm/factory.py"):
        source = (ROOT / "knapper" / module).read_text()
        for name, rest in re.findall(r'Reading\(\s*"(\w+)",(.*?)\),\n', source, flags=re.DOTALL):
            found.add(f"{name}_total" if "counts=True" in rest else name)
    return found


def asked() -> dict[str, str]:
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    found = {f"panel {panel['title']}": target["expr"] for panel in dashboard["panels"] for target in panel["targets"]}
    (rules,) = yaml.safe_load_all((MONITORING / "alerts.yaml").read_text())
    found |= {rule["alert"]: rule["expr"] for group in rules["spec"]["groups"] for rule in group["rules"]}
    return found


@pytest.mark.parametrize("who", asked())
def test_what_is_asked_for_exists(who: str) -> None:
    names = set(re.findall(r"\bknapper_\w+", asked()[who]))
    assert names
    assert names <= existing()


def test_every_alert_has_its_section_and_no_section_is_stale() -> None:
    text = (ROOT / "docs/operating.md").read_text()
    section = text.partition("## Alerts")[2].partition("\n## ")[0]
    (rules,) = yaml.safe_load_all((MONITORING / "alerts.yaml").read_text())
    alerts = [rule["alert"] for group in rules["spec"]["groups"] for rule in group["rules"]]
    assert re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE) == alerts


def test_the_store_is_counted_by_verb_and_outcome() -> None:
    class Broken(MemoryStore):
        async def delete(self, name: str) -> None:
            raise StoreError("no")

    async def story() -> None:
        store = CountedStore(Broken())
        assert await store.put_if_absent("a", b"1")
        assert not await store.put_if_absent("a", b"2")
        assert await store.get("a") == b"1"
        assert await store.get("b") is None
        assert await store.list("") == ["a"]
        with pytest.raises(StoreError):
            await store.delete("a")

    calls = [
        ("put_if_absent", "ok"), ("put_if_absent", "lost"), ("get", "ok"), ("get", "missing"), ("list", "ok"),
        ("delete", "failed"),
    ]  # fmt: skip
    before = [value("knapper_store_calls_total", verb=verb, outcome=outcome) for verb, outcome in calls]
    asyncio.run(story())
    after = [value("knapper_store_calls_total", verb=verb, outcome=outcome) for verb, outcome in calls]
    assert [now - then for now, then in zip(after, before, strict=True)] == [1.0] * len(calls)


def test_a_run_is_as_old_as_its_oldest_unanswered_operation() -> None:
    ages, one, two = Ages(), RunId("one"), RunId("two")
    assert ages.oldest({}, 100.0) == 0.0
    assert ages.oldest({one: 3}, 100.0) == 0.0
    assert ages.oldest({one: 3, two: -1}, 130.0) == 30.0
    assert ages.oldest({one: 4, two: -1}, 150.0) == 20.0  # one got an answer: it waits anew
    assert ages.oldest({}, 160.0) == 0.0


def test_a_scrape_needs_no_key_and_names_no_tenant() -> None:
    with gateway() as running:
        answer = httpx.get(f"{running.url}/metrics", trust_env=False)
    assert answer.status_code == 200
    assert "knapper_runs_waiting" in answer.text
    assert "tml-" not in answer.text


def test_what_a_machine_applies_is_counted_with_its_cost_and_its_outcome() -> None:
    ledger = Ledger()
    machine = CountedMachine(ledger)
    kinds: list[tuple[str, str]] = [("forward_backward", "ok"), ("forward_backward", "refused")]
    before = [value("knapper_operations_total", kind=kind, outcome=outcome) for kind, outcome in kinds]
    spent = value("knapper_device_seconds_total", kind="forward_backward")

    async def story() -> None:
        await machine.apply(0, OPERATION, None)
        ledger.refuses = True
        with pytest.raises(UserError):
            await machine.apply(0, OPERATION, None)

    asyncio.run(story())
    after = [value("knapper_operations_total", kind=kind, outcome=outcome) for kind, outcome in kinds]
    assert [now - then for now, then in zip(after, before, strict=True)] == [1.0, 1.0]
    assert value("knapper_device_seconds_total", kind="forward_backward") - spent == 2.5


OPERATION = Operation(run="r", seq=1, kind="forward_backward", sha256=b"", body_zstd=b"", accepted_at=0.0)


class Ledger:
    """A machine whose states are numbers, and whose operations cost 2.5 s each."""

    refuses = False

    async def create(self, spec: Spec, source: Files | None, with_optimizer: bool) -> int:
        return 0

    async def apply(self, state: int, operation: Operation, source: Files | None) -> Outcome[int]:
        if self.refuses:
            raise UserError("no")
        return Outcome(state + 1, "application/json", b"", cost_s=2.5)

    async def serialize(self, state: int) -> Files:
        return {}

    def serialized_bytes(self, state: int) -> int:
        return 0

    async def restore(self, spec: Spec, files: Files) -> int:
        return 0


def test_shares_are_reported_by_position_and_never_by_name(tmp_path: Path) -> None:
    device = Executor()
    try:
        trainer = tiny_trainer(tmp_path)
        machine = TrainingMachine(trainer, device, lambda: 0.0)
        for name, lengths in (("one", [20, 10]), ("two", [10])):
            data = [datum(length, "cross_entropy", np.random.default_rng(0)) for length in lengths]
            machine.scheduler.submit(trainer.create(spec(run=name)), partial(request, data)).result(60)
        sampler = EngineSampler(
            trainer.decoder, device, AdapterDict({}), None, slots_max=1, kv_tokens_max=64, now=time.monotonic
        )
        registry = CollectorRegistry()
        metrics.Readings(readings(machine, sampler), registry)
    finally:
        device.close()
    families = {family.name: family for family in registry.collect()}
    share = {sample.labels["position"]: sample.value for sample in families["knapper_train_run_token_ratio"].samples}
    assert share == {"1": 0.75, "2": 0.25} | {str(position): 0.0 for position in range(3, 9)}
    assert [sample.value for sample in families["knapper_train_capacity_tokens"].samples] == [
        2 * trainer.rows_shared(1)
    ]
    assert [sample.value for sample in families["knapper_train_tokens"].samples] == [40]
    assert [sample.value for sample in families["knapper_device_busy_seconds"].samples] == [device.busy_s]
    assert device.busy_s > 0
    assert [sample.value for sample in families["knapper_train_queue_age_seconds"].samples] == [0.0]
