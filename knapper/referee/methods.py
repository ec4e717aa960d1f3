"""Which methods of the SDK answer at all."""

from collections.abc import Callable
from typing import Any

from tinker import types

from knapper.referee.court import CHECKS, Check, Court, Observation, datum, text, texts

_PROMPT = types.ModelInput.from_ints(text(8))
_FEW = types.SamplingParams(max_tokens=4, seed=1)


def _custom(_: list[types.Datum], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
    return -sum(each.sum() for each in logprobs), {}


def _for_sampler(court: Court, name: str) -> str:
    return str(court.trained.save_weights_for_sampler(name, ttl_seconds=3600).result().path)


_CALLS: dict[str, Callable[[Court], Any]] = {
    "RestClient.get_server_capabilities": lambda court: court.rest.get_server_capabilities().result(),
    "ServiceClient.create_lora_training_client": lambda court: court.trained,
    "ServiceClient.create_sampling_client of a base model": lambda court: court.base,
    "ServiceClient.create_sampling_client of a checkpoint": lambda court: court.service.create_sampling_client(
        model_path=_for_sampler(court, "referee-path")
    ).result(),
    "ServiceClient.create_training_client_from_state": lambda court: court.service.create_training_client_from_state(
        court.saved("referee-from")
    ).result(),
    "ServiceClient.create_training_client_from_state_with_optimizer": lambda court: (
        court.service.create_training_client_from_state_with_optimizer(court.saved("referee-from-with")).result()
    ),
    "TrainingClient.get_info": lambda court: court.trained.get_info(),
    "TrainingClient.forward": lambda court: court.trained.forward(texts(1), "cross_entropy").result(),
    "TrainingClient.forward_backward": lambda court: court.run().forward_backward(texts(1), "cross_entropy").result(),
    "TrainingClient.forward_backward_custom": lambda court: (
        court.run().forward_backward_custom([datum(text(9))], _custom).result()
    ),
    "TrainingClient.optim_step": lambda court: court.run().optim_step(types.AdamParams(learning_rate=0.0)).result(),
    "TrainingClient.save_state": lambda court: court.saved("referee-state"),
    "TrainingClient.load_state": lambda court: court.run().load_state(court.saved("referee-load")).result(),
    "TrainingClient.load_state_with_optimizer": lambda court: (
        court.run().load_state_with_optimizer(court.saved("referee-load-with")).result()
    ),
    "TrainingClient.save_weights_for_sampler": lambda court: _for_sampler(court, "referee-sampler"),
    "TrainingClient.save_weights_and_get_sampling_client": lambda court: court.sampler,
    "TrainingClient.save_weights_external": lambda court: court.trained.save_weights_external(
        "referee-out", ttl_seconds=3600
    ).result(),
    "SamplingClient.sample": lambda court: court.sampler.sample(_PROMPT, 1, _FEW).result(),
    "SamplingClient.compute_logprobs": lambda court: court.sampler.compute_logprobs(_PROMPT).result(),
    "RestClient.list_training_runs": lambda court: court.rest.list_training_runs(limit=5).result(),
    "RestClient.get_training_run": lambda court: court.rest.get_training_run(court.trained.model_id).result(),
    "RestClient.list_checkpoints": lambda court: court.rest.list_checkpoints(court.trained.model_id).result(),
    "RestClient.list_user_checkpoints": lambda court: court.rest.list_user_checkpoints(limit=5).result(),
    "RestClient.get_weights_info_by_tinker_path": lambda court: court.rest.get_weights_info_by_tinker_path(
        court.saved("referee-told")
    ).result(),
    "RestClient.publish_checkpoint_from_tinker_path": lambda court: court.rest.publish_checkpoint_from_tinker_path(
        court.saved("referee-public")
    ).result(),
    "RestClient.unpublish_checkpoint_from_tinker_path": lambda court: court.rest.unpublish_checkpoint_from_tinker_path(
        court.saved("referee-private")
    ).result(),
    "RestClient.set_checkpoint_ttl_from_tinker_path": lambda court: court.rest.set_checkpoint_ttl_from_tinker_path(
        court.saved("referee-mortal"), 3600
    ).result(),
    "RestClient.delete_checkpoint_from_tinker_path": lambda court: court.rest.delete_checkpoint_from_tinker_path(
        court.saved("referee-gone")
    ).result(),
    "RestClient.list_sessions": lambda court: court.rest.list_sessions(limit=5).result(),
}


def _answers(call: Callable[[Court], Any]) -> Callable[[Court], Observation]:
    def answers(court: Court) -> Observation:
        return Observation(type(call(court)).__name__)

    return answers


CHECKS.extend(Check("methods", name, _answers(call)) for name, call in _CALLS.items())
