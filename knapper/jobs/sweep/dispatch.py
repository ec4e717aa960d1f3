"""What a sweep does next: it records the trials that have ended, begins others, and ends with the best of them.

Any process may do it, at any time, and die at any line: a trial's record is written first and once, its job follows
from the record, and what is missing is made at the next look. Nothing else is remembered.
"""

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import msgspec
import structlog

from knapper import limits
from knapper.errors import UserError
from knapper.events import cloudevents
from knapper.events.cloudevents import Event
from knapper.jobs import bells, checks, control, notifications, outputs, selection, spec, starts, yaml_document
from knapper.jobs.job_files import files_of
from knapper.jobs.names import Start
from knapper.jobs.progress import newest_step
from knapper.jobs.services import JobServices
from knapper.jobs.spec import AnyJob
from knapper.jobs.sweep import halt, points, search, trials
from knapper.jobs.sweep.points import Point
from knapper.jobs.sweep.spec import SweepSpec
from knapper.jobs.sweep.trials import Tried
from knapper.state.checkpoints import Checkpoints
from knapper.state.job_records import Evaluated, Started, State, Trained, Trial, TrialEnded, encode, read
from knapper.state.journal import bundles
from knapper.store import many

SOURCE = "knapper/gateway"
_ADAPTER = frozenset({"adapter_config.json", "adapter_model.safetensors"})
log = structlog.get_logger()


async def advance(services: JobServices, sweep: Start) -> list[Event]:
    """Do what is due, and return the doorbells for it. Safe to interrupt, to repeat, and to do twice at once."""
    started = await read(services.store, sweep.started, Started)
    job = None if started is None else spec.decode(started.spec_json)
    if started is None or job is None or job.sweep is None:
        return []
    if not await control.runs(services.store, sweep):
        await halt.all_trials(services, sweep)
        return []
    rung = await _Sweep(services, sweep, started, job, job.sweep).advance()
    if not await control.runs(services.store, sweep):  # it was cancelled meanwhile
        await halt.all_trials(services, sweep)
    return rung


async def go_on_after(services: JobServices, start: Start) -> list[Event]:
    """After the end of any job: the doorbells of its sweep, if it is a trial of one."""
    started = await read(services.store, start.started, Started)
    sweep = None if started is None else trials.of_trial(start, started)
    return [] if sweep is None else await advance(services, sweep)


