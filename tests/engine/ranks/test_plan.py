"""What a rank of eight keeps, at true sizes: FSDP2's own shards on the meta device, beside what is planned."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from knapper.engine import memory_table
from knapper.engine.layers.batch_invariance import Exactness
from knapper.engine.memory import ModelBytes
from knapper.engine.models.decoder import Decoder
from knapper.engine.models.loader import load
from knapper.engine.ranks import plan
from knapper.engine.ranks.sharded_linear import ShardedLinear
from knapper.engine.ranks.shards import Shards
from tests.engine.gate.models import META, SPREAD, write_model

DEVICES = 8


@pytest.fixture
def shards() -> Iterator[Shards]:
    """Of rank 0, in a group whose other seven exist on paper: nothing is sent."""
    dist.init_process_group("fake", rank=0, world_size=DEVICES, store=FakeStore())
    yield Shards(init_device_mesh("cpu", (DEVICES,)))
    dist.destroy_process_group()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", list(SPREAD))
def test_a_rank_keeps_what_is_planned(tmp_path: Path, shards: Shards, name: str) -> None:
    directory = write_model(tmp_path, name)
    model = load(directory, torch.bfloat16, META, Exactness(promised=False), linear=ShardedLinear, made=shards.add)
    assert isinstance(model, Decoder)
    sizes = plan.parts(model.config)
    assert shards.sizes == sizes
    planned = plan.planned(model.config, DEVICES).weights - plan.gathered(sizes)
    whole = ModelBytes.planned(model.config).weights - sum(sizes.values())  # the embedding, norms, biases
    assert shards.kept + whole == pytest.approx(planned, rel=0.001)
    assert all(
        linear.whole_OI.numel() == 0 for linear in model.weights.layers[0].linears if isinstance(linear, ShardedLinear)
    )


@pytest.mark.parametrize(("name", "devices", "card", "fits"), [
    ("Llama-3.3-70B", 1, "H200 (141 GB)", False),
    ("Llama-3.3-70B", 8, "H100 (80 GB)", True),
    ("Qwen3-235B-A22B", 8, "H100 (80 GB)", False),
    ("Qwen3-235B-A22B", 8, "H200 (141 GB)", True),
])  # fmt: skip
def test_what_fits_eight_cards(name: str, devices: int, card: str, fits: bool) -> None:
    (line,) = [
        line for line in memory_table.spread_lines() if line.startswith(f"| {name},") and f"| {devices} |" in line
    ]
    cells = dict(zip(memory_table.SPREAD_CARDS, line.strip("| ").split(" | ")[2:], strict=True))
    assert (cells[card] != "no") == fits
