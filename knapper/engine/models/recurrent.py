"""Mixers with a state of fixed size in place of keys and values: the facts. Loads no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from knapper.engine.models.linear_shape import LinearShape, Shape

CHUNK_ROWS: Final = 32  # of a memory: fewer take more steps over it, more a larger state


@dataclass(frozen=True)
class ShortConvolution:
    """out(c conv(b x)), with b, c and x of one linear: LFM2, arXiv 2511.23404, section 2.

    A channel's convolution sees the last `taps` rows, the row's own among them.
    """

    width: int  # the residual's
    taps: int
    biased: bool = False

    @property
    def state_shapes(self) -> tuple[Shape, ...]:
        """Of one sequence: the last rows of b x."""
        return ((self.taps, self.width),)

    def inputs(self, hidden: int) -> tuple[LinearShape, ...]:
        return (LinearShape("conv.in_proj", hidden, 3 * hidden, "attention", self.biased),)

    def output(self, hidden: int) -> LinearShape:
        return LinearShape("conv.out_proj", hidden, hidden, "attention", self.biased)

    def linears(self, hidden: int) -> tuple[LinearShape, ...]:
        return (*self.inputs(hidden), self.output(hidden))

    def norms(self) -> dict[str, int]:
        return {}

    def tensors(self, hidden: int) -> Mapping[str, Shape]:
        bias = {"conv.conv.bias": (hidden,)} if self.biased else {}
        return {"conv.conv.weight": (hidden, 1, self.taps), **bias}

    def numbers_of_row(self, hidden: int) -> int:
        return 6 * hidden


@dataclass(frozen=True)
class GatedDelta:
    """The gated delta rule, arXiv 2412.06464: a memory from keys to values, as wide as it is at the start.

    Key heads serve several value heads each. A channel's convolution sees `taps` rows. `fused`: the file has queries,
    keys, values and the output's gate as one linear, by key head, and the rule's two gates as another.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int
    fused: bool = False

    @property
    def key_width(self) -> int:
        return self.key_heads * self.key_dim

    @property
    def value_width(self) -> int:
        return self.value_heads * self.value_dim

    @property
    def conv_width(self) -> int:
        """Of queries, keys and values."""
        return 2 * self.key_width + self.value_width

    @property
    def state_shapes(self) -> tuple[Shape, ...]:
        """Of one sequence: the convolution's last rows; the memory before a chunk; keys, corrections and decays of the
        rows in it.
        """
        return (
            (self.taps, self.conv_width),
            (self.value_heads, self.key_dim, self.value_dim),
            (self.key_heads, CHUNK_ROWS, self.key_dim),
            (self.value_heads, CHUNK_ROWS, self.value_dim),
            (self.value_heads, CHUNK_ROWS),
        )

    def inputs(self, hidden: int) -> tuple[LinearShape, ...]:
        heads, values = self.value_heads, self.value_width
        if self.fused:
            widths = {"in_proj_qkvz": self.conv_width + values, "in_proj_ba": 2 * heads}
        else:
            widths = {"in_proj_qkv": self.conv_width, "in_proj_z": values, "in_proj_b": heads, "in_proj_a": heads}
        return tuple(LinearShape(f"linear_attn.{name}", hidden, width, "attention") for name, width in widths.items())

    def output(self, hidden: int) -> LinearShape:
        return LinearShape("linear_attn.out_proj", self.value_width, hidden, "attention")

    def linears(self, hidden: int) -> tuple[LinearShape, ...]:
        """All, in the order of transformers' modules."""
        inputs, output = self.inputs(hidden), self.output(hidden)
        return (*inputs, output) if self.fused else (output, *inputs)

    def norms(self) -> dict[str, int]:
        return {"linear_attn.norm": self.value_dim}

    def tensors(self, hidden: int) -> Mapping[str, Shape]:  # noqa: ARG002  as of other mixers
        return {
            "linear_attn.conv1d.weight": (self.conv_width, 1, self.taps),
            "linear_attn.dt_bias": (self.value_heads,),
            "linear_attn.A_log": (self.value_heads,),
        }

    def numbers_of_row(self, hidden: int) -> int:
        """The recurrence keeps its input alone; the norm and the gate of its output keep some of its width each."""
        return 2 * self.conv_width + 6 * self.value_width + hidden


@dataclass(frozen=True)
class Mamba2:
    """State space duality, arXiv 2405.21060, section 7: a memory from `groups` keys to the values of `heads`, whose
    decay and whose weight of what is new are one number of each row and head, at least `time_step_min`.

    The file has the output's gate, values, keys, queries and that number as one linear. A channel's convolution sees
    `taps` rows. What the rows give is gated, then normed by group.
    """

    heads: int
    groups: int
    head_dim: int
    state_dim: int
    taps: int
    time_step_min: float
    biased: bool = True  # the convolution

    @property
    def key_width(self) -> int:
        return self.groups * self.state_dim

    @property
    def value_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def conv_width(self) -> int:
        """Of values, keys and queries."""
        return self.value_width + 2 * self.key_width

    @property
    def state_shapes(self) -> tuple[Shape, ...]:
        """Of one sequence: the convolution's last rows; the memory before a chunk; keys, weighted values and decays of
        the rows in it.
        """
        return (
            (self.taps, self.conv_width),
            (self.heads, self.state_dim, self.head_dim),
            (self.groups, CHUNK_ROWS, self.state_dim),
            (self.heads, CHUNK_ROWS, self.head_dim),
            (self.heads, CHUNK_ROWS),
        )

    def inputs(self, hidden: int) -> tuple[LinearShape, ...]:
        return (LinearShape("mixer.in_proj", hidden, self.value_width + self.conv_width + self.heads, "attention"),)

    def output(self, hidden: int) -> LinearShape:
        """It stays frozen: PEFT takes no adapter there, as kernels read its weight past the module."""
        return LinearShape("mixer.out_proj", self.value_width, hidden, "attention")

    def linears(self, hidden: int) -> tuple[LinearShape, ...]:
        return self.inputs(hidden)

    def norms(self) -> dict[str, int]:
        return {"mixer.norm": self.value_width}

    def tensors(self, hidden: int) -> Mapping[str, Shape]:  # noqa: ARG002  as of other mixers
        bias = {"mixer.conv1d.bias": (self.conv_width,)} if self.biased else {}
        by_head = {f"mixer.{name}": (self.heads,) for name in ("dt_bias", "A_log", "D")}
        return {"mixer.conv1d.weight": (self.conv_width, 1, self.taps), **bias, **by_head}

    def numbers_of_row(self, hidden: int) -> int:
        """The recurrence keeps its input alone; the gate and the norm of its output keep some of its width each."""
        return self.conv_width + 5 * self.value_width + hidden


Recurrent = ShortConvolution | GatedDelta | Mamba2
Chunked = GatedDelta | Mamba2  # whose memory takes up a chunk of rows at once
