"""Constrained decoding: texts follow their schema, scores are of the allowed tokens, neighbours keep their bits."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch

from knapper import limits
from knapper.engine.sampling.grammar import GrammarCompiler
from knapper.errors import InvalidField, UserError
from knapper.wire import grammars
from knapper.wire.types import SampledSequence, SampleOutput
from tests.engine.sampling.test_scheduler import House, prompt_of, request, same
from tests.engine.tiny import tiny_model

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["red", "blue"]}, "maxItems": 2},
        "done": {"type": "boolean"},
    },
    "required": ["count", "tags", "done"],
    "additionalProperties": False,
}


def grammar_of(schema: Mapping[str, Any]) -> str:
    grammar = grammars.joined(grammars.json_part(schema, "schema"), {}, "schema")
    grammars.expect_compilable(grammar, "schema")
    return grammar


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    return House(tmp_path_factory.mktemp("tiny"))


def text(house: House, sequence: SampledSequence) -> str:
    return str(house.tokenizer.decode(sequence.tokens.tolist(), skip_special_tokens=True))


def constrained(schema: Mapping[str, Any] = SCHEMA, **fields: Any) -> Any:
    return request(**{"ignore_eos": False, "max_tokens": 200, "grammar": grammar_of(schema), **fields})


@pytest.mark.parametrize("parameters", [{}, {"temperature": 0}, {"top_p": 0.5}, {"top_k": 3, "temperature": 2.0}])
def test_a_random_model_writes_what_the_schema_asks(house: House, parameters: dict[str, Any]) -> None:
    [output] = house.run(constrained(num_samples=5, seed=3, **parameters))
    for sequence in output.sequences:
        assert sequence.stopped
        assert sequence.tokens[-1] in house.decoder.config.eos
        jsonschema.validate(json.loads(text(house, sequence)), SCHEMA)


def test_scores_are_of_the_allowed_tokens_renormalised(house: House) -> None:
    """Each step by itself: the model's logits, where the grammar allows the token, become one distribution."""
    asked = constrained(seed=11)
    [sequence] = house.run(asked)[0].sequences
    state = GrammarCompiler(house.tokenizer, house.decoder.config).compile(asked.grammar).start()
    tokens = [*asked.prompt.tolist(), *sequence.tokens.tolist()]
    logits_TV = logits_of(house, tokens)[len(asked.prompt) - 1 : -1]
    for token, logprob, logits_V in zip(sequence.tokens.tolist(), sequence.logprobs.tolist(), logits_TV, strict=True):
        allowed_V = torch.from_numpy(state.allowed_V())
        expected_V = logits_V.double().masked_fill(~allowed_V, -torch.inf).log_softmax(-1)
        assert logprob == pytest.approx(float(expected_V[token]), abs=2e-5)
        state.take(token)


def logits_of(house: House, tokens: list[int]) -> torch.Tensor:
    from knapper.engine.layers.lora_grouped import Segment, Segments

    adapt = [Segment(0, len(tokens), None)]
    with torch.no_grad():
        hidden = house.decoder.hidden(torch.tensor(tokens), [len(tokens)], adapt)
        return house.decoder.logits(hidden, Segments(adapt))


def test_neighbours_in_the_batch_keep_their_bits(house: House) -> None:
    plain = [request(prompt=prompt_of(5 + seed, seed), seed=seed, topk_sample_logprobs=3) for seed in range(4)]
    limited = [constrained(seed=seed, max_tokens=30, num_samples=2) for seed in range(3)]
    alone = [house.run(each)[0] for each in [*plain, *limited]]
    together = house.run(*plain, *limited)
    for one, other in zip(alone, together, strict=True):
        assert all(same(a, b) for a, b in zip(one.sequences, other.sequences, strict=True))


def test_a_text_that_is_cut_by_its_length_has_not_stopped(house: House) -> None:
    [sequence] = house.run(constrained(max_tokens=4))[0].sequences
    assert (sequence.tokens.size, sequence.stopped) == (4, False)


def test_alternatives_are_allowed_tokens_only(house: House) -> None:
    output: SampleOutput = house.run(constrained({"enum": ["red", "blue"]}, topk_sample_logprobs=8))[0]
    topk = output.sequences[0].topk
    assert topk is not None
    first = [token for token, logprob in zip(topk.tokens[0], topk.logprobs[0], strict=True) if logprob > -9999]
    assert [house.tokenizer.decode([int(token)]) for token in first] == ['"']


def test_a_parked_sequence_goes_on_in_its_grammar(tmp_path: Path) -> None:
    """Memory for one sequence at a time fails steps; what was drawn is computed again, and the grammar stays."""
    roomy, house = House(tmp_path / "roomy"), House(tmp_path / "tight")
    asked = [constrained(seed=seed, num_samples=2) for seed in range(2)]
    step, failures = house.sampler._scheduler._step, [9, 17]

    def failing() -> None:
        if failures and house.sampler.counters.steps == failures[0]:
            failures.pop(0)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        step()

    house.sampler._scheduler._step = failing  # type: ignore[method-assign]  # a fault, planted
    for one, other in zip(roomy.run(*asked), house.run(*asked), strict=True):
        assert all(same(a, b) for a, b in zip(one.sequences, other.sequences, strict=True))
    assert not failures


