"""Every limit a user can meet: the sizes that are refused, the lists that are cut, the times after which things expire.

Each is tested at the limit and one past it. Other bounds (caches, polls, time-outs between our own processes, kernels)
stand beside the code they serve; `tests/test_limits.py` lists them with the reason why no user meets them.
Bounds of the fields of job.yaml stand in its schema, and on docs/jobs.md.
"""

MIB = 1024 * 1024

# ---- HTTP. Bodies are measured after decompression; each route names its limit.
body_bytes_max = 64 * MIB  # training, jobs, rewards. The SDK's chunks are about 5 MB; one huge datum travels alone.
sample_body_bytes_max = 32 * MIB  # a prompt, and the cells of target_prompt_logprobs, all as JSON
text_body_bytes_max = 4 * MIB  # the OpenAI protocol: a million tokens as ids, or of most texts
labels_body_bytes_max = MIB // 2  # lists and texts that people write: tags, reasons, telemetry events
small_body_bytes_max = 128 * 1024  # all others: a few names and numbers, and 16 KiB of metadata, every byte escaped
body_free_bytes = 64 * 1024  # of each body are not counted in the memory budget for bodies
worker_memory_bytes = 1024 * MIB  # the memory that decoding one body may use
zstd_window_bytes_max = 8 * MIB  # a decoder's memory; RFC 9659 allows no larger window over HTTP
head_bytes_max = 32 * 1024  # a request's URL and headers together: a token is about one thousand
head_fields_max = 128
head_s = 20.0  # for all headers of a request, from its first byte; of a new connection's first, from the beginning
body_rate_min = 1024  # bytes a second while a body is read; averaged over `body_stalled_s`
body_stalled_s = 20.0
body_discarded_bytes_max = 64 * MIB  # of a body that was answered early: clients read the answer once all is sent
body_discarded_s = 30.0
answer_stalled_s = 120.0  # a client that reads nothing of its answer for this long is disconnected
connections_max = 16384  # of one process; fewer where it may open fewer files
pipelined_max = 8  # requests queued on one connection; clients send one at a time
error_message_chars_max = 2000  # messages quote names that clients chose, which may be as long as a request

# ---- Fields of requests.
id_chars_max = 200
text_chars_max = 1024
token_chars_max = 4096  # a weights_access_token
name_chars_max = 128  # checkpoint names
project_chars_max = 128
key_note_chars_max = 128
role_chars_max = 64  # the role of a chat message
user_metadata_bytes_max = 16 * 1024
cursor_max = 2**63 - 1  # of sample sequence numbers, and of the cursor over them
tags_max = 256  # of a session
finish_detail_chars_max = 100_000
seed_min, seed_max = -(2**63), 2**63 - 1  # torch's range
counter_max = 10**17  # of a client's own counters, sequence numbers among them
ttl_s_min, ttl_s_max = 3600, 315_360_000

# ---- Lists.
page_max = 1000  # runs, checkpoints or sessions in one answer
offset_max = 10**9
sessions_found_max = 200  # of one search
checkpoints_found_max = 200  # of one search; the same as Tinker's own server
search_projects_max = 1000
search_models_max = 1000
search_owners_max = 10
search_statuses_max = 32
futures_listed_max = 4096  # samples in one answer of retrieve_futures; its cursor continues from there
models_listed_max = 1000  # checkpoints that v1/models lists, the newest; all others can be used too
operations_listed_max = 20_000  # operations that one trace, or one usage report, is made from
usage_days_max = 14
dead_letters_listed_max = 1000
jobs_listed_max = 1000
job_metrics_listed_max = 1000  # steps in one answer

# ---- Training.
datums_per_request_max = 4096
datum_parts_max = 262_144  # text chunks, arrays and provenance spans of all datums of one request
sparse_cells_max = 16 * MIB  # cells of one sparse array, once dense
target_columns_max = 64  # K of (N, K) targets
loss_inputs_max = 32  # arrays of one datum
loss_config_keys_max = 64
unknown_fields_max = 256  # protobuf fields of a request besides its datums
rank_max = 256
pattern_repeats_max = 3  # of * + { in a pattern of an imported adapter
operations_waiting_max = 16384  # accepted and not yet applied, for one run
operations_ahead_max = 1_000_000  # how far past the newest applied operation a seq_id may be
age_recipients_max = 10  # of one encrypted export; the same as Tinker's own server

