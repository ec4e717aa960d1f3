"""Which extra brings a module, so that a missing one is reported in one line with the command that installs it."""

from typing import Final

from knapper.errors import UserError

# By the first parts of a module's name, the longest first. tests/cli/test_extras.py holds it to pyproject.toml.
EXTRA_OF: Final = {
    "google.cloud.pubsub_v1": "gcp",
    "google.cloud": "gcp",
    "google.api_core": "gcp",
    "google.auth": "gcp",
    "requests": "gcp",
    "urllib3": "gcp",
    "gguf": "train",
    "huggingface_hub": "train",
    "PIL": "train",
    "safetensors": "train",
    "torch": "train",
    "transformers": "train",
    "jsonschema": "reward",
    "math_verify": "reward",
    "referencing": "reward",
    "optuna": "sweep",
    "jsonpatch": "deploy",
    "kubernetes": "deploy",
    "opentelemetry": "traces",
    "tensorboard": "log",
    "trackio": "log",
    "wandb": "log",
    "vllm": "vllm",
    "matplotlib": "demo",
    "tinker": "demo",
}


def brought_by(module: str) -> tuple[str, str] | None:
    """The name under which EXTRA_OF lists `module` or a package around it, and the extra that brings it; None for a
    module of the core, or of no extra."""
    parts = module.split(".")
    names = (".".join(parts[:size]) for size in range(len(parts), 0, -1))
    return next(((name, EXTRA_OF[name]) for name in names if name in EXTRA_OF), None)


def refusal(error: ModuleNotFoundError) -> UserError | None:
    """The error for a module that an extra would have brought; None for any other, which is a defect."""
    module = error.name or ""
    brought = brought_by(module)
    if brought is None and module.partition(".")[0] == "google":
        brought = module, "gcp"  # not even the namespace is there
    if brought is None:
        return None
    name, extra = brought
    return UserError(f"{name} is not installed; it comes with: pip install 'knapper[{extra}]'")
