"""The weights of bundles: who saved them, after how many optimizer steps, and their digest."""

from dataclasses import dataclass
from typing import Final

from knapper.state.journal import bundles
from knapper.store import Store
from knapper.store.cache import LruCache

_ADAPTER: Final = "adapter_model.safetensors"
_OPTIMIZER: Final = "optimizer.safetensors"
_DIGEST_CHARS: Final = 16


@dataclass(frozen=True)
class SavedWeights:
    """`run`, `seq`: who saved them; empty for the base model. `step`: optimizer steps in them, -1 if not known."""

    run: str = ""
    seq: int = 0
    step: int = 0
    digest: str = ""
    resumable: bool = False  # with the state of the optimizer


class WeightsReader:
    """The weights of bundles, which never change."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: LruCache[str, SavedWeights] = LruCache()

    def known(self, bundle: str) -> SavedWeights | None:
        return self._known.known(bundle) if bundle else SavedWeights()

    async def of(self, bundle: str) -> SavedWeights:
        """Those of a bundle that was deleted are not known: they have no run."""
        return await self._known.get(bundle, lambda: self._read(bundle)) if bundle else SavedWeights()

    async def _read(self, bundle: str) -> SavedWeights:
        index = await bundles.read_index(self._store, bundle)
        if index is None:
            return SavedWeights(step=-1, digest="unknown")
        parts = {part.name: part.sha256.hex() for part in index.parts}
        digest = parts.get(_ADAPTER, "")[:_DIGEST_CHARS]
        return SavedWeights(index.spec.run, index.seq, index.step, digest, _OPTIMIZER in parts)


def describe(weights: SavedWeights, sampler: str) -> str:
    """Which weights drew a sample, for its answer: `digest;step=N;sampler=engine float32`."""
    return f"{weights.digest or 'base'};step={weights.step};sampler={sampler or 'unknown'}"