# ---- Images in prompts.
image_bytes_max = 8 * MIB  # of a file
image_pixels_max = 16 * MIB  # 4096 x 4096, by its header: decoded they take three bytes each, and several times at once
image_sides_ratio_max = 200  # the longer one by the shorter one, as Qwen's own processor has it
image_tokens_max = 16384  # those of so many pixels, at 32 x 32 a token
images_max = 1024  # of one request
image_segments_max = 4096  # of a JPEG before its pixels

# ---- Sampling.
num_samples_max = 1024  # samples of one asample request
stop_sequences_max = 64
temperature_max = 1e6
greedy_temperature_max = 1e-6  # below it float32 cannot tell a distribution from its likeliest token
chat_messages_max = 4096  # of one chat completion
tools_max = 128  # of one chat, and calls of one message
tools_bytes_max = 512 * 1024  # of their descriptions and schemas, which all go into the prompt
grammar_bytes_max = 64 * 1024  # JSON schemas that constrain a text, without their descriptions
json_nesting_max = 100  # lists and objects inside each other, in schemas, arguments of calls, and metadata
schema_levels_max = 512  # and with the targets of its references: it is compiled by recursion, on the stack
grammar_step_fuel = 100_000  # llguidance's, for one token: a few milliseconds
grammar_step_items_max = 25_000  # likewise
grammar_states_max = 50_000  # of one text: up to 2 kB each
top_logprobs_max = 64  # k of topk_prompt_logprobs, topk_sample_logprobs and prompt_alt_tokens_k
prompt_targets_max = MIB  # cells of target_prompt_logprobs
clones_max = 100_000  # clients of one sampling session, besides the one that made it
clone_id_max = 10**9
samples_waiting_max = 8192  # asample requests in one gateway
samples_waiting_bytes_max = 256 * MIB  # of their prompts
sample_results_bytes_max = 256 * MIB  # results in one gateway; clients fetch them within a poll or two
sample_results_s = 600.0  # and for this long
adapters_cached_max = 32  # in vLLM's adapter directory, in use or not
adapters_cached_bytes_max = 4 * 1024 * MIB  # of their files, which are in memory

# ---- Captured episodes: agents' sessions, kept token for token.
episodes_max = 10_000  # of one tenant
episode_turns_max = 1000
episode_bytes_max = 64 * MIB  # of its turns as they are kept
episode_s = 30 * 24 * 3600.0  # after its first turn it is deleted
turns_listed_max = 100  # in one answer
turns_listed_bytes_max = 4 * MIB  # in one answer, as they are kept, unless one turn has more
episode_score_max = 1e6  # and not below its negative
logprob_min, logprob_max = -1e6, 1e-3  # in a file of episodes: at most 0 but for rounding

# ---- Time: sessions, results, holders.
poll_hold_s = 30.0  # retrieve_future; the SDK gives up at 45 s
start_s_max = 600.0  # of a function on this machine: a large model may come from a slow disk
poll_timeout_s_max = 3600  # that a client may ask for
session_timeout_s = 300.0  # without a heartbeat: samples are cancelled, runs released from memory
session_expiry_s = 7 * 24 * 3600.0  # without a heartbeat: the session no longer keeps its samplers' weights alive
token_s = 3600.0  # the life of a token; the SDK exchanges its key for another after half of it
key_fresh_s = 0.5  # how long a key check is cached; a revoked key is refused within a second
link_s = 3600.0  # the life of a signed URL
holder_timeout_s = 60.0  # a holder that does not answer a doorbell for this long is presumed dead: two slices
holder_stale_s = 600.0  # without a sign of life from a holder, the process that is notified takes the run over
slice_s = 30.0  # how long one doorbell works on a run before it rings the next
sequence_gap_s = 900.0  # a sequence number that has not arrived after this becomes a tombstone
replay_budget_s = 30.0  # compute that a recovery may have to repeat
replay_bytes_min = MIB // 4  # records that a recovery may have to read in any case
snapshot_bytes_per_replay_s = 25 * MIB  # bytes that are worth storing to spare a recovery one second of compute
snapshot_replay_s_min = 1.0  # and however few bytes: a snapshot is ten calls to the store
torn_after_s = 7 * 24 * 3600.0  # unreferenced parts of large objects are deleted: no writer takes this long
store_retry_s = 20.0  # retries of one call to the store; then the client retries
commit_inline_bytes_max = 4 * MIB  # results that share one commit

