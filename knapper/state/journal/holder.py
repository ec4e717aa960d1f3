"""Who holds a run, and what it may take over."""

from dataclasses import dataclass
from typing import Final

from knapper.errors import OtherDtype
from knapper.ids import RunId
from knapper.state.journal.records import Terms

_OTHER_DTYPE_S: Final = 30.0  # nothing but another start of the engine helps: nobody need ask sooner


@dataclass(frozen=True)
class Holder:
    """Who claims: a name that no other claim has or had (not even of the same process), and where it listens."""

    name: str
    address: str
    terms: Terms


def expect_dtype(run: RunId, made: Terms, ours: Terms) -> None:
    """Raises OtherDtype.

    Another dtype is no matter of last bits: log-probabilities would jump, and a replay would not be what it was.
    """
    if made.dtype != ours.dtype:
        raise OtherDtype(
            f"{run} was made in {made.dtype}, and this engine computes in {ours.dtype}. Its operations are stored and "
            f"wait for one that is started with KNAPPER_DTYPE={made.dtype} (knapper up --dtype {made.dtype}); or go on "
            "from one of its checkpoints in a new run",
            retry_after_s=_OTHER_DTYPE_S,
        )
