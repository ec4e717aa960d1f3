"""A job that cannot go on says in its status why, and that it waits."""

from knapper.jobs import control, outputs
from knapper.jobs.names import Start
from knapper.jobs.services import JobServices
from knapper.state.job_records import Started, read


async def note(place: JobServices, start: Start, reason: str) -> None:
    """In `status.json` and `knapper jobs`, if that is news; nothing, of a job that does not run."""
    started = await read(place.store, start.started, Started)
    if started is not None and await control.note(place.store, start, f"waits: {reason}", place.clock()):
        await outputs.publish_status(place, started)