@dataclass(frozen=True)
class _Sweep:
    """One look at a sweep that runs."""

    services: JobServices
    start: Start
    started: Started
    job: AnyJob
    spec: SweepSpec

    async def advance(self) -> list[Event]:
        store, rung = self.services.store, list[Event]()
        before = await trials.read_all(store, self.start)
        for trial in before:
            if trial.ended is None and not await self._record_end(trial):
                rung += await self._go_on(trial)
        tried = await trials.read_all(store, self.start)
        while (point := await self._next(tried)) is not None:
            record = Trial(values=msgspec.json.encode(point), at=self.services.clock())
            await store.put_if_absent(self.start.tried(len(tried) + 1), encode(record))
            tried = await trials.read_all(store, self.start)  # another process may have been first, with other values
            rung += await self._go_on(tried[-1])
            tried = await trials.read_all(store, self.start)
        if all(trial.ended is not None for trial in tried):
            return [*rung, *await self._finish(tried)]
        if [trial.ended for trial in tried] != [trial.ended for trial in before]:
            await self._publish(tried)
            await outputs.publish_status(self.services, self.started)
        return rung

    async def _next(self, tried: Sequence[Tried]) -> Point | None:
        """The next trial's point, if one may begin now."""
        running = sum(trial.ended is None for trial in tried)
        planned = self.spec.planned or limits.sweep_trials_max
        device_s = self.spec.budget.device_seconds
        if running >= self.spec.at_once or len(tried) >= planned:
            return None
        if device_s is not None and trials.device_s(tried) >= device_s:
            return None
        if self.spec.method == "grid":
            return next(itertools.islice(points.grid(self.spec), len(tried), None))
        so_far = [search.TriedPoint(trial.point, trial.value, trial.ended is not None) for trial in tried]
        return await asyncio.to_thread(search.draw, self.spec, trials.metric(self.job, self.spec)[1], so_far)

    # ---- one trial

    async def _go_on(self, trial: Tried) -> list[Event]:
        """Begin its job if that has not begun; let it go on if it was cancelled with the sweep."""
        store = self.services.store
        started = await read(store, trial.start.started, Started)
        if started is None:
            return await self._begin(trial)
        if await control.runs(store, trial.start):
            return []
        await control.change(store, trial.start, "running", "", self.services.clock())
        await store.put_if_absent(trial.start.working, b"")
        await outputs.publish_status(self.services, started)
        return await bells.again(self.services, started, trial.start)

    async def _begin(self, trial: Tried) -> list[Event]:
        try:
            parsed = spec.parse(points.job_yaml(self._content, trial.point))
            files = await files_of(self.services.store, self.start, self.started)
            started = await checks.checked_trial(self.services, self.started, trial.start, parsed, files)
        except UserError as error:
            await self._end(trial, TrialEnded(state="refused", reason=str(error), at=self.services.clock()))
            return []
        await starts.begin(self.services, trial.start, started, {})
        return [notifications.started(started)]

    @cached_property
    def _content(self) -> dict[str, object]:
        content: dict[str, object] = yaml_document.read(self.started.job_yaml).content
        return content

    async def _record_end(self, trial: Tried) -> bool:
        """Whether the trial has ended, which is then on record."""
        store = self.services.store
        now = await control.now(store, trial.start)
        if now.state == "running" or (now.state == "cancelled" and now.reason.startswith(control.WITH_SWEEP)):
            return False
        steps = await newest_step(store, trial.start)
        evaluated = await selection.history(store, trial.start)
        trained = await many.each(range(steps), lambda step: read(store, trial.start.trained(step), Trained))
        worked: list[Trained | Evaluated] = [*(each for each in trained if each is not None), *evaluated.values()]
        value, reason = None, now.reason
        if now.state == "completed":
            value, reason = await self._value(trial, evaluated, reason)
        ended = TrialEnded(
            state=now.state, value=value, reason=reason, steps=steps, at=now.at,
            device_s=sum(each.device_s + each.spent.sample_device_s for each in worked),
        )  # fmt: skip
        await self._end(trial, ended)
        return True

    async def _value(self, trial: Tried, evaluated: dict[int, Evaluated], reason: str) -> tuple[float | None, str]:
        """(the metric of the adapter that the trial has published, the reason)"""
        started = await read(self.services.store, trial.start.started, Started)
        name = trials.metric(self.job, self.spec)[0]
        if started is None or not evaluated:
            return None, "its evaluations are gone"
        job = spec.decode(started.spec_json)
        version = selection.best(job, evaluated) if job.keep == "best" else max(evaluated)
        metrics = evaluated[max(evaluated) if version is None else version].metrics
        if name not in metrics:
            return None, f"its evaluation has no {name}, only {', '.join(metrics)}"
        return metrics[name], reason

    async def _end(self, trial: Tried, ended: TrialEnded) -> None:
        if await self.services.store.put_if_absent(self.start.trial_ended(trial.n), encode(ended)):
            log.info("trial ended", job=str(trial.start), state=ended.state, value=ended.value, reason=ended.reason)

    # ---- all of them

    async def _finish(self, tried: Sequence[Tried]) -> list[Event]:
        """Publish the best trial's adapter as the sweep's own, and end."""
        name, goal = trials.metric(self.job, self.spec)
        chosen = trials.best(goal, tried)
        await self._publish(tried)
        if chosen is None:
            why = next((trial.ended.reason for trial in tried if trial.ended is not None and trial.ended.reason), "")
            return await self._close("failed", f"none of its {len(tried)} trials has a {name}: {why}", len(tried))
        try:
            await self._publish_best(chosen)
        except UserError as error:
            return await self._close(
                "failed", f"the best trial is {chosen.start.job}, and is gone: {error}", len(tried)
            )
        reason = f"the best of {len(tried)} trials is {chosen.start.job}: {name} {chosen.value:.4g}"
        return await self._close("completed", reason, len(tried))

    async def _publish(self, tried: Sequence[Tried]) -> None:
        await outputs.publish_json(
            self.services, self.start, "sweep.json", await trials.table(self.services.store, self.job, tried)
        )

    async def _publish_best(self, chosen: Tried) -> None:
        """Raises NotFound if its checkpoint was deleted."""
        services = self.services
        checkpoint = await Checkpoints(services.store, services.clock).own(chosen.checkpoint, self.start.tenant)
        _, files = await bundles.read(services.store, checkpoint.bundle, _ADAPTER)
        for name, data in files.items():
            await services.exchange.publish(outputs.where(self.start, f"adapter/{name}"), data)
        await services.exchange.publish(
            outputs.where(self.start, "best.yaml"), points.job_yaml(self._content, chosen.point)
        )

    async def _close(self, state: State, reason: str, count: int) -> list[Event]:
        services, event = self.services, notifications.started(self.started)
        if not await control.change(services.store, self.start, state, reason, services.clock()):
            return []
        log.info("sweep ended", job=str(self.start), state=state, reason=reason)
        await services.store.delete(self.start.working)
        await outputs.publish_status(services, self.started)
        what = cloudevents.JOB_COMPLETED if state == "completed" else cloudevents.JOB_FAILED
        return [event.next(what, SOURCE, step=count)]
