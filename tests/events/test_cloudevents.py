"""Events as CloudEvents: what is sent is what is read, in both modes, and nothing else is taken for one."""

import json

import pytest

from knapper.errors import UserError
from knapper.events import cloudevents
from knapper.events.cloudevents import Event
from knapper.ids import RunId

FULL = Event(
    type=cloudevents.ROLLOUTS_SCORED, subject="local/adding/0123456789abcdef", id="a1", source="knapper/reward", step=7,
    kind="rl", model="00112233445566ff", traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
)  # fmt: skip


@pytest.mark.parametrize(
    "event",
    [
        FULL,
        Event(type=cloudevents.TICK, subject="", id="t"),
        Event(type=cloudevents.OBJECT_FINALIZED, subject="objects/inbox/a/b/job.yaml", id="9", data=b'{"size":"3"}'),
    ],
)
def test_an_event_is_read_as_it_was_sent(event: Event) -> None:
    assert cloudevents.decode(*event.encode()) == event


def test_the_structured_mode_is_read_too() -> None:
    sent = {
        "specversion": "1.0", "type": cloudevents.OBJECT_FINALIZED, "id": "1", "step": 3,
        "source": "//storage.googleapis.com/projects/_/buckets/b", "subject": "objects/inbox/a/b/c",
        "data": {"name": "inbox/a/b/c"},
    }  # fmt: skip
    event = cloudevents.decode({"content-type": "application/cloudevents+json"}, json.dumps(sent).encode())
    assert (event.subject, event.step, json.loads(event.data)) == (sent["subject"], 3, sent["data"])


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({}, b""),
        ({}, b"hello"),
        ({"content-type": "application/json"}, b"{}"),
        ({"content-type": "application/cloudevents+json"}, b"{"),
        ({"content-type": "application/cloudevents+json"}, b"[]"),
        ({"content-type": "application/cloudevents+json"}, b'{"specversion":"1.0","type":3,"source":[],"id":{}}'),
        ({"ce-specversion": "1.0", "ce-type": "x", "ce-id": "1"}, b""),
        ({"ce-specversion": "7", "ce-type": "x", "ce-source": "s", "ce-id": "1"}, b""),
        ({"ce-specversion": "1.0", "ce-type": "x", "ce-source": "s", "ce-id": "1", "ce-step": "-1"}, b""),
        ({"ce-specversion": "1.0", "ce-type": "x", "ce-source": "s", "ce-id": "1", "ce-step": "9" * 40}, b""),
        ({"ce-specversion": "1.0", "ce-type": "x" * 5000, "ce-source": "s", "ce-id": "1"}, b""),
    ],
)
def test_what_is_no_event_is_refused(headers: dict[str, str], body: bytes) -> None:
    with pytest.raises(UserError):
        cloudevents.decode(headers, body)


def test_a_bell_has_one_follower_of_each_kind() -> None:
    first = FULL.next(cloudevents.ADAPTER_STEPPED, "knapper/train_step", 8)
    assert first == FULL.next(cloudevents.ADAPTER_STEPPED, "knapper/train_step", 8)
    others = {
        FULL.next(cloudevents.ADAPTER_STEPPED, "knapper/train_step", 9).id,
        FULL.next(cloudevents.TICK, "x", 8).id,
        FULL.id,
    }
    assert first.id not in others
    assert (first.subject, first.kind, first.model, first.traceparent) == (
        FULL.subject, FULL.kind, FULL.model, FULL.traceparent,
    )  # fmt: skip


def test_a_bell_of_operations_names_a_run() -> None:
    run = "ses-00000000000000000000000000000000:train:0"
    assert cloudevents.run_of(cloudevents.decode(*cloudevents.doorbell(RunId(run), "b").encode())) == run
    for wrong in (
        FULL,
        Event(type=cloudevents.OPERATIONS, subject="", id="1"),
        Event(cloudevents.OPERATIONS, "../x", "1"),
    ):
        with pytest.raises(UserError):
            cloudevents.run_of(wrong)
