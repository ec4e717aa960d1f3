"""Which handler answers what."""

from starlette.routing import Route

from gateway.rest import admin, checkpoints, downloads, links, runs, sessions, weights

_ONE = "training_runs/{run_id}/checkpoints/{kind}/{name}"

ROUTES = [
    Route(f"/api/v1/{path}", handler, methods=[method])
    for method, path, handler in (
        ("GET", "training_runs", runs.list_runs),
        ("GET", "training_runs/{run_id}", runs.get_run),
        ("DELETE", "training_runs/{run_id}", runs.delete_run),
        ("GET", "training_runs/{run_id}/checkpoints", runs.list_checkpoints),
        ("GET", "checkpoints", checkpoints.list_all),
        ("DELETE", _ONE, checkpoints.delete),
        ("POST", f"{_ONE}/publish", checkpoints.publish),
        ("DELETE", f"{_ONE}/publish", checkpoints.unpublish),
        ("PUT", f"{_ONE}/ttl", checkpoints.set_ttl),
        ("GET", f"{_ONE}/archive", checkpoints.archive),
        ("GET", f"{_ONE}/external_weights_urls", weights.external_weights_urls),
        ("POST", "weights_info", weights.weights_info),
        ("POST", "copy_weights", weights.copy_weights),
        ("GET", "sessions", sessions.list_sessions),
        ("POST", "sessions/search", sessions.search),
        ("GET", "sessions/{session_id}", sessions.get_session),
        ("PUT", "sessions/{session_id}/project", sessions.assign_project),
        ("GET", "sessions/{session_id}/trace_export", sessions.trace_export),
        ("GET", "audit", admin.audit),
        ("GET", "billing/usage/events", admin.usage_events),
        ("GET", "billing/usage/checkpoints/current", admin.storage),
        ("GET", links.ROUTE, downloads.follow),
    )
]
