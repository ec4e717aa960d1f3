"""The engine of this process: one base model, one device, one store, shared by all functions of the process."""

import atexit
import os
import platform
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
import torch
from tokenizers import Tokenizer

from knapper import limits
from knapper.catalogue.servable import expect_files, not_served
from knapper.concurrency import quiesce, shutdown
from knapper.engine import checkpoint_format, hardware, host_memory, memory
from knapper.engine.executor import Executor, Work
from knapper.engine.hardware import dtype_for, finish, release
from knapper.engine.layers.batch_invariance import Exactness
from knapper.engine.layers.determinism import keeps_bits
from knapper.engine.layers.fingerprint import fingerprint
from knapper.engine.layers.lora import Lora, layout
from knapper.engine.layers.paged_attention import PAGE
from knapper.engine.memory import Account, ModelBytes
from knapper.engine.models.base import Model
from knapper.engine.models.config import Facts
from knapper.engine.models.decoder import Decoder
from knapper.engine.models.loader import load
from knapper.engine.models.preflight import expect_device, expect_loadable
from knapper.engine.out_of_memory import MemoryShortage
from knapper.engine.ranks import plan
from knapper.engine.reservations import Reservations
from knapper.engine.run_machine import TrainingMachine
from knapper.engine.sampling.sampler import EngineSampler
from knapper.engine.training.trainer import RunState, Trainer
from knapper.engine.transfer import to_device
from knapper.errors import InvalidField, NotFound
from knapper.jobs.services import JobServices, open_job_services
from knapper.observability import metrics
from knapper.serving import backend
from knapper.serving.handover import HandingMachine, handover
from knapper.serving.identity import ProcessIdentity
from knapper.serving.lent_memory import borrow
from knapper.serving.probe_results import StoredChoices
from knapper.serving.readings import memory_readings, readings
from knapper.serving.runs import ClaimedRuns
from knapper.settings import Settings
from knapper.state.journal import bundles
from knapper.state.journal.counted import CountedMachine
from knapper.state.journal.holder import Holder
from knapper.state.journal.records import Terms
from knapper.store import Store
from knapper.store.counted import CountedStore
from knapper.store.factory import open_store

if TYPE_CHECKING:
    from knapper.engine.ranks.leader import Leader

# With some 64 rows a CPU's matrix products are saturated, and more rows only add latency. A GPU reads all weights for
# each step, whatever the rows: there the memory for keys and values decides.
_SLOTS_CPU_MAX = 64
_SLOTS_GPU_MAX = 256
_MORE_MEMORY = "Free some, raise KNAPPER_GPU_MEMORY_SHARE if it is less than 1, or serve a smaller model"

log = structlog.get_logger()


@dataclass(frozen=True)
class Loaded:
    """The model, the account of memory, the device's thread's number of threads, which bits products keep, and the
    other ranks, if the model is spread.
    """

    model: Model
    account: Account
    threads: int
    exactness: Exactness
    ranks: "Leader | None"


@dataclass(frozen=True)
class ServingEngine:
    """The runs and the sampler that functions serve."""

    base_model: str
    directory: Path
    context: int
    runs: ClaimedRuns[RunState]
    sampler: EngineSampler
    job_services: JobServices
    sampled_by: str  # backend and dtype of the sampler
    trainer: Trainer
    executor: Executor
    account: Account


@dataclass(frozen=True)
class StoredAdapters:
    """Loads adapters for a sampler from their immutable bundles, and verifies them.

    On a GPU they are in the base's dtype, half the bytes; on a CPU in float32, in which trainer and sampler agree.
    """

    store: Store
    config: Facts
    device: torch.device
    dtype: torch.dtype

    async def load(self, adapter: str) -> Lora:
        """Raises NotFound once the bundle was deleted, Corrupt if it does not match its index."""
        if await bundles.read_index(self.store, adapter) is None:
            raise NotFound(
                "the weights of this sampler are gone: its checkpoint was deleted or expired, and its session has "
                "ended; create another sampling client"
            )
        only = frozenset({checkpoint_format.CONFIG, checkpoint_format.ADAPTER})
        index, files = await bundles.read(self.store, adapter, only)
        arena = layout(self.config, index.spec)
        weights_P, _ = checkpoint_format.read(files, index.spec, arena, with_optimizer=False)
        dtype = torch.float32 if keeps_bits(self.device) else self.dtype
        return arena.lora(to_device(weights_P, self.device, dtype), index.spec.alpha / index.spec.rank)


