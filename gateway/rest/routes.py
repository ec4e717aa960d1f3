"""The REST routes: handler and body limit of each."""

from gateway.rest import admin, captures, checkpoints, files, links, runs, sessions, weights
from gateway.routing import Door
from knapper import limits

_CHECKPOINT = "training_runs/{run_id}/checkpoints/{kind}/{name}"
_NONE, _SMALL, _LABELS = 0, limits.small_body_bytes_max, limits.labels_body_bytes_max

ROUTES = [
    Door(f"/api/v1/{path}", handler, methods=[method], body_bytes_max=body_bytes_max)
    for method, path, handler, body_bytes_max in (
        ("GET", "training_runs", runs.list_runs, _NONE),
        ("GET", "training_runs/{run_id}", runs.get_run, _NONE),
        ("DELETE", "training_runs/{run_id}", runs.delete_run, _NONE),
        ("GET", "training_runs/{run_id}/checkpoints", runs.list_checkpoints, _NONE),
        ("GET", "checkpoints", checkpoints.list_all, _NONE),
        ("POST", "checkpoints/search", checkpoints.search, _LABELS),
        ("DELETE", _CHECKPOINT, checkpoints.delete, _NONE),
        ("POST", f"{_CHECKPOINT}/publish", checkpoints.publish, _NONE),
        ("DELETE", f"{_CHECKPOINT}/publish", checkpoints.unpublish, _NONE),
        ("PUT", f"{_CHECKPOINT}/ttl", checkpoints.set_ttl, _SMALL),
        ("GET", f"{_CHECKPOINT}/archive", checkpoints.archive, _NONE),
        ("GET", f"{_CHECKPOINT}/files", files.list_files, _NONE),
        ("GET", f"{_CHECKPOINT}/files/{{file}}", files.get_file, _NONE),
        ("GET", f"{_CHECKPOINT}/external_weights_urls", weights.external_weights_urls, _NONE),
        ("POST", "weights_info", weights.weights_info, _SMALL),
        ("POST", "copy_weights", weights.copy_weights, _SMALL),
        ("GET", "sessions", sessions.list_sessions, _NONE),
        ("POST", "sessions/search", sessions.search, _LABELS),
        ("GET", "sessions/{session_id}", sessions.get_session, _NONE),
        ("PUT", "sessions/{session_id}/project", sessions.assign_project, _SMALL),
        ("GET", "sessions/{session_id}/trace_export", sessions.trace_export, _NONE),
        ("GET", "captures", captures.list_episodes, _NONE),
        ("GET", "captures/{episode:path}", captures.get_turns, _NONE),
        ("DELETE", "captures/{episode:path}", captures.delete, _NONE),
        ("POST", "captures/{episode:path}/score", captures.score, _SMALL),
        ("GET", "audit", admin.audit, _NONE),
        ("GET", "quota", admin.quota, _NONE),
        ("GET", "billing/usage/events", admin.usage_events, _NONE),
        ("GET", "billing/usage/checkpoints/current", admin.storage, _NONE),
        ("GET", "links/{token}", links.follow, _NONE),
    )
]
