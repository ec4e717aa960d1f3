"""An adapter merged into its base model, file by file, within a bounded memory: W + scale * B @ A.

O outputs, I inputs, R rank. Each product is of a block of rows in float32, and is rounded once, to the dtype of the
base's own weight. A file that is finished is kept: an export that was interrupted goes on with the next.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from torch import Tensor

from knapper.engine.models import weight_files
from knapper.engine.models.composite import text_name
from knapper.engine.models.config import HEAD, ModelConfig
from knapper.engine.models.fields import UnsupportedModel, read_json
from knapper.engine.models.tensor_header import TensorHeader
from knapper.errors import UserError
from knapper.export import safetensors_file, space
from knapper.export.adapter import WEIGHTS, Pair, PeftAdapter
from knapper.export.joined import Place, places
from knapper.export.safetensors_file import TensorEntry

Say = Callable[[str], None]

STATE: Final = ".knapper-merge.json"  # what the files of an unfinished directory were made of
_BLOCK_BYTES: Final = 64 * 1024 * 1024  # of float32 rows at a time
_HEAD_WEIGHT, _EMBEDDING = f"{HEAD}.weight", "model.embed_tokens.weight"
_CODES: Final = {name: code for code, name in weight_files.DTYPES.items()}
_COPIED: Final = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab.*",
    "merges.txt", "preprocessor_config.json", "processor_config.json", "LICENSE*",
)  # fmt: skip


@dataclass(frozen=True)
class _Write:
    """One tensor of a file: the base's own bytes, with what the adapter adds to them: to all of it, or to places."""

    name: str
    source: TensorHeader
    pair: Pair | None = None
    parts: Sequence[tuple[Place, Pair]] = ()


@dataclass(frozen=True)
class MergePlan:
    """What a merge writes: `files`, by name, in order. `untied`: the head gets a matrix of its own."""

    base: Path
    adapter: PeftAdapter
    files: Mapping[str, Sequence[_Write]]
    untied: bool

    @property
    def nbytes(self) -> int:
        """Of all weights that it writes."""
        return sum(write.source.nbytes for writes in self.files.values() for write in writes)

    @property
    def memory_bytes(self) -> int:
        """The most that it holds at once: a block as stored, widened, summed and rounded, and two matrices."""
        pairs = self.adapter.pairs.values()
        matrices = max(
            2 * 4 * pair.rank * (1 if pair.expert is None else pair.expert[1]) * (pair.inputs + pair.outputs)
            for pair in pairs
        )
        joined = [4 * write.source.numbers // write.source.shape[0] for each in self.files.values() for write in each
                  if write.parts]  # fmt: skip
        return 4 * max(_BLOCK_BYTES, 4 * max(pair.inputs for pair in pairs), *joined) + matrices


def plan(base: Path, adapter: PeftAdapter) -> MergePlan:
    """Raises UserError unless every matrix of the adapter has a weight, or its part of one, in the base's files."""
    entries = weight_files.entries(base)
    stored_as = {text: name for name in entries if (text := text_name(name)) is not None}
    untied = HEAD in adapter.pairs and _is_tied(base, _HEAD_WEIGHT in stored_as)
    added: dict[str, Pair] = {}
    joined, parts = places(base, stored_as), dict[str, list[tuple[Place, Pair]]]()
    for module, pair in adapter.pairs.items():
        weight = _EMBEDDING if untied and module == HEAD else text_name(f"{module}.weight")
        place = None if weight is None else joined.get(weight.removesuffix(".weight"))
        if place is not None:
            _expect_part_fits(pair, place, entries[stored_as[place.name]])
            parts.setdefault(stored_as[place.name], []).append((place, pair))
            continue
        if weight not in stored_as:
            raise UserError(
                f"{base} has no weight for {module}, which the adapter in {adapter.directory} adapts; allowed: the "
                "adapter's own base model, unquantized, in files with a tensor for each linear, or with those of all "
                "experts in one. Else merge it by PEFT"
            )
        _expect_fits(pair, entries[stored_as[weight]])
        if weight != _EMBEDDING:
            added[stored_as[weight]] = pair
    files = {
        path.name: [
            _Write(name, each, added.get(name), parts.get(name, ()))
            for name, each in entries.items()
            if each.path == path and not (untied and text_name(name) == _HEAD_WEIGHT)  # a copy that loaders ignore
        ]
        for path in weight_files.paths(base)
    }
    if untied:
        head = entries[stored_as[_EMBEDDING]]
        files[head.path.name].append(_Write(_HEAD_WEIGHT, head, adapter.pairs[HEAD]))
    return MergePlan(base, adapter, files, untied)


