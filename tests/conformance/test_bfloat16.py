"""What is compared with transformers and peft in float32, once more on a server that computes in bfloat16."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conformance.conftest import Trained, train
from tests.conformance.server import Dtype, Server
from tests.conformance.test_alarms import test_clean_steps_of_a_real_engine_are_far_below_the_limits
from tests.conformance.test_cli import (
    cli,
    environment,
    test_a_downloaded_folder_loads_in_peft_and_gives_the_servers_logprobs,
)
from tests.conformance.test_clip_thresholds import test_thresholds_of_each_token_are_those_of_the_formula
from tests.conformance.test_losses import test_a_loss_and_its_step_are_those_of_transformers_and_peft
from tests.conformance.test_sampling import (
    adapted,
    base,
    test_greedy_texts_and_their_log_probabilities_are_the_models,
    test_log_probabilities_are_those_of_the_tempered_distribution,
    test_prompt_log_probabilities_are_those_of_a_forward_pass,
    test_the_end_token_ends_a_text_unless_stop_is_empty,
    test_the_likeliest_tokens_of_prompt_and_text_come_with_their_log_probabilities,
)
from tests.conformance.test_sampling_extras import (
    scored,
    test_alternatives_to_a_prompt_s_tokens_are_drawn_and_scored,
    test_chosen_targets_of_a_prompt_are_scored_in_their_layout,
    test_the_last_n_tokens_alone_are_scored,
    torch_only,
)
from tests.conformance.test_training import (
    test_a_new_run_is_the_base_model,
    test_each_step_takes_its_own_values,
)

__all__ = [  # what pytest is to find here: tests, and fixtures of theirs
    "adapted",
    "base",
    "cli",
    "environment",
    "scored",
    "test_a_downloaded_folder_loads_in_peft_and_gives_the_servers_logprobs",
    "test_a_loss_and_its_step_are_those_of_transformers_and_peft",
    "test_a_new_run_is_the_base_model",
    "test_alternatives_to_a_prompt_s_tokens_are_drawn_and_scored",
    "test_chosen_targets_of_a_prompt_are_scored_in_their_layout",
    "test_clean_steps_of_a_real_engine_are_far_below_the_limits",
    "test_each_step_takes_its_own_values",
    "test_greedy_texts_and_their_log_probabilities_are_the_models",
    "test_log_probabilities_are_those_of_the_tempered_distribution",
    "test_prompt_log_probabilities_are_those_of_a_forward_pass",
    "test_the_end_token_ends_a_text_unless_stop_is_empty",
    "test_the_last_n_tokens_alone_are_scored",
    "test_the_likeliest_tokens_of_prompt_and_text_come_with_their_log_probabilities",
    "test_thresholds_of_each_token_are_those_of_the_formula",
    "torch_only",
]

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
]


@pytest.fixture(scope="module")
def dtype() -> Dtype:
    return "bfloat16"


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory, dtype: Dtype) -> Iterator[Server]:
    with Server.start(model, tmp_path_factory.mktemp("knapper-bfloat16") / "data", dtype=dtype) as running:
        yield running
    assert "Traceback" not in running.log(), running.log()[-4000:]


@pytest.fixture(scope="module")
def trained(server: Server, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(server, model, tmp_path_factory.mktemp("adapter-bfloat16"))
