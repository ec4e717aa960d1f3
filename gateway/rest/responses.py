"""Records as the SDK's types have them."""

import json
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request

from knapper.ids import CheckpointKind, TinkerPath
from knapper.state.checkpoints import Checkpoint

_TYPES: dict[CheckpointKind, str] = {
    "weights": "training", "sampler_weights": "sampler", "external_weights": "external",
}  # fmt: skip


def query(request: Request) -> dict[str, str]:
    return dict(request.query_params)


def time(at: float) -> str:
    """Seconds since the epoch as ISO 8601 in UTC."""
    return datetime.fromtimestamp(at, UTC).isoformat()


def checkpoint(found: Checkpoint) -> dict[str, Any]:
    path = TinkerPath.parse(found.path)
    return {
        "checkpoint_id": f"{path.kind}/{path.name}",
        "checkpoint_type": _TYPES[path.kind],
        "time": time(found.saved_at),
        "tinker_path": found.path,
        "size_bytes": found.size_bytes,
        "public": found.public,
        "user_metadata": found.user_metadata or None,
        "expires_at": time(found.expires_at) if found.expires_at else None,
    }


def cursor(offset: int, limit: int, total: int) -> dict[str, int]:
    return {"offset": offset, "limit": limit, "total_count": total}


def labels(metadata_json: str) -> dict[str, str] | None:
    """A client's metadata: the protocol sends back texts, so that other values come as their JSON."""
    sent = json.loads(metadata_json)
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in sent.items()} or None
