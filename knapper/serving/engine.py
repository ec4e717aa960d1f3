"""The engine of this process: one base model, one device, one store. Every function of the process shares it."""

import atexit
import os
import platform
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import structlog
import torch
from tokenizers import Tokenizer

from knapper.catalogue.servable import expect_files
from knapper.concurrency import shutdown
from knapper.engine import checkpoint_format, hardware
from knapper.engine.executor import Executor, Work
from knapper.engine.hardware import dtype_for, finish, release
from knapper.engine.layers.batch_invariance import Exactness
from knapper.engine.layers.lora import Lora, layout
from knapper.engine.models.base import Model
from knapper.engine.models.config import Facts
from knapper.engine.models.loader import load
from knapper.engine.models.preflight import expect_device, expect_loadable
from knapper.engine.out_of_memory import MemoryShortage
from knapper.engine.run_machine import TrainingMachine
from knapper.engine.sampling.sampler import EngineSampler
from knapper.engine.training.trainer import RunState, Trainer
from knapper.errors import InvalidField, NotFound
from knapper.jobs.services import JobServices, open_services
from knapper.observability import metrics
from knapper.observability.metrics import Reading
from knapper.serving.runs import ClaimedRuns
from knapper.settings import Settings
from knapper.state.journal import bundles
from knapper.state.journal.counted import CountedMachine
from knapper.state.journal.holder import Holder
from knapper.state.journal.records import Terms
from knapper.store import Store
from knapper.store.counted import CountedStore
from knapper.store.factory import open_store

_SLOTS_MAX = 64  # from some 64 rows on a CPU's matrix products are saturated: more only make each text wait longer
_MORE_MEMORY = "Free some, raise KNAPPER_GPU_MEMORY_SHARE if it is less than 1, or serve a smaller model"
_POSITIONS = 8  # of the runs that are served most: how many metrics tell the share of

log = structlog.get_logger()


@dataclass(frozen=True)
class ServingEngine:
    """What a function needs to answer: runs to train, and a sampler."""

    base_model: str
    directory: Path
    context: int
    residents: ClaimedRuns[RunState]
    sampler: EngineSampler
    place: JobServices  # of jobs


@dataclass(frozen=True)
class StoredAdapters:
    """Adapters as a sampler wants them, read from their immutable bundles and verified."""

    store: Store
    config: Facts
    device: torch.device

    async def load(self, adapter: str) -> Lora:
        """Raises NotFound once the bundle was deleted, Corrupt if it is not what its index says."""
        if await bundles.read_index(self.store, adapter) is None:
            raise NotFound(
                "the weights of this sampler are gone: its checkpoint was deleted or expired, and its session has "
                "ended; create another sampling client"
            )
        only = frozenset({checkpoint_format.CONFIG, checkpoint_format.ADAPTER})
        index, files = await bundles.read(self.store, adapter, only)
        where = layout(self.config, index.spec)
        weights_P, _ = checkpoint_format.read(files, index.spec, where, with_optimizer=False)
        return where.lora(weights_P.to(self.device), index.spec.alpha / index.spec.rank)


@cache
def engine() -> ServingEngine:
    """The engine, loaded on the first call that succeeds, on any thread. Everything comes from the environment.

    Raises UserError for a model, a device or a memory with which it cannot be.
    """
    settings = Settings.load(os.environ)
    began = time.monotonic()
    if (age_s := metrics.process_age_s()) is not None:
        metrics.cold_start_seconds.labels("import").observe(age_s)
    if not settings.model_directory:
        raise InvalidField("KNAPPER_MODEL_DIRECTORY", "", "the directory of the base model's files")
    where = expect_device(settings)
    expect_files(Path(settings.model_directory))
    device = Executor(settle=partial(finish, where))
    exactness = Exactness(promised=settings.batch_invariant)
    try:
        decoder, threads = device.submit(_loaded(settings, where, exactness)).result()
    except BaseException:
        device.close()
        release(where)
        raise
    finally:
        torch.set_num_threads(1)  # of whoever is not the device's thread: see _loaded
    atexit.register(device.close)  # torch aborts if the interpreter goes away under its thread
    directory, context = Path(settings.model_directory), decoder.config.context
    metrics.cold_start_seconds.labels("weights").observe(time.monotonic() - began)
    store = CountedStore(open_store(settings))
    machine = TrainingMachine(Trainer(decoder), device, time.monotonic)
    terms = _terms(where, decoder, threads)
    holder = Holder(f"{socket.gethostname()}:{os.getpid()}:{time.time_ns()}", settings.address, terms)
    log.info(
        "loaded",
        model=settings.model,
        architecture=decoder.architecture,
        computed_by=decoder.computed_by,
        context=context,
        device=terms.device,
        dtype=terms.dtype,
        threads=terms.threads,
        exact=_promise(exactness, where),
        took_s=round(time.monotonic() - began, 2),
    )
    sampler = _sampler(settings, decoder, device, StoredAdapters(store, decoder.config, where))
    metrics.Readings(readings(machine, sampler))
    residents = ClaimedRuns(store, CountedMachine(machine), holder, time.time, rest_s=settings.run_idle_s)
    shutdown.before(residents.leave)
    return ServingEngine(
        base_model=settings.model,
        directory=directory,
        context=context,
        residents=residents,
        sampler=sampler,
        place=open_services(settings, store, time.time),
    )


