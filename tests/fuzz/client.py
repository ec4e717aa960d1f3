"""The healthy neighbour: one loop of the SDK, again and again, in a process of its own.

Each turn trains a run of the same seed on the same texts, samples from it, and downloads it: the same bits every time.
`python -m tests.fuzz.client URL KEY MODEL` prints a line of JSON a turn, until its standard input ends.
"""

import hashlib
import json
import select
import sys
from typing import Any

import httpx
import numpy as np
import tinker
from tinker import types

from tests.conformance import data


def turn(service: tinker.ServiceClient, rest: tinker.RestClient, model: str) -> dict[str, str]:
    """Names of what was made, and a hash of each kind of result."""
    run = service.create_lora_training_client(model, rank=4, seed=7).result()
    rng = np.random.default_rng(7)
    trained = hashlib.sha256()
    for _ in range(2):
        output = run.forward_backward(data.batch(rng), data.CE)
        step = run.optim_step(types.AdamParams(learning_rate=1e-2, grad_clip_norm=0.5))
        for each in data.bits(output.result()):
            trained.update(each)
        trained.update(repr((sorted(output.result().metrics.items()), step.result())).encode())
    path = run.save_weights_for_sampler("turn").result().path
    sampler = service.create_sampling_client(model_path=path).result()
    params = types.SamplingParams(max_tokens=6, seed=5, temperature=1.0)
    drawn = sampler.sample(types.ModelInput.from_ints([1, 2, 3, 4]), 2, params, include_prompt_logprobs=True).result()
    samples = [(each.tokens, np.array(each.logprobs, np.float32).tobytes()) for each in drawn.sequences]
    external = run.save_weights_external("adapter").result().path
    urls = rest.get_external_weights_urls(external).result().urls
    files = [name.encode() + httpx.get(urls[name], timeout=60).raise_for_status().content for name in sorted(urls)]
    return {
        "run": run.model_id, "path": path, "session": str(service.holder._session_id), "trained": trained.hexdigest(),
        "sampled": _hash(repr((samples, drawn.prompt_logprobs)).encode()), "adapter": _hash(b"\0".join(files)),
    }  # fmt: skip


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def main(url: str, key: str, model: str) -> None:
    rest = tinker.RestClient(base_url=url, api_key=key)
    with tinker.ServiceClient(base_url=url, api_key=key) as service:
        while True:
            response: dict[str, Any] = turn(service, rest, model)
            print(json.dumps(response), flush=True)
            if select.select([sys.stdin], [], [], 0)[0]:
                return


if __name__ == "__main__":
    main(*sys.argv[1:])
