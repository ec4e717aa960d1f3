"""One training, small and the same for the same seed: all that it was answered, and what came of it."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from knapper import limits
from knapper.chaos.client import ChaosClient, Response
from knapper.errors import Gone
from knapper.wire import proto
from knapper.wire.tensors import Array
from knapper.wire.types import Datum, ForwardBackward

_IDS = 128  # of the vocabulary; every model has so many
_LENGTH = 24
_RATE = 1e-3


@dataclass(frozen=True)
class Plan:
    model: str
    seed: int
    steps: int


@dataclass
class TrainingTrace:
    """`answers` by what was asked; `drawn`: the answers that are samples. `step_s`: how long each step took."""

    run: str = ""
    answers: dict[str, Array] = field(default_factory=dict)
    drawn: dict[str, Array] = field(default_factory=dict)
    weights: str = ""  # SHA-256 of the adapter's files
    step_s: list[float] = field(default_factory=list)
    pause: tuple[float, str] = (0.0, "")


def train(
    client: ChaosClient, plan: Plan, before_step: Callable[[int], None], after_step: Callable[[], None]
) -> TrainingTrace:
    """A session from its beginning to its end. Checkpoints that it leaves live for an hour."""
    session, outcome = client.start(), TrainingTrace()
    asked = {"rank": 4, "seed": plan.seed % 2**31}
    made = {"session_id": session, "model_seq_id": 0, "base_model": plan.model, "lora_config": asked}
    outcome.run = str(client.post("create_model", {**made, "type": "create_model"})["model_id"])
    client.wait(f"{outcome.run}:0")
    line = _Line(client, plan, outcome, session)
    for step in range(plan.steps):
        before_step(step)
        began = client.now()
        line.step(step)
        outcome.step_s.append(client.now() - began)
        after_step()
    line.judge()
    client.finish()
    outcome.pause = client.longest
    return outcome


@dataclass
class _Line:
    """Operations of one run, numbered from 1, and samples."""

    client: ChaosClient
    plan: Plan
    outcome: TrainingTrace
    session: str
    seq: int = 0
    samplers: int = 0

    def step(self, step: int) -> None:
        """Two passes and an optimizer's step, sent before the first is answered, as loops do; at times a sample."""
        began = self.client.now()
        sent = [(f"forward_backward {n}", self._send_pass(self._data(2 * step + n))) for n in range(2)]
        adam = {"learning_rate": _RATE * (1 + step % 3)}
        sent.append(("optim_step", self._send("optim_step", {"adam_params": adam})))
        for what, request_id in sent:
            self._keep(f"step {step}: {what}", self.client.wait(request_id))
            self.client.note(f"step {step}: {what}", began)
        if step % 3 == 2:
            began = self.client.now()
            self._sample(step)
            self.client.note(f"step {step}: sample", began)

    def judge(self) -> None:
        """What the weights are in the end: by their bytes, and by what they say of fixed data."""
        self._keep("at the end: forward", self.client.wait(self._send_pass(self._data(-1), forward_only=True)))
        saved = {"path": "chaos", "ttl_seconds": limits.ttl_s_min}
        self.client.wait(self._send("save_weights_external", saved))
        run = self.outcome.run
        urls = self.client.get(f"training_runs/{run}/checkpoints/external_weights/chaos/external_weights_urls")["urls"]
        whole = hashlib.sha256()
        for name in sorted(urls):
            if name.endswith(".safetensors"):
                whole.update(name.encode() + self.client.download(urls[name]))
        self.outcome.weights = whole.hexdigest()

    def _data(self, which: int) -> list[Datum]:
        draw = np.random.default_rng([self.plan.seed, which + 1])
        rows = draw.integers(0, _IDS, (2, _LENGTH + 1))
        ones = np.ones(_LENGTH, np.float32)
        return [
            Datum(row[:-1].astype(np.int32), {"target_tokens": row[1:].astype(np.int64), "weights": ones})
            for row in rows
        ]

    def _send_pass(self, data: list[Datum], *, forward_only: bool = False) -> str:
        self.seq += 1
        request = ForwardBackward(self.outcome.run, self.seq, data, "cross_entropy", {}, forward_only)
        return str(self.client.post("forward_backward", proto.encode_forward_backward(request))["request_id"])

    def _send(self, kind: str, asked: dict[str, Any]) -> str:
        self.seq += 1
        body = {"model_id": self.outcome.run, "seq_id": self.seq, "type": kind, **asked}
        return str(self.client.post(kind, body)["request_id"])

    def _sample(self, step: int) -> None:
        saved = {"path": f"step-{step}", "ttl_seconds": limits.ttl_s_min}
        path = self.client.wait(self._send("save_weights_for_sampler", saved)).json()["path"]
        opened = {"session_id": self.session, "sampling_session_seq_id": self.samplers, "model_path": path}
        self.samplers += 1
        session = self.client.post("create_sampling_session", {**opened, "type": "create_sampling_session"})
        prompt = self._data(step)[0].tokens.tolist()
        asked = {
            "sampling_session_id": session["sampling_session_id"], "seq_id": 0, "num_samples": 2, "type": "sample",
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": prompt}]},
            "sampling_params": {"max_tokens": 8, "seed": step, "stop": []},
        }  # fmt: skip
        found = proto.decode_sample_response(self._sampled(asked).body)
        for n, sequence in enumerate(found.sequences):
            self.outcome.drawn[f"step {step}: sample {n}: tokens"] = sequence.tokens
            self.outcome.drawn[f"step {step}: sample {n}: logprobs"] = sequence.logprobs

    def _sampled(self, asked: dict[str, Any]) -> Response:
        while True:
            try:
                return self.client.wait(self.client.post("asample", asked)["request_id"])
            except Gone:
                continue  # the next gateway is asked

    def _keep(self, what: str, answer: Response) -> None:
        kept = self.outcome.answers
        if answer.protobuf:
            output = proto.decode_forward_backward_output(answer.body)
            metrics: dict[str, Any] = dict(output.metrics)
            for n, arrays in enumerate(output.outputs):
                kept |= {f"{what}: datum {n}: {name}": array for name, array in arrays.items()}
        else:
            metrics = answer.json().get("metrics") or {}
        kept |= {f"{what}: {name}": np.array(value, np.float64) for name, value in metrics.items()}
