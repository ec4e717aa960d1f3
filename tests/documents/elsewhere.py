"""Blocks that `test_blocks_run.py` does not run: what holds each instead, and why it is not run there.

A key is a page and how the first line of a block on it begins. `TESTS` names a test that runs the block or compares it
with the code; `NOT_RUN` says what a block needs that a test does not have. The words of commands in both are held by
`test_command_lines.py`.
"""

from typing import Final

_TRIAL: Final = "docs/cluster-trial.md"
_OPERATING: Final = "docs/operating.md"
_EVENTS: Final = "tests/test_events_page.py::test_examples_are_events"
_REWARDS: Final = "tests/rewards/test_page.py::test_the_examples_of_a_job_are_rewards"
_ENVIRONMENT: Final = "tests/jobs/test_environments.py::test_the_environment_of_the_page_plays"

TESTS: Final = {
    ("docs/openai.md", "import base64"): "tests/conformance/test_images_in_chats.py::test_all_protocols_see_the_same",
    ("README.md", "flowchart LR"): "tests/documents/test_architecture.py::test_both_pictures_show_the_same_processes",
    (
        "docs/alarms.md",
        "client = service.create_lora_training_client",
    ): "tests/gateway/diagnostics/test_alarms.py::test_staleness_that_is_declared_raises_none",
    (
        "docs/console.md",
        "knapper runs list",
    ): "tests/conformance/test_runs_cli.py::test_a_run_is_listed_shown_watched_and_compared",
    (
        "docs/architecture.md",
        "flowchart TB",
    ): "tests/documents/test_architecture.py::test_both_pictures_show_the_same_processes",
    (
        "docs/architecture.md",
        "gateway | functions",
    ): "tests/documents/test_architecture.py::test_the_page_shows_the_layers_of_the_contract",
    (
        "docs/architecture.md",
        "gateway/            speaks the Tinker protocol",
    ): "tests/test_house.py::test_the_tree_in_the_documents_is_the_tree",
    (
        "docs/checkpoints.md",
        "model = AutoModelForCausalLM.from_pretrained",
    ): "tests/conformance/test_merging.py::test_an_adapter_of_a_tied_head_says_that_it_does_not_merge_and_how_it_would",
    (
        "docs/checkpoints.md",
        "$ tinker run list",
    ): "tests/conformance/test_cli.py::test_a_checkpoints_life_on_the_command_line",
    (_TRIAL, "mkdir -p out/trial"): "tests/cluster/test_page.py::test_a_registry_can_be_named",
    (
        _TRIAL,
        "python3.11 -m venv out/client",
    ): "tests/cluster/test_containers.py::test_the_program_of_the_documented_trial_runs",
    (
        "docs/concepts.md",
        "runs/<hash>-<run>/in/<seq>",
    ): "tests/documents/test_concepts.py::test_the_journals_names_are_those_of_the_layout",
    (
        "docs/cookbook.md",
        "export TINKER_BASE_URL=",
    ): "tests/conformance/test_cookbook.py::test_a_loop_of_the_cookbook_has_its_effect",
    ("docs/events.md", "POST / HTTP/1.1"): _EVENTS,
    ("docs/events.md", "POST /events HTTP/1.1"): _EVENTS,
    (
        "docs/jobs.md",
        "   0:00  loading the model, for 0:01",
    ): "tests/conformance/test_follow.py::test_a_job_that_is_not_there_yet_is_waited_for_and_its_cold_start_is_told",
    (
        "docs/gpu.md",
        "make bench-gpu",
    ): "tests/benchmarks/test_gpu.py::test_every_phase_finds_its_figures_and_the_page_is_made_of_them",
    (
        "docs/jobs.md",
        "evaluate: {data: held_out.jsonl",
    ): "tests/jobs/test_documentation.py::test_the_example_of_the_best_step_belongs_to_every_kind",
    ("docs/jobs.md", "kind: rl "): "tests/jobs/test_documentation.py::test_the_example_of_the_page_is_a_job",
    (_OPERATING, "knapper quota set alice"): "tests/cli/test_quota.py::test_the_commands_of_the_page_do_what_they_say",
    (
        _OPERATING,
        "default: {runs: 5, rank: 16}",
    ): "tests/cli/test_quota.py::test_the_file_of_the_page_is_a_file_of_quotas",
    (
        "docs/openai.md",
        "import anthropic",
    ): "tests/conformance/test_anthropic.py::test_the_program_of_the_documentation_runs",
    ("docs/openai.md", "import tinker"): "tests/conformance/test_openai.py::test_the_program_of_the_documentation_runs",
    (
        "docs/capture.md",
        "import httpx",
    ): "tests/conformance/test_capture.py::test_the_program_and_the_commands_of_the_page_train_an_adapter",
    (
        "docs/capture.md",
        "knapper capture list",
    ): "tests/conformance/test_capture.py::test_the_program_and_the_commands_of_the_page_train_an_adapter",
    (
        "docs/export.md",
        "knapper export tinker://RUN",
    ): "tests/conformance/test_merging.py::test_an_export_is_the_model_that_is_served",
    (
        "docs/export.md",
        "knapper import ./their-adapter",
    ): "tests/conformance/test_merging.py::test_an_imported_adapter_trains_and_samples",
    ("docs/rewards.md", "reward: {name: exact_match}"): _REWARDS,
    ("docs/rewards.md", "reward: {code: reward.py}"): _REWARDS,
    ("docs/rewards.md", "reward:  "): _REWARDS,
    ("docs/rewards.md", "environment: {code: env.py"): _ENVIRONMENT,
    ("docs/rewards.md", "import random"): _ENVIRONMENT,
    (
        "docs/jobs.md",
        "init_from: tinker://RUN",
    ): "tests/jobs/test_init_from.py::test_the_example_of_the_page_is_a_part_of_a_job",
    ("docs/jobs.md", "sweep:"): "tests/jobs/sweep/test_spec.py::test_the_example_of_the_page_is_a_sweep",
}

