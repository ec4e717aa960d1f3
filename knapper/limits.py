"""Every limit, in one place. Each is tested at the limit and one past it."""

MIB = 1024 * 1024

body_bytes_max = (
    64 * MIB
)  # one request, after decompression. The SDK's chunks are about 5 MB; one huge datum goes alone.
body_drain_bytes_max = 512 * MIB  # how much of an oversized body is read and thrown away so that the client hears why
name_chars_max = 128  # checkpoint names
user_metadata_bytes_max = 16 * 1024
datums_per_request_max = 4096
rank_max = 256
target_columns_max = 64  # K of (N, K) targets
datum_parts_max = 262_144  # text chunks, arrays and provenance spans of all datums of one request
sparse_cells_max = 16 * MIB  # cells of one sparse array, once dense
num_samples_max = 1024  # samples of one asample request
stop_sequences_max = 64
chat_messages_max = 4096  # of one chat completion
models_listed_max = 1000  # checkpoints that v1/models lists, the newest; others can be used all the same
top_logprobs_max = 64  # k of topk_prompt_logprobs, topk_sample_logprobs and prompt_alt_tokens_k
prompt_targets_max = MIB  # cells of target_prompt_logprobs
operations_waiting_max = 16384  # accepted and not yet applied, for one run
operations_ahead_max = 1_000_000  # how far past the newest applied operation a seq_id may lie
clones_max = 100_000  # clients of one sampling session, besides the one that made it
samples_waiting_max = 8192  # asample requests that one gateway holds
ttl_s_min, ttl_s_max = 3600, 315_360_000
poll_hold_s = 30.0  # retrieve_future; the SDK gives up at 45 s
slice_s = 30.0  # how long one bell works on a run before it rings the next
hole_s = 900.0  # a sequence number that never arrives becomes a tombstone after this
session_lapse_s = 300.0  # no heartbeat for so long: samples cancelled, runs released from memory
replay_budget_s = 30.0  # compute that a recovery may have to repeat
collect_after_s = 7 * 24 * 3600.0  # journal objects older than this may be swept
commit_inline_bytes_max = 4 * MIB  # results that share one commit
page_max = 1000  # how many runs, checkpoints or sessions one list answers
project_chars_max = 128
token_s = 3600.0  # a token is good for this long; the SDK exchanges its key for another at half of it
key_note_chars_max = 128
key_fresh_s = 0.5  # a key that was good so long ago is good; a revoked one is refused within a second
link_s = 3600.0  # a signed URL is good for this long
session_silent_s = 7 * 24 * 3600.0  # a session that nobody has heard of for so long holds its samplers' weights no more
orphan_grace_s = 3600.0  # files that nothing leads to any more are deleted after this, so that loads under way succeed
operations_told_max = 20_000  # operations that one trace, or one report of usage, is made from
usage_days_max = 14
reward_terms_max = 16  # of one weighted sum
reward_s_max = 60.0  # the longest that a job may give its reward for one rollout
reward_pattern_chars_max = 1000
reward_file_bytes_max = MIB  # reward.py, a schema, a database's script
reward_reason_chars_max = 400  # of why a rollout has no score