def merge(plan: MergePlan, out: Path, say: Say) -> None:
    """Write the model directory, going on where an interrupted one ended; config.json, which makes it one, comes last.

    Raises UserError for a directory that holds something else, or a disk or memory that will not do.
    """
    made_of = _made_of(plan)
    done = _begin(out, made_of)
    if (out / "config.json").is_file():
        say(f"{out} is complete already")
        return
    missing = {name: writes for name, writes in plan.files.items() if name not in done}
    nbytes = sum(write.source.nbytes for writes in missing.values() for write in writes)
    space.expect_disk(out, nbytes, "the merged model")
    space.expect_memory(plan.memory_bytes, "merging")
    for count, (name, writes) in enumerate(plan.files.items(), 1):
        if name in missing:
            _write_file(plan, out / name, writes)
        say(f"merged {count} of {len(plan.files)}: {name}{'' if name in missing else ' was there'}")
    _write_index(plan, out)
    for pattern in _COPIED:
        for path in filter(Path.is_file, plan.base.glob(pattern)):
            shutil.copyfile(path, out / path.name)
    (out / "config.json").write_text(json.dumps(_config(plan), indent=2) + "\n", encoding="utf-8")


def _begin(out: Path, made_of: str) -> set[str]:
    """Names of finished files. Raises UserError unless the directory is new, empty, or an export of the same."""
    out.mkdir(parents=True, exist_ok=True)
    state = read_json(out / STATE)
    if state is None and any(out.iterdir()):
        raise UserError(f"{out} is not empty, and no export of this; allowed: a directory that is new or empty")
    if state is not None and state.get("made_of") != made_of:
        raise UserError(f"{out} holds the export of another checkpoint or base model; remove it, or use --out")
    if state is None:
        (out / STATE).write_text(json.dumps({"made_of": made_of}) + "\n", encoding="utf-8")
    return {path.name for path in out.glob("*.safetensors") if not path.name.startswith(".")}


