"""A training loop as SDK 0.18 wants it written. Run in a process of its own, whose `tinker` is that version.

Prints one line of JSON: what came out, to be compared with the newest SDK's.
"""

import json
import sys
from typing import Any

import tinker
from tinker import types


def datum(seed: int, length: int = 12) -> types.Datum:
    row = [(seed * 7919 + n * 104729) % 199 for n in range(length + 1)]
    weights = [float(n % 3) - 0.5 for n in range(length)]
    return types.Datum(
        model_input=types.ModelInput.from_ints(row[:-1]), loss_fn_inputs={"target_tokens": row[1:], "weights": weights}
    )


def main(url: str, model: str) -> None:
    service = tinker.ServiceClient(base_url=url, api_key="tml-local")
    assert [each.model_name for each in service.get_server_capabilities().supported_models]
    training = service.create_lora_training_client(model, rank=4, seed=1)
    losses, logprobs = [], []
    batch = [datum(n) for n in range(4)]
    for step in range(3):
        passed = training.forward_backward(batch, "cross_entropy")
        training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        losses.append(passed.result().metrics["loss:sum"])
        logprobs = passed.result().loss_fn_outputs[0]["logprobs"].tolist()
        print(f"step {step}", file=sys.stderr)
    scored = training.forward(batch, "cross_entropy").result().metrics["loss:sum"]
    state = training.save_state("old").result().path
    training.optim_step(types.AdamParams(learning_rate=1e-1)).result()
    training.load_state(state).result()
    reloaded = training.forward(batch, "cross_entropy").result().metrics["loss:sum"]
    sampler_path = training.save_weights_for_sampler("old").result().path
    sampler = service.create_sampling_client(model_path=sampler_path)
    prompt = types.ModelInput.from_ints(list(range(9)))
    params = types.SamplingParams(max_tokens=6, seed=5, stop=[])
    sampled = sampler.sample(prompt, num_samples=2, sampling_params=params).result()
    wrong = types.Datum(
        model_input=types.ModelInput.from_ints([10**6]), loss_fn_inputs={"target_tokens": [1], "weights": [1.0]}
    )
    try:
        training.forward_backward([wrong], "cross_entropy").result()
    except tinker.RequestFailedError as error:
        refusal = str(error)
    else:
        refusal = "none"
    resumed = [
        service.create_training_client_from_state(state),
        service.create_training_client_from_state_with_optimizer(state),
    ]
    rest: Any = service.create_rest_client()  # the newest SDK, whose types are checked, has no archives
    run = training.get_info().model_id
    rest.publish_checkpoint_from_tinker_path(sampler_path).result()
    listed = rest.list_checkpoints(run).result().checkpoints
    try:
        rest.get_checkpoint_archive_url_from_tinker_path(sampler_path).result()
    except tinker.APIStatusError as error:
        archive = str(error)
    else:
        archive = "none"
    rest.delete_checkpoint_from_tinker_path(sampler_path).result()
    found = {
        "version": tinker.__version__,
        "losses": losses,
        "logprobs": logprobs,
        "scored": scored,
        "reloaded": reloaded,
        "state": state,
        "tokens": [sequence.tokens for sequence in sampled.sequences],
        "sampled_logprobs": [sequence.logprobs for sequence in sampled.sequences],
        "prompt_logprobs": sampler.compute_logprobs(prompt).result(),
        "refusal": refusal,
        "resumed": [each.forward(batch, "cross_entropy").result().metrics["loss:sum"] for each in resumed],
        "listed": {each.tinker_path: each.public for each in listed},
        "left": [each.tinker_path for each in rest.list_checkpoints(run).result().checkpoints],
        "found": rest.get_training_run(run).result().training_run_id == run,
        "sampler_path": sampler_path,
        "archive": archive,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
