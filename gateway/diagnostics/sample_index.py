"""Which weights drew which completion: recent samples by fingerprint."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from knapper.diagnostics.weights import SavedWeights
from knapper.ids import Tenant
from knapper.wire.fingerprints import Fingerprint

_SAMPLES_MAX: Final = 131_072  # about 20 MB; a batch of 128 prompts with 16 completions each has 2048


@dataclass(frozen=True)
class SampleSource:
    """How a completion was drawn. `began`, `ended`: monotonic seconds. `sampler`: backend and dtype."""

    weights: SavedWeights
    sampler: str
    temperature: float
    truncated: bool
    began: float
    ended: float


class SampleIndex:
    """The newest completions of each tenant; the tenant with the most gives way."""

    def __init__(self, samples_max: int = _SAMPLES_MAX) -> None:
        self._samples_max = samples_max
        self._sources: dict[Tenant, OrderedDict[Fingerprint, SampleSource]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, tenant: Tenant, fingerprints: list[Fingerprint], source: SampleSource) -> None:
        own = self._sources.setdefault(tenant, OrderedDict())
        for fingerprint in fingerprints:
            self._count += fingerprint not in own
            own[fingerprint] = source
            own.move_to_end(fingerprint)
        while self._count > self._samples_max:
            largest = max(self._sources, key=lambda tenant: len(self._sources[tenant]))
            self._sources[largest].popitem(last=False)
            self._count -= 1

    def add_unknown(self, tenant: Tenant, fingerprints: list[Fingerprint], source: SampleSource) -> None:
        """Those that are not here already, of which more is known."""
        own = self._sources.get(tenant, OrderedDict())
        self.add(tenant, [each for each in fingerprints if each not in own], source)

    def find(self, tenant: Tenant, fingerprints: tuple[Fingerprint, ...]) -> list[SampleSource]:
        """The sources of a datum's turns that are known, in order. Never another tenant's."""
        own = self._sources.get(tenant, OrderedDict())
        return [own[fingerprint] for fingerprint in fingerprints if fingerprint in own]