def _made_of(plan: MergePlan) -> str:
    """A digest of the adapter's bytes, and of what the base's files are, without reading all of them."""
    digest = hashlib.sha256()
    with (plan.adapter.directory / WEIGHTS).open("rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    for pair in plan.adapter.pairs.values():
        digest.update(f"{pair.module} {pair.scale!r}\n".encode())
    for path in weight_files.paths(plan.base):
        stat = path.stat()
        digest.update(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _write_file(plan: MergePlan, path: Path, writes: Sequence[_Write]) -> None:
    """All tensors of a file come from one of the base's."""
    (source,) = {each.source.path for each in writes}
    file = weight_files.opened(source, "pt")
    entries = [
        TensorEntry(each.name, _CODES.get(each.source.dtype, each.source.dtype), each.source.shape, each.source.nbytes)
        for each in writes
    ]
    pieces = (piece for each in writes for piece in _pieces(file, each, plan.adapter))
    safetensors_file.write(path, entries, pieces, {"format": "pt"})


def _pieces(file: safe_open, write: _Write, adapter: PeftAdapter) -> Iterator[Tensor]:
    if write.parts:
        return _experts(file, write, adapter)
    return _blocks(file, write.source) if write.pair is None else _sums(file, write, adapter)


def _blocks(file: safe_open, header: TensorHeader) -> Iterator[Tensor]:
    """The tensor as it is, a block of rows at a time."""
    rows = file.get_slice(header.stored)  # type: ignore[no-untyped-call]  # the library has no types here
    if not header.shape:
        yield file.get_tensor(header.stored)  # type: ignore[no-untyped-call]  # the library has no types here
        return
    step = max(1, _BLOCK_BYTES * header.shape[0] // max(1, header.nbytes))
    for start in range(0, header.shape[0], step):
        yield rows[start : min(start + step, header.shape[0])]


def _sums(file: safe_open, write: _Write, adapter: PeftAdapter) -> Iterator[Tensor]:
    assert write.pair is not None
    a_RI, b_OR = adapter.matrices(write.pair)
    step = max(1, _BLOCK_BYTES // (4 * write.pair.inputs))
    rows = file.get_slice(write.source.stored)  # type: ignore[no-untyped-call]  # the library has no types here
    for start in range(0, write.pair.outputs, step):
        stop = min(start + step, write.pair.outputs)
        stored: Tensor = rows[start:stop]
        yield _rounded(torch.addmm(stored.float(), b_OR[start:stop], a_RI), write)


def _experts(file: safe_open, write: _Write, adapter: PeftAdapter) -> Iterator[Tensor]:
    """One expert after another."""
    experts = file.get_slice(write.source.stored)  # type: ignore[no-untyped-call]  # the library has no types here
    of_expert: dict[int, list[tuple[Place, Pair]]] = {}
    for place, pair in write.parts:
        of_expert.setdefault(place.expert, []).append((place, pair))
    for expert in range(write.source.shape[0]):
        summed: Tensor = experts[expert : expert + 1][0].float()
        for place, pair in of_expert.get(expert, []):
            a_RI, b_OR = adapter.matrices(pair)
            own = summed.narrow(1 if place.turned else 0, place.start, place.outputs)
            (own.T if place.turned else own).addmm_(b_OR, a_RI)
        yield _rounded(summed, write)


def _rounded(summed: Tensor, write: _Write) -> Tensor:
    merged = summed.to(getattr(torch, write.source.dtype))
    if not torch.isfinite(merged).all():
        raise UserError(
            f"{write.name} would have numbers that {write.source.dtype} cannot hold; the adapter's are too large, "
            "or not finite. Export another checkpoint"
        )
    return merged


def _write_index(plan: MergePlan, out: Path) -> None:
    if list(plan.files) == ["model.safetensors"]:
        return
    weight_map = {write.name: name for name, writes in plan.files.items() for write in writes}
    index = {"metadata": {"total_size": plan.nbytes}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _config(plan: MergePlan) -> dict[str, Any]:
    config = read_json(plan.base / "config.json") or {}
    if plan.untied:
        config["tie_word_embeddings"] = False
        if isinstance(text := config.get("text_config"), dict):
            text["tie_word_embeddings"] = False
    return config


def _is_tied(base: Path, has_head: bool) -> bool:
    """Whether loaders take the embedding as the head: by config.json, or because there is no other."""
    try:
        return not has_head or ModelConfig.read(base).tied
    except UnsupportedModel:
        return bool((read_json(base / "config.json") or {}).get("tie_word_embeddings", False))


def _expect_fits(pair: Pair, header: TensorHeader) -> None:
    _expect_plain(header)
    if header.shape != (pair.outputs, pair.inputs):
        raise UserError(
            f"{header.stored} is {list(header.shape)}, and the adapter makes {pair.module} "
            f"{[pair.outputs, pair.inputs]}; name its own base model by --base"
        )


def _expect_part_fits(pair: Pair, place: Place, header: TensorHeader) -> None:
    _expect_plain(header)
    outputs, inputs = header.shape[:0:-1] if place.turned else header.shape[1:]
    if (place.outputs, inputs) != (pair.outputs, pair.inputs) or place.start + place.outputs > outputs:
        raise UserError(
            f"{header.stored} is {list(header.shape)}, with {[place.outputs, inputs]} for {pair.module}, and the "
            f"adapter makes it {[pair.outputs, pair.inputs]}; name its own base model by --base"
        )


def _expect_plain(header: TensorHeader) -> None:
    if header.dtype not in weight_files.ALLOWED:
        raise UserError(
            f"{header.stored} is {header.dtype}; allowed: {', '.join(weight_files.ALLOWED)}. "
            "Merge into the unquantized base model"
        )
