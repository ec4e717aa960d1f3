"""`knapper/limits.py` has every limit a user can meet; bounds that stand elsewhere are listed here, with reasons."""

import ast
import re
from collections.abc import Iterator
from itertools import chain

import pytest

from knapper import limits
from tests.test_house import ROOT, sources

_BOUND = re.compile(r"_(max|min|s|bytes|chars)$|_s_max|_bytes_|^(rows|elements|saved)_", re.IGNORECASE)

# Reason -> module: names. None of these refuses, cuts or ends anything of a user's.
ELSEWHERE = {
    "how long what the referee saves is kept: it is the referee's own": {"knapper/referee/court.py": "_KEPT_S"},
    "a cache's size: a miss costs time, never an answer": {
        "gateway/lookups.py": "_INFLIGHT_RUNS_MAX",
        "gateway/openai/state.py": "_LANGUAGES_MAX",
        "gateway/peers.py": "_KNOWN_MAX",
        "gateway/result_reader.py": "_RUNS_MAX",
        "knapper/engine/host_memory.py": "_DEFAULT_TRIM_BYTES _KEPT_BYTES",
        "knapper/engine/images/reader.py": "_READ_MAX",
        "knapper/engine/images/tower.py": "FEATURES_BYTES_MAX",
        "knapper/engine/sampling/sampler.py": "_ADAPTER_BYTES_MAX",
        "gateway/console/history.py": "_RUNS_MAX",
        "gateway/console/job_steps.py": "_JOBS_MAX",
        "knapper/exchange/directory.py": "_HASHED_MAX",
        "knapper/jobs/job_files.py": "_CACHED_MAX",
        "knapper/jobs/notifications.py": "_REMEMBERED_MAX",
        "knapper/jobs/outputs.py": "_CACHED_MAX",
        "knapper/jobs/worker.py": "_TAKEN_MAX",
        "knapper/sandbox/pool.py": "_idle_max",
        "knapper/serving/runs.py": "_RUNS_MAX",
        "knapper/state/journal/results.py": "_CACHE_BYTES_MAX",
        "knapper/store/cache.py": "_VALUES_MAX",
        "knapper/store/directory.py": "_SYNCED_MAX",
    },
    "how often a grammar repeats a call: a text ends by itself, and has no more": {
        "knapper/catalogue/call_formats.py": "_CALLS_MAX",
    },
    "how old a cached answer may be: another process's change is seen after it": {
        "gateway/lookups.py": "_OPEN_FRESH_S _PROJECT_FRESH_S _MODEL_FRESH_S _INFLIGHT_FRESH_S",
        "gateway/result_reader.py": "_FRESH_S _STREAMED_FRESH_S",
        "knapper/state/journal/accept.py": "_MANIFEST_FRESH_S",
    },
    "how often something is looked at, tried again or reported; nothing is refused by it": {
        "gateway/admission.py": "_SOON_S _FREED_S",
        "gateway/console/live.py": "_LOOK_S _LOOK_MAX_S _KEEP_ALIVE_S _BEHIND_MAX",
        "gateway/errors.py": "_OPERATOR_S",
        "gateway/futures.py": "_FIRST_HOLD_S _PAUSED_HOLD_S _READ_EVERY_S",
        "gateway/openai/samples.py": "_KEEP_ALIVE_S _RETRY_AFTER_S",
        "gateway/peers.py": "_CONNECT_S _SPARE_S _LOOK_S _SILENT_S _GONE_S _FAILING_S _MISSED_MAX",
        "gateway/periodic.py": "_FAILED_S",
        "gateway/periodic_tasks.py": "_TICK_S _JOBS_S _JOBS_AWAITING_FILES_S _JOBS_PAUSED_S _JOBS_STALLED_S "
        "_SAMPLE_USAGE_S _PARTS_S _ACCOUNTS_S _ACCOUNTS_OPEN_S _ACCOUNTS_IDLE_S IDLE_S",
        "gateway/sample_queue.py": "_BACK_OFF_S _BACK_OFF_MAX_S _COLD_S _NOTICE_EVERY_S _ASLEEP_S",
        "gateway/train_client.py": "_BACK_OFF_S _BACK_OFF_MAX_S _COLD_S _NOTICE_EVERY_S",
        "gateway/unfinished_runs.py": "_SOON_S _LATE_S",
        "gateway/uploads.py": "_LOOK_S",
        "knapper/cli/jobs_follower.py": "_POLL_S _QUIET_S",
        "knapper/engine/executor.py": "IDLE_S",
        "knapper/engine/ranks/followers.py": "_POLL_S _NOTICE_S",
        "knapper/cli/runs_watcher.py": "_POLL_S _PAUSE_EVERY_S",
        "knapper/cli/jobs_transfer.py": "_PAUSE_S",
        "knapper/concurrency/retry.py": "_PAUSE_S _PAUSE_MAX_S _SOON_S _WAIT_S",
        "knapper/jobs/notifications.py": "_QUIET_S",
        "knapper/jobs/revive.py": "_QUIET_S",
        "knapper/jobs/rollouts.py": "_WATCH_S",
        "knapper/jobs/sample_usage.py": "_MINUTE_S",
        "knapper/local/always_on.py": "_healthy_s_max _grace_s _steady_s _backoff_s _backoff_s_max",
        "knapper/local/broker/delivery.py": "_BACK_OFF_S _BACK_OFF_MAX_S",
        "knapper/local/broker/watcher.py": "_STILL_S _LOOK_S",
        "knapper/local/on_demand.py": "stop_grace_s _backoff_s_max _START_POLL_S _POLL_S",
        "knapper/serving/backend.py": "_IDLE_S",
        "knapper/serving/idle.py": "_FIRST_S _DRAIN_S",
        "knapper/state/gc/collector.py": "_PACE_S _PAUSE_MAX_S _LISTING_S _FAR_S",
        "knapper/state/gc/session.py": "_HELD_S",
        "knapper/state/holds.py": "RENEWED_S HELD_S",
        "knapper/state/gateways.py": "LISTED_S SETTLED_S IDLE_S",
        "knapper/state/journal/holder.py": "_OTHER_DTYPE_S",
        "knapper/state/journal/replay.py": "_STORING_S _RECORD_BYTES_MIN",
        "knapper/state/ledger.py": "_MARK_S _IDLE_S _FINISHED_IDLE_S",
        "knapper/vllm/engine.py": "_ABANDON_EVERY_S",
        "knapper/web/connections.py": "_LOOK_S _LAST_S",
    },
    "how often a defect of the server is tried again before it is the answer": {
        "gateway/sample_queue.py": "_DEFECTS_MAX",
        "knapper/jobs/worker.py": "_DEFECTS_MAX _WAITS_MAX",
        "knapper/serving/gate.py": "_DEATHS_MAX",
        "knapper/state/journal/apply.py": "_ATTEMPTS_MAX",
        "knapper/state/journal/newest.py": "_ATTEMPTS_MAX",
        "knapper/state/journal/results.py": "_BEHIND_MAX",
    },
    "a time-out between processes of one deployment, or of an operator's tool; the call is made again": {
        "gateway/rewards.py": "_COLD_S",
        "gateway/train_client.py": "_SILENCE_S",
        "knapper/catalogue/download.py": "_hub_answer_s _pip_s",
        "knapper/catalogue/servable.py": "_REHEARSAL_S",
        "knapper/chaos/client.py": "_HEARTBEAT_S _PAUSE_S PATIENCE_S",
        "knapper/chaos/kills.py": "_APPEARS_S _LOOK_S",
        "knapper/cluster/api.py": "_TIMEOUT_S",
        "knapper/cluster/google.py": "_TIMEOUT_S",
        "knapper/cluster/model_description.py": "_TIMEOUT_S",
        "knapper/events/broker.py": "_TIMEOUT_S",
        "knapper/events/pubsub.py": "_PULL_S _REQUEST_S",
        "knapper/exchange/gcs.py": "_TIMEOUT_S",
        "knapper/local/doctor.py": "_ANSWER_S",
        "knapper/local/refusal.py": "_CALLER_S",
        "knapper/local/web.py": "KEEP_ALIVE_S",
        "knapper/sandbox/pool.py": "_start_s_max _grace_s",
        "knapper/sandbox/warden.py": "taken_s_max",
        "knapper/store/gcs.py": "_TIMEOUT_S",
        "knapper/vllm/core.py": "_CLOSE_S",
    },
    "how work is cut: larger work takes more steps, and none is refused": {
        "gateway/bodies.py": "_SMALL_BYTES _COPIED_BYTES _PREFIX_BYTES",
        "gateway/openai/detokenizer.py": "_WINDOW_MAX _CONTEXT_MAX",
        "gateway/rewards.py": "_CHUNK_BYTES",
        "knapper/state/recent.py": "_FIRST_SPAN_S _READ_MAX _READ_MIN _WINDOWS_MAX",
        "gateway/sample_queue.py": "_IN_FLIGHT_MAX",
        "gateway/worker_pool.py": "_LARGE_BYTES",
        "knapper/catalogue/served_models.py": "_attempts_max",
        "knapper/catalogue/tokenizer.py": "_PIECE_CHARS",
        "knapper/cli/jobs_transfer.py": "_CHUNK_BYTES _CHANGES_MAX",
        "knapper/export/merge.py": "_BLOCK_BYTES",
        "knapper/export/space.py": "_SPARE_BYTES",
        "knapper/engine/hardware.py": "_SPEEDUP_MIN",
        "knapper/engine/layers/batch_invariance.py": "_ROWS_MAX _ELEMENTS_MAX _PROBE_ELEMENTS_MAX",
        "knapper/engine/layers/batch_invariant_attention.py": "_scores_max",
        "knapper/engine/layers/checkpointing.py": "_saved_bytes_least",
        "knapper/engine/layers/head.py": "ELEMENTS_MAX ROWS_MIN",
        "knapper/engine/layers/linear.py": "_REGISTER_BYTES",
        "knapper/engine/memory.py": "ROWS_CPU _HEAD_BYTES CUDA_BYTES",
        "knapper/engine/sampling/prefill_queue.py": "_ROWS_MAX _GROUPS_MAX",
        "knapper/engine/sampling/prefix_cache.py": "COMMON_MIN _COST_MIN",
        "knapper/engine/training/trainer.py": "ROWS_SHARED_CPU ROWS_SHARED_BY_FEW_CPU ROWS_SPREAD_GPU",
        "knapper/events/pubsub.py": "_MESSAGES_MAX",
        "knapper/exchange/directory.py": "_CHUNK_BYTES",
        "knapper/exchange/gcs.py": "_CHUNK_BYTES",
        "knapper/jobs/run_client.py": "_TOKENS_MAX _DATUMS_MAX",
        "knapper/jobs/runner.py": "_RECIPES_MAX",
        "knapper/local/refusal.py": "_PIECE_BYTES",
        "knapper/serving/engine.py": "_SLOTS_CPU_MAX _SLOTS_GPU_MAX",
        "knapper/state/gc/session.py": "_FENCES_MAX",
        "knapper/state/journal/accept.py": "_ON_LOOP_BYTES_MAX",
        "knapper/store/directory.py": "_SMALL_BYTES",
        "knapper/store/gcs.py": "part_bytes_max",
        "knapper/state/journal/outbox.py": "_AHEAD_MAX",
        "knapper/store/many.py": "_AT_ONCE_MAX",
        "knapper/vllm/factory.py": "_SEQUENCES_MAX",
        "knapper/wire/scan.py": "_PEEKED_BYTES",
        "knapper/wire/zstd.py": "_STEP_BYTES",
    },
    "how much a watched run remembers: what is forgotten is not known, and raises no alarm": {
        "gateway/diagnostics/monitor.py": "_RUNS_MAX _NOTES_MAX _NOTICES_MAX _QUEUE_MAX _MATCH_S",
        "gateway/diagnostics/sample_index.py": "_SAMPLES_MAX",
        "gateway/diagnostics/drawn_log.py": "_LOOK_EVERY_S",
        "knapper/state/drawn_samples.py": "OBJECTS_MAX SAMPLES_MAX",
        "knapper/diagnostics/timeline.py": "_OPERATIONS_MAX _UPDATES_MAX",
        "knapper/diagnostics/watch.py": "_BATCHES_MAX _DOUBLED_TOKENS_MIN",
        "knapper/engine/training/divergence.py": "_EXPONENT_MAX",
        "knapper/wire/fingerprints.py": "_TOKENS_MAX",
    },
    "how much of something is shown or logged": {
        "knapper/diagnostics/weights.py": "_DIGEST_CHARS",
        "knapper/state/alarms.py": "_READ_MAX",
        "gateway/console/history.py": "_CLAIMS_READ_MAX _PAUSE_S",
        "gateway/console/home.py": "_SKEW_S",
        "knapper/chaos/report.py": "_SHOWN_MAX",
        "knapper/cli/jobs_rollouts.py": "_SHOWN_CHARS",
        "knapper/cli/runs_client.py": "_NAME_CHARS",
        "knapper/local/broker/delivery.py": "_ERROR_CHARS_MAX",
        "knapper/local/process.py": "_last_bytes_max _last_lines_max",
        "knapper/state/damage.py": "_REPORTED_MAX",
        "knapper/text/suggestions.py": "_CHARS_MAX",
        "knapper/wire/json.py": "_SHOWN_BYTES_MAX",
    },
    "fixed by a format, a standard or the manifests, or a unit": {
        "knapper/engine/ranks/group.py": "HEADER_BYTES",
        "gateway/openai/responses.py": "_LOGPROB_MIN",
        "knapper/cluster/doctor.py": "_RESTARTS_MAX",
        "knapper/cluster/installation.py": "KNATIVE_MIN KUBERNETES_MIN",
        "knapper/engine/models/weight_files.py": "_HEADER_BYTES_MAX",
        "knapper/engine/models/preflight.py": "_LEAST_BYTES",
        "knapper/events/cloudevents.py": "_STEP_DIGITS_MAX",
        "knapper/local/broker/delivery.py": "_RETRIES_MAX HOPS_MAX",
        "knapper/state/journal/envelope.py": "BARE_MAX",
        "knapper/state/sessions.py": "DAY_S",
        "knapper/state/usage.py": "HOUR_S",
        "knapper/store/__init__.py": "NAME_CHARS_MAX",
        "knapper/wire/scan.py": "_FIXED_BYTES",
    },
    "only the server itself writes what this bounds": {
        "knapper/exchange/directory.py": "_FOLDERS_MAX",
        "knapper/jobs/listings.py": "_BILL_BYTES_MAX",
        "knapper/wire/frames.py": "_FRAME_BYTES_MAX",
    },
    "of a start, and of a copy of a process: nobody's request": {
        "knapper/engine/models/prefetch.py": "_RANGE_BYTES",
        "knapper/serving/identity.py": "_CLOCK_STEP_S",
        "knapper/serving/pod_snapshot.py": "_LINE_MAX _SEED_BYTES",
    },
    "a test's own": {
        "knapper/cli/chaos.py": "_STEPS_MIN",
        "knapper/local/broker/fault_injection.py": "COPIES_MAX LATE_S_MAX",
    },
}
# Schemas whose bounds are documented and compared field by field: docs/jobs.md, docs/rewards.md, docs/settings.md.
OWN_SCHEMAS = {
    "knapper/jobs/spec.py", "knapper/jobs/spec_part.py", "knapper/jobs/sweep/spec.py", "knapper/rewards/spec.py",
    "knapper/settings.py",
}  # fmt: skip
OF_THE_TYPE = {1, 2, 2**31 - 1, 2**63 - 1, 1e30}  # a fraction, a matrix, int32, int64, float32


