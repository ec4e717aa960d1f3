"""Responses in the shapes of the SDK's types."""

import json
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request

from gateway.services import services_of
from knapper.ids import CheckpointKind, TinkerPath
from knapper.state.checkpoints import Checkpoint
from knapper.state.signed_links import Link

TYPES: dict[CheckpointKind, str] = {
    "weights": "training", "sampler_weights": "sampler", "external_weights": "external",
}  # fmt: skip


def query(request: Request) -> dict[str, str]:
    return dict(request.query_params)


def time(at: float) -> str:
    """Seconds since the epoch as ISO 8601 in UTC."""
    return datetime.fromtimestamp(at, UTC).isoformat()


def checkpoint(record: Checkpoint) -> dict[str, Any]:
    path = TinkerPath.parse(record.path)
    return {
        "checkpoint_id": f"{path.kind}/{path.name}",
        "checkpoint_type": TYPES[path.kind],
        "time": time(record.saved_at),
        "tinker_path": record.path,
        "base_model": record.base_model,
        "size_bytes": record.size_bytes,
        "public": record.public,
        "user_metadata": record.user_metadata or None,
        "expires_at": time(record.expires_at) if record.expires_at else None,
    }


def cursor(offset: int, limit: int, total: int) -> dict[str, int]:
    return {"offset": offset, "limit": limit, "total_count": total}


def labels(metadata_json: str) -> dict[str, str] | None:
    """A client's metadata. The protocol returns strings, so other values become their JSON."""
    metadata = json.loads(metadata_json)
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in metadata.items()} or None


def moment(microseconds: int) -> str:
    """A time since the epoch as ISO 8601 in UTC, exactly: a cursor that comes back is the same number."""
    return datetime.fromtimestamp(microseconds // 10**6, UTC).replace(microsecond=microseconds % 10**6).isoformat()


async def link_url(request: Request, link: Link) -> str:
    """A URL for the link on the host that this request used. It needs no key, because it is signed."""
    token = await services_of(request).signed_links.sign(link)
    return f"{str(request.base_url).rstrip('/')}/api/v1/links/{token}"
