"""Stores what was drawn here now and then, and finds what was drawn elsewhere: before a restart, by another gateway."""

from collections.abc import Callable
from typing import Final

from gateway.diagnostics.sample_index import SampleIndex, SampleSource
from knapper.diagnostics.weights import SavedWeights
from knapper.ids import Tenant
from knapper.state.drawn_samples import SAMPLES_MAX, DrawnSamplesLog, DrawnTogether
from knapper.state.journal.records import Drawn
from knapper.store import Store
from knapper.wire.fingerprints import Fingerprint

_LOOK_EVERY_S: Final = 5.0  # for samples of a tenant that are not known here


class DrawnLog:
    """`clock`: seconds since the epoch. `new_id`: a random id."""

    def __init__(self, store: Store, index: SampleIndex, clock: Callable[[], float], new_id: Callable[[], str]) -> None:
        self._log, self._index = DrawnSamplesLog(store), index
        self._clock, self._new_id = clock, new_id
        self._new: dict[Tenant, dict[Fingerprint, Drawn]] = {}
        self._read: dict[Tenant, tuple[float, str]] = {}  # tenant -> (when it was looked for, the newest name)

    def note(self, tenant: Tenant, fingerprints: list[Fingerprint], source: SampleSource) -> None:
        weights = source.weights
        drawn = Drawn(
            run=weights.run, seq=weights.seq, step=weights.step, digest=weights.digest, sampler=source.sampler,
            temperature=source.temperature, truncated=source.truncated, datums=0,
        )  # fmt: skip
        new = self._new.setdefault(tenant, {})
        new |= dict.fromkeys(fingerprints, drawn)
        for _ in range(len(new) - SAMPLES_MAX):
            del new[next(iter(new))]

    async def flush(self) -> None:
        """Store what is new. Raises StoreError; what was not stored then is not known elsewhere."""
        new, self._new = self._new, {}
        for tenant, fingerprints in new.items():
            together: dict[Drawn, list[Fingerprint]] = {}
            for fingerprint, drawn in fingerprints.items():
                together.setdefault(drawn, []).append(fingerprint)
            groups = [DrawnTogether(drawn=drawn, fingerprints=found) for drawn, found in together.items()]
            await self._log.append(tenant, self._clock(), self._new_id(), groups)

    async def look(self, tenant: Tenant) -> None:
        """Enter what others stored since the last look. Their times are not known, so nothing of it is overdue."""
        looked_at, newest = self._read.get(tenant, (float("-inf"), ""))
        if self._clock() - looked_at < _LOOK_EVERY_S:
            return
        groups, newest = await self._log.after(tenant, newest)
        self._read[tenant] = self._clock(), newest
        for group in groups:
            drawn, began = group.drawn, float("-inf")
            weights = SavedWeights(drawn.run, drawn.seq, drawn.step, drawn.digest)
            source = SampleSource(weights, drawn.sampler, drawn.temperature, drawn.truncated, began, began)
            self._index.add_unknown(tenant, group.fingerprints, source)
