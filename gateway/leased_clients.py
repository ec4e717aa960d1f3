"""Straight to a function's process, past the dispatcher that started it, while that lends its address."""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import aiohttp
import structlog
from yarl import URL

from knapper.web import lease

_KEPT_S = 1.0  # unused for so long, a loan is given back: only then does the process begin to be idle
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=5.0)
_LINE_BYTES_MAX = 256

log = structlog.get_logger()


@dataclass
class _Loan:
    address: str = ""  # not known yet
    uses: int = 0
    used_at: float = 0.0
    task: asyncio.Task[None] | None = None


class Shortcuts:
    """By the URL of a function. Where nobody lends, as on a cluster, every URL is its own. `now`: monotonic seconds."""

    def __init__(self, client: aiohttp.ClientSession, now: Callable[[], float]) -> None:
        self._client = client
        self._now = now
        self._loans: dict[str, _Loan] = {}

    @contextmanager
    def use(self, url: str) -> Iterator[str]:
        """Where to send a request for the function now. After a failure inside, it is `url` itself."""
        loan = self._loans.get(url)
        if loan is None or not loan.address:
            yield url
            return
        loan.uses += 1
        try:
            yield loan.address
        except (aiohttp.ClientError, TimeoutError):
            loan.address = ""
            raise
        finally:
            loan.uses -= 1
            loan.used_at = self._now()

    def heard(self, url: str, headers: Mapping[str, str]) -> None:
        """An answer came from there: if it offers a loan, take it, beside whatever else is done."""
        path = headers.get(lease.HEADER, "")
        if path.startswith(lease.PATH + "/") and url not in self._loans:
            loan = self._loans[url] = _Loan(used_at=self._now())
            loan.task = asyncio.create_task(self._borrow(url, path, loan))

    async def close(self) -> None:
        tasks = [loan.task for loan in self._loans.values() if loan.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _borrow(self, url: str, path: str, loan: _Loan) -> None:
        """Hold the loan until the process ends, or nobody has used it for a while."""
        try:
            async with self._client.get(URL(url).join(URL(path)), timeout=_TIMEOUT) as answer:
                line = (await answer.content.readline()).decode("ascii", "replace").strip()
                if answer.status != 200 or not line.startswith(lease.ADDRESSES) or len(line) > _LINE_BYTES_MAX:
                    return
                loan.address = line
                while not await self._ended(answer):
                    if not loan.uses and self._now() - loan.used_at >= _KEPT_S:
                        loan.address = ""  # before it is given back: nobody begins to use it in between
                        return
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            log.debug("the loan broke off", url=url, reason=repr(error))
        finally:
            loan.address = ""
            del self._loans[url]

    @staticmethod
    async def _ended(answer: aiohttp.ClientResponse) -> bool:
        """Whether it does within a while."""
        try:
            async with asyncio.timeout(_KEPT_S):
                return not await answer.content.read(1)
        except TimeoutError:
            return False