@cache
def engine() -> ServingEngine:
    """The engine, loaded from the environment's settings on the first call that succeeds, on any thread.

    Raises UserError if the model, the device or the memory do not allow it.
    """
    settings = backend.settings()
    began = time.monotonic()
    if (age_s := metrics.process_age_s()) is not None:
        metrics.stage("import", age_s)
    if not settings.model_directory:
        raise InvalidField("KNAPPER_MODEL_DIRECTORY", "", "the directory of the base model's files")
    device = expect_device(settings)
    expect_files(Path(settings.model_directory))
    store = CountedStore(open_store(settings))
    executor, loaded = _open_device(settings, device, store)
    model, account = loaded.model, loaded.account
    metrics.stage("weights", time.monotonic() - began)
    trainer = Trainer(model, account.rows_max, account.datum_rows_max, loaded.ranks)
    machine = TrainingMachine(trainer, executor, time.monotonic)
    terms = _terms(device, model, loaded.threads, spread=loaded.ranks is not None)
    _log_loaded(settings, model, terms, _promise(loaded.exactness, device), time.monotonic() - began)
    sampler = _sampler(settings, model, executor, StoredAdapters(store, model.config, device, model.dtype), account)
    metrics.Readings([*readings(machine, sampler), *memory_readings(account)])
    borrow(settings, executor, machine.scheduler, model)
    runs = _runs(store, machine, terms, settings, account)
    quiesce.before(sampler.release)
    quiesce.before(runs.quiesce)
    return ServingEngine(
        base_model=settings.model,
        directory=Path(settings.model_directory),
        context=model.config.context,
        runs=runs,
        sampler=sampler,
        job_services=open_job_services(settings, store, time.time),
        sampled_by=f"engine {terms.dtype}",
        trainer=trainer,
        executor=executor,
        account=account,
    )


def _runs(
    store: Store, machine: TrainingMachine, terms: Terms, settings: Settings, account: Account
) -> ClaimedRuns[RunState]:
    """The runs, whose states in memory have their part of the account."""
    identity = ProcessIdentity(time.time, time.monotonic)

    def holder() -> Holder:
        """Read anew: a copy of this process has the address of its own pod."""
        return Holder(identity.renew(), Settings.load(os.environ).address, terms)

    handing = HandingMachine(machine, handover().saved)
    runs = ClaimedRuns(
        store, CountedMachine(handing), holder(), time.time, idle_s=settings.run_idle_s, bytes_max=account.runs,
        renewed=lambda: holder() if identity.moved else None,
    )  # fmt: skip
    shutdown.before(runs.leave)
    quiesce.after(lambda: runs.resume(holder()))
    return runs


def _open_device(settings: Settings, device: torch.device, store: Store) -> tuple[Executor, Loaded]:
    """The device's thread, and what was loaded on it. Raises UserError as `_load` does."""
    if device.type == "cpu":
        host_memory.keep_freed()
    executor = Executor(synchronize=partial(finish, device), idle=host_memory.give_back)
    try:
        loaded = executor.submit(_load(settings, device, store)).result()
    except BaseException:
        executor.close()
        release(device)
        raise
    finally:
        torch.set_num_threads(1)  # for all threads but the device's: see _load
    if loaded.ranks is not None:
        atexit.register(loaded.ranks.close)
    atexit.register(executor.close)  # before the ranks; torch aborts if the interpreter goes away under its thread
    return executor, loaded


def _log_loaded(settings: Settings, model: Model, terms: Terms, exact: str, took_s: float) -> None:
    left_out = not_served(Path(settings.model_directory))
    packing = model.config.packing if isinstance(model, Decoder) else None
    log.info(
        "loaded",
        model=settings.model,
        architecture=model.architecture,
        computed_by=model.computed_by,
        context=model.config.context,
        device=terms.device,
        dtype=terms.dtype,
        threads=terms.threads,
        exact=exact,
        took_s=round(took_s, 2),
        **({"images": left_out} if left_out else {}),
        **({"unpacked": f"from {packing.method} to {terms.dtype}"} if packing is not None else {}),
    )


