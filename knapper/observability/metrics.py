"""What Prometheus sees: every metric there is, each with its meaning. `text()` is what a scrape gets.

Counted where things happen, or read from counters that exist; nothing here decides anything. Labels are few and
bounded: never a run, a tenant or a name that a client chose. What a job costs is in its bill.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
REGISTRY = CollectorRegistry()

_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_STARTS = (0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0)

operations = Counter(
    "knapper_operations", "Operations that the engine applied, by kind and outcome (ok, refused, failed).",
    ["kind", "outcome"], registry=REGISTRY,
)  # fmt: skip
device_seconds = Counter(
    "knapper_device_seconds", "Seconds of the device that operations took: what a GPU is paid for.", ["kind"],
    registry=REGISTRY,
)  # fmt: skip
replayed_seconds = Counter(
    "knapper_replayed_seconds", "Device seconds of operations that were computed again after a claim.",
    registry=REGISTRY,
)  # fmt: skip
store_calls = Counter(
    "knapper_store_calls", "Calls of the object store, by verb and outcome (ok, lost, missing, failed).",
    ["verb", "outcome"], registry=REGISTRY,
)  # fmt: skip
store_seconds = Histogram(
    "knapper_store_seconds", "How long the object store took.", ["verb"], buckets=_SECONDS, registry=REGISTRY
)
cold_start_seconds = Histogram(
    "knapper_cold_start_seconds",
    "Starts from zero, by stage: total (as the gateway waits), pod (of it, until the process began: node and image), "
    "import, weights, adapter (the first state that is made or loaded), first_step.",
    ["stage"], buckets=_STARTS, registry=REGISTRY,
)  # fmt: skip
runs_waiting = Gauge(
    "knapper_runs_waiting", "Runs with operations that are accepted and not answered.", ["model"], registry=REGISTRY
)
queue_age_seconds = Gauge(
    "knapper_queue_age_seconds", "How long the run that waits longest has waited without a result, as scrapes saw it.",
    registry=REGISTRY,
)  # fmt: skip
unreadable_objects = Counter(
    "knapper_unreadable_objects",
    "Objects of the store that were met and cannot be read, damaged or of a newer format; `knapper verify` lists them.",
    registry=REGISTRY,
)
samples_waiting = Gauge("knapper_samples_waiting", "Samples that are asked for and not done.", registry=REGISTRY)


def text() -> bytes:
    """All metrics, as Prometheus reads them."""
    return bytes(generate_latest(REGISTRY))


@dataclass(frozen=True)
class Reading:
    """One value, read when it is asked for, or one for each value of `label`. `counts`: it only grows."""

    name: str
    meaning: str
    read: Callable[[], float | Mapping[str, float]]
    counts: bool = False
    label: str = ""


class Readings:
    """Counters and gauges that live elsewhere: asked at each scrape, kept nowhere twice."""

    def __init__(self, readings: Iterable[Reading], registry: CollectorRegistry = REGISTRY) -> None:
        self._readings = tuple(readings)
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        for each in self._readings:
            family = CounterMetricFamily if each.counts else GaugeMetricFamily
            found = each.read()
            if isinstance(found, Mapping):
                metric = family(each.name, each.meaning, labels=[each.label])
                for value, number in found.items():
                    metric.add_metric([value], number)
                yield metric
            else:
                yield family(each.name, each.meaning, value=found)


def process_age_s() -> float | None:
    """How long this process has run, imports and all; None where the system does not say (it is for a metric)."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        up_s = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None
    return up_s - ticks / 100.0  # USER_HZ, which Linux promises to programs
