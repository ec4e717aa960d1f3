"""Whoever misspells a name is told which was meant, wherever a name can be written."""

import pytest

from knapper.errors import InvalidField, UserError
from knapper.jobs import spec
from knapper.rewards import spec as rewards
from knapper.settings import Settings
from knapper.text.suggestions import did_you_mean
from knapper.wire import json, rest

JOB = "kind: rl\ndata: d.jsonl\nsteps: 1\nreward: {name: length, max: 1}\n"


@pytest.mark.parametrize(
    ("word", "meant"),
    [("prot", "port"), ("learningrate", "learning_rate"), ("Learning-Rate", "learning_rate"), ("xyz", ""), ("", "")],
)
def test_the_nearest_of_the_known_words_is_named(word: str, meant: str) -> None:
    assert did_you_mean(word, ["port", "learning_rate", "seed"]) == (f"Did you mean {meant}?" if meant else "")


def test_a_word_of_a_megabyte_is_compared_with_nothing() -> None:
    assert did_you_mean("a" * 2**20, ["a" * 2**20]) == ""


@pytest.mark.parametrize(
    ("yaml", "meant"),
    [
        (JOB + "sead: 1\n", "seed"),
        (JOB + "optimizer: {learning_rat: 1}\n", "learning_rate"),
        (JOB + "batch: {sample: 2}\n", "samples"),
        (JOB.replace("max: 1", "max: 1, slop: 2"), "slope"),
        (JOB.replace("name: length, max: 1", "name: exact_mach"), "exact_match"),
        (JOB.replace("kind: rl", "kind: sftt"), "sft"),
        (JOB.replace("kind: rl", "knd: rl"), "kind"),
    ],
)
def test_in_job_yaml(yaml: str, meant: str) -> None:
    with pytest.raises(UserError, match=rf"^job\.yaml, line \d: .*Did you mean {meant}\?"):
        spec.parse(yaml.encode())


def test_in_a_reward_that_a_client_sends() -> None:
    with pytest.raises(UserError, match=r"Did you mean pattern\?"):
        rewards.parse({"name": "regex", "patern": "a"}, {})


def test_in_a_body_and_in_a_query() -> None:
    with pytest.raises(InvalidField, match=r"^ttl_secnds is 5; .*Did you mean ttl_seconds\?"):
        json.decode(b'{"ttl_secnds": 5}', rest.TtlChange)
    with pytest.raises(InvalidField, match=r"Did you mean ttl_seconds\?"):
        json.convert({"ttl_sec": "5"}, rest.TtlChange)


def test_among_the_settings() -> None:
    with pytest.raises(InvalidField, match=r"'KNAPPER_PROT'.*Did you mean KNAPPER_PORT\?"):
        Settings.load({"HOME": "/home/ada", "KNAPPER_PROT": "1"})
