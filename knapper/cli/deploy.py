"""`knapper deploy ...`: base models on a cluster. What a command needs is imported inside it."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from knapper.cli.tables import Json, listing, table
from knapper.text.printable import say

if TYPE_CHECKING:
    from knapper.cluster.api import Api
    from knapper.cluster.findings import Finding
    from knapper.cluster.state import Deployed

app = typer.Typer(name="deploy", help="Base models on a Knative cluster.", no_args_is_help=True, rich_markup_mode=None)

Kubeconfig = Annotated[Path | None, typer.Option(help="As kubectl's --kubeconfig.")]
Context = Annotated[str | None, typer.Option(help="As kubectl's --context.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the objects and change nothing.")]


@app.command()
def add(
    model: Annotated[str, typer.Argument(help="The base model's name, as clients request it.")],
    accelerator: Annotated[str, typer.Option(help="The GPU, by its GKE name; empty: that of the manifests.")] = "",
    manifests: Annotated[
        Path | None, typer.Option(help="A kustomization: a directory, or an overlay's name; default: gke-l4.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="The model's config.json; default: from the hub.")] = None,
    directory: Annotated[
        str, typer.Option(help="The weights' directory in pods; default: /srv/models/ORGANISATION--NAME.")
    ] = "",
    dtype: Annotated[str, typer.Option(help="Dtype of the base weights: auto, float32 or bfloat16.")] = "auto",
    sampler: Annotated[
        str, typer.Option(help="vllm to sample this model with vLLM; empty: that of the manifests.")
    ] = "",
    one_pod: Annotated[
        bool,
        typer.Option("--one-pod", help="Train and sample in one pod on one GPU, with vLLM where it takes the model."),
    ] = False,
    sample_replicas_max: Annotated[int | None, typer.Option(min=1, help="Most pods that sample.")] = None,
    gpus: Annotated[
        int | None, typer.Option(min=2, max=8, help="GPUs of a pod, over which the model is spread: 2, 4 or 8.")
    ] = None,
    dry_run: DryRun = False,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
) -> None:
    """Serve a base model: create its train_step and sample Services, their Triggers and its catalogue entry."""
    import yaml

    from knapper.cluster import model_description
    from knapper.cluster.kustomize import render
    from knapper.cluster.model import Wanted, objects
    from knapper.local.package_root import deployables

    described = model_description.described(
        model, config, directory, dtype, os.environ.get("HF_ENDPOINT") or model_description.HUB
    )
    root = deployables()
    path = model_description.manifests(manifests, root)
    rendered = render(path)
    if component := model_description.component(sampler, one_pod, described, rendered):
        rendered = render(path, root / "knative" / "components" / component)
    made = objects(rendered, Wanted(described.record, accelerator, sample_replicas_max, gpus))
    if dry_run:
        say(*yaml.safe_dump_all(made, sort_keys=False).splitlines())
        return
    api = _api(kubeconfig, context)
    *applied, entry = made
    for thing in applied:
        api.apply(thing)
        say(f"applied: {thing['kind']} {thing['metadata']['name']}")
    api.merge(entry)  # last: the gateway announces a model once its Services exist
    say(f"declared: {model}; the gateway serves it within two minutes, and no GPU runs before the first request")


@app.command()
def remove(
    model: Annotated[str, typer.Argument(help="The base model's name.")],
    dry_run: DryRun = False,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
) -> None:
    """Stop serving a base model. Its runs stay in the store, and continue when it is added again."""
    from knapper.cluster.model import LABEL, NAMESPACE, no_entry
    from knapper.state.model_record import slug

    api = _api(kubeconfig, context)
    label = f"{LABEL}={slug(model)}"
    kinds = (("eventing.knative.dev/v1", "Trigger"), ("serving.knative.dev/v1", "Service"))
    found = [thing for kind in kinds for thing in api.list(*kind, NAMESPACE, label)]
    if not dry_run:
        api.merge(no_entry(model))  # first: it is no longer announced
    for thing in found:
        kind, name = thing["kind"], thing["metadata"]["name"]
        say(f"would delete: {kind} {name}" if dry_run else f"deleted: {kind} {name}")
        if not dry_run:
            api.delete(thing)
    if not found:
        say(f"{model}: nothing to delete")


@app.command("list")
def list_(kubeconfig: Kubeconfig = None, context: Context = None, as_json: Json = False) -> None:
    """Print one line per base model."""
    from dataclasses import asdict

    from knapper.cluster.state import deployed

    every, rows = deployed(_api(kubeconfig, context)), []
    for one in every:
        states = {part.service: f"{part.state} ({part.replicas})" for part in one.parts}
        states |= {"sample": "in train-step"} if one.one_pod else {}
        gpu = next((part.gpu for part in one.parts), "-")
        error = next((part.error for part in one.parts if part.error), "" if one.declared else "not declared")
        waiting = "?" if one.waiting is None else str(one.waiting)
        rows.append(
            (one.model, states.get("train-step", "missing"), states.get("sample", "missing"), gpu, waiting, error)
        )
    lines = list(table(("MODEL", "TRAIN-STEP", "SAMPLE", "GPU", "RUNS WAITING", "LAST ERROR"), rows)) if rows else []
    empty = "no base model is deployed; `knapper deploy add MODEL` serves one"
    listing([asdict(one) for one in every], lines, empty, as_json=as_json)


@app.command()
def status(
    model: Annotated[str, typer.Argument(help="The base model's name.")],
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    as_json: Json = False,
) -> None:
    """Print a base model's state: revisions, replicas, cold or warm, GPU, queue, the last pod's start."""
    from dataclasses import asdict

    from knapper.cluster.state import deployed
    from knapper.errors import NotFound

    every = deployed(_api(kubeconfig, context))
    one = next((each for each in every if each.model == model), None)
    if one is None:
        raise NotFound(f"model {model!r} is not deployed; deployed: {', '.join(_names(every)) or 'none'}")
    listing(asdict(one), list(_status(one)), "", as_json=as_json)


def _status(one: "Deployed") -> Iterator[str]:
    yield f"{one.model}: {'served' if one.declared else 'not declared to the gateway'}"
    yield f"runs waiting: {'the gateway does not say' if one.waiting is None else one.waiting}"
    rows = [
        (each.name, each.revision or "-", str(each.replicas), each.state, each.gpu, each.error) for each in one.parts
    ]
    yield from table(("SERVICE", "REVISION", "REPLICAS", "STATE", "GPU", "LAST ERROR"), rows)
    for start in (each.start for each in one.parts if each.start is not None):
        stages = (("node", start.node_s), ("image and volumes", start.image_s), ("process", start.ready_s))
        stages_text = ", ".join(
            f"{stage} {'not yet' if taken is None else f'{taken:.0f} s'}" for stage, taken in stages
        )
        own = ", ".join(f"{stage.replace('_', ' ')} {took_s:.1f} s" for stage, took_s in start.stages.items())
        of_it = f" ({own})" if own else ""
        yield f"start of {start.pod}: {stages_text}{of_it}{f' ({start.waits_for})' if start.waits_for else ''}"


def _names(every: "Sequence[Deployed]") -> list[str]:
    return [each.model for each in every]


def _api(kubeconfig: Path | None, context: str | None) -> "Api":
    from knapper.cluster.api import Api

    return Api.open(kubeconfig, context)


def doctor(
    project: Annotated[str, typer.Option(help="Google Cloud project, to check quotas.")] = "",
    region: Annotated[str, typer.Option(help="The region for GPUs and buckets.")] = "",
    accelerator: Annotated[str, typer.Option(help="The GPU whose quota is checked, by its GKE name.")] = "",
    subscription: Annotated[str, typer.Option(help="The uploads' projects/PROJECT/subscriptions/NAME.")] = "",
    spot: Annotated[bool, typer.Option(help="Whether GPUs are Spot, which have their own quota.")] = True,
    cold_start: Annotated[
        float, typer.Option(min=1, help="Seconds that a cold start may take, the node included.")
    ] = 900,
    every: Annotated[bool, typer.Option("--all", help="Also print what is good.")] = False,
    data: Annotated[Path | None, typer.Option(help="The data directory of a `knapper up` on this machine.")] = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    as_json: Json = False,
) -> None:
    """Find problems and print their remedies: of the `knapper up` on this machine, else of a cluster.

    Exit status 1 if there are any.
    """
    import time
    from dataclasses import asdict
    from datetime import UTC, datetime

    from knapper.cluster.doctor import examine
    from knapper.cluster.findings import DoctorTarget
    from knapper.cluster.google import Google, default_token
    from knapper.local.package_root import deployables

    findings = None if kubeconfig or context or project else _here(data)
    if findings is None:
        google = Google(default_token, project, region, accelerator, subscription, spot)
        today = datetime.fromtimestamp(time.time(), UTC).date()
        findings = examine(DoctorTarget(_api(kubeconfig, context), deployables(), today, cold_start, [google.examine]))
    counts = {"good": 0, "wrong": 0, "unknown": 0}
    rows = []
    for finding in findings:
        counts[finding.verdict] += 1
        if finding.verdict != "good" or every:
            rows.append(asdict(finding))
            if not as_json:  # at once: some checks take a while
                say(f"{finding.verdict:<7} {finding.subject}: {finding.seen}")
                if finding.remedy:
                    say(f"        {finding.remedy}")
    listing(rows, [f"{counts['wrong']} wrong, {counts['unknown']} unknown, {counts['good']} good"], "", as_json=as_json)
    raise typer.Exit(1 if counts["wrong"] else 0)


def _here(data: Path | None) -> "Iterable[Finding] | None":
    """Findings about the server of the data directory; None where none runs."""
    import asyncio

    from knapper.errors import UserError
    from knapper.local import doctor as local
    from knapper.settings import Settings, variable

    settings = Settings.load({**os.environ, **({variable("data"): str(data)} if data else {})})
    port = local.running(settings)
    if port is not None:
        return asyncio.run(local.examine(settings, port))
    if data is not None:
        raise UserError(f"no `knapper up` runs over {settings.data}; start one, or leave out --data to check a cluster")
    return None