# ---- Jobs.
job_name_chars_max = 63
job_yaml_bytes_max = 64 * 1024
job_yaml_depth_max = 16
job_files_max = 64  # submitted with one job.yaml over HTTP
job_file_bytes_max = 256 * MIB  # one data file of a job
job_upload_bytes_max = 256 * MIB  # all files of a job that is submitted over HTTP
upload_part_bytes = 8 * MIB  # each part of a file but the last
uploads_bytes_max = 1024 * MIB  # a tenant's parts that no job has claimed
upload_s = 24 * 3600.0  # unclaimed parts are deleted after this, once a day
job_rows_max = 1_000_000  # of one data file
job_steps_max = 100_000
job_batch_max = 4096  # prompts, sequences or pairs of one step
job_staleness_max = 4
job_turns_max = 64  # of one episode with an environment
sweep_fields_max = 16  # that the trials of a sweep differ in
sweep_values_max = 64  # in the list of one of them
sweep_trials_max = 1000  # of one sweep
sweep_at_once_max = 64  # trials side by side
job_missing_s = 600.0  # files that job.yaml names and that have not arrived are an error after this
job_inbox_look_s = 300.0  # where nobody announces uploads, an inbox with nothing new is listed this often at last
job_appears_s = job_inbox_look_s + 60.0  # so long `--follow` waits for a job: such a look, and its start
job_server_lost_s = 900.0  # and this long for a server that went away

# ---- The console.
console_session_s = 12 * 3600.0  # then one signs in again
console_page_rows_max = 25  # of a list, and of a step's prompts
sweep_trials_shown_max = 200  # of a sweep, on its page
console_operations_max = 50  # the newest of a run
console_points_max = 2000  # of a curve: the newest steps
console_compared_max = 8  # runs and jobs on one chart
console_text_chars_max = 4000  # of one text on a page: a prompt, a completion, a reason
console_tokens_max = 4096  # of one conversation, each a cell
console_fields_max = 32  # of a form
console_form_bytes_max = 4096  # of a form of few fields; signing in, nobody is known yet
console_streams_max = 256  # open pages that are followed, of one gateway
console_watch_s = 300.0  # a page is followed this long after its run or job last changed

# ---- Rewards and their sandbox.
reward_terms_max = 16  # of one weighted sum
reward_s_max = 60.0  # the longest timeout that a job may give its reward for one rollout
reward_loading_s = 30.0  # for the imports of a reward.py
reward_judging_s = 3.0  # for the tests' own work, beyond the program's time
reward_pattern_chars_max = 1000
reward_file_bytes_max = MIB  # reward.py, a schema, a database's script
reward_reason_chars_max = 400  # of why a rollout has no score
reward_text_chars_max = MIB  # of one completion, and of prompt and answer as JSON
rollouts_per_request_max = 1024
reward_request_values_max = 4 * MIB  # commas and brackets of one request's JSON, those in its texts too
rewards_request_s = 240.0  # for all rollouts of one request; a cluster ends requests at 300
program_names_max = 1000  # public names of a program that tests can call
program_message_bytes_max = MIB  # one call or result between a program and its tests
value_depth_max = 50  # nesting of what a program returns
query_rows_max = 10_000
query_value_bytes_max = 10_000_000
sandbox_memory_bytes = 256 * MIB  # that one task may use beyond what was loaded before it
sandbox_loading_bytes = 4 * 1024 * MIB  # of address space, while modules load
sandbox_imports_max = 64  # modules that one program can name
sandbox_output_bytes_max = 64 * 1024  # of one cell

# ---- Quotas of tenants.
quota_max = 10**17
quotas_file_bytes_max = MIB
quota_fresh_s = 5.0  # a changed quota is in force everywhere after this
quota_usage_fresh_s = 30.0  # how often the tokens of a tenant with a quota are read from the store while it works
quota_run_silent_s = 24 * 3600.0  # a run whose client was not heard of for this long, and up to a day more, is not open
quota_pause_s_max = 25 * 3600  # the SDK waits this long for a quota: a day, and an hour for clocks

# ---- Events.
event_bytes_max = MIB  # of a CloudEvent; a doorbell has none, a storage event about one thousand
events_in_flight_max = 4096  # deliveries of the local broker
event_attribute_chars_max = 1024  # the longest attribute is an object's name

# ---- Models, for operators.
models_declared_max = 64
models_file_bytes_max = 64 * 1024
model_record_bytes_max = 64 * 1024
config_json_bytes_max = MIB
model_layers_max = 1024  # of a base model; its configuration is a list of them before a weight is looked at
model_experts_max = 1024  # of a layer, for the same reason
