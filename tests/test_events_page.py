"""docs/events.md says what the code does: its examples are read, it names every type, and its table is served."""

import re
from pathlib import Path

import pytest
import yaml

from knapper.events import cloudevents
from knapper.local.broker.triggers import TRIGGERS

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "events.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```http\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_are_events(example: str) -> None:
    head, _, body = example.partition("\n\n")
    headers = dict(line.split(": ", 1) for line in head.splitlines()[1:])
    event = cloudevents.decode(headers, body.strip().encode())
    assert event.id
    assert cloudevents.decode(*event.encode()) == event


def test_every_type_is_on_the_page_and_no_other() -> None:
    ours = {
        value
        for value in vars(cloudevents).values()
        if isinstance(value, str) and value.startswith(("dev.", "google."))
    }
    assert len(EXAMPLES) == 4
    assert set(re.findall(r"`((?:dev\.knapper|google\.cloud)\.[a-z0-9.]+)`", PAGE)) == ours


def test_the_table_says_who_hears_what() -> None:
    rows = dict(re.findall(r"^\| (`[^|]+`) \| [^|]* \| ([^|]*) \|", PAGE, re.MULTILINE))
    for trigger in TRIGGERS:
        for exact in trigger.any_of:
            (hearers,) = (hearers for types, hearers in rows.items() if f"`{exact['type']}`" in types)
            assert trigger.subscriber in hearers, (trigger, hearers)


def test_a_cluster_has_the_same_triggers() -> None:
    """But for `model`: of one machine there is one."""
    served = []
    for trigger in yaml.safe_load_all((ROOT / "knative" / "base" / "triggers.yaml").read_text(encoding="utf-8")):
        if trigger is None:
            continue
        exacts, prefix = [], ""
        (outer,) = trigger["spec"]["filters"]
        for one in outer.get("any") or outer.get("all") or [outer]:
            if "exact" in one:
                exacts.append({name: value for name, value in one["exact"].items() if name != "model"})
            else:
                prefix = one["prefix"]["subject"]
        served.append((trigger["spec"]["subscriber"]["ref"]["name"].replace("-", "_"), exacts, prefix))
    ours = [(trigger.subscriber, [dict(exact) for exact in trigger.any_of], trigger.prefix) for trigger in TRIGGERS]
    assert served == ours
