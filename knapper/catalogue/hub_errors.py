"""What huggingface_hub raises where the hub does not answer, or breaks off."""

from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

# Its HTTP client is another one from release to release; the root of that one's errors is a base of its own.
NO_ANSWER: tuple[type[Exception], ...] = tuple(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
BROKEN_OFF: tuple[type[Exception], ...] = (*NO_ANSWER, LocalEntryNotFoundError)  # of a download
