"""Which functions cannot serve their base model, as each said last when it was asked. In memory: they say it again."""

import structlog

log = structlog.get_logger()


class UnservableModels:
    """By the URL of the function."""

    def __init__(self) -> None:
        self._said: dict[str, str] = {}

    def refused(self, url: str, said: str) -> None:
        if self._said.get(url) != said:
            log.debug("a function cannot serve", url=url, reason=said)
        self._said[url] = said

    def answered(self, url: str) -> None:
        """It serves its model, whatever it answered. Who said the same for the same reason would do so, too."""
        if (mended := self._said.get(url)) is not None:
            self._said = {each: said for each, said in self._said.items() if said != mended}
            log.debug("a function serves again", url=url)

    @property
    def sentences(self) -> list[str]:
        """Each once: two functions may have one reason."""
        return sorted(set(self._said.values()))
