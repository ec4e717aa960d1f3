"""The state of a socket, without reading from it."""

import select


def readable(number: int) -> bool:
    """Whether the socket with this file descriptor has bytes to read, its end, or a connection to accept."""
    poll = select.poll()  # select.select knows no descriptor above 1023
    poll.register(number, select.POLLIN)
    return bool(poll.poll(0))
