"""Captured episodes: list, show their turns, score, delete."""

import asyncio
from typing import Any

import msgspec
import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway import bodies
from gateway.rest import responses
from gateway.services import services_of
from gateway.tenants import tenant_of
from knapper import limits
from knapper.ids import EpisodeName
from knapper.state.captures import Episode, KeptTurn, TurnsPage
from knapper.wire import json, rest

_MOST = {
    "episodes": limits.episodes_max, "turns": limits.episode_turns_max, "bytes": limits.episode_bytes_max,
    "seconds": limits.episode_s,
}  # fmt: skip


async def list_episodes(request: Request) -> Response:
    """The newest first, with what a tenant, and an episode, may have at most."""
    gateway, tenant = services_of(request), tenant_of(request)
    query = json.convert(responses.query(request), rest.EpisodesPage)
    begun = list((await gateway.captures.begun(tenant)).items())[::-1]
    page = dict(begun[query.offset : query.offset + query.limit])
    episodes = [_episode(each) for each in await gateway.captures.described(tenant, page)]
    cursor = responses.cursor(query.offset, query.limit, len(begun))
    return JSONResponse({"episodes": episodes, "cursor": cursor, "limits": _MOST})


async def get_turns(request: Request) -> Response:
    """Turns in the order in which they were kept; `next` goes on after them."""
    gateway, tenant = services_of(request), tenant_of(request)
    query = json.convert(responses.query(request), rest.TurnsQuery)
    name = _name(request)
    page = await gateway.captures.turns(tenant, name, query.after, query.limit)
    head = {"episode": str(name), "group": name.group or None, "score": await gateway.captures.score(tenant, name)}
    return Response(await asyncio.to_thread(_encoded, head, page), media_type="application/json")


async def score(request: Request) -> Response:
    """What the episode was worth, in place of what was said before."""
    gateway, tenant = services_of(request), tenant_of(request)
    name = _name(request)
    change = json.decode(await bodies.read(request), rest.ScoreChange)
    await gateway.captures.set_score(tenant, name, change.score)
    return JSONResponse({"episode": str(name), "score": change.score})


async def delete(request: Request) -> Response:
    gateway, tenant = services_of(request), tenant_of(request)
    name = _name(request)
    await gateway.captures.expect(tenant, name)
    await gateway.audit.write(tenant, "episode_delete", episode=str(name))
    turns = await gateway.captures.delete(tenant, name)
    return JSONResponse({"episode": str(name), "turns": turns})


def _name(request: Request) -> EpisodeName:
    return EpisodeName.parse(request.path_params["episode"])


def _episode(episode: Episode) -> dict[str, Any]:
    return {
        "episode": str(episode.name), "group": episode.name.group or None, "began_at": responses.time(episode.began_at),
        "turns": episode.turns, "bytes": episode.bytes, "score": episode.score,
    }  # fmt: skip


def _encoded(head: dict[str, Any], page: TurnsPage) -> bytes:
    """Turn by turn, since each call of the encoder holds the interpreter's lock."""
    turns = [msgspec.Raw(msgspec.json.encode(_turn(each))) for each in page.turns]
    return msgspec.json.encode(head | {"turns": turns, "next": page.next})


def _turn(kept: KeptTurn) -> dict[str, Any]:
    turn, drawn = kept.turn, kept.turn.drawn
    sequences = [
        {
            "tokens": np.frombuffer(sequence.tokens, "<i4").tolist(),
            "logprobs": np.frombuffer(sequence.logprobs, "<f4").tolist(),
            "stopped": sequence.stopped,
        }
        for sequence in turn.sequences
    ]
    weights = {"run": drawn.run or None, "step": drawn.step, "digest": drawn.digest or None, "sampler": drawn.sampler}
    return {
        "id": kept.id, "at": responses.time(turn.at), "model": turn.model, "base_model": turn.base_model,
        "weights": weights, "temperature": drawn.temperature, "truncated": drawn.truncated, "retry": turn.retry,
        "prompt": np.frombuffer(turn.prompt, "<i4").tolist(), "sequences": sequences,
    }  # fmt: skip
