"""train_step's part of a job: its steps and, at the end, its outputs.

A step is operations in the run's journal and one record, `trained`, which says where the next step begins.
"""

from dataclasses import dataclass, field

import msgspec

from knapper.catalogue.tokenizer import Language
from knapper.errors import STANDING, KnapperError, damaged
from knapper.events import cloudevents
from knapper.events.cloudevents import Event
from knapper.ids import TinkerPath
from knapper.jobs import completion, control, needs, outputs, progress, sample_usage, schedule, selection
from knapper.jobs.alarms import StepAlarms
from knapper.jobs.episodes import Episodes
from knapper.jobs.job_files import Folder
from knapper.jobs.names import STEP, Round, Start, step_name
from knapper.jobs.outputs import Metrics
from knapper.jobs.progress import Progress, ProgressReader
from knapper.jobs.recipes import Recipe, RunClients
from knapper.jobs.rl import Rl
from knapper.jobs.run_client import Journal, RunClient
from knapper.jobs.spec import DpoJob, EpisodesJob, RlJob, SftJob
from knapper.jobs.supervised import Dpo, Sft
from knapper.jobs.tokenized_rows import RowTokenizer
from knapper.jobs.worker import Slice, Worker
from knapper.state.checkpoints import Checkpoints
from knapper.state.job_records import Evaluated, Trained, encode, read
from knapper.state.journal.records import Spec
from knapper.state.ledger import Accounts
from knapper.state.sessions import DAY_S, Session, Sessions
from knapper.state.tenant_index import Register
from knapper.store.cache import LruCache

SOURCE = "knapper/train_step"
_RECIPES_MAX = 8