def _constants(tree: ast.Module) -> Iterator[str]:
    """Names of a module's numbers that read as a bound."""
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            parts = list(ast.walk(node.value))
            if any(isinstance(part, ast.Constant) and type(part.value) in (int, float) for part in parts):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = (part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name))
                yield from filter(_BOUND.search, names)


def _schema_bounds(tree: ast.Module) -> Iterator[ast.expr]:
    """The upper bounds of fields: `le`, `lt` and `max_length` of `Meta(...)`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Meta":
            yield from (keyword.value for keyword in node.keywords if keyword.arg in ("le", "lt", "max_length"))


def _tree(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_bytes())


def test_a_bound_stands_in_limits_or_here_with_its_reason() -> None:
    bounds = {(path, name) for path in sources() if path != "knapper/limits.py" for name in _constants(_tree(path))}
    listed = [(path, name) for rooms in ELSEWHERE.values() for path in rooms for name in rooms[path].split()]
    assert len(listed) == len(set(listed))
    assert bounds - set(listed) == set(), "can a user meet it? then it belongs in knapper/limits.py; else name it here"
    assert set(listed) - bounds == set(), "these are gone"


def test_the_bound_of_a_request_field_is_one_of_limits_or_of_its_type() -> None:
    loose = [
        f"{path}:{bound.lineno}: {ast.unparse(bound)}"
        for path in sources()
        if path not in OWN_SCHEMAS
        for bound in _schema_bounds(_tree(path))
        if not ast.unparse(bound).startswith("limits.") and eval(ast.unparse(bound)) not in OF_THE_TYPE  # noqa: S307
    ]
    assert loose == []


@pytest.mark.parametrize("name", [name for name in vars(limits) if not name.startswith("_") and name != "MIB"])
def test_every_limit_is_used(name: str) -> None:
    assert any(f"limits.{name}" in (ROOT / path).read_text() for path in sources())


def test_the_scan_sees_what_it_is_for() -> None:
    tree = ast.parse(
        "_A_MAX: Final = 3\nb_s, _C_S_MAX = 1.0, 2.0\n_BYTES = 4\nword = 5\nX = Annotated[int, Meta(le=7)]"
    )
    assert list(_constants(tree)) == ["_A_MAX", "b_s", "_C_S_MAX", "_BYTES"]
    assert [ast.unparse(bound) for bound in chain(_schema_bounds(tree))] == ["7"]
