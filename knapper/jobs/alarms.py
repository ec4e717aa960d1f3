"""Alarms of a job's steps: by the same rules as those of a client's run, from what the step's own records say.

A job cannot repeat a step, nor resume without its optimizer, and samples from the version that `max_staleness` says.
What is left: a sampler that computes otherwise than the trainer, a temperature, and rewards that teach nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import structlog

from knapper.diagnostics import rules
from knapper.diagnostics.rules import SILENT_GROUPS, Step
from knapper.diagnostics.weights import WeightsReader
from knapper.jobs.names import Start
from knapper.jobs.recipes import StepOutcome
from knapper.jobs.spec import RlJob
from knapper.observability import metrics
from knapper.state import damage
from knapper.state.alarms import Alarms
from knapper.state.job_records import Trained, read
from knapper.state.journal.records import Alarm
from knapper.store import Store

log = structlog.get_logger()


@dataclass(frozen=True)
class StepAlarms:
    store: Store
    start: Start
    job: RlJob
    source: str = ""  # the bundle that the job began with

    async def look(self, step: int, seq: int, outcome: StepOutcome, at: float) -> None:
        """Store the alarms of step `step`, counted from 0: each is said once a job. `at`: seconds since the epoch."""
        looked_at = await self._step(step, seq, outcome)
        for _, age in looked_at.drawn:
            metrics.sample_age.observe(age or 0)
        if looked_at.kl is not None:
            metrics.sampler_trainer_kl.observe(looked_at.kl)
        found = rules.alarms(looked_at)
        if not found:
            return
        alarms, run = Alarms(self.store), self.start.run
        said = {alarm.name for alarm in await alarms.newest(run)}
        for name, message in found.items():
            if name not in said:
                metrics.alarms.labels(name).inc()
                log.warning("alarm", job=self.start.job, alarm=name, message=message)
                await alarms.put(run, Alarm(name=name, seq=seq, step=step + 1, message=message, at=at))

    async def _step(self, step: int, seq: int, outcome: StepOutcome) -> Step:
        tokens = outcome.pass_metrics.get("sampled_tokens:sum", 0.0)
        return Step(
            run=self.start.run, seq=seq, step=step + 1, losses=frozenset({self.job.loss.name}), passes=1,
            kl=outcome.pass_metrics.get("kl_sample_train_v2:sum", 0.0) / tokens if tokens else None,
            sampled=sum(each.datums for each in outcome.drawn), declared=self.job.max_staleness,
            drawn=[(each, int(outcome.metrics["staleness"])) for each in outcome.drawn],
            silent_groups=await self._silent_groups(step, outcome.metrics),
            own=frozenset({(await WeightsReader(self.store).of(self.source)).digest} if self.source else ()),
        )  # fmt: skip

    async def _silent_groups(self, step: int, of_step: Mapping[str, float]) -> int:
        """Groups in a row without an advantage, this step's last: as many as matter."""
        count = 0
        while silent := self._silent(of_step):
            count += silent
            if count >= SILENT_GROUPS or step == 0:
                break
            step -= 1
            trained = await damage.unless(read(self.store, self.start.trained(step), Trained), None)
            of_step = {} if trained is None else trained.metrics
        return count

    def _silent(self, of_step: Mapping[str, float]) -> int:
        """The groups of a step if all of them are silent, else 0; groups that were refused have no rewards."""
        if "groups/silent" not in of_step:
            return 0
        groups = self.job.batch.prompts - int(of_step["groups/refused"])
        return groups if of_step["groups/silent"] == groups else 0
