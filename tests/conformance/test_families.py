"""Through the whole stack, natively: Gemma 3, with windows, two rotary bases and norms on both sides; Qwen 3.5, whose
layers have states; Nemotron 3, which has them and experts; and with `-m long` other mixtures.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import tinker
import torch
from peft import PeftModel
from tinker import types
from transformers import AutoModelForCausalLM

from tests.conformance import data
from tests.conformance.conftest import exported
from tests.conformance.data import CE
from tests.conformance.server import Server
from tests.engine.strange import strange_model

ADAM = types.AdamParams(learning_rate=1e-2)
LONG = pytest.mark.long
MORE = (
    "qwen3_moe",
    "gpt_oss",
    "deepseek_v3",
    "glm4_moe_lite",
    "deepseek_v32",
    "glm_moe_dsa",
    "lfm2_moe",
    "nemotron_h_latent",
    "qwen3_next",
)
LENGTHS = (40, 90, 17)  # windows are of 16 tokens, chunks of the delta rule of 32


def step(client: tinker.TrainingClient, n: int) -> list[bytes]:
    """One step of a run; the bits of its log-probabilities before it."""
    passed = client.forward_backward(data.batch(np.random.default_rng(n), LENGTHS), CE)
    client.optim_step(ADAM).result()
    return data.bits(passed.result())


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
@pytest.mark.filterwarnings("ignore:Could not find a config file")
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
@pytest.mark.parametrize(
    "kind", ["gemma3", "qwen3_5", "nemotron_h", *(pytest.param(kind, marks=LONG) for kind in MORE)]
)
def test_a_run_survives_a_kill_samples_what_it_trained_and_loads_in_peft(tmp_path: Path, kind: str) -> None:
    model = strange_model(tmp_path / kind, kind)
    with (
        Server.start(model, tmp_path / "data", dtype="float32") as server,
        tinker.ServiceClient(base_url=server.url, api_key="tml-local") as service,
    ):
        calm, killed = (service.create_lora_training_client(str(model), rank=4, seed=1).result() for _ in range(2))
        undisturbed = [step(calm, n) for n in range(3)]
        assert re.search(r"computed_by='?native", server.log())
        assert step(killed, 0) == undisturbed[0]
        server.kill()
        server.up()
        assert [step(killed, n) for n in (1, 2)] == undisturbed[1:]

        prompt = data.tokens(np.random.default_rng(7), 30)
        path = killed.save_weights_for_sampler("trained").result().path
        sampler = service.create_sampling_client(model_path=path).result()
        params = types.SamplingParams(max_tokens=25, seed=3, stop=[])
        [drawn] = sampler.sample(types.ModelInput.from_ints(prompt), 1, params).result().sequences
        text = data.weighted([*prompt, *drawn.tokens])
        [forward] = data.logprobs(killed.forward([text], CE).result())
        assert drawn.logprobs is not None
        np.testing.assert_allclose(drawn.logprobs, forward[len(prompt) - 1 :], atol=1e-5, rtol=0)

        directory = exported(server, path, tmp_path / "adapter")
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
        tokens = torch.tensor([[*prompt, *drawn.tokens]])
        with torch.no_grad():
            rows = PeftModel.from_pretrained(base, directory)(input_ids=tokens).logits[0].log_softmax(-1)
        wanted = rows[:-1].gather(1, tokens[0, 1:, None])[:, 0].numpy()
        np.testing.assert_allclose(forward, wanted, atol=1e-5, rtol=1e-5)
        assert "Traceback" not in server.log()
