"""The gates of this process to its engine and to vLLM: each opened once, however many functions share it."""

import asyncio
import os
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import structlog

from knapper.concurrency import shutdown
from knapper.concurrency.retry import Deaths
from knapper.engine.models import prefetch
from knapper.errors import UserError
from knapper.observability import logs
from knapper.serving import backend, pod_snapshot
from knapper.serving.gate import Gate
from knapper.settings import Settings

if TYPE_CHECKING:
    from knapper.serving.engine import ServingEngine
    from knapper.serving.sampler import Served

T = TypeVar("T")


@cache
def engine() -> "Gate[ServingEngine]":
    """The gate to the engine, which trains, and samples unless vLLM does. First called on the main thread."""
    settings = _settings("engine")
    if settings.address:
        shutdown.install()
    return _open("engine", settings, _engine)


@cache
def vllm() -> "Gate[Served]":
    """The gate to vLLM. First called on the main thread."""
    settings = _settings("sample")
    shutdown.install(by_itself=True)
    return _open("vllm", settings, _vllm)


def sampler() -> "Gate[Served] | Gate[ServingEngine]":
    """The gate to the sampler that this process takes."""
    _settings("sample")  # so that the choice is logged as all else is
    return vllm() if samples_by_vllm() else engine()


@cache
def samples_by_vllm() -> bool:
    """Decided once: each sample asks. What cannot be decided the engine's gate says."""
    try:
        return backend.settings().sampler == "vllm"
    except UserError:
        return False


def _settings(process: str) -> Settings:
    settings = Settings.load(os.environ)
    if not structlog.is_configured():  # the other gate may have done it
        logs.begin(process, settings)
    return settings


def _open(name: str, settings: Settings, load: Callable[[], T]) -> Gate[T]:
    marker = f"loading-{name}-{os.environ.get('FUNCTION_TARGET', 'shared')}"
    gate = Gate(f"model {settings.model}", load, Deaths(settings.run_directory / marker), time.monotonic)
    gate.open()
    _go_on_from_snapshots(settings)
    return gate


def _go_on_from_snapshots(settings: Settings) -> None:
    """Before the port binds: nothing is claimed yet, and nobody is connected."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:  # imported by a tool, which serves nothing
        return
    pod_snapshot.install(loop)
    if settings.pod_snapshot:
        pod_snapshot.offer(Path(settings.pod_snapshot), os.environ)
        pod_snapshot.watch(Path(settings.pod_snapshot), loop, os.environ)


def _engine() -> "ServingEngine":
    settings = backend.settings()
    if settings.model_directory:
        prefetch.begin(Path(settings.model_directory))
    from knapper.serving.engine import engine  # imports torch, which may be missing or broken

    return engine()


def _vllm() -> "Served":
    from knapper.serving.sampler import by_vllm

    return by_vllm(backend.settings())
