"""What the recipes ask is what they say: rules, rows, queries that give something, and held-out rows that are."""

import logging
import sqlite3
from dataclasses import replace
from typing import Any

import pytest

from knapper.jobs import spec
from recipes import common
from recipes.arithmetic import train as arithmetic
from recipes.autoresearch import train as autoresearch
from recipes.distillation import train as distillation
from recipes.pig_latin import train as pig_latin
from recipes.preference import train as preference
from recipes.text_to_sql import questions
from recipes.text_to_sql import train as text_to_sql
from recipes.tool_use import env
from recipes.tool_use import train as tool_use


@pytest.mark.parametrize(
    ("word", "wanted"), [("apple", "appleway"), ("string", "ingstray"), ("by", "byay"), ("queen", "ueenqay")]
)
def test_pig_latin_is_the_rule(word: str, wanted: str) -> None:
    assert pig_latin.pig_latin(word) == wanted


def test_what_is_held_out_is_in_nothing_that_is_learned() -> None:
    learned, asked = pig_latin.split(pig_latin.Options())
    assert (len(asked), set(learned) & set(asked)) == (40, set())
    assert sorted({*learned, *asked}) == sorted(pig_latin.WORDS)
    sums, held_out = arithmetic.rows(arithmetic.Options())
    assert (len(sums) + len(held_out), len(held_out)) == (900, 40)
    assert {row["prompt"] for row in sums}.isdisjoint(row["prompt"] for row in held_out)
    parts = text_to_sql.split(text_to_sql.Options())
    assert [len(part) for part in parts] == [12, sum(len(each) for each in questions.every()) - 52, 40]
    assert len({each.text for part in parts for each in part}) == sum(len(part) for part in parts)
    products = tool_use.split(tool_use.Options())
    assert [len(part) for part in products] == [4, 200, 40]
    assert len({each for part in products for each in part}) == 244
    preferred, tested = preference.split(preference.Options())
    assert (len(preferred), len(tested), {*preferred} & {*tested}) == (30, 10, set())


def test_every_query_gives_rows_and_no_answer_is_nothing() -> None:
    connection = sqlite3.connect(":memory:")
    connection.executescript((text_to_sql.HERE / "schema.sql").read_text(encoding="utf-8"))
    for part in questions.every():
        for question in part:
            assert connection.execute(question.query).fetchall() not in ([], [(None,)]), question
    connection.close()


def test_sums_are_right() -> None:
    learned, held_out = arithmetic.rows(replace(arithmetic.Options(), largest=4, held_out=3))
    assert {"prompt": "Q: What is 2 plus 3?\nA: ", "answer": "5"} in learned + held_out


def test_a_model_that_is_not_served_is_refused_by_name() -> None:
    with pytest.raises(SystemExit, match=r"--model no/such is not served at .*; served: a, b"):
        common.chosen("no/such", ["a", "b"])
    assert common.chosen("", ["a", "b"]) == "a"
    assert common.chosen("b", ["a", "b"]) == "b"


def test_job_yaml_takes_changes_by_dotted_names() -> None:
    text = common.changed(autoresearch.JOB, {"base_model": "m", "sweep.at_once": 2, "evaluate.every": 3})
    job = spec.parse(text.encode()).job
    assert job.sweep is not None
    assert (job.sweep.at_once, job.base_model, job.sweep.metric) == (2, "m", "reward/right")
    assert job.evaluate is not None
    assert job.evaluate.every == 3


def test_a_trial_s_reward_is_told_in_words() -> None:
    right = {"name": "exact_match", "label": "right"}
    short: dict[str, Any] = {"name": "length", "weight": 0.0, "label": "short"}
    assert autoresearch.signal({"reward": [right, short]}) == "1 right"
    assert autoresearch.signal({"reward": [right, {**short, "weight": 0.2}]}) == "1 right + 0.2 short"


def test_the_calculator_answers_calls_and_scores_answers() -> None:
    product = tool_use.Product(23, 47)
    calculator = env.Environment()
    assert calculator.reset(product.prompt, product.answer) == product.prompt
    assert calculator.step({"content": product.call.strip()}) == ("RESULT 1081\nA:", 0.0, False)
    assert calculator.step({"content": " 1081"}) == ("", 1.0, True)
    for wrong in ("1082", "CALC 23*", "CALC 1234567*2", "CALC __import__('os')", ""):
        assert calculator.step({"content": wrong}) == ("", 0.0, True)
    call, answer = tool_use.demonstrations([product])
    assert call == {"prompt": "Q: What is 23 times 47?\n", "completion": "CALC 23*47\n"}
    assert answer["prompt"] + answer["completion"] == "Q: What is 23 times 47?\nCALC 23*47\nRESULT 1081\nA: 1081\n"


def test_a_token_s_advantage_is_how_much_likelier_the_teacher_finds_it() -> None:
    made = distillation.datum([5, 6, 7], [8, 9], own=[-1.0, -2.0], teacher=[-0.5, -4.0])
    assert made.model_input.to_ints() == [5, 6, 7, 8]
    given = {name: list(value.data) for name, value in made.loss_fn_inputs.items()}
    assert given == {
        "target_tokens": [6, 7, 8, 9],
        "logprobs": [0.0, 0.0, -1.0, -2.0],
        "advantages": [0.0, 0.0, 0.5, -2.0],
    }


def test_who_imports_a_recipe_still_hears_the_sdk() -> None:
    assert logging.getLogger("tinker").getEffectiveLevel() <= logging.WARNING
