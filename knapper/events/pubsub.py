"""Notifications of a bucket, pulled from a Pub/Sub subscription. The one module that imports its client.

A pull holds a thread until a message comes. The library honours PUBSUB_EMULATOR_HOST.
"""

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import msgspec
from google.api_core.exceptions import DeadlineExceeded, GoogleAPIError
from google.auth.exceptions import GoogleAuthError
from google.cloud import pubsub_v1  # noqa: TID251 - here, and nowhere else

from knapper.errors import StoreError, UserError
from knapper.events import cloudevents
from knapper.events.cloudevents import Event

_MESSAGES_MAX: Final = 50
_PULL_S: Final = 20.0  # timeout of a pull without messages
_REQUEST_S: Final = 20.0


@dataclass(frozen=True)
class PubsubMessage:
    """`ack`: the subscription's id of this delivery."""

    id: str
    attributes: Mapping[str, str]
    data: bytes
    ack: str


class Subscription:
    """`name`: projects/PROJECT/subscriptions/SUBSCRIPTION. Nothing is connected before the first pull."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._client: pubsub_v1.SubscriberClient | None = None
        self._thread = ThreadPoolExecutor(1, "pubsub")

    async def pull(self) -> list[PubsubMessage]:
        """The next messages, or none after a timeout. Raises StoreError."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._pull)

    async def acknowledge(self, messages: Sequence[PubsubMessage]) -> None:
        """Acknowledge the messages, which are then rarely delivered again."""
        if messages:
            acks = [message.ack for message in messages]
            await asyncio.get_running_loop().run_in_executor(self._thread, self._acknowledge, acks)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._client is not None:
            self._client.close()

    def _connected(self) -> pubsub_v1.SubscriberClient:
        if self._client is None:
            self._client = pubsub_v1.SubscriberClient()
        return self._client

    def _pull(self) -> list[PubsubMessage]:
        request = {"subscription": self._name, "max_messages": _MESSAGES_MAX}
        try:
            response = self._connected().pull(request=request, timeout=_PULL_S, retry=None)
        except DeadlineExceeded:
            return []
        except (GoogleAPIError, GoogleAuthError) as error:
            raise StoreError(f"cannot pull from {self._name}: {error}", retry_after_s=5.0) from error
        return [
            PubsubMessage(item.message.message_id, dict(item.message.attributes), item.message.data, item.ack_id)
            for item in response.received_messages
        ]

    def _acknowledge(self, acks: Sequence[str]) -> None:
        request = {"subscription": self._name, "ack_ids": list(acks)}
        try:
            self._connected().acknowledge(request=request, timeout=_REQUEST_S)
        except (GoogleAPIError, GoogleAuthError) as error:
            raise StoreError(f"cannot acknowledge to {self._name}: {error}", retry_after_s=5.0) from error


def finalized(message: PubsubMessage) -> Event | None:
    """The event that Eventarc makes of a notification, or None for one that is not of a new object.

    Raises UserError for a message that no bucket sends.
    """
    attributes = message.attributes
    if attributes.get("eventType", "") not in ("", "OBJECT_FINALIZE"):
        return None
    try:
        bucket, name, generation = (attributes[key] for key in ("bucketId", "objectId", "objectGeneration"))
    except KeyError as error:
        raise UserError(f"the message has no attribute {error}; a bucket's notification has it") from error
    data = message.data if attributes.get("payloadFormat") == "JSON_API_V1" and message.data else b""
    if not data:
        data = msgspec.json.encode({"bucket": bucket, "name": name, "generation": generation})
    return Event(
        type=cloudevents.OBJECT_FINALIZED,
        source=f"//storage.googleapis.com/projects/_/buckets/{bucket}",
        subject=f"objects/{name}",
        id=message.id,
        data=data,
    )
