"""A linear of a layer, as the model's files and adapters name it. Loads no torch."""

from dataclasses import dataclass
from typing import Literal

Part = Literal["attention", "mlp", "unembed"]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class LinearShape:
    """A stored linear, (inputs) -> (outputs). `module`: its name within the layer, as files have it. `experts`: there
    are so many of one shape, and `module` has {} for an expert's number. `joined`: files may have those of all experts
    in one tensor of this name, as transformers' model has them. `whole`: they have them in no other way, (experts,
    inputs, outputs), and adapters so too: `module` names all of them. `together`: adapters alone have them so, by the
    name of `joined`.
    """

    module: str
    inputs: int
    outputs: int
    part: Part
    biased: bool = False
    experts: int | None = None
    joined: str | None = None
    whole: bool = False
    together: bool = False

    @property
    def name(self) -> str:
        return self.peft_target if self.experts is None else f"experts.{self.peft_target}"

    @property
    def peft_target(self) -> str:
        """Its short name in PEFT's target_modules."""
        return self.module.rpartition(".")[2]

    @property
    def modules(self) -> tuple[str, ...]:
        return expert_names(self.module, self.experts)


def expert_names(module: str, experts: int | None) -> tuple[str, ...]:
    """`module`, or the names of all experts by its pattern."""
    return (module,) if experts is None else tuple(module.format(expert) for expert in range(experts))
