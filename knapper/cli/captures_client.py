"""A client of a gateway's captured episodes, and what it tells of them, in lines for a terminal."""

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote, urlencode

from knapper import limits
from knapper.cli.jobs_client import JobsClient
from knapper.cli.tables import table
from knapper.ids import EpisodeName
from knapper.text.sizes import sized


class CapturesClient(JobsClient):
    """Asks for episodes, with the same key and the same errors as for jobs."""

    def page(self, limit: int, offset: int) -> dict[str, Any]:
        """`episodes`, the newest first; `cursor`, with how many there are; `limits`."""
        return self.ask("GET", f"/captures?{urlencode({'limit': limit, 'offset': offset})}")

    def episodes(self) -> list[dict[str, Any]]:
        """All of them, the newest first."""
        found: list[dict[str, Any]] = []
        while True:
            page = self.page(limits.page_max, len(found))
            found += page["episodes"]
            if not page["episodes"] or len(found) >= page["cursor"]["total_count"]:
                return found

    def episode(self, name: str) -> dict[str, Any]:
        """The episode with all of its turns."""
        page = self._turns(name, "")
        turns, following = list(page["turns"]), page["next"]
        while following is not None:
            more = self._turns(name, following)
            turns, following = [*turns, *more["turns"]], more["next"]
        return {field: value for field, value in page.items() if field != "next"} | {"turns": turns}

    def _turns(self, name: str, after: str) -> dict[str, Any]:
        query = urlencode({"limit": limits.turns_listed_max, "after": after})
        return self.ask("GET", f"/captures/{_path(name)}?{query}")

    def score(self, name: str, score: float) -> dict[str, Any]:
        return self.ask("POST", f"/captures/{_path(name)}/score", {"score": score})

    def delete(self, name: str) -> dict[str, Any]:
        return self.ask("DELETE", f"/captures/{_path(name)}")


def _path(name: str) -> str:
    """Raises InvalidField."""
    return quote(str(EpisodeName.parse(name)))


def overview(answer: Mapping[str, Any]) -> Iterator[str]:
    """A table with one line an episode; nothing without episodes."""
    rows = [
        (
            each["episode"], each["began_at"][:19], str(each["turns"]), sized(each["bytes"]),
            "" if each["score"] is None else f"{each['score']:g}",
        )
        for each in answer["episodes"]
    ]  # fmt: skip
    if rows:
        yield from table(("EPISODE", "BEGAN", "TURNS", "SIZE", "SCORE"), rows)
        yield f"{answer['cursor']['total_count']} of at most {answer['limits']['episodes']} episodes"


def summary(episode: Mapping[str, Any]) -> Iterator[str]:
    """A line for each answer of each turn."""
    score = "not scored" if episode["score"] is None else f"score {episode['score']:g}"
    yield f"{episode['episode']}: {len(episode['turns'])} turns, {score}"
    rows = [
        (
            str(n), turn["at"][:19], turn["model"], _weights(turn["weights"]), str(len(turn["prompt"])),
            str(len(sequence["tokens"])), f"{sum(sequence['logprobs']):.4f}",
            "stop" if sequence["stopped"] else "length",
        )
        for n, turn in enumerate(episode["turns"], 1)
        for sequence in turn["sequences"]
    ]  # fmt: skip
    yield from table(("TURN", "AT", "MODEL", "WEIGHTS", "PROMPT", "SAMPLED", "LOGPROB", "ENDED BY"), rows)


def _weights(weights: Mapping[str, Any]) -> str:
    return "base" if weights["digest"] is None else f"{weights['digest']} step {weights['step']}"