def _sampler(settings: Settings, model: Model, device: Executor, adapters: StoredAdapters) -> EngineSampler:
    """With its part of the memory that the weights left."""
    left, one = hardware.memory_left(model.device), model.bytes_per_token
    kv = hardware.kv_bytes(left, settings.kv_memory, model.context_positions * one)
    kept = hardware.adapter_bytes(left)
    log.info("memory", free_mib=left >> 20, kv_cache_mib=kv >> 20, kv_cache_tokens=kv // one, adapters_mib=kept >> 20)
    if kv // one < model.context_positions:
        log.warning(
            "not even one text of the whole context fits: longer ones are refused",
            tokens=kv // one, context=model.config.context, bytes_per_token=one,
            todo="raise KNAPPER_KV_MEMORY, or give the engine more memory",
        )  # fmt: skip
    return EngineSampler(
        model,
        device,
        adapters,
        Tokenizer.from_file(f"{settings.model_directory}/tokenizer.json"),
        slots_max=_SLOTS_MAX,
        kv_tokens_max=kv // one,
        now=time.monotonic,
        adapter_bytes_max=kept,
    )


def _loaded(settings: Settings, where: torch.device, exactness: Exactness) -> Work[tuple[Model, int]]:
    """The model, and on how many threads the device's computes.

    A task of the device, because OpenMP keeps a team of threads for each thread that ever computed on several. With two
    teams there are more than CPUs, and then they sleep between any two products, where they would have waited awake.

    Raises UserError if the weights do not fit into the memory, or the settings ask for what is not there.
    """
    yield from ()
    threads = settings.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    dtype = dtype_for(settings.dtype, where)
    expect_loadable(settings, where, dtype.itemsize)
    try:
        return load(Path(settings.model_directory), dtype, where, exactness), threads
    except Exception as error:
        if (lacking := MemoryShortage.of(error)) is None:
            raise
        failed = lacking.error(f"what the weights of {settings.model} need", where, _MORE_MEMORY)
    raise failed  # without the traceback, whose frames hold what was loaded


def _promise(exactness: Exactness, where: torch.device) -> str:
    """Whether a row's bits depend on its neighbours, in a few words for the log."""
    if where.type != "cpu":
        return f"no: {where.type}"
    if not exactness.promised:
        return "no: KNAPPER_BATCH_INVARIANT=false"
    if exactness.broken:
        return f"not of {', '.join(exactness.broken)}"
    ways = [f"{product}: {way}" for product, way in exactness.found.items()]
    return f"yes; {'; '.join(ways)}" if ways else "yes"


def readings(machine: TrainingMachine, sampler: EngineSampler) -> list[Reading]:
    """The metrics of training and sampling, read from their counters at each scrape."""
    passes, counts = machine.passes.counters, sampler.counters
    return [
        Reading("knapper_device_busy_seconds", "Total seconds the device was busy.", lambda: machine.device.busy_s,
                counts=True),
        Reading("knapper_train_forward_passes", "Forward passes of training, with or without a backward pass.",
                lambda: passes.passes, counts=True),
        Reading("knapper_train_tokens", "Tokens computed in those passes.", lambda: passes.rows, counts=True),
        Reading("knapper_train_microbatches", "Micro-batches in those passes, each of one request; divided by the "
                "passes: how many requests share one.", lambda: passes.shares, counts=True),
        Reading("knapper_train_capacity_tokens", "Tokens those passes had capacity for; knapper_train_tokens divided "
                "by it: their utilisation.", lambda: passes.room, counts=True),
        Reading("knapper_train_requests_waiting", "Training requests waiting for a pass.",
                lambda: machine.passes.waiting),
        Reading("knapper_train_queue_age_seconds", "How long the oldest of those has waited.", machine.passes.oldest_s),
        Reading("knapper_train_run_token_ratio", "Fraction of the tokens of the last 1,024 micro-batches that belonged "
                "to the run with the most (position 1), the second most, ...; `knapper usage` names the runs.",
                lambda: _by_position(machine.passes.shares(_POSITIONS)), label="position"),
        Reading("knapper_prefilled_tokens", "Prompt tokens computed.", lambda: counts.prefilled_tokens, counts=True),
        Reading("knapper_reused_tokens", "Prompt tokens taken from the prefix cache.", lambda: counts.reused_tokens,
                counts=True),
        Reading("knapper_sampled_tokens", "Tokens sampled.", lambda: counts.decoded_tokens, counts=True),
        Reading("knapper_sample_device_seconds", "Device seconds spent on samples.", lambda: counts.device_s,
                counts=True),
        Reading("knapper_sample_steps", "Decoding steps; knapper_sampled_tokens divided by it: the batch size.",
                lambda: counts.steps, counts=True),
        Reading("knapper_sample_preemptions", "Sequences preempted after they had begun, because memory ran out.",
                lambda: counts.parked, counts=True),
        Reading("knapper_sample_slots", "Sequences decoding now.", lambda: sampler.active),
        Reading("knapper_sample_slots_max", "Sequences that can decode at once.", lambda: _SLOTS_MAX),
    ]  # fmt: skip


def _by_position(shares: Sequence[float]) -> dict[str, float]:
    """All positions, so that none keeps an old value."""
    return {str(index + 1): shares[index] if index < len(shares) else 0.0 for index in range(_POSITIONS)}


def _terms(device: torch.device, model: Model, threads: int) -> Terms:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    capability = torch.backends.cpu.get_cpu_capability()
    return Terms(
        device=f"{device.type} {name} {capability}",
        dtype=str(model.dtype).removeprefix("torch."),
        threads=threads,
        versions=", ".join((f"torch {torch.__version__}", *model.versions)),
    )