def _account(settings: Settings, model: Model, planned: int, gathered: int = 0) -> Account:
    """The process's account of memory, printed. Raises UserError if nothing fits beside the weights.

    `planned`: bytes that engines of other models will take. Those that may still come leave this one its part.
    `gathered`: that the weights of a spread model take at a time, beside its shards.
    """
    is_cpu = model.device.type == "cpu"
    shared_by = settings.engines * settings.devices if is_cpu else 1
    left = max(0, max(0, hardware.memory_left(model.device) - planned) // shared_by - gathered)
    samples = settings.sampler != "vllm"
    parts = ModelBytes.of(model, model.weights_bytes)
    account = memory.divide(left, parts, settings.kv_memory, is_cpu=is_cpu, samples=samples)
    if isinstance(model, Decoder) and account.passes is not None:
        model.passes = account.passes
    log.info(
        "memory", account=account.described(), kv_cache_tokens=account.kv_tokens, rows_of_a_pass=account.rows_max,
        **{f"{part}_mib": size // limits.MIB for part, size in account.parts.items()},
    )  # fmt: skip
    if samples:
        _expect_context(settings, model, account)
    return account


def _expect_context(settings: Settings, model: Model, account: Account) -> None:
    """Raises InvalidField for a context that was asked for and does not fit; warns if the model's own does not."""
    longest = min(account.kv_tokens, account.text_tokens_max or account.kv_tokens)
    if longest >= model.context_positions:
        return
    if settings.context:
        allowed = f"up to {longest // PAGE * PAGE}: for so many tokens of samples there is memory beside the weights"
        todo = "Lower it, or raise KNAPPER_KV_MEMORY, or unset it"
        raise InvalidField("KNAPPER_CONTEXT", settings.context, allowed, todo)
    log.warning(
        "not even one text of the whole context fits: longer ones are refused",
        tokens=longest, context=model.config.context, bytes_per_token=model.bytes_per_token,
        todo="raise KNAPPER_KV_MEMORY, lower KNAPPER_CONTEXT, or give the engine more memory",
    )  # fmt: skip


def _sampler(
    settings: Settings, model: Model, executor: Executor, adapters: StoredAdapters, account: Account
) -> EngineSampler:
    """The sampler, with its part of the account."""
    return EngineSampler(
        model,
        executor,
        adapters,
        Tokenizer.from_file(f"{settings.model_directory}/tokenizer.json"),
        slots_max=_SLOTS_CPU_MAX if model.device.type == "cpu" else _SLOTS_GPU_MAX,
        kv_tokens_max=account.kv_tokens,
        now=time.monotonic,
        adapter_bytes_max=account.adapters,
        text_tokens_max=account.text_tokens_max,
    )


def _load(settings: Settings, device: torch.device, store: Store) -> Work[Loaded]:
    """The model, and what was found out while it was loaded.

    It runs on the device's thread, because OpenMP keeps a team of threads for each thread that ever computed on
    several. Two teams have more threads than there are CPUs, so they sleep between two products instead of spinning.

    Raises UserError if the weights do not fit into the memory, or nothing fits beside them, or the settings name
    something unavailable.
    """
    yield from ()
    threads = settings.threads or max(1, torch.get_num_threads() // (settings.devices if device.type == "cpu" else 1))
    torch.set_num_threads(threads)
    dtype = dtype_for(settings.dtype, device)
    choices = _choices(settings, device, store)
    exactness = Exactness(promised=settings.batch_invariant != "false", choices=choices)
    reservations = Reservations(settings.run_directory)
    shares = settings.engines > 1 and device.type == "cpu"  # of a GPU each engine has a part, which torch enforces
    try:
        with reservations.turn() if shares else nullcontext(0) as planned:
            expect_loadable(settings, device, dtype.itemsize, planned)
            model, ranks = _loaded_model(settings, dtype, device, exactness)
            account = _account(settings, model, planned, 0 if ranks is None else plan.gathered(ranks.shards.sizes))
            if shares:
                reservations.write(account.total)
    except Exception as error:
        if (shortage := MemoryShortage.of(error)) is None:
            error.__traceback__ = None  # its frames hold the weights
            raise
        failed = shortage.error(f"what the weights of {settings.model} need", device, _MORE_MEMORY)
    else:
        if choices is not None:
            choices.flush()  # once on each kind of CPU; from here on no other thread is at work
        return Loaded(model, account, threads, exactness, ranks)
    raise failed  # without the traceback, whose frames hold the weights


def _loaded_model(
    settings: Settings, dtype: torch.dtype, device: torch.device, exactness: Exactness
) -> "tuple[Model, Leader | None]":
    """The model, and the ranks that it is spread over, if there are others."""
    if settings.devices == 1:
        return load(Path(settings.model_directory), dtype, device, exactness, settings.context), None
    from knapper.engine.ranks.start import start  # torch.distributed: seconds, which one device never needs

    return start(settings, dtype, device, exactness, time.monotonic)


def _choices(settings: Settings, device: torch.device, store: Store) -> StoredChoices | None:
    """Where the layouts chosen on this CPU are kept; None where none is searched for, or the CPU is not described."""
    if device.type != "cpu" or settings.batch_invariant == "false":
        return None
    model = (Path(settings.model_directory) / "config.json").read_bytes()
    found = fingerprint(model, os.environ)
    return None if found is None else StoredChoices(store, found)


def _promise(exactness: Exactness, device: torch.device) -> str:
    """Whether computation is batch-invariant, in a few words for the log."""
    if not keeps_bits(device):
        return f"no: {device.type}"
    if not exactness.promised:
        return "no: KNAPPER_BATCH_INVARIANT=false"
    if exactness.broken:
        return f"not of {', '.join(exactness.broken)}"
    ways = [f"{product}: {way}" for product, way in exactness.layouts.items()]
    return f"yes; {'; '.join(ways)}" if ways else "yes"


def _terms(device: torch.device, model: Model, threads: int, *, spread: bool) -> Terms:
    """Of shards the products are others, whatever their number."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    capability = torch.backends.cpu.get_cpu_capability()
    return Terms(
        device=f"{device.type} {name} {capability}{', in shards' if spread else ''}",
        dtype=str(model.dtype).removeprefix("torch."),
        threads=threads,
        versions=", ".join((f"torch {torch.__version__}", *model.versions)),
    )
