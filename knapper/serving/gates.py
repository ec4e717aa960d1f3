"""The gates of this process: what its functions answer from, each opened once, however many functions share it."""

import os
import time
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, TypeVar

import structlog

from knapper.concurrency import shutdown
from knapper.concurrency.retry import Deaths
from knapper.observability import logs
from knapper.serving.gate import Gate
from knapper.settings import Settings

if TYPE_CHECKING:
    from knapper.serving.engine import ServingEngine
    from knapper.serving.sampler import Served

T = TypeVar("T")


@cache
def engine() -> "Gate[ServingEngine]":
    """Of what trains, and samples unless vLLM does. The first call, on the main thread, makes the first attempt."""
    settings = _begun("engine")
    if settings.address:
        shutdown.heed()
    return _opened("engine", settings, _engine)


@cache
def vllm() -> "Gate[Served]":
    """Of vLLM, likewise."""
    settings = _begun("sample")
    shutdown.heed(by_itself=True)
    return _opened("vllm", settings, _by_vllm)


def sampler() -> "Gate[Served] | Gate[ServingEngine]":
    """Of whoever samples."""
    return vllm() if Settings.load(os.environ).sampler == "vllm" else engine()


def _begun(process: str) -> Settings:
    settings = Settings.load(os.environ)
    if not structlog.is_configured():  # the other gate may have done it
        logs.begin(process, settings)
    return settings


def _opened(name: str, settings: Settings, load: Callable[[], T]) -> Gate[T]:
    place = f"loading-{name}-{os.environ.get('FUNCTION_TARGET', 'shared')}"
    gate = Gate(f"model {settings.model}", load, Deaths(settings.run_directory / place), time.monotonic)
    gate.open()
    return gate


def _engine() -> "ServingEngine":
    from knapper.serving.engine import engine  # torch, which may be missing or broken

    return engine()


def _by_vllm() -> "Served":
    from knapper.serving.sampler import by_vllm

    return by_vllm(Settings.load(os.environ))
