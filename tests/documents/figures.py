"""Where each size and each time that a page states is from. Pages state none that is not here.

In the order of the page: the figure as it stands there, and its source. A source is

    limits:NAME, settings:NAME, MODULE:NAME    a number of the code, in bytes or seconds; a setting's default
    FILE: TEXT                                 a line of a file of the repository
    docs/performance.md                        a table that a stored run filled in (`make bench-page`)
    (reason)                                   nothing in the code decides it: measured, computed, or of others
"""

from typing import Final

_SDK: Final = "(the SDK's own)"
_SHAPES: Final = "(computed from shapes, as the page says)"
_RUN: Final = "(printed by the test's run that the page names)"
_TABLE: Final = "(made by knapper.engine.memory_table, and held to it by test_memory_table.py)"
_GPU: Final = "(the device's memory, by its maker)"
_AUTOSCALER: Final = "(the cluster autoscaler's)"

FIGURES: Final[dict[str, list[tuple[str, str]]]] = {
    "README.md": [
        ("1.5 GB", "Makefile: (95 packages, 1.5 GB)"), ("0.5 GB", "(the converted model, as the demo leaves it)"),
    ],
    "docs/capture.md": [("64 MiB", "limits:episode_bytes_max"), ("30 days", "limits:episode_s")],
    "docs/checkpoints.md": [
        ("75 s", _SDK), ("45 s", _SDK), ("30 s", _SDK), ("369 MB", _SHAPES), ("6 GB", _SHAPES),
        ("400 bytes", "(a manifest's size, about)"),
    ],
    "docs/cluster-trial.md": [
        ("10 GiB", "(what a trial needs, about)"),
        ("0.54 GB", "(as it was seen there)"),
        ("15 s", "(as it was seen there)"),
        ("3 s", "(as it was seen there)"),
        ("15 s", "(as it was seen there)"),
        ("11 s", "(as it was seen there)"),
        ("149 s", "(as it was seen there)"),
        ("56 s", "(as it was seen there)"),
        ("388 s", "(as it was seen there)"),
        ("7.6 s", "(as it was seen there)"),
        ("8.4 s", "(as it was seen there)"),
        ("17 s", "(as it was seen there)"),
        ("22 s", "(as it was seen there)"),
        ("192 s", "(as it was seen there)"),
        ("5.6 s", "(as it was seen there)"),
        ("0.6 s", "(as it was seen there)"),
        ("1.7 s", "(as it was seen there)"),
        ("1.8 s", "(as it was seen there)"),
        ("0.0 s", "(as it was seen there)"),
        ("2.0 s", "(as it was seen there)"),
        ("117 s", "(as it was seen there)"),
        ("44 s", "(as it was seen there)"),
        ("23 s", "(as it was seen there)"),
        ("18 s", "(as it was seen there)"),
        ("15 minutes", "(as it was set there)"),
        ("10 minutes", "(as it was set there)"),
        ("7.3 s", "(as it was seen there)"),
        ("1.1 s", "(as it was seen there)"),
        ("0.5 s", "(as it was seen there)"),
    ],
    "docs/console.md": [("12 hours", "limits:console_session_s"), ("30 s", "gateway.console.live:_LOOK_MAX_S")],
    "docs/errors.md": [
        ("64 MiB", "limits:body_bytes_max"), ("32 MiB", "limits:sample_body_bytes_max"),
        ("4 MiB", "limits:text_body_bytes_max"), ("512 KiB", "limits:labels_body_bytes_max"),
        ("128 KiB", "limits:small_body_bytes_max"), ("64 MiB", "limits:body_discarded_bytes_max"),
        ("32,768 bytes", "limits:head_bytes_max"), ("20 s", "limits:head_s"), ("1,024 bytes", "limits:body_rate_min"),
        ("20 s", "limits:body_stalled_s"), ("30 seconds", "knapper.concurrency.retry:_PAUSE_MAX_S"),
    ],
    "docs/export.md": [("64 MiB", "knapper.export.merge:_BLOCK_BYTES")],
    "docs/events.md": [("30 s", "limits:slice_s"), ("0.3 s", "knapper.local.broker.watcher:_STILL_S")],
    "docs/jobs.md": [
        ("256 MiB", "limits:job_upload_bytes_max"), ("8 MiB", "limits:upload_part_bytes"),
        ("8 MiB", "limits:upload_part_bytes"), ("24 hours", "limits:upload_s"), ("1 GiB", "limits:uploads_bytes_max"),
        ("10 minutes", "limits:job_missing_s"), ("256 MiB", "limits:job_file_bytes_max"),
        ("0.308 s", "docs/performance.md"), ("0.494 s", "docs/performance.md"),
    ],
    "docs/models.md": [
        ("256 MiB", "knapper/engine/images/tower.py: FEATURES_BYTES_MAX: Final = 256 * limits.MIB"),
        ("8 MiB", "limits:image_bytes_max"),
        ("50 ms", "(measured at the start, about)"),
    ],
    "docs/openai.md": [
        ("4 MiB", "limits:text_body_bytes_max"), ("64 KiB", "limits:grammar_bytes_max"),
        ("4 MiB", "limits:text_body_bytes_max"),
    ],
    "docs/gpu.md": [("10 s", "knapper.serving.backend:_IDLE_S")],
    "docs/operating.md": [
        ("30 s", "limits:slice_s"),
        ("30 days", "terraform/modules/storage/main.tf: days_since_noncurrent_time = 30"),
        ("24 GB", _GPU), ("40 GB", _GPU), ("80 GB", _GPU), ("80 GB", _GPU), ("141 GB", _GPU),
        *(
            (f"{weights} GB", _TABLE)
            for weights in ("3.4", "6.4", "8.0", "16.4", "23.5", "29.5", "41.8", "61.1", "65.5")
            for _ in range(2)
        ),
        ("0.16 GB", _SHAPES), ("1.4 GB", _SHAPES), ("3.4 GB", _SHAPES),
        ("17 min", _AUTOSCALER), ("1 min", "knative/base/train-step.yaml: autoscaling.knative.dev/window: 60s"),
        ("5 min", "knative/base/train-step.yaml: scale-to-zero-pod-retention-period: 300s"),
        ("2 min", "knative/base/sample.yaml: scale-to-zero-pod-retention-period: 120s"),
        ("0.5 min", "(Knative's scale-to-zero-grace-period)"), ("10 min", _AUTOSCALER), ("17 minutes", _AUTOSCALER),
        ("20 s", "gateway.peers:_FAILING_S"),
        ("0.5 s", "docs/cluster-trial.md: undisturbed step took 1.1 s in"),
        ("1.1 s", "docs/cluster-trial.md: undisturbed step took 1.1 s in"),
        ("20 s", "limits:store_retry_s"), ("7 days", "limits:torn_after_s"), ("15 minutes", "limits:sequence_gap_s"),
        ("30 s", "knapper.concurrency.retry:_PAUSE_MAX_S"), ("8 MiB", "knapper.store.gcs:part_bytes_max"),
    ],
    "docs/ranks.md": [
        ("24 GB", _GPU), ("80 GB", _GPU), ("80 GB", _GPU), ("141 GB", _GPU),
        *((f"{weights} GB", _TABLE) for weights in ("16", "66", "141", "470") for _ in range(4)),
    ],
    "docs/quickstart.md": [
        ("2 GB", "(the sum of the two)"), ("1.5 GB", "Makefile: (95 packages, 1.5 GB)"),
        ("0.5 GB", "(the converted model, as the demo leaves it)"),
    ],
    "docs/reliability.md": [
        ("404 s", _RUN), ("361 s", _RUN), ("250 ms", "tests/calm/test_calm.py: WAIT_S_MAX = 0.25"), ("0.22 s", _RUN),
        ("209 MiB", _RUN), ("1,060 MiB", _RUN)
    ],
    "docs/rewards.md": [
        ("256 MiB", "limits:sandbox_memory_bytes"), ("64 KiB", "limits:sandbox_output_bytes_max"),
        ("240 seconds", "limits:rewards_request_s"), ("256 MiB", "limits:sandbox_memory_bytes"),
    ],
    "docs/security.md": [
        ("30 s", "limits:poll_hold_s"), ("12 hours", "limits:console_session_s"), ("32 KiB", "limits:head_bytes_max"),
        ("20 s", "limits:head_s"), ("1 KiB", "limits:body_rate_min"), ("4 KiB", "limits:console_form_bytes_max"),
        ("8 MiB", "limits:zstd_window_bytes_max"),
        ("64 KiB", "limits:body_free_bytes"), ("1 GiB", "limits:worker_memory_bytes"),
        ("50 ms", "tests/calm/watch.py: EVERY_S = 0.05"),
        ("250 ms", "tests/calm/test_calm.py: WAIT_S_MAX = 0.25"),
    ],
}  # fmt: skip

