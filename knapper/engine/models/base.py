"""What a base model is to training and sampling, whoever computes its layers.

`Decoder` computes those that `ModelConfig` knows; `TransformersModel` leaves any other to transformers.
N rows, U rows that differ (`Prefixes`), H hidden size, V vocabulary, K targets of a row.
"""

from collections.abc import Hashable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knapper.engine.layers.adapters import Adapt
from knapper.engine.layers.head import HeadLora
from knapper.engine.layers.layerwise import LayerSegment
from knapper.engine.layers.lora import Lora
from knapper.engine.models.config import ComputedBy, Facts
from knapper.engine.models.prefill import Prefilled, PrefillPrompt
from knapper.engine.training.prefix_sharing import Prefixes

SlotT = TypeVar("SlotT", bound=Hashable)


class DecodeState(Protocol[SlotT]):
    """The texts that decode, and what the model keeps of each. `rows`: the order in which a step takes them."""

    @property
    def rows(self) -> list[SlotT]: ...

    @property
    def tokens(self) -> int:
        """Positions that the texts occupy."""
        ...

    @property
    def longest(self) -> int:
        """Tokens of the longest text that there is room for when there is no other."""
        ...

    def positions(self, length: int) -> int:
        """What a text of `length` tokens occupies, in the unit of `positions_max`; more than that: it cannot be."""
        ...

    def add(self, past: Any, length: int) -> SlotT:
        """A text whose first `length` tokens left `past`, which other texts may begin with too."""
        ...

    def remove(self, slot: SlotT) -> None: ...

    def reserve(self) -> None:
        """Room for one more token in every text. This may change `rows`."""
        ...

    def step(self, tokens_N: Tensor, loras: Sequence[Lora | None]) -> Tensor:
        """One token for every text: float32 logits (N, V) of the next. The texts are one token longer afterwards."""
        ...

    def restored(self, slot: SlotT, length: int) -> bool:
        """After `reserve` or `step` broke: have the text `length` tokens long, as it was before, or is one longer.

        False: what it had is lost. Remove it.
        """
        ...


class Model(Protocol):
    """A frozen base model. Adapters come with each call; nothing of them is kept.

    A row's bits depend on its own sequence and adapter, and on the request that it came with; never on other requests.
    """

    @property
    def config(self) -> Facts: ...

    @property
    def computed_by(self) -> ComputedBy: ...

    @property
    def architecture(self) -> str: ...

    @property
    def versions(self) -> tuple[str, ...]:
        """Of what its last bits depend on, beside torch."""
        ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def bytes_per_token(self) -> int:
        """What decoding keeps of a token, in the dtype in which it is kept."""
        ...

    @property
    def context_positions(self) -> int:
        """What a text that fills the context occupies."""
        ...

    def layer_segments(
        self, groups: Sequence[Prefixes], loras: Sequence[Lora | None]
    ) -> tuple[Tensor, Sequence[LayerSegment]]:
        """A forward pass: its beginning, and what is done with that one after another, others computing between.

        The last gives the rows (U, H) that the head takes, group after group, each with its adapter; differentiable in
        these, each stretch by itself.
        """
        ...

    def target_logprobs(
        self, hidden_NH: Tensor, targets_NK: Tensor, lora: HeadLora | None, needed_N: NDArray[np.bool_]
    ) -> Tensor:
        """`head.target_logprobs` with this model's head."""
        ...

    def logits(self, hidden_NH: Tensor, adapt: Adapt) -> Tensor:
        """float32 (N, V), with the adapters' part of the head where they have one."""
        ...

    @property
    def continues(self) -> bool:
        """Whether a prompt can go on from a part of what another one left. Else none of `prompts` reuses anything."""
        ...

    def prompts(self, prompts: Sequence[PrefillPrompt]) -> list[Prefilled]:
        """Each with the rows that it did not reuse, and what texts of it begin with."""
        ...

    def decode_state(self, positions_max: int) -> DecodeState[Any]:
        """None as yet. They occupy `positions_max` at most, as whoever adds them sees to."""
        ...
