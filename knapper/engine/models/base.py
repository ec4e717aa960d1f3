"""The interface of a base model to training and sampling.

`Decoder` computes the architectures of the registry; `TransformersModel` leaves any other to transformers. N rows, U
distinct rows (`Prefixes`), H hidden size, V vocabulary, K targets of a row.
"""

from collections.abc import Hashable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knapper.engine.images.placed import PlacedImage
from knapper.engine.layers.adapters import Adapt
from knapper.engine.layers.head import HeadLora
from knapper.engine.layers.layerwise import Gather, LayerSegment
from knapper.engine.layers.lora import Lora
from knapper.engine.models.config import ComputedBy, Facts
from knapper.engine.models.prefill import Prefilled, PrefillPrompt
from knapper.engine.training.prefix_sharing import Prefixes
from knapper.wire.types import Image

SlotT = TypeVar("SlotT", bound=Hashable)


class DecodeState(Protocol[SlotT]):
    """The decode batch: sequences and their keys and values. `rows`: the order in which a step takes the sequences."""

    @property
    def rows(self) -> list[SlotT]: ...

    @property
    def tokens(self) -> int:
        """Positions that the sequences occupy."""
        ...

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that fits when there is no other."""
        ...

    def positions(self, length: int) -> int:
        """Positions of a sequence of `length` tokens; above `positions_max` for one that cannot be."""
        ...

    def add(self, past: Any, length: int) -> SlotT:
        """Add a sequence whose first `length` tokens left `past`, which others may share."""
        ...

    def remove(self, slot: SlotT) -> None: ...

    def reserve(self) -> None:
        """Reserve one more token in every sequence. This may change `rows`."""
        ...

    def step(self, tokens_N: Tensor, loras: Sequence[Lora | None]) -> Tensor:
        """One token for every sequence: float32 logits (N, V) of the next. Each is one token longer then."""
        ...

    def roll_back(self, slot: SlotT, length: int) -> bool:
        """After `reserve` or `step` failed: set the sequence, now `length` tokens long or one longer, back to `length`.

        False: its keys and values are lost. Remove it.
        """
        ...


class Model(Protocol):
    """A frozen base model. Adapters come with each call and are not kept.

    A row's bits depend on its own sequence and adapter, and on its own request; never on other requests.
    """

    @property
    def config(self) -> Facts: ...

    @property
    def computed_by(self) -> ComputedBy: ...

    @property
    def architecture(self) -> str: ...

    @property
    def versions(self) -> tuple[str, ...]:
        """Versions that its last bits depend on, besides torch's."""
        ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def gather(self) -> Gather:
        """Contexts in which a part's weights are whole, for whoever computes with it; the model's own methods do."""
        ...

    @property
    def weights_bytes(self) -> int:
        """Bytes of the base weights on the device; with those of images what may be kept of images."""
        ...

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a token's keys and values while decoding. States count as so many positions of these."""
        ...

    @property
    def context_positions(self) -> int:
        """Positions of a sequence that fills the context."""
        ...

    def placed(self, images: Sequence[Image], where: str) -> tuple[PlacedImage, ...]:
        """A prompt's images, read and found right; on any thread. Raises InvalidField or TooLarge, which name `where`;
        a model of text refuses them all.
        """
        ...

    def layer_segments(
        self, groups: Sequence[Prefixes], loras: Sequence[Lora | None]
    ) -> tuple[Tensor, Sequence[LayerSegment]]:
        """A forward pass as its input and a list of layer segments, to be called in order; other work may go between.

        The last segment gives the rows (U, H) for the head, group after group, each group with its adapter.
        Differentiable in the adapters, each segment by itself.
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

    def reusable(self, past: Any, tokens: int) -> int:
        """How many tokens, `tokens` at most, a prompt need not compute that begins with so many of those of `past`: an
        earlier prompt's `Prefilled.past`.
        """
        ...

    def kept_positions(self, past: Any, tokens: int) -> int:
        """What `past`, of a prompt of so many tokens, takes of the key/value memory."""
        ...

    def prefill(self, prompts: Sequence[PrefillPrompt]) -> list[Prefilled]:
        """Each prompt's rows that were not reused, and its keys and values."""
        ...

    def decode_state(self, positions_max: int) -> DecodeState[Any]:
        """An empty decode batch. The caller keeps its sequences within `positions_max`."""
        ...
