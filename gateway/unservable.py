"""Functions that cannot serve their base model, with the reason of each. In memory: every refusal repeats it."""

import structlog

log = structlog.get_logger()


class UnservableModels:
    """The reason by the URL of the function."""

    def __init__(self) -> None:
        self._reasons: dict[str, str] = {}

    def add(self, url: str, reason: str) -> None:
        if self._reasons.get(url) != reason:
            log.debug("a function cannot serve", url=url, reason=reason)
        self._reasons[url] = reason

    def remove(self, url: str) -> None:
        """The function serves its model. Other functions with the same reason then do so, too."""
        if (obsolete := self._reasons.get(url)) is not None:
            self._reasons = {other: reason for other, reason in self._reasons.items() if reason != obsolete}
            log.debug("a function serves again", url=url)

    @property
    def reasons(self) -> list[str]:
        """Each once: two functions may have the same reason."""
        return sorted(set(self._reasons.values()))
