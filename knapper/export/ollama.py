"""A GGUF file for Ollama: a Modelfile with the model's chat template, and `ollama create`, where Ollama is."""

import shutil
import subprocess
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

from knapper.catalogue.tokenizer import Language
from knapper.engine.models.fields import read_json
from knapper.errors import UserError
from knapper.export.chat_turns import Message, Turns, turns

_DAYS: Final = (0.0, 400 * 86400.0)  # a template that writes today's date is none of fixed turns


def modelfile(model: Path, gguf: Path) -> tuple[str, bool]:
    """(the Modelfile, whether it has the chat template). `model`: the directory that the GGUF file was made of."""
    found = _turns(model)
    lines = [f"FROM ./{gguf.name}"]
    if found is not None:
        lines.append(f'TEMPLATE """{found.template()}"""')
        if stop := found.around["assistant"][1].strip():
            lines.append(f"PARAMETER stop {msgspec.json.encode(stop).decode()}")
    return "\n".join(lines) + "\n", found is not None


def create(name: str, file: Path) -> None:
    """Run `ollama create`. Raises UserError if it fails, or is not there."""
    program = shutil.which("ollama")
    if program is None:
        raise UserError(
            f"ollama is not on PATH; {file} is written: where it is, `ollama create {name} -f {file}` takes it"
        )
    done = subprocess.run([program, "create", name, "-f", file.name], cwd=file.parent, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"ollama create {name} failed: {(done.stderr or done.stdout).strip()[-1000:]}")


def _turns(model: Path) -> Turns | None:
    language = Language.read(model)
    found = [turns(partial(_render, language, day), _begin(model, language)) for day in _DAYS]
    return found[0] if found[0] == found[1] and '"""' not in str(found[0] and found[0].template()) else None


def _render(language: Language, day: float, messages: Sequence[Message], answering: bool) -> str:
    return language.render(messages, day, {}, answering=answering)


def _begin(model: Path, language: Language) -> str:
    """The token that llama.cpp puts before any text, so that no template may have it; empty without."""
    config = read_json(model / "tokenizer_config.json") or {}
    token = config.get("bos_token") or ""
    text = str(token["content"]) if isinstance(token, dict) else str(token)
    begins = text and language.encode("x")[:1] == [language.tokenizer.token_to_id(text)]
    return text if begins else ""
