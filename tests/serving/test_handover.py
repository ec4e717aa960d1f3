"""What training saves for a sampler goes to the vLLM of its process before anything of it is stored."""

import asyncio
import time
from pathlib import Path

import pytest

from knapper.engine import checkpoint_format
from knapper.engine.executor import Executor
from knapper.engine.run_machine import TrainingMachine
from knapper.serving.handover import HandingMachine, Handover
from knapper.state.journal.machine import Files
from knapper.state.journal.records import Kind, Operation, Spec
from knapper.wire import zstd
from tests.engine.runs import RUN, spec, tiny_trainer


def _save(kind: Kind) -> Operation:
    body = zstd.compress(b'{"model_id": "r", "seq_id": 1, "path": "here"}')
    return Operation(run=RUN, seq=1, kind=kind, sha256=b"", body_zstd=body, accepted_at=0.0)


@pytest.mark.parametrize("kind", ["save_weights_for_sampler", "save_weights"])
def test_a_save_for_a_sampler_is_handed_over_as_it_will_be_stored(tmp_path: Path, kind: Kind) -> None:
    taken: list[tuple[Spec, Files]] = []
    handover, device = Handover(), Executor()
    handover.saved(spec(), {})  # nobody samples here: nothing to do
    handover.to(lambda of, files: taken.append((of, files)))
    machine = HandingMachine(TrainingMachine(tiny_trainer(tmp_path), device, time.monotonic), handover.saved)
    try:
        state = asyncio.run(machine.create(spec(), None, False))
        outcome = asyncio.run(machine.apply(state, _save(kind), None))
    finally:
        device.close()
    assert checkpoint_format.ADAPTER in outcome.export
    assert taken == ([(state.spec, outcome.export)] if kind == "save_weights_for_sampler" else [])
