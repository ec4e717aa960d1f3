"""What can be asked of a prompt besides its own log-probabilities, against one full forward pass.

P prompt tokens, V vocabulary, K targets a position.
"""

from typing import Any

import numpy as np
import pytest
import torch

from knapper import limits
from knapper.engine.layers.lora_grouped import Segment, Segments
from knapper.engine.sampling.prompt_logprobs import PromptLogprobs
from knapper.errors import KnapperError
from knapper.wire.types import Cells
from tests.engine.sampling.test_scheduler import House, prompt_of, request

ADAPTER = "adapter-1"


@pytest.fixture
def house(tmp_path: Any) -> House:
    return House(tmp_path)


def distribution(house: House, prompt: np.ndarray[Any, Any]) -> torch.Tensor:
    """(P - 1, V): log p of every token at each position after the first, by one pass, under ADAPTER."""
    adapt = [Segment(0, len(prompt), house.adapter_dict.adapters[ADAPTER])]
    with torch.no_grad():
        hidden = house.decoder.hidden(torch.from_numpy(prompt.astype("int64")), [len(prompt)], adapt)
        logits = house.decoder.logits(hidden, Segments(adapt))
    return logits.log_softmax(-1)[:-1]


def targets(rows: int, columns: int, seed: int = 0, share: float = 0.4) -> np.ndarray[Any, np.dtype[np.int64]]:
    dice = np.random.default_rng(seed)
    ids = dice.integers(0, 260, (rows, columns))
    return np.where(dice.random((rows, columns)) < share, ids, -1).astype(np.int64)


def sparse(dense: np.ndarray[Any, np.dtype[np.int64]]) -> Cells:
    """CSR of the cells that name an id."""
    rows, columns = np.nonzero(dense >= 0)
    starts = np.searchsorted(rows, np.arange(len(dense) + 1))
    return Cells(dense[rows, columns], (dense.shape[0], dense.shape[1]), starts, columns)


def test_targets_are_those_of_one_pass_in_both_layouts(house: House) -> None:
    prompt = prompt_of(150)
    ids = targets(149, 5)
    ids[:70] = -1  # nothing before is scored, so that the ranges do not begin at 0
    expected = distribution(house, prompt)
    for cells in (Cells(ids.reshape(-1), (149, 5)), sparse(ids)):
        (output,) = house.run(request(prompt=prompt, adapter=ADAPTER, max_tokens=1, target_prompt_logprobs=cells))
        scores = output.target_prompt_logprobs
        assert scores is not None
        assert scores.shape == (149, 5)
        assert scores.values.dtype == np.float32
        for value, token, row in zip(scores.values.tolist(), cells.values.tolist(), cells.rows().tolist(), strict=True):
            wanted = float(expected[row, token]) if token >= 0 else 0.0
            assert value == pytest.approx(wanted, abs=1e-5), (row, token)
        assert (scores.values[cells.values < 0] == 0.0).all()
        assert output.prompt_logprobs is None
        assert output.prompt_draws is None


def test_targets_equal_prompt_logprobs_where_they_name_the_same_token(house: House) -> None:
    """Bit for bit: both are read off the same rows."""
    prompt = prompt_of(90)
    cells = Cells(prompt[1:].astype(np.int64), (89, 1))
    (output,) = house.run(
        request(prompt=prompt, temperature=0.2, target_prompt_logprobs=cells, prompt_logprobs=True, max_tokens=1)
    )
    assert output.target_prompt_logprobs is not None
    assert output.prompt_logprobs is not None
    assert np.array_equal(output.target_prompt_logprobs.values, output.prompt_logprobs[1:])


def test_the_last_n_are_scored_and_nothing_before(house: House) -> None:
    prompt = prompt_of(150)
    whole, partial = house.run(
        request(prompt=prompt, prompt_logprobs=True, topk_prompt_logprobs=2),
        request(prompt=prompt, prompt_logprobs=True, topk_prompt_logprobs=2, prompt_logprobs_last_n=80),
    )
    assert whole.prompt_logprobs is not None
    assert partial.prompt_logprobs is not None
    assert np.isnan(partial.prompt_logprobs[:-80]).all()
    assert np.array_equal(partial.prompt_logprobs[-80:], whole.prompt_logprobs[-80:])
    assert partial.topk_prompt_logprobs is not None
    assert whole.topk_prompt_logprobs is not None
    assert (partial.topk_prompt_logprobs.logprobs[:-80] == -99999.0).all()
    assert (partial.topk_prompt_logprobs.tokens[:-80] == 0).all()
    assert np.array_equal(partial.topk_prompt_logprobs.logprobs[-80:], whole.topk_prompt_logprobs.logprobs[-80:])
    assert np.array_equal(partial.sequences[0].tokens, whole.sequences[0].tokens)


def test_the_last_n_bound_neither_targets_nor_draws(house: House) -> None:
    prompt = prompt_of(30)
    cells = Cells(prompt[1:].astype(np.int64), (29, 1))
    options = {"target_prompt_logprobs": cells, "prompt_alt_tokens_k": 2, "prompt_logprobs": True}
    (partial,) = house.run(request(prompt=prompt, prompt_logprobs_last_n=3, **options))
    (whole,) = house.run(request(prompt=prompt, **options))
    assert partial.target_prompt_logprobs is not None
    assert whole.target_prompt_logprobs is not None
    assert np.array_equal(partial.target_prompt_logprobs.values, whole.target_prompt_logprobs.values)
    assert partial.prompt_draws is not None
    assert whole.prompt_draws is not None
    assert np.array_equal(partial.prompt_draws.tokens, whole.prompt_draws.tokens)
    assert partial.prompt_logprobs is not None
    assert np.isnan(partial.prompt_logprobs[:-3]).all()


