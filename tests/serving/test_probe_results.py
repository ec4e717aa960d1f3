"""What was found out about a CPU is found out once: later processes have it from the store, exactly as it was."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from knapper.engine.layers.batch_invariance import MODEL_LAYOUTS, Exactness, Product, RowLayout
from knapper.engine.layers.fingerprint import fingerprint
from knapper.errors import StoreError
from knapper.serving.probe_results import StoredChoices
from knapper.state.layout import ObjectKind
from knapper.store.memory import MemoryStore

LIKE = torch.empty(0)


def few_rows_differ(w_OI: Tensor) -> Product:
    """Of fewer than 7 rows the sums are added up in another order."""

    def product(x_NI: Tensor) -> Tensor:
        parts = 2 if len(x_NI) < 7 else 4
        return sum((x @ w.T for x, w in zip(x_NI.chunk(parts, 1), w_OI.chunk(parts, 1), strict=True)), torch.zeros(()))

    return product


def first_row_differs(w_OI: Tensor) -> Product:
    def product(x_NI: Tensor) -> Tensor:
        return torch.cat([x_NI[:1] @ w_OI.T + 1, x_NI[1:] @ w_OI.T])

    return product


def never(_: Tensor) -> Product:
    raise AssertionError("it was searched for again")


def found(store: MemoryStore, make: Callable[[Tensor], Product], print_: str = "cpu") -> tuple[RowLayout, list[str]]:
    """What a process finds, which starts with this store and ends."""
    findings = StoredChoices(store, print_)
    exactness = Exactness(choices=findings)
    layout = exactness.product("forward", MODEL_LAYOUTS, make, 64, 48, LIKE)
    findings.flush()
    return layout, exactness.broken


def test_a_later_process_has_what_an_earlier_one_found_without_a_search() -> None:
    store = MemoryStore()
    first = found(store, few_rows_differ)
    assert first == (RowLayout(8), [])
    assert found(store, never) == first
    with pytest.raises(AssertionError, match="searched for again"):
        found(store, never, "another cpu")


def test_a_product_that_keeps_no_bits_is_named_by_every_process() -> None:
    store = MemoryStore()
    first = found(store, first_row_differs)
    assert first == (RowLayout(), ["forward 64x48 float32"])
    assert found(store, never) == first


def test_a_damaged_finding_is_found_out_again_and_what_is_not_stored_is_no_error() -> None:
    class Troubled(MemoryStore):
        async def list(self, prefix: str, start_after: str = "", limit: int = 0) -> list[str]:
            raise StoreError("no store")

        async def put_if_absent(self, name: str, data: bytes) -> bool:
            raise StoreError("no right to write")

    async def damage(store: MemoryStore) -> None:
        (name,) = await store.list(ObjectKind.PROBE_RESULT.under("cpu"))
        data = await store.get(name) or b""
        await store.delete(name)
        await store.put_if_absent(name, data[:-1] + bytes([data[-1] ^ 1]))

    store = MemoryStore()
    first = found(store, few_rows_differ)
    asyncio.run(damage(store))
    with pytest.raises(AssertionError, match="searched for again"):
        found(store, never)
    assert found(store, few_rows_differ) == first
    assert found(Troubled(), few_rows_differ) == first


def machine(directory: Path, cpu: str, cache: str = "1024K") -> dict[str, Path]:
    caches = directory / "sys/devices/system/cpu/cpu0/cache/index2"
    caches.mkdir(parents=True)
    (caches / "size").write_text(cache)
    (directory / "cpuinfo").write_text(f"processor : 0\n{cpu}\n\nprocessor : 1\n")
    return {"proc": directory, "sys": directory / "sys"}


def test_a_fingerprint_is_another_wherever_a_kernel_may_be_another(tmp_path: Path) -> None:
    cpu = "model name : EPYC\nflags : avx2 avx512f\nmicrocode : 0x1\ncpu MHz : 2500"
    seen = [
        fingerprint(b"{}", {}, **machine(tmp_path / "a", cpu)),
        fingerprint(b'{"hidden_size": 1}', {}, **machine(tmp_path / "b", cpu)),
        fingerprint(b"{}", {"ONEDNN_MAX_CPU_ISA": "AVX2"}, **machine(tmp_path / "c", cpu)),
        fingerprint(b"{}", {"MKL_CBWR": "COMPATIBLE"}, **machine(tmp_path / "d", cpu)),
        fingerprint(b"{}", {}, **machine(tmp_path / "e", cpu.replace(" avx512f", ""))),
        fingerprint(b"{}", {}, **machine(tmp_path / "f", cpu.replace("EPYC", "Xeon"))),
        fingerprint(b"{}", {}, **machine(tmp_path / "g", cpu.replace("0x1", "0x2"))),
        fingerprint(b"{}", {}, **machine(tmp_path / "h", cpu, "2048K")),
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        seen.append(fingerprint(b"{}", {}, proc=tmp_path / "a", sys=tmp_path / "a/sys"))
    finally:
        torch.set_num_threads(threads)
    assert len(set(seen)) == len(seen)
    assert None not in seen
    slower = machine(tmp_path / "i", cpu.replace("2500", "1200"))
    assert fingerprint(b"{}", {"HOME": "/root"}, **slower) == seen[0], "what no kernel is chosen by"
    assert fingerprint(b"{}", {}, proc=tmp_path / "nowhere") is None
