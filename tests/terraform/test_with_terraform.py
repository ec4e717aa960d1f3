"""Terraform itself, over providers that have Google's schema and nothing else: its tests pass, its order is right."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.terraform import provider, schema
from tests.terraform.reading import TERRAFORM

BINARY = shutil.which("terraform")
STAGES = ["10-platform", "20-knative", "30-functions"]
TOOLS = ("gcloud", "kubectl", "gke-gcloud-auth-plugin")
NEWEST = max(schema.PACKAGES)

pytestmark = pytest.mark.skipif(BINARY is None, reason="no terraform")


class Stage:
    """A copy of one, initialised. Programs that it starts write their arguments into `log`, and do nothing."""

    def __init__(self, name: str, version: str, folder: Path) -> None:
        self.log = folder / "log"
        shutil.copytree(
            TERRAFORM, folder / "terraform", ignore=shutil.ignore_patterns(".terraform*", ".rendered", "*.tfstate*")
        )
        shutil.copytree(TERRAFORM.parent / "knative", folder / "knative")
        self.directory = folder / "terraform/stages" / name
        (self.directory / "backend_override.tf").write_text('terraform {\n  backend "local" {}\n}\n')
        tools = folder / "tools"
        tools.mkdir()
        for tool in TOOLS:
            (tools / tool).write_text(f'#!/bin/sh\necho "{tool} $*" >> {self.log}\n')
            (tools / tool).chmod(0o755)
        self._environment = os.environ | provider.install(folder / "providers", version)
        self._environment["PATH"] = f"{tools}:{os.environ['PATH']}"
        self.run("init", "-input=false")

    def run(self, *command: str) -> str:
        assert BINARY
        done = subprocess.run(
            [BINARY, *command], cwd=self.directory, env=self._environment, capture_output=True, text=True, timeout=170
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def made_and_destroyed(self) -> list[str]:
        """What it ran while all was made, and destroyed again; its resources are mocked."""
        (given,) = (self.directory / "tests").glob("*.tftest.hcl")
        mocks, _, _ = given.read_text().partition('\nrun "')
        given.write_text(f'{mocks}\nrun "made" {{\n  command = apply\n}}\n')
        self.run("test", "-no-color")
        return self.log.read_text().splitlines()


NewStage = Callable[..., Stage]


@pytest.fixture
def stage_of(tmp_path: Path) -> NewStage:
    return lambda name, version=NEWEST: Stage(name, version, tmp_path)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize(
    "version", [pytest.param(each, marks=[] if each == NEWEST else [pytest.mark.long]) for each in schema.PACKAGES]
)
def test_the_tests_of_each_stage_pass_with_mocked_providers(name: str, version: str, stage_of: NewStage) -> None:
    said = stage_of(name, version).run("test", "-no-color")
    assert re.search(r"Success! [1-9]\d* passed, 0 failed", said), said


@pytest.mark.timeout(400)
def test_in_an_empty_project_everything_waits_for_the_apis(stage_of: NewStage) -> None:
    """By Terraform's own graph, in which it plans, and by which it makes things."""
    graph = stage_of("10-platform").run("graph")
    after: dict[str, set[str]] = {}
    for one, before in re.findall(r'"(\S+)" -> "(\S+)"', graph):
        after.setdefault(one, set()).add(before)

    def waits(one: str) -> bool:
        return one == "google_project_service.this" or any(map(waits, after.get(one, ())))

    there = re.findall(r'^ *"(\S+)" \[', graph, re.MULTILINE)
    assert len(there) >= 40
    assert [one for one in there if not waits(one)] == []
    identity = "module.events.google_project_service_identity.pubsub"
    for given in ("google_pubsub_topic_iam_member.dead", "google_pubsub_subscription_iam_member.dead"):
        assert identity in after[f"module.events.{given}"], "an account has to be there before it is given a role"


@pytest.mark.timeout(400)
def test_knative_is_waited_for_until_it_serves(stage_of: NewStage) -> None:
    ran = stage_of("20-knative").made_and_destroyed()
    assert [re.sub(r" --.*", "", line) for line in ran] == [
        "gcloud container clusters get-credentials knapper", *["kubectl wait"] * 3,
    ]  # fmt: skip
    waited = [re.findall(r"--for=condition=(\w+) (\S+)", line) for line in ran[1:]]
    assert waited == [
        [("Ready", "knativeserving/knative-serving")], [("Ready", "knativeeventing/knative-eventing")],
        [("Available", "deployment")],
    ]  # fmt: skip


@pytest.mark.timeout(400)
def test_the_objects_are_applied_once_and_go_before_their_namespace(stage_of: NewStage) -> None:
    ran = [line for line in stage_of("30-functions").made_and_destroyed() if line.startswith("kubectl")]
    assert [line.split()[1:3] for line in ran] == [
        ["apply", "--server-side"],
        ["delete", "services.serving.knative.dev,triggers.eventing.knative.dev,pingsources.sources.knative.dev"],
        ["delete", "brokers.eventing.knative.dev"],
        ["delete", "namespace"],
    ]
