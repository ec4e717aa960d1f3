"""A reward's description: what is allowed, and what is said about what is not."""

from typing import Any

import pytest

from knapper import limits
from knapper.errors import UserError
from knapper.rewards import spec


def test_one_term_or_a_weighted_list() -> None:
    one = spec.parse({"name": "exact_match", "ignore_case": True}, {})
    assert one.terms == {"exact_match": spec.ExactMatch(ignore_case=True)}
    both = spec.parse([{"name": "maths"}, {"name": "length", "max": 9, "weight": -0.5, "label": "brevity"}], {})
    assert [(label, term.weight) for label, term in both.terms.items()] == [("maths", 1.0), ("brevity", -0.5)]


def test_the_files_that_are_needed_are_known_before_they_are_there() -> None:
    described = [
        {"code": "reward.py"}, {"name": "sql", "database": "a.sql"}, {"name": "json_schema", "json_schema": "s.json"},
        {"code": "reward.py", "label": "again"}, {"name": "length", "max": 1},
    ]  # fmt: skip
    assert spec.names(described) == ["reward.py", "a.sql", "s.json"]
    parsed = spec.parse(described, {"reward.py": b"1", "a.sql": b"2", "s.json": b"{}", "other": b"4"})
    assert parsed.files == {"reward.py": "1", "a.sql": "2", "s.json": "{}"}


REFUSED: list[tuple[Any, str]] = [
    ("exact_match", r"reward is 'exact_match'; allowed: `name:` \(one of exact_match, regex"),
    ({"name": "maths", "code": "reward.py"}, "not both"),
    ({"name": "exact"}, "reward.name is 'exact'; allowed: exact_match, regex"),
    ({"name": ["maths"]}, r"reward.name is \['maths'\]; allowed"),
    ([], "reward is 'a list of 0'; allowed: 1 to 16 terms"),
    ([{"name": "length", "max": 1, "label": f"l{n}"} for n in range(17)], "a list of 17"),
    ([{"name": "maths"}, {"name": "maths"}], r"reward\[1\].label is 'maths'; allowed: a label that no other term has"),
    ({"name": "maths", "wieght": 2}, "reward.wieght is 2; allowed: no field of this name, only weight, label"),
    ({"name": "maths", "weight": "2"}, "reward.weight is '2'; allowed: float"),
    ({"name": "maths", "weight": float("nan")}, "reward.weight is None; allowed: float. NaN and infinity come as null"),
    ({"name": "maths", "weight": {1}, 2: 3}, "reward"),
    ({"name": "regex"}, "reward.pattern is None; allowed: a value: this field is required"),
    ({"name": "regex", "pattern": "("}, r"reward.pattern is '\('; allowed: a regular expression of Python"),
    ({"name": "regex", "pattern": "a" * 1001}, "reward.pattern"),
    ({"name": "length", "max": 1, "min": 2}, "reward.min is 2; allowed: 0 to max, which is 1"),
    ({"name": "exact_match", "between": ["", "b"]}, "reward.between"),
    ({"name": "format", "tags": []}, "reward.tags"),
    ({"code": "../reward.py"}, "reward.code is '../reward.py'"),
    ({"code": "reward.py", "timeout_s": 61}, "reward.timeout_s is 61"),
    ({"code": "reward.py"}, "reward is 'reward.py'; allowed: a file that was sent: there is none"),
]


@pytest.mark.parametrize(("described", "said"), REFUSED)
def test_what_is_wrong_is_named_with_what_is_allowed(described: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        spec.parse(described, {})


def test_a_file_has_a_limit_and_is_text() -> None:
    full = b"#" * limits.reward_file_bytes_max
    assert spec.parse({"code": "r.py"}, {"r.py": full}).files["r.py"] == full.decode()
    with pytest.raises(UserError, match=f"r.py has {len(full) + 1} bytes; allowed: at most {len(full)}"):
        spec.parse({"code": "r.py"}, {"r.py": full + b"#"})
    with pytest.raises(UserError, match=r"r\.py is not a text in UTF-8: byte 2 is 0xff"):
        spec.parse({"code": "r.py"}, {"r.py": b"ab\xff"})


@pytest.mark.parametrize(
    ("described", "text"),
    [
        ({"code": "f"}, "def reward(prompt, completion, answer):\n    return 1.0\n"),
        ({"name": "json_schema", "json_schema": "f"}, '{"type": "object"}'),
        ({"name": "sql", "database": "f"}, "create table t (x);"),
    ],
)
def test_a_byte_order_mark_is_no_part_of_a_file(described: dict[str, str], text: str) -> None:
    assert spec.parse(described, {"f": b"\xef\xbb\xbf" + text.encode()}).files == {"f": text}
    with pytest.raises(UserError, match="f is not a text in UTF-8: byte 5 is 0xff"):
        spec.parse(described, {"f": b"\xef\xbb\xbfab\xff"})


def test_the_longest_list_is_allowed() -> None:
    terms = [{"name": "length", "max": 1, "label": f"l{n}"} for n in range(limits.reward_terms_max)]
    assert len(spec.parse(terms, {}).terms) == limits.reward_terms_max


@pytest.mark.parametrize("text", [b"{", b"3", b"[]", b"[" * 100_000, b"1" * 5000])
def test_a_schema_is_json(text: bytes) -> None:
    with pytest.raises(UserError, match=r"s\.json is "):
        spec.parse({"name": "json_schema", "json_schema": "s.json"}, {"s.json": text})
