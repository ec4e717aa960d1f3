"""The one account of a process's memory: weights, keys and values, adapters, passes, runs; and what follows from it.

Weights are loaded first. What they leave is divided once, at the start, by what the device then has. From the parts
follow the bytes that caches may hold, the rows of a pass, the layers that keep their activations, and the longest datum
and text that can be computed at all. docs/operating.md's table of cards is made by the same functions.

On a CPU the rows are a constant, as bits depend on them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Self

from knapper.engine.layers import checkpointing
from knapper.engine.layers.checkpointing import PassBytes
from knapper.engine.layers.head import ELEMENTS_MAX
from knapper.engine.models.base import Model
from knapper.engine.models.config import Facts, ModelConfig
from knapper.engine.models.weight_files import promised
from knapper.errors import UserError
from knapper.limits import MIB
from knapper.text.sizes import sized

ROWS_CPU: Final = 1024  # of a micro-batch: its products are saturated from some 128 rows on
_ROWS_MOST: Final = 8192  # a GPU's products are saturated, and other work waits for a layer of them
_ROWS_GRAIN: Final = 64
_ROWS_WANTED: Final = 4096  # that a card should compute at once before keys and values get more than their quarter
_ROWS_LEAST: Final = 256
_TOKENS_LEAST: Final = 512  # of keys and values
_RANK: Final = 32  # of the run that the account expects of a dense model: the SDK's default, with the head
_ARENAS_HELD: Final = 4  # weights, two moments, gradients
_ARENAS_BEHIND: Final = 4  # the same of an earlier state, until a commit of what came after it is stored
_ARENAS_OF_STEP: Final = 4  # what an optimizer step makes beside those: its results, and the clipped gradients
_HEAD_BYTES: Final = 5 * 4 * ELEMENTS_MAX  # chunks of logits, their probabilities and gradients
_KV_PART: Final = 4  # keys and values have 1 / this of what the weights leave
_KV_PART_MOST: Final = 0.75  # where one text of the whole context needs more
_ADAPTERS_PART: Final = 16
_RUNS_PART: Final = 4  # of what a GPU then has left for training
_FRAGMENTS_PART: Final = 20  # of a GPU's memory: its allocator's gaps, and kernels' own buffers
CUDA_BYTES: Final = 512 * MIB  # what CUDA takes of a card for itself, with its kernels


@dataclass(frozen=True)
class ModelBytes:
    """What a model takes. `arena`: one of the tensors of a run of rank `rank` (float32 numbers, a parameter each).

    `prompt_row`: of a token of a prompt while it is computed, keys and values twice. `passes`: of a training pass.
    """

    weights: int
    kv_token: int
    context: int  # positions of a text that fills it, its states of recurrent layers counted as such
    arena: int
    prompt_row: int
    row: int
    layer_row: int  # beyond `row`, in a layer that keeps its activations
    rank: int = _RANK

    @classmethod
    def of(cls, model: Model, weights: int) -> Self:
        config = model.config
        if isinstance(config, ModelConfig):
            size = 4 if model.device.type == "cpu" else model.dtype.itemsize  # a CPU keeps most of a row in float32
            return cls._native(config, size, weights, model.bytes_per_token)
        # Of a transformers model every layer keeps what its linears take and give.
        row = 5 * sum(target.inputs + target.outputs for target in config.lora_targets[:-1])
        kept = row // max(1, len(config.lora_targets) // 7)
        kv = model.bytes_per_token
        return cls(weights, kv, model.context_positions, _arena(config), 2 * kv + kept, row, 0)

    @classmethod
    def planned(cls, config: ModelConfig, size: int = 2) -> Self:
        """Of a native model on a GPU before it is loaded; `size` bytes a number."""
        weights = size * sum(math.prod(shape) for _, shape in promised(config))
        kv = 2 * math.prod(config.kv_shape) * size
        return cls._native(config, size, weights, kv)

    @classmethod
    def _native(cls, config: ModelConfig, size: int, weights: int, kv: int) -> Self:
        row = checkpointing.pass_bytes_of_row(config, size)
        layer_row = checkpointing.saved_bytes_of_row(config, size)
        context = config.context + -config.context % 64 + -(-4 * config.state_numbers // kv)
        rank = expected_rank(config)
        return cls(weights, kv, context, _arena(config, rank), 2 * kv + layer_row, row, layer_row, rank)

    @property
    def run(self) -> int:
        """Of one run, in its optimizer step, while the commit before it is being stored."""
        return (_ARENAS_HELD + _ARENAS_BEHIND + _ARENAS_OF_STEP) * self.arena


@dataclass(frozen=True)
class Account:
    """Bytes by part. `total`: what the process may take, weights included. `snapshots`: on the host of a GPU, for each
    run that is being saved; on a CPU a snapshot shares the run's own memory.

    `kv_tokens`: positions of keys and values. `rows_max`: of a micro-batch. `datum_rows_max`, `text_tokens_max`: what
    is longer cannot be computed, and is refused; None: not known.
    """

    total: int
    weights: int
    kv: int
    adapters: int
    activations: int
    runs: int
    fragments: int
    snapshots: int
    kv_tokens: int
    context: int
    rows_max: int
    passes: PassBytes | None = None
    datum_rows_max: int | None = None
    text_tokens_max: int | None = None

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by name, as the start, /metrics and `knapper doctor` show them."""
        names = ("weights", "kv", "adapters", "activations", "runs", "fragments", "snapshots")
        return {name: getattr(self, name) for name in names}

    def described(self) -> str:
        """One line."""
        parts = ", ".join(f"{name} {sized(size)}" for name, size in self.parts.items() if size)
        longest = "" if self.datum_rows_max is None else f", a datum of up to {self.datum_rows_max:,} tokens"
        follows = f"{self.kv_tokens:,} tokens of samples, {self.rows_max:,} rows a pass{longest}"
        return f"{sized(self.total)}: {parts}; {follows}"