def test_a_sequence_that_was_preempted_for_another_to_grow_goes_on_in_its_grammar(tmp_path: Path) -> None:
    """Three texts of some 400 tokens, of which 704 positions hold two at their start and one at its end."""
    make = partial(tiny_model, context=1024)
    long = {"type": "string", "minLength": 560, "maxLength": 580, "pattern": "^[a-z ]*$"}
    roomy, tight = House(tmp_path / "roomy", make=make), House(tmp_path / "tight", make=make, kv_tokens_max=704)
    asked = [constrained(long, prompt=prompt_of(10 + seed, seed), seed=seed, max_tokens=600) for seed in range(3)]
    outputs = tight.run(*asked)
    assert tight.sampler.counters.parked > 0
    for one, output in zip(asked, outputs, strict=True):
        assert same(roomy.run(one)[0].sequences[0], output.sequences[0])
        jsonschema.validate(json.loads(text(tight, output.sequences[0])), long)


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"not": {"type": "string"}}, "Unimplemented keys"), ({"type": "nonsense"}, "Invalid type"),
        ({"type": "string", "pattern": "(?=a)b"}, "look"), ({"enum": []}, "Unsatisfiable"),
        ({"type": "object", "x-guidance": {"lenient": True}}, "the server sets"),
        ({"$ref": "http://127.0.0.1:1/schema.json"}, "nothing is fetched"),
        ({"$ref": "#/$defs/none"}, "nothing is fetched"),
        ({"$ref": "file:///etc/passwd"}, "nothing is fetched"), ({"$id": "x:y", "$ref": "z"}, "nothing is fetched"),
    ],
)  # fmt: skip
def test_what_cannot_be_compiled_is_refused_with_the_reason(schema: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidField, match=reason) as refused:
        grammar_of(schema)
    assert refused.value.field is not None
    assert refused.value.field.startswith("schema")


def nested(levels: int) -> dict[str, Any]:
    """A schema of so many levels: each array schema is one."""
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels - 1):
        schema = {"type": "array", "items": schema}
    return schema


def chained(references: int, each: int) -> dict[str, Any]:
    """Definitions that refer on: `references` of them with `each` levels, below three of the schema's own."""
    definitions: dict[str, Any] = {f"d{i}": nested(each - 1) for i in range(references)}
    for i in range(references):
        definitions[f"d{i}"] = {"type": "array", "items": {"$ref": f"#/$defs/d{i + 1}"}}
    definitions[f"d{references}"] = {"type": "string"}
    return {"$defs": definitions, "$ref": "#/$defs/d0"}


def test_nesting_is_bounded_also_through_references() -> None:
    grammar_of(nested(limits.json_nesting_max))
    with pytest.raises(InvalidField, match="schema: nesting is 101"):
        grammar_of(nested(limits.json_nesting_max + 1))
    longest = (limits.schema_levels_max - 4 - 1) // 2  # four levels of the whole, one of the last definition
    grammar_of(chained(longest, 2))
    with pytest.raises(InvalidField, match=r"schema: nesting is 51\d; allowed: up to 512"):
        grammar_of(chained(longest + 1, 2))


def test_size_is_bounded_without_descriptions() -> None:
    described = SCHEMA | {"description": "x" * limits.grammar_bytes_max}
    assert grammar_of(described) == grammar_of(SCHEMA)
    names = SCHEMA | {"properties": {"description": {"type": "string"}}, "required": ["description"]}
    assert '"description"' in grammar_of(names)
    room = limits.grammar_bytes_max - len(grammar_of({"const": ""}).encode())
    grammar_of({"const": "x" * room})
    with pytest.raises(InvalidField, match=f"schema: bytes is {limits.grammar_bytes_max + 1}"):
        grammar_of({"const": "x" * (room + 1)})


def test_references_to_itself_are_followed(house: House) -> None:
    tree = {
        "type": "object", "properties": {"child": {"anyOf": [{"type": "null"}, {"$ref": "#"}]}},
        "required": ["child"], "additionalProperties": False,
    }  # fmt: skip
    sequences = house.run(constrained(tree, num_samples=4))[0].sequences
    ended = [json.loads(text(house, sequence)) for sequence in sequences if sequence.stopped]
    assert ended
    for each in ended:
        jsonschema.validate(each, tree)


def test_a_grammar_that_outgrows_its_limits_fails_its_own_request(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "grammar_step_items_max", 1)
    with pytest.raises(UserError, match="simplify the schema"):
        house.run(constrained())


def test_refused_with_ignore_eos_and_without_a_tokenizer(house: House) -> None:
    with pytest.raises(InvalidField, match="ignore_eos is True"):
        house.run(constrained(ignore_eos=True))
    with pytest.raises(InvalidField, match=r"no tokenizer\.json or no end token"):
        GrammarCompiler(None, house.decoder.config).compile(grammar_of(SCHEMA))


def test_blanks_are_bounded(house: House) -> None:
    """Flexible blanks without a bound let a model draw them until its context ends."""
    state = GrammarCompiler(house.tokenizer, house.decoder.config).compile(grammar_of({"type": "object"})).start()
    for character in "{\n" + " " * 32:
        [token] = house.tokenizer.encode(character).ids
        assert state.allowed_V()[token]
        state.take(token)
    allowed = np.flatnonzero(state.allowed_V())
    assert not any(house.tokenizer.decode([int(token)]).startswith((" ", "\n")) for token in allowed)