NOT_RUN: Final = {
    (
        "docs/recipes.md",
        "knapper up &",
    ): "trains for minutes; tests/recipes runs the notebook, which calls the same script, in a reduced form",
    (
        "docs/referee.md",
        "pip install 'knapper[train,demo]'",
    ): "installs packages",
    ("README.md", "git clone REPOSITORY knapper && cd knapper"): "fetches this repository from where it is published",
    ("README.md", "make demo"): "installs packages, and trains for minutes",
    (
        "README.md",
        "Reinforcement learning: 8 questions x 8 answers a step, reward 1 for the right sum",
    ): "what `make demo` printed on the machine that is named above it",
    ("docs/ranks.md", "gpu_pools = {"): "a part of a tfvars file, for a cluster",
    ("docs/ranks.md", "knapper up --model Qwen/Qwen3-32B --devices 4"): "needs several GPUs, and a large model",
    ("CONTRIBUTING.md", "make setup"): "installs packages, and runs all tests",
    (_TRIAL, "kind create cluster --name knapper"): "needs a cluster",
    (_TRIAL, "for map in"): "needs a cluster",
    (_OPERATING, "for map in"): "needs a cluster",
    (_TRIAL, "for target in"): "needs a container engine",
    (_TRIAL, "kubectl apply -k knative/overlays/local"): "needs a cluster",
    (_TRIAL, "gateway() {"): "needs a cluster",
    (_TRIAL, "knapper usage"): "needs a cluster",
    (_TRIAL, "for file in examples/jobs/rl/*; do"): "needs a cluster",
    (_TRIAL, "kubectl delete pod"): "needs a cluster",
    (_TRIAL, "kill $(jobs -p);"): "needs a cluster",
    (_OPERATING, "gcloud storage buckets create"): "needs a project of Google Cloud",
    (_OPERATING, "REGISTRY=$(terraform"): "needs a project of Google Cloud",
    (
        _OPERATING,
        'python -c "from pathlib import Path; from knapper.catalogue.download import obtain;',
    ): "downloads a model",
    (_OPERATING, "cd terraform/stages/30-functions"): "needs a project of Google Cloud",
    (_OPERATING, "knapper deploy add"): "needs a cluster",
    ("docs/quickstart.md", "make install"): "installs packages, and trains for minutes",
}
