"""The last lines of a run tell what it tried, and what it could not try on this machine and why."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests import instructions
from tests.instructions import Seen

ROOT = Path(__file__).parent.parent
ZEN4 = {"avx2": True, "avx512_f": True, "avx512_bf16": True, "amx_bf16": False}


@pytest.mark.parametrize(
    ("limit", "usable"),
    [
        ("", ["avx2", "avx512", "avx512_bf16"]),
        ("AVX2", ["avx2"]),
        ("avx512_core", ["avx2", "avx512"]),
        ("AVX512_CORE_BF16", ["avx2", "avx512", "avx512_bf16"]),
        ("AVX512_CORE_AMX", ["avx2", "avx512", "avx512_bf16"]),
        ("ALL", ["avx2", "avx512", "avx512_bf16"]),
    ],
)
def test_what_onednn_uses_is_what_the_cpu_has_up_to_the_limit(limit: str, usable: list[str]) -> None:
    assert instructions.usable(ZEN4, {"ONEDNN_MAX_CPU_ISA": limit}) == usable


def test_what_was_not_tried_is_told_with_what_would_or_why_nothing_could() -> None:
    run = Seen("Zen 4", ["avx2", "avx512", "avx512_bf16"], ["cuda"], {("float32", "avx512"), ("bfloat16", "avx512")})
    run.tried.add(("bfloat16", "avx512_bf16"))
    assert list(instructions.lines(run, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "HOME": "/"})) == [
        "this machine: Zen 4: avx2, avx512, avx512_bf16",
        "set: ONEDNN_MAX_CPU_ISA=AVX512_CORE",
        "tried: bfloat16 in avx512, bfloat16 in avx512_bf16, float32 in avx512",
        "not tried: float32 and bfloat16 in avx2: ONEDNN_MAX_CPU_ISA=AVX2 does",
        "not tried: float32 in avx512_bf16: ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 does",
        "not tried here: float32 and bfloat16 in amx_bf16: this CPU has none",
        "not tried: cuda: no test that ran computes on it",
        "not tried here: mps: torch finds no such device",
    ]


def test_a_run_without_a_model_says_so() -> None:
    assert list(instructions.lines(Seen(), {})) == ["no test that ran computes with a model"]


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="oneDNN's variable is for x86")
@pytest.mark.parametrize("workers", [0, 1])
def test_the_last_lines_of_a_run_are_of_what_really_ran(workers: int) -> None:
    """Of two tests one is chosen; with xdist its worker tells whoever prints."""
    one = "tests/engine/training/test_scheduler.py::test_a_cancelled_request_leaves_at_once[bfloat16]"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", str(workers), one],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}, cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    last = done.stdout.rpartition("= instruction sets =")[2].splitlines()
    assert "ONEDNN_MAX_CPU_ISA=AVX2" in last[2]
    assert last[3:5] == ["tried: bfloat16 in avx2", "not tried: float32 in avx2: ONEDNN_MAX_CPU_ISA=AVX2 does"]
