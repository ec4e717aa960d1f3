"""The measured server: our own, or any that speaks the Tinker protocol."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tinker
from tinker import types

from tests.conformance.server import Dtype, Server


@dataclass(frozen=True)
class Setting:
    """The arguments of every section. `server` is None for an external server."""

    service: tinker.ServiceClient
    model: str  # its name on the server
    directory: Path  # its files, for the bare loops
    quick: bool
    threads: int
    server: Server | None

    def engine_mib(self) -> float | None:
        """Memory of the engine's process; None of an external server."""
        if self.server is None:
            return None
        status = Path(f"/proc/{self.server.processes()['engine']}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024

    def repeats(self, full: int) -> int:
        return max(1, full // 3) if self.quick else full

    def training_client(self, seed: int = 0) -> tinker.TrainingClient:
        """Rank 16 on every linear of a layer, as the bare loop has it."""
        return self.service.create_lora_training_client(self.model, rank=16, seed=seed, train_unembed=False).result()


@contextmanager
def serving(
    model: Path, name: str, base_url: str, *, quick: bool, threads: int, dtype: Dtype = "float32"
) -> Iterator[Setting]:
    if base_url:
        yield Setting(tinker.ServiceClient(base_url=base_url), name, model, quick, threads, None)
        return
    settings = {"KNAPPER_THREADS": str(threads)}
    with tempfile.TemporaryDirectory(prefix="knapper-bench-") as scratch:
        with Server.start(model, Path(scratch) / "data", settings=settings, dtype=dtype) as server:
            service = tinker.ServiceClient(base_url=server.url, api_key="tml-local")
            yield Setting(service, str(model), model, quick, threads, server)
            service.close("success").result()


def datum(tokens: Sequence[int], weights: Sequence[float]) -> types.Datum:
    """A datum that predicts each token from those before it; `weights` of the tokens."""
    return types.Datum(
        model_input=types.ModelInput.from_ints(list(tokens[:-1])),
        loss_fn_inputs={"target_tokens": list(tokens[1:]), "weights": list(weights[1:])},
    )


def step(client: tinker.TrainingClient, data: list[types.Datum], loss: str = "cross_entropy") -> None:
    """forward_backward and optim_step, both sent before the first is awaited."""
    first = client.forward_backward(data, loss)  # type: ignore[arg-type]  # the SDK lists the names
    second = client.optim_step(types.AdamParams(learning_rate=1e-4))
    first.result()
    second.result()
