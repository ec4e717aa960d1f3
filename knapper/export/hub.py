"""An export on the Hugging Face hub, or on a server that speaks its protocol (HF_ENDPOINT), by the hub's own client."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from knapper.catalogue.hub_errors import NO_ANSWER
from knapper.errors import UserError

CARD = "README.md"


def push(repository: str, folder: Path, names: Sequence[str], *, private: bool, message: str) -> str:
    """Upload those files of the folder in one commit; the repository is made if there is none. Returns its address.

    Files that the hub has already are not sent again. Raises UserError for what the hub refuses.
    """
    api = HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=[*names], commit_message=message)
    except HFValidationError as error:
        raise UserError(
            f"--push-to-hub is {repository!r}; allowed: a name like 'organisation/model'. {error}"
        ) from error
    except HfHubHTTPError as error:
        raise UserError(
            f"{api.endpoint} refuses {repository}: {str(error).splitlines()[0].rstrip('.')}. Set HF_TOKEN to one that "
            "may write there, or `hf auth login`"
        ) from error
    except ValueError as error:  # the hub does not take the card
        raise UserError(f"{folder / CARD}: {' '.join(str(error).split())}. Correct it, or remove it") from error
    except OfflineModeIsEnabled as error:
        raise UserError("HF_HUB_OFFLINE is set, so nothing is uploaded; unset it") from error
    except NO_ANSWER as error:
        raise UserError(f"{api.endpoint} does not answer: {error}; start this again later") from error
    return str(address)


def card(base_model: str, kind: str, checkpoint: str) -> str:
    """The README of a repository: what the hub shows and links by."""
    library = {"peft": "peft", "gguf": "gguf"}.get(kind, "transformers")
    relation = {"peft": "adapter", "gguf": "quantized"}.get(kind, "finetune")
    named = f"base_model: {base_model}\nbase_model_relation: {relation}\n" if not base_model.startswith("/") else ""
    what = {
        "peft": "A LoRA adapter, which PEFT loads onto its base model.",
        "gguf": "GGUF files for llama.cpp.",
        "merged": "A LoRA adapter merged into its base model.",
    }[kind]
    return f"---\n{named}library_name: {library}\ntags: [knapper, lora]\n---\n\n{what}\n\nTrained as `{checkpoint}`.\n"
