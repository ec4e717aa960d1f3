"""Every Prometheus metric, each with its meaning. `text()` answers a scrape.

Labels are few and bounded: never a run, a tenant or a name that a client chose. What a job costs is in its bill.
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
    "knapper_operations", "Operations the engine applied, by kind and outcome (ok, refused, failed).",
    ["kind", "outcome"], registry=REGISTRY,
)  # fmt: skip
device_seconds = Counter(
    "knapper_device_seconds", "Device seconds spent on training operations.", ["kind"],
    registry=REGISTRY,
)  # fmt: skip
replayed_seconds = Counter(
    "knapper_replayed_seconds", "Device seconds spent on operations recomputed after a claim.",
    registry=REGISTRY,
)  # fmt: skip
store_calls = Counter(
    "knapper_store_calls", "Calls to the object store, by verb and outcome (ok, lost, missing, failed).",
    ["verb", "outcome"], registry=REGISTRY,
)  # fmt: skip
store_seconds = Histogram(
    "knapper_store_seconds", "Duration of calls to the object store.", ["verb"], buckets=_SECONDS, registry=REGISTRY
)
cold_start_seconds = Histogram(
    "knapper_cold_start_seconds",
    "Duration of cold starts, by stage: total (as the gateway waits), pod (until the process begins: node and image), "
    "import, weights, adapter (the first state created or loaded), first_step.",
    ["stage"], buckets=_STARTS, registry=REGISTRY,
)  # fmt: skip
runs_waiting = Gauge(
    "knapper_runs_waiting", "Runs with accepted operations that have no result yet.", ["model"], registry=REGISTRY
)
queue_age_seconds = Gauge(
    "knapper_queue_age_seconds", "How long the longest-waiting run has been without a result, as scrapes saw it.",
    registry=REGISTRY,
)  # fmt: skip
unreadable_objects = Counter(
    "knapper_unreadable_objects",
    "Unreadable objects met in the store, damaged or of a newer format; `knapper verify` lists them.",
    registry=REGISTRY,
)
samples_drawn = Counter(
    "knapper_samples_drawn", "Samples answered, by sampler (backend and dtype).", ["sampler"], registry=REGISTRY
)
sample_age = Histogram(
    "knapper_sample_age_updates",
    "Updates of a run between the weights that drew its data and those that were trained on it, by data and pass.",
    buckets=(0, 1, 2, 4, 8, 16, 32, 64, 128), registry=REGISTRY,
)  # fmt: skip
sampler_trainer_kl = Histogram(
    "knapper_sampler_trainer_kl", "Estimate k2 of KL(sampler, trainer) a token, by optimizer step.",
    buckets=(1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0), registry=REGISTRY,
)  # fmt: skip
alarms = Counter(
    "knapper_alarms",
    "Alarms raised to users: stale_sampler, other_adapter, wrong_temperature, sampler_trainer_mismatch, doubled_step, "
    "repeated_data, fresh_optimizer, degenerate_groups.",
    ["alarm"], registry=REGISTRY,
)  # fmt: skip
samples_waiting = Gauge("knapper_samples_waiting", "Samples requested and not finished.", registry=REGISTRY)


_stages: dict[str, float] = {}


def stage(name: str, took_s: float) -> None:
    """A stage of this process's own start is over."""
    cold_start_seconds.labels(name).observe(took_s)
    _stages.setdefault(name, took_s)


def stages() -> dict[str, float]:
    """Seconds of the stages of this process's start, in their order; what is not over is missing."""
    return dict(_stages)


def text() -> bytes:
    """All metrics, in Prometheus' text format."""
    return bytes(generate_latest(REGISTRY))


@dataclass(frozen=True)
class Reading:
    """A metric read at each scrape: one value, or one for each value of `label`. `counts`: it is a counter."""

    name: str
    meaning: str
    read: Callable[[], float | Mapping[str, float]]
    counts: bool = False
    label: str = ""


class Readings:
    """Counters and gauges kept elsewhere, read at each scrape."""

    def __init__(self, readings: Iterable[Reading], registry: CollectorRegistry = REGISTRY) -> None:
        self._readings = tuple(readings)
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        for reading in self._readings:
            family = CounterMetricFamily if reading.counts else GaugeMetricFamily
            value = reading.read()
            if isinstance(value, Mapping):
                metric = family(reading.name, reading.meaning, labels=[reading.label])
                for label, number in value.items():
                    metric.add_metric([label], number)
                yield metric
            else:
                yield family(reading.name, reading.meaning, value=value)


def process_age_s() -> float | None:
    """Seconds since this process started, imports included; None where the system does not report it."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        up_s = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None
    return up_s - ticks / 100.0  # USER_HZ, which Linux promises to programs
