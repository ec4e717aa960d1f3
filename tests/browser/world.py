"""A real knapper with keys and two tenants, one of whom trains, and writes what a page must not obey."""

import asyncio
import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import tinker
from tinker import types

from knapper.ids import Tenant
from knapper.state.api_keys import Keys
from knapper.store.directory import DirectoryStore
from tests.conformance import data, loops
from tests.conformance.server import Server, wait_until
from tests.engine.tiny import tiny_model

HOSTILE = "<img src=x onerror=alert(1)></script><b>bold</b>"
YAML = """kind: rl
data: prompts.jsonl
steps: {steps}
lora: {{rank: 2}}
batch: {{prompts: 3, samples: 4}}
sampling: {{max_tokens: 16}}
reward: {{name: length, max: 1, slope: 30}}
evaluate: {{data: prompts.jsonl}}
"""
PROMPTS = ("and the <b>bold</b> one", "of a", HOSTILE)
CHAT = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
SETTINGS = {"KNAPPER_KEYS": "true", "KNAPPER_ADMIN": "ops"}


@dataclass
class World:
    server: Server
    model: str
    keys: dict[str, str]
    run: str = ""
    watched: str = ""  # a run with an alarm

    @property
    def url(self) -> str:
        return self.server.url

    def http(self, tenant: str = "alice") -> httpx.Client:
        return httpx.Client(base_url=f"{self.url}/api/v1/", headers={"X-API-Key": self.keys[tenant]}, timeout=60)

    def submit(self, name: str, steps: int) -> None:
        rows = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS)
        files = {"job.yaml": YAML.format(steps=steps), "prompts.jsonl": rows}
        with self.http() as http:
            http.post("jobs", json={"name": name, "files": files}).raise_for_status()

    def completed(self, name: str) -> None:
        with self.http() as http:
            wait_until(lambda: http.get(f"jobs/{name}").json()["state"] == "completed", f"{name} is done", 90.0)

    def train(self, steps: int = 12) -> None:
        """A run of the SDK's, with hostile words wherever a client may write some."""
        with tinker.ServiceClient(
            base_url=self.url, api_key=self.keys["alice"], user_metadata={"note": HOSTILE, HOSTILE[:20]: "x" * 3000}
        ) as service:
            client = service.create_lora_training_client(self.model, rank=4, seed=3).result()
            rng = np.random.default_rng(3)
            for n in range(steps):
                client.forward_backward(data.batch(rng), "cross_entropy").result()
                client.optim_step(types.AdamParams(learning_rate=1e-2 / (n + 1))).result()
            client.save_state("trained").result()
            client.save_weights_for_sampler("adapter").result()
            self.run = client.model_id
            stale = service.create_lora_training_client(self.model, rank=4, seed=4).result()
            loops.step(stale, loops.rollouts(loops.clean_steps(stale, 3)))
            self.watched = stale.model_id


@contextmanager
def world(place: Path) -> Iterator[World]:
    model = tiny_model(place / "tiny")
    (model / "chat_template.jinja").write_text(CHAT)
    with Server.start(model, place / "data", settings=SETTINGS) as server:
        made = World(server, str(model), {tenant: _key(server, tenant) for tenant in ("alice", "bob", "ops")})
        yield made
    assert "Traceback" not in server.log(), server.log()[-4000:]


def _key(server: Server, tenant: str) -> str:
    keys = Keys(DirectoryStore(server.data / "store"), time.time)
    made: Any = asyncio.run(keys.create(Tenant(tenant), "", lambda: hashlib.sha256(tenant.encode()).hexdigest()))
    return str(made[0])


def pages(world: World, job: str) -> dict[str, str]:
    """Every page that one who is signed in can open, by a name for it."""
    run = world.run
    return {
        "runs": "/", "jobs": "/jobs", "sessions": "/sessions", "session": f"/sessions/{run.partition(':')[0]}",
        "checkpoints": "/checkpoints", "run": f"/runs/{run}",
        "checkpoint": f"/runs/{run}/checkpoints/sampler_weights/adapter", "job": f"/jobs/{job}",
        "rollouts": f"/jobs/{job}/rollouts/steps/0", "conversation": f"/jobs/{job}/rollouts/steps/0/0/1",
        "alarms": f"/runs/{world.watched}", "pass": f"/runs/{world.watched}/passes/10",
        "datum": f"/runs/{world.watched}/passes/10/0",
        "compare": f"/compare?of={run}&of={job}", "playground": f"/playground?model=tinker://{run}/sampler_weights/adapter",
        "usage": "/usage", "not-found": "/runs/ses-00000000000000000000000000000000:train:0",
    }  # fmt: skip
