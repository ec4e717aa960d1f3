"""The doorbells that a job with open work needs, from its records."""

from knapper.events import cloudevents
from knapper.events.cloudevents import Event
from knapper.jobs import notifications, progress
from knapper.jobs.names import Start
from knapper.jobs.progress import Outline, ProgressReader
from knapper.jobs.services import JobServices
from knapper.jobs.spec import RlJob, decode
from knapper.state.job_records import Started


async def again(services: JobServices, started: Started, start: Start) -> list[Event]:
    """A doorbell for each function that has work to do for the job."""
    when = int(services.clock() * 1e3)
    job = decode(started.spec_json)
    if not isinstance(job, RlJob):
        return [notifications.revived(started, start, cloudevents.JOB_STARTED, 0, when)]  # only train_step has work
    outline = Outline(start, job, started.held_out)
    now = await ProgressReader(services.store).look(outline, job.steps)
    steps: dict[str, int] = {}  # by event type
    for kind, n, prompts in progress.rounds(outline, job, now):
        parts = now.parts(kind, n)
        if len(parts.rollouts) < prompts:
            steps.setdefault(cloudevents.JOB_STARTED, now.trained)
        elif len(parts.scores) < prompts:
            steps.setdefault(cloudevents.ROLLOUTS_SAMPLED, n)
        elif kind == "evaluations" or n == now.trained:
            steps.setdefault(cloudevents.ROLLOUTS_SCORED, n)
    if progress.finished(outline, now, job.steps):
        steps[cloudevents.ROLLOUTS_SCORED] = now.trained
    return [notifications.revived(started, start, what, step, when) for what, step in steps.items()]
