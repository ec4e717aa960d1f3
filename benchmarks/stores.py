"""The stores' speed: a directory, and the bucket store over fake-gcs-server, both on this machine.

The emulator has no network and no disk: its figures are our own client's cost, not Google's service's.
"""

import asyncio
import os
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from benchmarks.figures import Figure
from knapper.limits import MIB
from knapper.settings import Settings
from knapper.state.journal import bundles
from knapper.state.journal.records import Spec
from knapper.store import Store
from knapper.store.factory import open_store
from tests.store import emulator

_SMALL, _TIMES = 1024, 200
_FILES, _FILE_BYTES, _BUNDLES = 4, 16 * MIB, 3
_SPEC = Spec(
    run="bench", tenant="local", base_model="none", rank=1, alpha=1.0, seed=0,
    train_attn=True, train_mlp=True, train_unembed=True,
)  # fmt: skip
Figures = dict[str, float]


def measure() -> dict[str, Figures]:
    """Medians of `put_ms` and `get_ms` (1 KB, one after another), best of `up_mb_s` and `down_mb_s` (a bundle)."""
    with tempfile.TemporaryDirectory(prefix="knapper-stores-") as scratch:
        figures = {"directory": asyncio.run(_figures(open_store(Settings.load({"KNAPPER_DATA": scratch}))))}
        with emulator.running(Path(scratch) / "emulator.log") as running:
            os.environ["STORAGE_EMULATOR_HOST"] = running.url
            bucket = open_store(Settings.load({"KNAPPER_STORE": f"gs://{running.make_bucket()}"}))
            figures["fake-gcs-server"] = asyncio.run(_figures(bucket))
            del os.environ["STORAGE_EMULATOR_HOST"]
    return figures


def figures() -> list[Figure]:
    """Figures of both stores."""
    units = {"put_ms": ("put 1 KB", "ms"), "get_ms": ("get 1 KB", "ms"), "up_mb_s": ("bundle up", "MB/s"),
             "down_mb_s": ("bundle down", "MB/s")}  # fmt: skip
    return [
        Figure(
            "stores",
            f"{store}: {units[name][0]}",
            value,
            None,
            units[name][1],
            note="emulator, no network" * (store != "directory"),
        )
        for store, values in measure().items()
        for name, value in values.items()
    ]


async def _figures(store: Store) -> Figures:
    draw = random.Random(1)
    small = draw.randbytes(_SMALL)
    files = {f"part-{n}": draw.randbytes(_FILE_BYTES) for n in range(_FILES)}
    megabytes = _FILES * _FILE_BYTES / 1e6

    async def write(n: int) -> None:
        await bundles.write(store, f"bundles/{n}/", files, spec=_SPEC, seq=n, epoch=1)

    async def read(n: int) -> None:
        await bundles.read(store, f"bundles/{n}/")

    puts = [await _seconds(store.put_if_absent, f"small/{n:04d}", small) for n in range(_TIMES)]
    gets = [await _seconds(store.get, f"small/{n:04d}") for n in range(_TIMES)]
    ups = [await _seconds(write, n) for n in range(_BUNDLES)]
    downs = [await _seconds(read, n) for n in range(_BUNDLES)]
    return {
        "put_ms": 1000 * statistics.median(puts),
        "get_ms": 1000 * statistics.median(gets),
        "up_mb_s": megabytes / min(ups),
        "down_mb_s": megabytes / min(downs),
    }


async def _seconds(call: Callable[..., Awaitable[object]], *arguments: object) -> float:
    began = time.perf_counter()
    await call(*arguments)
    return time.perf_counter() - began
