"""What `knapper export` does, in order: what can be checked, the adapter, the merge, GGUF, Ollama, the hub.

Modules that need the extra `train` are imported by what needs them: an adapter alone is fetched without.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from knapper.errors import InvalidField, UserError
from knapper.export import gguf, space

Say = Callable[[str], None]
Fetch = Callable[[str, tuple[str, ...], Path], str]  # a checkpoint's files into a folder; its base model's name
_FILES: Final = ("adapter_config.json", "adapter_model.safetensors")
_OLLAMA_DEFAULT: Final = "q8_0"


@dataclass(frozen=True)
class ExportOrder:
    """`checkpoint`: a tinker:// path, a job's name, or a PEFT directory."""

    checkpoint: str
    peft: bool = False
    merged: bool = False
    gguf: tuple[str, ...] = ()
    ollama: str | None = None
    repository: str | None = None
    public: bool = False
    out: Path | None = None
    base: str | None = None
    llama_cpp: Path | None = None

    @property
    def types(self) -> list[str]:
        """The GGUF files that are wanted. Raises InvalidField."""
        wanted = [each.lower() for given in self.gguf for each in re.split(r"[, ]+", given) if each]
        for each in wanted:
            if each not in gguf.TYPES:
                raise InvalidField("--gguf", each, ", ".join(gguf.TYPES))
        return list(dict.fromkeys(wanted or ([_OLLAMA_DEFAULT] if self.ollama else [])))

    @property
    def place(self) -> Path:
        """The directory that everything is written to."""
        return self.out or Path(self.stem)

    @property
    def stem(self) -> str:
        """A name for files: the checkpoint's, or the job's."""
        return self.checkpoint.rstrip("/").rpartition("/")[2]

    def pushed(self) -> str | None:
        """The kind that goes to the hub. Raises UserError for several: a repository holds one."""
        kinds = [kind for kind, asked in (("peft", self.peft), ("merged", self.merged), ("gguf", self.types)) if asked]
        if self.repository is not None and len(kinds) > 1:
            raise UserError(
                f"--push-to-hub with {' and '.join(kinds)}; allowed: one of them, as a repository holds one"
            )
        return kinds[0] if self.repository is not None else None


def carry_out(order: ExportOrder, fetch: Fetch, cache: Path, say: Say) -> None:
    """`cache`: where base models are. Raises UserError; what is finished by then stays, and is not done again."""
    types, pushed = order.types, order.pushed()
    tools = gguf.Tools.find(order.llama_cpp, types) if types else None
    directory, name = _adapter(order, fetch)
    if order.merged or types:
        from knapper.export import adapter, merge

        base = _base(order.base or name, cache, say)
        plan = merge.plan(base, adapter.read(directory))
        if tools is not None:
            numbers = sum(write.source.numbers for writes in plan.files.values() for write in writes)
            space.expect_disk(order.place, plan.nbytes + gguf.nbytes(numbers, types), "the model and its GGUF files")
        merge.merge(plan, order.place / "merged", say)
        say(f"merged: {order.place / 'merged'}")
        if tools is not None:
            _gguf(order, types, tools, say, untied=plan.untied)
    if pushed is not None:
        _push(order, pushed, directory, order.base or name, say)


def _adapter(order: ExportOrder, fetch: Fetch) -> tuple[Path, str]:
    """The adapter's directory, and the name of its base model."""
    if (given := Path(order.checkpoint)).is_dir():
        from knapper.export import adapter

        return given, adapter.read(given).base_model
    directory = order.place / "adapter"
    return directory, fetch(order.checkpoint, _FILES, directory)


def _base(name: str, cache: Path, say: Say) -> Path:
    from knapper.catalogue.download import is_name, obtain

    if not is_name(name) and not Path(name).expanduser().is_dir():
        raise UserError(
            f"the base model is {name!r}, which is no directory of this machine; name a copy of it, or its name on the "
            "hub, by --base"
        )
    return obtain(name, cache, say)


def _gguf(order: ExportOrder, types: list[str], tools: gguf.Tools, say: Say, *, untied: bool) -> None:
    merged = order.place / "merged"
    files = gguf.write(merged, order.place, order.stem, types, tools, say, untied=untied)
    if order.ollama is None:
        return
    from knapper.export import ollama

    text, has_template = ollama.modelfile(merged, files[0])
    file = order.place / "Modelfile"
    file.write_text(text, encoding="utf-8")
    templated = "" if has_template else "; the model's chat template is more than turns, so Ollama's own guess is used"
    say(f"{file}{templated}")
    ollama.create(order.ollama, file)
    say(f"ollama run {order.ollama}")


def _push(order: ExportOrder, kind: str, directory: Path, base_model: str, say: Say) -> None:
    from knapper.export import hub

    assert order.repository is not None
    folder = {"peft": directory, "merged": order.place / "merged", "gguf": order.place}[kind]
    names = {
        "peft": [*_FILES],
        "merged": ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"],
        "gguf": ["*.gguf"],
    }
    if not (folder / hub.CARD).exists():
        (folder / hub.CARD).write_text(hub.card(base_model, kind, order.checkpoint), encoding="utf-8")
    patterns = [*names[kind], hub.CARD, *(["Modelfile"] if kind == "gguf" else [])]
    say(hub.push(order.repository, folder, patterns, private=not order.public, message=f"{kind} of {order.checkpoint}"))
