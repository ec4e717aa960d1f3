"""Publishes why a job that cannot continue waits."""

from knapper.jobs import control, outputs
from knapper.jobs.names import Start
from knapper.jobs.services import JobServices
from knapper.state.job_records import Started, read


async def note(services: JobServices, start: Start, reason: str) -> None:
    """Into `status.json` and `knapper jobs`, if it changed; does nothing for a job that does not run."""
    started = await read(services.store, start.started, Started)
    if started is not None and await control.note(services.store, start, f"waits: {reason}", services.clock()):
        await outputs.publish_status(services, started)