@dataclass
class Training:
    """`context`: the model's context, in tokens."""

    worker: Worker
    journal: Journal
    language: Language
    context: int
    _recipes: LruCache[Start, Recipe] = field(default_factory=lambda: LruCache(_RECIPES_MAX))

    def __post_init__(self) -> None:
        self._services = self.worker.services
        self._progress_reader = ProgressReader(self._services.store)
        self._checkpoints = Checkpoints(self._services.store, self._services.clock)
        self._metrics = Metrics(self._services)
        clock = self._services.clock
        self._accounts = Accounts(self._services.store, clock, clock, lambda: "job")

    async def answer(self, event: Event) -> None:
        await self.worker.answer(event, self._work)

    async def _work(self, folder: Folder, within: Slice, event: Event) -> None:
        try:
            await self._go_on(folder, within, event)
        except KnapperError as error:
            if error.code in STANDING:
                await self._note(folder, f"waits: {error}")
            raise

    async def _go_on(self, folder: Folder, within: Slice, event: Event) -> None:
        await within.go_on()
        await Sessions(self._services.store).record_heartbeat(
            folder.start.session, int(self._services.clock() // DAY_S)
        )
        recipe = await self._course(folder)
        for run in recipe.runs:  # for `knapper usage`; a slice takes less time than a mark lasts
            await self._accounts.mark(folder.start.tenant, run)
        await self._create(folder, recipe)
        while True:
            await within.go_on()
            now = await self._progress_reader.look(folder.outline, recipe.steps)
            if progress.finished(folder.outline, now, recipe.steps):
                await self._finish(folder, recipe, now, within, event)
                return
            if not await self._advance(folder, recipe, now, within, event):
                return

    async def _advance(self, folder: Folder, recipe: Recipe, now: Progress, within: Slice, event: Event) -> bool:
        """Do the next evaluation or step that is ready. False if none is."""
        for version in progress.evaluations(folder.outline, now, recipe.steps):
            if _scored(recipe, now, "evaluations", version):
                await self._evaluate(folder, recipe, version, within)
                if isinstance(folder.job, RlJob) and folder.job.stop_early is not None:  # the next steps waited for it
                    ring = self._services.notifier.ring
                    await ring(event, cloudevents.ADAPTER_STEPPED, SOURCE, version, "evaluations")
                return True
        if now.trained < now.end(recipe.steps) and _scored(recipe, now, "steps", now.trained):
            await self._train(folder, recipe, now.trained, within)
            await self._services.notifier.ring(event, cloudevents.ADAPTER_STEPPED, SOURCE, now.trained + 1)
            return True
        return False

    async def _train(self, folder: Folder, recipe: Recipe, step: int, within: Slice) -> None:
        clients = await self._clients(folder, recipe, step, within, before_step=True)
        outcome = await recipe.train(clients, step)
        if isinstance(folder.job, RlJob):
            alarms = StepAlarms(self._services.store, folder.start, folder.job, folder.started.source)
            await alarms.look(step, clients.run.seq, outcome, self._services.clock())
        if folder.job.keep == "best" and schedule.evaluated(folder.job, step + 1, recipe.steps):
            await clients.run.save(step_name(step + 1))
        made_s = 0.0 if step else sum([await self.journal.creation_s(run) for run in recipe.runs])
        ended_at = self._services.clock()
        trained = Trained(
            next_seq=clients.run.seq, reference_seq=clients.reference.seq, steps=recipe.steps, metrics=outcome.metrics,
            tokens=clients.tokens, bytes=clients.sent_bytes, spent=outcome.spent, before_at=clients.before_at,
            began_at=clients.began_at or ended_at, ended_at=ended_at, device_s=clients.device_s + made_s,
            uncounted=await sample_usage.after_step(self._services.store, folder, step, outcome.spent, ended_at),
        )  # fmt: skip
        await outputs.publish_rollouts(self._services, folder, f"step-{step + 1}", outcome.readable)
        await self._services.store.put_if_absent(folder.start.trained(step), encode(trained))
        await self._forget_adapters(folder, step + 1, recipe.steps)
        await self._metrics.publish(folder)
        await control.note(self._services.store, folder.start, "", self._services.clock())
        await outputs.publish_status(self._services, folder.started)

    async def _evaluate(self, folder: Folder, recipe: Recipe, version: int, within: Slice) -> None:
        clients = await self._clients(folder, recipe, version, within)
        outcome = await recipe.evaluate(clients, version)
        ended_at = self._services.clock()
        evaluated = Evaluated(
            next_seq=clients.run.seq, reference_seq=clients.reference.seq, metrics=outcome.metrics,
            tokens=clients.tokens, bytes=clients.sent_bytes, spent=outcome.spent, began_at=clients.began_at or ended_at,
            ended_at=ended_at, device_s=clients.device_s,
        )  # fmt: skip
        if selection.selects(folder.job):
            done = {**await selection.history(self._services.store, folder.start), version: evaluated}
            evaluated = msgspec.structs.replace(evaluated, stop=selection.stops(folder.job, done))
        await sample_usage.after_evaluation(self._services.store, folder, version, outcome.spent)
        await outputs.publish_rollouts(self._services, folder, f"evaluation-{version}", outcome.readable)
        await self._services.store.put_if_absent(folder.start.evaluated(version), encode(evaluated))
        await self._forget_states(folder)
        await outputs.publish_evaluations(self._services, folder, recipe.steps)
        await control.note(self._services.store, folder.start, "", self._services.clock())
        await outputs.publish_status(self._services, folder.started)

    async def _note(self, folder: Folder, reason: str) -> None:
        if await control.note(self._services.store, folder.start, reason, self._services.clock()):
            await outputs.publish_status(self._services, folder.started)

    async def _clients(
        self, folder: Folder, recipe: Recipe, version: int, within: Slice, *, before_step: bool = False
    ) -> RunClients:
        """Clients that continue the journal after this version was made, or also after it was evaluated."""
        start, store = folder.start, self._services.store
        seq = reference_seq = 1
        previous: Trained | Evaluated | None = None
        if before_step and recipe.evaluates_in_run and schedule.evaluated(folder.job, version, recipe.steps):
            previous = await read(store, start.evaluated(version), Evaluated)
            if previous is None:
                raise damaged(start.evaluated(version), "it is missing")
        elif version:
            previous = await read(store, start.trained(version - 1), Trained)
            if previous is None:
                raise damaged(start.trained(version - 1), "it is missing")
        if previous is not None:
            seq, reference_seq = previous.next_seq, previous.reference_seq
        return RunClients(
            RunClient(self.journal, start.run, seq, within.go_on),
            RunClient(self.journal, start.reference, reference_seq, within.go_on),
            folder.started.started_at if previous is None else previous.ended_at,
        )

    async def _finish(self, folder: Folder, recipe: Recipe, now: Progress, within: Slice, event: Event) -> None:
        steps = now.end(recipe.steps)
        clients = await self._clients(folder, recipe, steps, within, before_step=True)
        await self._metrics.publish(folder)
        done = await selection.history(self._services.store, folder.start) if selection.selects(folder.job) else {}
        ending = selection.ending(folder.job, done, steps, recipe.steps)
        await completion.write(self._services, self._checkpoints, folder, clients, steps, ending)
        self._metrics.forget(folder)
        for run in (folder.start.run, folder.start.reference):
            self.journal.forget(run)
        self._recipes.forget(folder.start)
        await self._services.notifier.ring(event, cloudevents.JOB_COMPLETED, SOURCE, steps)

    async def _course(self, folder: Folder) -> Recipe:
        return await self._recipes.get_once(folder.start, lambda: self._make(folder))

    async def _make(self, folder: Folder) -> Recipe:
        job, store = folder.job, self._services.store
        if isinstance(job, RlJob):
            return Rl(folder, job, store)
        tokens_max = min(job.max_tokens or self.context, self.context)
        if isinstance(job, EpisodesJob):
            return Episodes.read(folder, job, tokens_max)
        tokenizer = RowTokenizer(self.language, folder.started.started_at, tokens_max)
        if isinstance(job, SftJob):
            return await Sft.read(folder, job, tokenizer)
        assert isinstance(job, DpoJob)
        return await Dpo.read(folder, job, tokenizer)

    async def _create(self, folder: Folder, recipe: Recipe) -> None:
        """Create the runs, registered like a client's, so that `tinker` finds them and their checkpoints."""
        start, started = folder.start, folder.started
        if await self._services.store.get(start.trained(0)) is not None:
            return
        await self._services.quota.expect_runs(start.tenant, list(recipe.runs))
        session = Session(
            session=start.session, tenant=start.tenant, created_at=started.started_at, display_name=start.job,
            tags=[needs.TAG, folder.job.kind],
        )  # fmt: skip
        register = Register(self._services.store)
        await register.add_session(session)
        await Sessions(self._services.store).find_or_create(session)
        for run in recipe.runs:
            await register.add_run(session, run)
            await self.journal.create(_spec(folder, run == start.reference, run), started.source)

    async def _forget_adapters(self, folder: Folder, newest: int, steps: int) -> None:
        """Delete the checkpoint of a version from which no round can be sampled any more."""
        job = folder.job
        if not isinstance(job, RlJob):
            return
        version = newest - job.max_staleness - 1
        if version > 0 and not schedule.evaluated(job, version, steps):
            path = TinkerPath(folder.start.run, "sampler_weights", step_name(version))
            await self._checkpoints.delete(path, folder.start.tenant)

    async def _forget_states(self, folder: Folder) -> None:
        """Delete the states of versions that are evaluated and not the best."""
        start = folder.start
        if folder.job.keep != "best":
            return
        done = await selection.history(self._services.store, start)
        best = selection.best(folder.job, done)
        for entry in await self._checkpoints.labels(start.tenant, within=f"{start.run}/weights/{STEP}"):
            if entry.path.name in {step_name(version) for version in done.keys() - {best}}:
                await self._checkpoints.delete(entry.path, start.tenant)


def _scored(recipe: Recipe, now: Progress, kind: Round, n: int) -> bool:
    return len(now.parts(kind, n).scores) >= recipe.scores[kind]


def _spec(folder: Folder, reference: bool, run: str) -> Spec:
    """`reference`: the smallest adapter, as it is never trained; or the weights that the job begins with."""
    lora, small = folder.job.lora, reference and not folder.started.source
    return Spec(
        run=run, tenant=folder.start.tenant, base_model=folder.started.base_model, rank=1 if small else lora.rank,
        alpha=lora.alpha, seed=lora.seed, train_attn=lora.train_attn, train_mlp=lora.train_mlp,
        train_unembed=lora.train_unembed,
    )  # fmt: skip
