"""`knapper chaos`: what an operator runs, and that it tells a difference, and kills nobody else's processes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from knapper.chaos.report import compare, report
from knapper.chaos.targets import Pods, ProcessTargets, Target
from knapper.chaos.workload import TrainingTrace
from knapper.cluster.api import Api
from knapper.errors import InvalidField
from tests.cluster.apiserver import Cluster, serving
from tests.command import knapper
from tests.conformance.server import Server
from tests.engine.tiny import tiny_model

YES = "--yes-kill-processes"


def chaos(*arguments: object) -> "subprocess.CompletedProcess[str]":
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("KNAPPER_", "TINKER_"))}
    return knapper("chaos", *map(str, arguments), environment=inherited)


def test_an_operator_kills_a_running_deployment_and_not_one_bit_differs(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "a" / "model" / "tiny")
    with Server.start(model, tmp_path / "data", "--isolated") as server:
        before = server.processes()["supervisor"], server.processes()["gateway"]
        done = chaos("--url", server.url, "--data", server.data, "--kills", 4, "--seed", 1, YES)
        print(done.stdout)
        assert done.returncode == 0, done.stdout + done.stderr + server.log()[-4000:]
        assert server.processes()["supervisor"] == before[0]
        assert server.processes()["gateway"] != before[1], "it was killed, and started again"
        assert "kills: 4 (broker 1, gateway 1, sample 1, train_step 1)" in done.stdout
        taken_over = re.search(r"^recoveries: (\d+)", done.stdout, re.MULTILINE)
        assert taken_over
        assert int(taken_over[1]) >= 1
        assert done.stdout.endswith("verdict: the same\n")


def test_nothing_is_killed_without_the_operators_word(tmp_path: Path) -> None:
    done = chaos("--data", tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"knapper: {YES} is False; allowed: given")


@pytest.mark.parametrize("whose", [[], ["--data", "x", "--namespace", "knapper"]])
def test_it_must_be_said_whose_processes_die(whose: list[str]) -> None:
    done = chaos(*whose, YES)
    assert done.returncode == 1
    assert "allowed: exactly one of them" in done.stderr


def _directory(tmp_path: Path, **roles: int) -> Path:
    run = tmp_path / "run"
    run.mkdir()
    found = {role: {"pid": pid, "port": 8000} for role, pid in roles.items()}
    (run / "processes.json").write_text(json.dumps(found))
    return tmp_path


def test_only_children_of_the_supervisor_are_killed_and_never_itself(tmp_path: Path) -> None:
    children = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) for _ in range(2)]
    try:
        engine, reward = (child.pid for child in children)
        stranger = os.getppid()  # such as a number in an old file may be
        directory = _directory(
            tmp_path, supervisor=os.getpid(), gateway=engine, sample=stranger, reward=reward, engine=2**22 + 1
        )
        targets = ProcessTargets(directory, "http://127.0.0.1:8000")
        assert targets.living() == [Target("gateway", str(engine))]
        assert not targets.kill(Target("sample", str(stranger)))
        assert not targets.kill(Target("supervisor", str(os.getpid())))
        assert targets.kill(Target("gateway", str(engine)))
        assert children[0].wait() == -9
        assert not targets.kill(Target("gateway", str(engine)))
        assert children[1].poll() is None
    finally:
        for child in children:
            child.kill()
            child.wait()


def test_another_deployments_gateway_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidField, match="a `knapper up` that runs on this machine"):
        ProcessTargets(tmp_path, "http://127.0.0.1:8000")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        directory = _directory(tmp_path, supervisor=os.getpid(), gateway=child.pid)
        with pytest.raises(InvalidField, match="which listens on port 8000"):
            ProcessTargets(directory, "http://127.0.0.1:8001")
    finally:
        child.kill()
        child.wait()


def test_pods_are_deleted_without_grace(tmp_path: Path) -> None:
    """On a constructed API server."""
    cluster = Cluster()
    for name, service, phase in (
        ("gateway-1", "gateway", "Running"), ("train-step-1", "train-step", "Running"),
        ("sample-1", "sample", "Pending"), ("somebody-else", "", "Running"),
    ):  # fmt: skip
        labels = {"serving.knative.dev/service": service} if service else {"app": "db"}
        metadata = {"name": name, "namespace": "knapper", "labels": labels}
        cluster.put({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "status": {"phase": phase}})
    with serving(cluster, tmp_path) as kubeconfig:
        targets = Pods(Api.open(kubeconfig), "knapper")
        assert list(targets.living()) == [Target("gateway", "gateway-1"), Target("train-step", "train-step-1")]
        one = Pods(Api.open(kubeconfig), "knapper", "serving.knative.dev/service=gateway")
        assert list(one.living()) == [Target("gateway", "gateway-1")]
        assert targets.kill(Target("train-step", "train-step-1"))
        assert not targets.kill(Target("train-step", "train-step-1"))
        assert list(targets.living()) == [Target("gateway", "gateway-1")]
    deleted = ("DELETE", "/api/v1/namespaces/knapper/pods/train-step-1", {"gracePeriodSeconds": ["0"]})
    assert deleted in cluster.asked


def _outcome(logprob: float = -1.5, token: int = 7, weights: str = "aa") -> TrainingTrace:
    answers = {"step 0: logprobs": np.array([logprob, -2.0], np.float32)}
    return TrainingTrace(
        "run", answers, {"step 0: tokens": np.array([token], np.int32)}, weights, [0.1], (0.1, "step 0")
    )


def test_one_bit_of_an_answer_a_sample_or_the_weights_is_a_difference() -> None:
    bit = float(np.nextafter(np.float32(-1.5), np.float32(0)))
    assert compare(_outcome(), _outcome(), 0.0).differences == []
    for wild in (_outcome(logprob=bit), _outcome(token=8), _outcome(weights="ab"), _outcome(logprob=float("nan"))):
        verdict = compare(_outcome(), wild, 0.0)
        assert len(verdict.differences) == 1
        assert list(report(_outcome(), wild, {"gateway": 1}, "1", verdict))[-1] == "verdict: DIFFERENT"
    missing = TrainingTrace("run", {}, dict(_outcome().drawn), "aa")
    assert compare(_outcome(), missing, 0.0).differences == ["step 0: logprobs: of another form"]


def test_a_tolerance_bounds_answers_and_judges_neither_bytes_nor_samples() -> None:
    near = compare(_outcome(), _outcome(logprob=-1.5005, token=8, weights="ab"), 1e-3)
    assert near.differences == []
    assert len(near.remarks) == 2
    for logprob in (-1.6, float("nan")):
        assert len(compare(_outcome(), _outcome(logprob=logprob), 1e-3).differences) == 1
