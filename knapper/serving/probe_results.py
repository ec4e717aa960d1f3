"""The layouts that earlier processes chose on this CPU, from the store; and those of this process, into it."""

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import structlog

from knapper.engine.layers.batch_invariance import LayoutChoice, RowLayout
from knapper.errors import KnapperError
from knapper.state import probe_results
from knapper.state.probe_results import ProbeResult
from knapper.store import Store

T = TypeVar("T")
log = structlog.get_logger()


class StoredChoices:
    """The layouts of one fingerprint. All methods may be called on any thread, with an event loop or without."""

    def __init__(self, store: Store, fingerprint: str) -> None:
        """Reads what there is; a store in trouble costs the time of the search, and no more."""
        self._store, self._fingerprint = store, fingerprint
        self._thread = ThreadPoolExecutor(1, "probe-results")
        try:
            self._known = self._thread.submit(_run, probe_results.read(store, fingerprint)).result()
        except KnapperError as error:
            log.warning(
                "the layouts that were chosen on this CPU cannot be read: they are searched for", reason=str(error)
            )
            self._known = {}

    def get(self, product: str) -> LayoutChoice | None:
        known = self._known.get(product)
        if known is None:
            return None
        return LayoutChoice(RowLayout(known.least, known.block, known.larger, known.alone), known.invariant)

    def add(self, product: str, choice: LayoutChoice) -> None:
        """Stored behind the caller's back, which does not wait."""
        layout = choice.layout
        result = ProbeResult(
            product=product, least=layout.least, block=layout.block, larger=layout.larger, alone=layout.alone,
            invariant=choice.invariant,
        )  # fmt: skip
        self._known[product] = result
        self._thread.submit(_run, self._keep(result))

    def flush(self) -> None:
        """Wait until all that was found is stored, or cannot be."""
        self._thread.submit(lambda: None).result()

    async def _keep(self, result: ProbeResult) -> None:
        try:
            await probe_results.keep(self._store, self._fingerprint, result)
        except KnapperError as error:  # sample's account may not write, for one
            log.info("a layout that was chosen on this CPU is not kept", product=result.product, reason=str(error))


def _run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)
