"""The holder of a run, and which runs it may claim."""

from dataclasses import dataclass
from typing import Final

from knapper.errors import OtherDtype
from knapper.ids import RunId
from knapper.state.journal.records import Terms

_OTHER_DTYPE_S: Final = 30.0  # only a restart of the engine helps, so earlier retries are useless


@dataclass(frozen=True)
class Holder:
    """Identity of a claim. `name` is unique, even among claims of one process; `address` is where it listens."""

    name: str
    address: str
    terms: Terms


def expect_dtype(run: RunId, created: Terms, ours: Terms) -> None:
    """Raises OtherDtype: in another dtype log-probabilities would jump, and a replay would give another state."""
    if created.dtype != ours.dtype:
        raise OtherDtype(
            f"{run} was made in {created.dtype}, and this engine computes in {ours.dtype}. Its operations are stored "
            "and wait for one that is started with "
            f"KNAPPER_DTYPE={created.dtype} (knapper up --dtype {created.dtype}); "
            "or go on from one of its checkpoints in a new run",
            retry_after_s=_OTHER_DTYPE_S,
        )
