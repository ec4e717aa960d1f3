"""Captures an agent's session: a request that names an episode is answered once its turn is kept, token for token."""

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

import numpy as np
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.openai.models import SampledModel
from gateway.services import Services, services_of
from gateway.tenants import tenant_of
from knapper.errors import InvalidField, StoreError
from knapper.ids import EpisodeName, Tenant
from knapper.state.captures import CapturedSequence, CapturedTurn
from knapper.state.journal.records import Drawn
from knapper.wire import proto
from knapper.wire.types import Image, SamplingParams

HEADER: Final = "X-Knapper-Capture"
_RETRY: Final = "x-stainless-retry-count"  # of OpenAI's and Anthropic's clients
_PLACE: Final = re.compile(r"/capture/((?:[^/]+/)?[^/]+)((?:/oai/api)?/v1/.*)")


class CapturePaths:
    """Serves /capture/[GROUP/]EPISODE/v1/... as /v1/... with the header, for clients that can set no header."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (match := _PLACE.fullmatch(scope["path"])) is not None:
            named = (HEADER.lower().encode(), match[1].encode("latin-1", "replace"))
            path = {"path": match[2], "raw_path": quote(match[2]).encode()}
            scope = {**scope, **path, "headers": [*scope["headers"], named]}
        await self._app(scope, receive, send)


@dataclass(frozen=True)
class Drawing:
    """What is sampled, by what and how. `constrained`: by a grammar."""

    model: SampledModel
    params: SamplingParams
    constrained: bool
    prompts: list[list[int]]


@dataclass(frozen=True)
class Capture:
    """One request whose answers are kept. `retry`: how often its client had sent it before."""

    gateway: Services
    tenant: Tenant
    episode: EpisodeName
    retry: int

    @staticmethod
    def asked(request: Request) -> "Capture | None":
        """None if the request names no episode. Raises InvalidField, and what `tenant_of` does."""
        names = list(dict.fromkeys(request.headers.getlist(HEADER)))
        if not names:
            return None
        if len(names) > 1:
            raise InvalidField(HEADER, names, "one episode, in the header or in the URL")
        retry = request.headers.get(_RETRY, "")
        retries = int(retry) if retry.isascii() and retry.isdecimal() and len(retry) < 5 else 0
        return Capture(services_of(request), tenant_of(request), EpisodeName.parse(names[0], HEADER), retries)

    def expect_texts(self, images: Sequence[Image]) -> None:
        """Raises InvalidField for a prompt with images: a turn is kept as token ids, which have none of them."""
        if images:
            allowed = "no episode with images: what is kept are token ids"
            raise InvalidField(HEADER, str(self.episode), allowed, f"Leave out the header, or {images[0].name}")

    async def admit(self, drawing: Drawing) -> "UnkeptTurns":
        """Raises InvalidField if a limit leaves no room for another turn, before anything is sampled."""
        await self.gateway.captures.admit(self.tenant, self.episode, HEADER)
        return UnkeptTurns(self, drawing)


@dataclass(frozen=True)
class UnkeptTurns:
    """A turn for each prompt of a request, while it is sampled."""

    capture: Capture
    drawing: Drawing

    async def keep(self, responses: list[bytes], sampler: str) -> None:
        """Durable on return. `sampler`: backend and dtype. Raises StoreError."""
        gateway, tenant, episode = self.capture.gateway, self.capture.tenant, self.capture.episode
        for prompt, response in zip(self.drawing.prompts, responses, strict=True):
            sequences = await asyncio.to_thread(_sequences, response)
            if not any(sequence.tokens for sequence in sequences):  # the prompt was only scored
                continue
            try:
                await gateway.captures.keep(tenant, episode, await self._turn(prompt, sequences, sampler))
            except StoreError as error:
                raise StoreError(f"episode {episode} could not keep the answer, so there is none: {error}") from error

    async def _turn(self, prompt: list[int], sequences: list[CapturedSequence], sampler: str) -> CapturedTurn:
        gateway, model, params = self.capture.gateway, self.drawing.model, self.drawing.params
        weights = await gateway.monitor.weights.of(model.adapter)
        truncated = self.drawing.constrained or params.top_k != -1 or params.top_p != 1.0
        drawn = Drawn(
            run=weights.run, seq=weights.seq, step=weights.step, digest=weights.digest, sampler=sampler,
            temperature=params.temperature, truncated=truncated, datums=len(sequences),
        )  # fmt: skip
        name = model.record.name if model.checkpoint is None else model.checkpoint.path
        return CapturedTurn(
            model=name, base_model=model.record.name, prompt=np.array(prompt, "<i4").tobytes(), sequences=sequences,
            drawn=drawn, retry=self.capture.retry, at=gateway.clock(),
        )  # fmt: skip


def _sequences(response: bytes) -> list[CapturedSequence]:
    return [
        CapturedSequence(
            tokens=sequence.tokens.astype("<i4").tobytes(),
            logprobs=sequence.logprobs.astype("<f4").tobytes(),
            stopped=sequence.stopped,
        )
        for sequence in proto.decode_sample_response(response).sequences
    ]
