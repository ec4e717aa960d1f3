"""Blocks that `test_blocks_run.py` does not run: what holds each instead, and why it is not run there.

A key is a page and a block's first line. `TESTS` names a test that runs the block or compares it with the code;
`NOT_RUN` says what a block needs that a test does not have. The words of commands in both are held by
`test_command_lines.py`.
"""

from typing import Final

_TRIAL = "docs/cluster-trial.md"
_OPERATING = "docs/operating.md"
_EVENTS = "tests/test_events_page.py::test_examples_are_events"
_REWARDS = "tests/rewards/test_page.py::test_the_examples_of_a_job_are_rewards"
_TRIAL_TEST = "tests/cluster/test_page.py::test_they_are_bash"

TESTS: Final = {
    ("README.md", "flowchart LR"): "tests/documents/test_architecture.py::test_both_pictures_show_the_same_processes",
    ("docs/architecture.md", "flowchart TB"): (
        "tests/documents/test_architecture.py::test_both_pictures_show_the_same_processes"
    ),
    (
        "docs/architecture.md",
        "gateway/            speaks the Tinker protocol; stores what it accepts, answers at once, never computes",
    ): "tests/test_house.py::test_the_tree_in_the_documents_is_the_tree",
    ("docs/checkpoints.md", "model = AutoModelForCausalLM.from_pretrained(base, tie_word_embeddings=False)"): (
        "tests/conformance/test_merging.py::test_an_adapter_of_a_tied_head_says_that_it_does_not_merge_and_how_it_would"
    ),
    ("docs/checkpoints.md", "$ tinker run list"): (
        "tests/conformance/test_cli.py::test_a_checkpoints_life_on_the_command_line"
    ),
    (_TRIAL, "mkdir -p out/trial"): "tests/cluster/test_page.py::test_a_registry_can_be_named",
    (_TRIAL, "python3.11 -m venv out/client && out/client/bin/pip install --quiet --editable '.[deploy]' tinker"): (
        "tests/cluster/test_containers.py::test_the_program_of_the_documented_trial_runs"
    ),
    ("docs/concepts.md", "runs/<hash>-<run>/in/<seq>        an accepted operation, as received"): (
        "tests/documents/test_concepts.py::test_the_journals_names_are_those_of_the_layout"
    ),
    ("docs/cookbook.md", "export TINKER_BASE_URL=http://127.0.0.1:8000 TINKER_API_KEY=tml-local"): (
        "tests/conformance/test_cookbook.py::test_a_loop_of_the_cookbook_has_its_effect"
    ),
    ("docs/events.md", "POST / HTTP/1.1"): _EVENTS,
    ("docs/events.md", "POST /events HTTP/1.1"): _EVENTS,
    ("docs/jobs.md", "kind: rl                      # or sft, dpo"): (
        "tests/jobs/test_documentation.py::test_the_example_of_the_page_is_a_job"
    ),
    ("docs/openai.md", "import tinker"): (
        "tests/conformance/test_openai.py::test_the_program_of_the_documentation_runs"
    ),
    ("docs/rewards.md", "reward: {name: exact_match}            # one named reward"): _REWARDS,
    ("docs/rewards.md", "reward: {code: reward.py}              # a function of yours, from a file beside job.yaml"): (
        _REWARDS
    ),
    ("docs/rewards.md", "reward:                                # a weighted sum"): _REWARDS,
}

NOT_RUN: Final = {
    ("README.md", "git clone REPOSITORY knapper && cd knapper"): "fetches this repository from where it is published",
    ("README.md", ("make demo   # installs, starts knapper, and trains a small real model (SmolLM2-135M) by RL and by"
                  " supervision; no GPU, no account")): "installs packages, and trains for minutes",
    ("README.md", "Reinforcement learning: 8 questions x 8 answers a step, reward 1 for the right sum"): (
        "what `make demo` printed on the machine that is named above it"
    ),
    ("CONTRIBUTING.md", ("make setup   # everything into .venv, the tests' and checks' needs too; instant when nothing"
                        " changed")): "installs packages, and runs all tests",
    (_TRIAL, "kind create cluster --name knapper"): "needs a cluster",
    (_TRIAL, "kubectl apply --server-side --force-conflicts -k knative/cluster/configmaps"): "needs a cluster",
    (_TRIAL, "for target in gateway train-step sample reward; do"): "needs a container engine",
    (_TRIAL, "kubectl apply -k knative/overlays/local"): "needs a cluster",
    (_TRIAL, ("gateway() { kubectl get pod -n knapper -l serving.knative.dev/service=gateway"
             " --field-selector=status.phase=Running -o name | head -1; }")): "needs a cluster",
    (_TRIAL, "knapper usage                                               # tokens, and seconds of the device"): (
        "needs a cluster"
    ),
    (_TRIAL, "for file in examples/jobs/rl/*; do"): "needs a cluster",
    (_TRIAL, ("kubectl delete pod -n knapper -l app.kubernetes.io/name=train-step --grace-period=0 --force     # while"
             " out/loop.py runs: it ends all the same")): "needs a cluster",
    (_TRIAL, ("kill $(jobs -p); kubectl delete -k knative/overlays/local --wait=false; kind delete cluster --name"
             " knapper")): "needs a cluster",
    (_OPERATING, ("gcloud storage buckets create gs://PROJECT-terraform --location=REGION"
                 " --uniform-bucket-level-access")): "needs a project of Google Cloud",
    (_OPERATING, "REGISTRY=$(terraform -chdir=terraform/stages/10-platform output -raw registry)"): (
        "needs a project of Google Cloud"
    ),
    (_OPERATING, ('python -c "from pathlib import Path; from knapper.catalogue.download import obtain;'
                 " obtain('HuggingFaceTB/SmolLM2-135M-Instruct', Path('models'))\"")): "downloads a model",
    (_OPERATING, "cd terraform/stages/30-functions"): "needs a project of Google Cloud",
    (_OPERATING, ("kubectl apply --server-side --force-conflicts -k knative/cluster/configmaps            # what"
                 " Knative must allow")): "needs a cluster",
    (_OPERATING, ("knapper deploy add Qwen/Qwen3-8B --accelerator nvidia-l4 --manifests"
                 " terraform/stages/30-functions/.rendered/knapper")): "needs a cluster",
    ("docs/quickstart.md", "make install   # what serving and the demo need, into .venv"): (
        "installs packages, and trains for minutes"
    ),
}  # fmt: skip
