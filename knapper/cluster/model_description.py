"""A base model's record, from its config.json in a file or on the hub."""

import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import msgspec

from knapper import limits
from knapper.catalogue.servable import record_of
from knapper.cluster.kustomize import Object
from knapper.cluster.model import only, samples_by_vllm
from knapper.engine.models.config import computed_by
from knapper.errors import InvalidField, Unavailable
from knapper.state.model_record import ModelRecord

HUB = "https://huggingface.co"
_TIMEOUT_S = 20.0


def record(model: str, config: Path | None, directory: str, dtype: str, hub: str = HUB) -> ModelRecord:
    """The record of a model that pods find in `directory`. Raises InvalidField, Unavailable."""
    with TemporaryDirectory() as empty:
        if config is None:
            config = Path(empty) / "config.json"
            config.write_bytes(_from_hub(model, hub))
        where = config.parent if config.is_file() else config
        found = record_of(where, model, dtype=dtype, train_step_url="-", sample_url="-")
        found = msgspec.structs.replace(found, computed_by=computed_by(where))
    return type(found)(
        **{name: getattr(found, name) for name in found.__struct_fields__ if name not in ("directory", "tokenizer_id")},
        directory=directory or f"/srv/models/{model.replace('/', '--')}",
        tokenizer_id=model,  # what clients elsewhere give to AutoTokenizer: never a path of the cluster's
    )


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


def wants_vllm(sampler: str, record: ModelRecord, rendered: Sequence[Object]) -> bool:
    """Whether vLLM is to sample and does not by these manifests. Raises InvalidField for a sampler that cannot be."""
    if sampler not in ("", "vllm"):
        raise InvalidField("sampler", sampler, "vllm, or empty: that of the manifests")
    if not sampler:
        return False
    if record.computed_by != "native":
        raise InvalidField("sampler", sampler, f"none for {record.name}, which {record.computed_by} computes")
    if record.arch.endswith("ForConditionalGeneration"):  # of native models, those of images and text
        raise InvalidField("sampler", sampler, f"none for {record.name}, of which only the text part is served")
    service = only(rendered, "serving.knative.dev/v1", "Service", "sample")
    (container,) = service["spec"]["template"]["spec"]["containers"]
    if "nvidia.com/gpu" not in container["resources"]["limits"]:
        raise InvalidField("sampler", sampler, "none with manifests that ask for no GPU", "Take an overlay for GPUs")
    return not samples_by_vllm(service)


def manifests(given: Path | None, root: Path) -> Path:
    """The kustomization to derive objects from: a directory, or the name of an overlay."""
    found = given or Path("gke-l4")
    if not found.is_dir() and os.sep not in str(found):
        found = root / "knative" / "overlays" / found
    if not (found / "kustomization.yaml").is_file():
        overlays = ", ".join(sorted(path.name for path in (root / "knative" / "overlays").iterdir()))
        raise InvalidField("manifests", str(given), f"a directory with a kustomization.yaml, or an overlay: {overlays}")
    return found
