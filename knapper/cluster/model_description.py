"""A base model as its config.json describes it, in a file or on the hub: its record, and which pods it needs."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import msgspec

from knapper import limits
from knapper.catalogue.servable import not_sampled_by_vllm, record_of
from knapper.cluster.kustomize import Object
from knapper.cluster.model import has_gpu, only, samples_by_vllm, samples_too, shares_card
from knapper.engine.models.config import computed_by
from knapper.errors import InvalidField, Unavailable
from knapper.state.model_record import ModelRecord

HUB = "https://huggingface.co"
_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Described:
    """`not_by_vllm`: the model, and why vLLM is not asked to sample it; empty if it is."""

    record: ModelRecord
    not_by_vllm: str


def described(model: str, config: Path | None, directory: str, dtype: str, hub: str = HUB) -> Described:
    """A model that pods find in `directory`. Raises InvalidField, Unavailable."""
    with TemporaryDirectory() as empty:
        if config is None:
            config = Path(empty) / "config.json"
            config.write_bytes(_from_hub(model, hub))
        where = config.parent if config.is_file() else config
        found = record_of(where, model, dtype=dtype, train_step_url="-", sample_url="-")
        not_by_vllm = not_sampled_by_vllm(where, model)
        found = msgspec.structs.replace(
            found,
            computed_by=computed_by(where),
            directory=directory or f"/srv/models/{model.replace('/', '--')}",
            tokenizer_id=model,  # what clients elsewhere give to AutoTokenizer: never a path of the cluster's
        )
    return Described(found, not_by_vllm)


def _from_hub(model: str, hub: str) -> bytes:
    try:
        answer = httpx.get(f"{hub}/{model}/resolve/main/config.json", timeout=_TIMEOUT_S, follow_redirects=True)
    except httpx.HTTPError as error:
        raise Unavailable(f"{hub} does not answer ({error}); give the model's config.json: --config PATH") from error
    if answer.status_code in (401, 403, 404):
        raise InvalidField("model", model, f"one that {hub} shows", "Or give its config.json: --config PATH")
    if not answer.is_success or len(answer.content) > limits.config_json_bytes_max:
        raise Unavailable(f"{hub} answers {answer.status_code}; give the model's config.json: --config PATH")
    return answer.content


def component(sampler: str, one_pod: bool, model: Described, rendered: Sequence[Object]) -> str:
    """The component that the manifests need for this sampler and these pods: one-pod, vllm or none.

    Raises InvalidField for a sampler that cannot be, and for manifests of another kind.
    """
    if sampler not in ("", "vllm"):
        raise InvalidField("sampler", sampler, "vllm, or empty: that of the manifests")
    trains = only(rendered, "serving.knative.dev/v1", "Service", "train-step")
    if samples_too(trains):  # whose sampler is vLLM where it can be, and else the engine's own
        _expect_by_vllm(sampler, model)
        return ""
    samples = only(rendered, "serving.knative.dev/v1", "Service", "sample")
    by_vllm = samples_by_vllm(samples)
    if one_pod and (by_vllm or shares_card(trains)):
        raise InvalidField(
            "one-pod", "yes", "no with manifests where vLLM has pods of its own, or two pods share a GPU",
            "Take an overlay without components/vllm and components/gpu-time-sharing, such as gke-l4",
        )  # fmt: skip
    _expect_by_vllm("vllm" if by_vllm else sampler, model)
    if (one_pod or sampler) and not has_gpu(trains if one_pod else samples):
        field, value = ("one-pod", "yes") if one_pod else ("sampler", sampler)
        raise InvalidField(field, value, "none with manifests that ask for no GPU", "Take an overlay for GPUs")
    if one_pod:
        return "one-pod"
    return "vllm" if sampler and not by_vllm else ""


def _expect_by_vllm(sampler: str, model: Described) -> None:
    """Raises InvalidField for a model that vLLM is not asked to sample, where nothing but vLLM would."""
    if sampler and model.not_by_vllm:
        raise InvalidField(
            "sampler", sampler, f"torch, the engine's own, for {model.not_by_vllm}",
            "Leave --sampler out, with manifests that do not sample by vLLM, such as gke-l4",
        )  # fmt: skip


def manifests(given: Path | None, root: Path) -> Path:
    """The kustomization to derive objects from: a directory, or the name of an overlay."""
    found = given or Path("gke-l4")
    if not found.is_dir() and os.sep not in str(found):
        found = root / "knative" / "overlays" / found
    if not (found / "kustomization.yaml").is_file():
        overlays = ", ".join(sorted(path.name for path in (root / "knative" / "overlays").iterdir()))
        raise InvalidField("manifests", str(given), f"a directory with a kustomization.yaml, or an overlay: {overlays}")
    return found
