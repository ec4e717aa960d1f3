"""What a tenant is told that is over its quota: what is allowed, what it has, and when or how there is more."""

from knapper.text.durations import clock
from knapper.text.sizes import sized

_MORE = "Its operator sets quotas with `knapper quota set`"


def runs(tenant: str, are_open: int, most: int) -> str:
    return (
        f"tenant {tenant} has {are_open} open training runs; allowed: {most}. Close a ServiceClient whose runs are "
        f"done (close()), or delete a run. {_MORE}"
    )


def samples(tenant: str, in_flight: int, more: int, most: int) -> str:
    return (
        f"tenant {tenant} has {in_flight} samples in flight, and asks for {more} more; allowed: {most}. Send it again "
        f"when some are done (the SDK does so by itself). {_MORE}"
    )


def tokens(tenant: str, used: int, more: int, most: int, left_s: float) -> str:
    return (
        f"tenant {tenant} has used {used} tokens today, and asks for up to {more} more; allowed: {most} a day. The "
        f"next day begins at 00:00 UTC, in {clock(left_s)}. {_MORE}"
    )


def tokens_held(tenant: str, used: int, held: int, most: int) -> str:
    return (
        f"tenant {tenant} has used {used} tokens today, and samples in flight may use {held} more; allowed: {most} a "
        f"day. What they do not use is free when they are done. {_MORE}"
    )


def too_many_tokens(tenant: str, more: int, most: int) -> str:
    return (
        f"the request has up to {more} tokens; allowed: {most}, which tenant {tenant} may use in a whole day. Send "
        f"less at once, or lower max_tokens. {_MORE}"
    )


def stored(tenant: str, stored: int, more: int, most: int) -> str:
    asked = f", and asks for {sized(more)} more" if more else ""
    return (
        f"the checkpoints of tenant {tenant} have {sized(stored)}{asked}; allowed: {sized(most)}. Delete some (`tinker "
        f"checkpoint delete`), or give them a time to live. {_MORE}"
    )


def tokens_of_job(tenant: str, used: int, most: int) -> str:
    return (
        f"tenant {tenant} has used {used} tokens today; allowed: {most} a day. The job goes on by itself when the next "
        f"day has begun, at 00:00 UTC. {_MORE}"
    )


def runs_of_job(tenant: str, are_open: int, more: int, most: int) -> str:
    return (
        f"tenant {tenant} has {are_open} open training runs, and this job needs {more}; allowed: {most}. The job goes "
        f"on by itself when another run has ended. {_MORE}"
    )
