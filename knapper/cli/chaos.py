"""`knapper chaos`. It imports what it needs."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from knapper.text.printable import say

if TYPE_CHECKING:
    from knapper.chaos.client import ChaosClient
    from knapper.chaos.targets import Targets

_STEPS_MIN = 12


def chaos(
    url: Annotated[
        str | None, typer.Option(help="The gateway; default: TINKER_BASE_URL, or http://127.0.0.1:8000.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="The data directory of a `knapper up` on this machine.")] = None,
    namespace: Annotated[str, typer.Option(help="Instead of --data: the namespace of a cluster's pods.")] = "",
    labels: Annotated[str, typer.Option(help="Pods to kill, as kubectl's --selector; default: all of Knative.")] = "",
    kills: Annotated[int, typer.Option(min=1, max=10_000, help="Number of kills.")] = 10,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of the data and of the kills.")] = 0,
    model: Annotated[str | None, typer.Option(help="Base model; default: the only one served.")] = None,
    tolerance: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Largest allowed difference; 0, as on a CPU: not a bit.")
    ] = 0.0,
    yes: Annotated[
        bool, typer.Option("--yes-kill-processes", help="Confirm that processes in use will be killed.")
    ] = False,
    kubeconfig: Annotated[Path | None, typer.Option(help="As kubectl's --kubeconfig.")] = None,
    context: Annotated[str | None, typer.Option(help="As kubectl's --context.")] = None,
) -> None:
    """Train twice, the second time under SIGKILL, and compare every bit. Exit status 1 if one differs."""
    import time

    from knapper.chaos.client import ChaosClient
    from knapper.chaos.kills import Killer
    from knapper.chaos.report import compare, report
    from knapper.chaos.workload import Plan, train
    from knapper.errors import InvalidField

    if not yes:
        raise InvalidField(
            "--yes-kill-processes", False, "given: processes that others use are killed",
            "Nothing acknowledged is lost, but all users wait for restarts",
        )  # fmt: skip
    url = url or os.environ.get("TINKER_BASE_URL") or "http://127.0.0.1:8000"
    client = ChaosClient(url, os.environ.get("TINKER_API_KEY") or "tml-local", time.monotonic, time.sleep)
    targets = _targets(url, data, namespace, labels, kubeconfig, context)
    plan = Plan(model or _only_model(client), seed, max(_STEPS_MIN, kills + 2))
    say(f"{plan.model}, seed {seed}: {plan.steps} steps undisturbed")
    calm = train(client, plan, lambda _step: None, lambda: None)
    say(f"the same under {kills} kills")
    killer = Killer(targets, kills, plan.steps, sorted(calm.step_s)[plan.steps // 2], seed, time.sleep)
    wild = train(client, plan, killer.before_step, killer.after_step)
    client.close()
    verdict = compare(calm, wild, tolerance)
    for line in report(calm, wild, killer.killed, _recoveries(data, wild.run), verdict):
        say(line)
    raise typer.Exit(1 if verdict.differences else 0)


def _targets(
    url: str, data: Path | None, namespace: str, labels: str, kubeconfig: Path | None, context: str | None
) -> "Targets":  # fmt: skip
    from knapper.chaos.targets import Pods, ProcessTargets
    from knapper.errors import InvalidField

    if (data is None) == (not namespace):
        raise InvalidField("(--data, --namespace)", (data and str(data), namespace), "exactly one of them")
    if data is not None:
        return ProcessTargets(data, url)
    from knapper.cluster.api import Api

    return Pods(Api.open(kubeconfig, context), namespace, labels)


def _only_model(client: "ChaosClient") -> str:
    from knapper.errors import InvalidField

    served = client.get("get_server_capabilities")["supported_models"]
    names = [str(each["model_name"]) for each in served if each["trainable"] and each["sampleable"]]
    if len(names) != 1:
        raise InvalidField("--model", None, f"one of those that are trained and sampled here: {names}")
    return names[0]


def _recoveries(data: Path | None, run: str) -> str:
    """How often another process took over the run, by its manifests, where its store can be listed from here."""
    import asyncio

    from knapper.errors import KnapperError
    from knapper.ids import RunId
    from knapper.settings import Settings, variable
    from knapper.state import layout
    from knapper.store.factory import open_store

    given = {variable("data"): str(data)} if data else {}
    try:
        store = open_store(Settings.load({**os.environ, **given}))
        claims = len(asyncio.run(store.list(layout.manifests(RunId(run)))))
    except KnapperError as error:
        return f"not known here ({error})"
    return str(claims - 1) if claims else "not known here (set KNAPPER_STORE to the deployment's)"