def test_only_rows_that_matter_are_computed() -> None:
    prompt = prompt_of(100)
    requested = np.full((99, 2), -1, dtype=np.int64)
    requested[60, 1] = 7
    cells = Cells(requested.reshape(-1), (99, 2))
    assert PromptLogprobs(request(prompt=prompt, target_prompt_logprobs=cells)).first == 60
    assert PromptLogprobs(request(prompt=prompt, prompt_logprobs=True, prompt_logprobs_last_n=4)).first == 95
    assert PromptLogprobs(request(prompt=prompt, prompt_alt_tokens_k=1, target_prompt_logprobs=cells)).first == 0


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_follow_the_tempered_distribution_and_report_the_model_s_own_logprobs(
    house: House, temperature: float
) -> None:
    prompt = prompt_of(9)
    expected = distribution(house, prompt)
    k, seeds = 64, 60
    counts = torch.zeros(8, expected.shape[1], dtype=torch.float64)
    outputs = house.run(
        *(
            request(prompt=prompt, adapter=ADAPTER, seed=seed, prompt_alt_tokens_k=k, max_tokens=0,
                    temperature=temperature, top_k=1, top_p=0.1)
            for seed in range(seeds)
        )
    )  # fmt: skip
    for output in outputs:
        assert output.prompt_draws is not None
        tokens = torch.from_numpy(output.prompt_draws.tokens)
        assert tokens.shape == (8, k)
        counts.scatter_add_(1, tokens, torch.ones(8, k, dtype=torch.float64))
        torch.testing.assert_close(
            torch.from_numpy(output.prompt_draws.logprobs), expected.gather(1, tokens), atol=1e-5, rtol=1e-5
        )
    p = (expected.double() / temperature).softmax(-1)
    count = k * seeds
    # Five standard deviations of each frequency.
    assert ((counts / count - p).abs() <= 5 * (p * (1 - p) / count).sqrt() + 2 / count).all()


def test_draws_at_temperature_0_are_the_likeliest_tokens(house: House) -> None:
    prompt = prompt_of(20)
    (output,) = house.run(request(prompt=prompt, adapter=ADAPTER, prompt_alt_tokens_k=3, temperature=0.0))
    assert output.prompt_draws is not None
    likeliest = distribution(house, prompt).argmax(-1)
    assert output.prompt_draws.tokens.tolist() == [[token] * 3 for token in likeliest.tolist()]


def test_draws_depend_on_the_seed_alone_and_not_on_the_crowd(house: House) -> None:
    options = [
        request(prompt=prompt_of(40 + n, n), seed=n, prompt_alt_tokens_k=4, prompt_logprobs=True) for n in range(6)
    ]
    together = house.run(*options)
    for requested, output in zip(options, together, strict=True):
        (alone,) = house.run(requested)
        assert alone.prompt_draws is not None
        assert output.prompt_draws is not None
        assert np.array_equal(alone.prompt_draws.tokens, output.prompt_draws.tokens)
        assert np.array_equal(alone.prompt_draws.logprobs, output.prompt_draws.logprobs)
    (other,) = house.run(request(prompt=prompt_of(40, 0), seed=99, prompt_alt_tokens_k=4))
    (plain,) = house.run(request(prompt=prompt_of(40, 0), seed=0))
    assert other.prompt_draws is not None
    assert together[0].prompt_draws is not None
    assert not np.array_equal(other.prompt_draws.tokens, together[0].prompt_draws.tokens)
    assert np.array_equal(plain.sequences[0].tokens, together[0].sequences[0].tokens), "draws took its random numbers"


def one_target(token: int = 3, rows: int = 8) -> Cells:
    return Cells(np.full(rows, token, dtype=np.int64), (rows, 1))


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"prompt_logprobs": True, "prompt_logprobs_last_n": 9}, "prompt_logprobs_last_n is 9; allowed: 1 to 8"),
        ({"prompt_logprobs": True, "prompt_logprobs_last_n": 0}, "prompt_logprobs_last_n is 0"),
        ({"prompt_alt_tokens_k": limits.top_logprobs_max + 1}, "prompt_alt_tokens_k is 65"),
        ({"prompt_alt_tokens_k": 1, "prompt": prompt_of(1)}, "the prompt is one token"),
        ({"target_prompt_logprobs": one_target(rows=9)}, r"shape is \[9, 1\]; allowed: \(8, K\)"),
        ({"target_prompt_logprobs": one_target(-1)}, "at least one token id"),
        ({"target_prompt_logprobs": one_target(-2)}, r"data\[0\] is -2"),
        ({"target_prompt_logprobs": one_target(10**6)}, r"data\[0\] is 1000000"),
        (
            {"target_prompt_logprobs": Cells(np.zeros(8 * 131073, dtype=np.int64), (8, 131073))},
            "names 1048584 cells; allowed: 1048576",
        ),
    ],
)
def test_what_cannot_be_asked_is_refused_by_name(house: House, fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(KnapperError, match=complaint):
        house.run(request(**fields))


def test_limits_are_allowed_themselves(house: House) -> None:
    (output,) = house.run(
        request(
            prompt_logprobs=True,
            prompt_logprobs_last_n=8,
            prompt_alt_tokens_k=limits.top_logprobs_max,
            target_prompt_logprobs=Cells(np.zeros(limits.prompt_targets_max, dtype=np.int64), (8, 131072)),
        )
    )
    assert output.prompt_logprobs is not None
    assert not np.isnan(output.prompt_logprobs[1:]).any()
    assert output.target_prompt_logprobs is not None
    assert (output.target_prompt_logprobs.values < 0).all()