# The same of numbers in words, which stand on the page once each: (phrase, value, source).
IN_WORDS: Final[dict[str, list[tuple[str, float, str]]]] = {
    "docs/capture.md": [
        ("at most 1000 turns", 1000, "limits:episode_turns_max"),
        ("a tenant 10,000 episodes", 10_000, "limits:episodes_max"),
        ("each 1 to 128 letters", 128, "limits:name_chars_max"),
    ],
    "docs/checkpoints.md": [
        ("**The files go** an hour after", 3600, "settings:keep_orphans_s"),
        ("unfinished ones after an hour |", 3600, "settings:keep_orphans_s"),
        ("| an hour after their commit | `KNAPPER_KEEP_RESULTS_S`", 3600, "settings:keep_results_s"),
        ("| a quarter of an hour after somebody last sampled", 900, "settings:keep_samplers_s"),
        ("| after an hour | `KNAPPER_KEEP_ORPHANS_S`", 3600, "settings:keep_orphans_s"),
        ("silent for a week |", 7 * 86400, "limits:session_expiry_s"),
        ("| after a day; a job's", 86400, "settings:keep_finished_s"),
        ("| after thirty days | `KNAPPER_KEEP_RECORDS_S`", 30 * 86400, "settings:keep_records_s"),
        ("a link for each file, good for an hour", 3600, "limits:link_s"),
        ("up to ten native", 10, "limits:age_recipients_max"),
        ("at most 1000 entries", 1000, "limits:page_max"),
        ("at most 20,000 of them", 20_000, "limits:operations_listed_max"),
    ],
    "docs/errors.md": [
        ("more than 128 headers", 128, "limits:head_fields_max"),
        ("download link is older than an hour", 3600, "limits:link_s"),
    ],
    "docs/jobs.md": [("and a million rows", 1_000_000, "limits:job_rows_max")],
    "docs/openai.md": [
        ("`n` up to 1024", 1024, "limits:num_samples_max"),
        ("`stop` up to 64 texts", 64, "limits:stop_sequences_max"),
        ("up to 64 alternatives", 64, "limits:top_logprobs_max"),
        ("the newest thousand of your sampler checkpoints", 1000, "limits:models_listed_max"),
        ("up to 128 `tools`", 128, "limits:tools_max"),
        ("up to 16 of them", 16, "knapper.catalogue.call_formats:_CALLS_MAX"),
        ("100 levels", 100, "limits:json_nesting_max"),
        ("512 with the targets of `$ref` added up", 512, "limits:schema_levels_max"),
    ],
    "docs/operating.md": [
        ("every ten seconds while files come", 10, "gateway.uploads:_LOOK_S"),
    ],
    "docs/rewards.md": [("(10 unless given, at most 60)", 60, "limits:reward_s_max")],
    "docs/console.md": [
        ("the newest 50 operations", 50, "limits:console_operations_max"),
        ("up to eight runs and jobs", 8, "limits:console_compared_max"),
        ("the newest 2000 steps", 2000, "limits:console_points_max"),
        ("of the 16 runs that were looked at last", 16, "gateway.console.history:_RUNS_MAX"),
        ("none five minutes after the last change", 300, "limits:console_watch_s"),
    ],
    "docs/security.md": [
        ("at most 128 headers", 128, "limits:head_fields_max"),
        ("holds 16,384 connections", 16384, "limits:connections_max"),
        ("is taken for two minutes ends", 120, "limits:answer_stalled_s"),
        ("for at most half a second", 0.5, "limits:key_fresh_s"),
        ("good for an hour, buys no other token", 3600, "limits:token_s"),
        ("may fetch that one file, for an hour", 3600, "limits:link_s"),
    ],
    "docs/vllm.md": [
        ("Up to 32 stay", 32, "limits:adapters_cached_max"),
        ("in up to 4 GiB", 4 * 1024**3, "limits:adapters_cached_bytes_max"),
    ],
}  # fmt: skip

# Pages of figures: what stands there was measured, and says by what and where.
MEASURED: Final = ("docs/performance.md", "docs/referee.md", "docs/vllm.md")
