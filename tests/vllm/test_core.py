"""What a core is refused with, before vLLM is even imported."""

from pathlib import Path

import pytest

from knapper.errors import InvalidField
from knapper.vllm.core import Core, Options


def test_batch_invariance_is_refused_on_a_cpu_where_it_would_end_every_core_at_its_first_sample(tmp_path: Path) -> None:
    options = Options(
        directory=tmp_path, dtype="float32", context=8, sequences_max=1, rank_max=8, adapters_at_once=1,
        adapters_kept=1, device="cpu", memory=0.9, kv_bytes=2**30, threads=1, sleeps=False,
    )  # fmt: skip
    with pytest.raises(InvalidField, match="VLLM_BATCH_INVARIANT is '1'; allowed: 0 on a CPU"):
        Core.start(options, {"VLLM_BATCH_INVARIANT": "1"})