def divide(left: int, model: ModelBytes, kv_part: float, *, is_cpu: bool, samples: bool = True) -> Account:
    """The account of a process that has `left` bytes beside the weights; `kv_part`: KNAPPER_KV_MEMORY. One that does
    not sample keeps next to nothing for keys and values.

    Raises UserError for a GPU that holds the weights, and then no run, pass and text beside them.
    """
    if not samples:
        kv_part = min(0.5, (_TOKENS_LEAST + 1) * model.kv_token / max(1, left))
    return _of_host(left, model, kv_part) if is_cpu else _of_card(left, model, kv_part)


def planned_left(card: int, share: float, weights: int) -> int:
    """Bytes that the weights leave of a card of `card` bytes, used by this process alone, or by its share."""
    return min(int(share * card), card - CUDA_BYTES) - weights


def kv_bytes(left: int, part: float, context_bytes: int) -> int:
    """Bytes for the KV cache of all decoding sequences; `left` bytes beside the weights.

    `part` of `left`. 0: a quarter, or the need of one sequence that fills the context, up to three quarters.
    """
    if part > 0:
        return int(part * left)
    return max(left // _KV_PART, min(context_bytes, int(_KV_PART_MOST * left)))


def _of_host(left: int, model: ModelBytes, kv_part: float) -> Account:
    kv, adapters = kv_bytes(left, kv_part, model.context * model.kv_token), left // _ADAPTERS_PART
    rest = max(0, left - kv - adapters)
    activations = rest - rest // 2
    return Account(
        total=left + model.weights, weights=model.weights, kv=kv, adapters=adapters,
        activations=activations, runs=rest // 2, fragments=0, snapshots=0,
        kv_tokens=kv // model.kv_token, context=model.context, rows_max=ROWS_CPU,
        passes=checkpointing.on_cpu(activations - _HEAD_BYTES, model.weights, model.layer_row),
    )  # fmt: skip


def _of_card(left: int, model: ModelBytes, kv_part: float) -> Account:
    fragments, adapters = left // _FRAGMENTS_PART, left // _ADAPTERS_PART
    free = left - fragments - adapters
    least = model.run + _HEAD_BYTES + _ROWS_LEAST * model.row
    wanted = model.run + _HEAD_BYTES + min(_ROWS_WANTED, model.context) * model.row
    whole_text = model.context * model.kv_token
    kv = kv_bytes(left, kv_part, whole_text if whole_text <= free - wanted else 0)
    kv = kv if kv_part else min(kv, free - least)
    rest = free - kv
    if kv < _TOKENS_LEAST * model.kv_token or rest < least:
        raise _does_not_fit(model, least, left)
    runs = max(model.run, min(rest // _RUNS_PART, rest - least + model.run))
    activations = rest - runs
    rows = (activations - _HEAD_BYTES) // model.row
    beside_one_run = rest - (_ARENAS_HELD + _ARENAS_BEHIND) * model.arena
    return Account(
        total=left + model.weights, weights=model.weights, kv=kv, adapters=adapters, activations=activations, runs=runs,
        fragments=fragments, snapshots=_ARENAS_HELD * model.arena, kv_tokens=kv // model.kv_token,
        context=model.context, rows_max=min(_ROWS_MOST, rows // _ROWS_GRAIN * _ROWS_GRAIN),
        passes=PassBytes(activations - _HEAD_BYTES, model.row, model.layer_row),
        datum_rows_max=(beside_one_run - _HEAD_BYTES) // model.row,
        text_tokens_max=(beside_one_run - _HEAD_BYTES) // model.prompt_row,
    )  # fmt: skip


def _does_not_fit(model: ModelBytes, least: int, left: int) -> UserError:
    needed = int((least + _TOKENS_LEAST * model.kv_token) / (1 - 1 / _FRAGMENTS_PART - 1 / _ADAPTERS_PART))
    return UserError(
        f"the weights take {sized(model.weights)} and leave {sized(max(0, left))} of the GPU; a run of rank "
        f"{model.rank}, a pass of {_ROWS_LEAST} rows and {_TOKENS_LEAST} tokens of samples need {sized(needed)} beside "
        "them: raise "
        "KNAPPER_GPU_MEMORY_SHARE if it is less than 1, lower KNAPPER_KV_MEMORY if it is set, or serve a smaller model"
    )


def expected_rank(config: ModelConfig) -> int:
    """Of the run that the account expects. Of a mixture it is divided by the experts of a row (docs/models.md)."""
    return max(1, _RANK // config.experts_of_row)


def _arena(config: Facts, rank: int = _RANK) -> int:
    return 4 * sum(target.numel(rank) for target in config.lora_targets)


CARDS: Final[Mapping[str, int]] = {  # bytes, as the driver counts them
    "L4 (24 GB)": 23_034 * MIB - 512 * MIB,
    "A100 (40 GB)": 40_354 * MIB,
    "A100 (80 GB)": 81_153 * MIB,
    "H100 (80 GB)": 81_079 * MIB,
    "H200 (141 GB)": 143_167 * MIB,
}
