"""The trials of a sweep that does not run: cancelled, until it does again."""

from knapper.jobs import control, outputs
from knapper.jobs.names import Start
from knapper.jobs.services import JobServices
from knapper.jobs.sweep import trials
from knapper.state.job_records import Started, read


async def all_trials(services: JobServices, sweep: Start) -> None:
    """Cancel the trials of a sweep that does not run; `advance` lets them go on once it does again."""
    for tried in await trials.read_all(services.store, sweep):
        if tried.ended is None:
            await trial(services, tried.start)


async def trial(services: JobServices, trial: Start) -> None:
    if not await control.runs(services.store, trial):
        return
    await control.change(services.store, trial, "cancelled", control.WITH_SWEEP, services.clock())
    await services.store.delete(trial.working)
    if (started := await read(services.store, trial.started, Started)) is not None:
        await outputs.publish_status(services, started)
