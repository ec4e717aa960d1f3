"""train_step's part of a job: steps and, at the end, what people get.

A step is operations in the run's journal and one record, `trained`, in which it says where the next step begins.
"""

from dataclasses import dataclass, field

from knapper.catalogue.tokenizer import Language
from knapper.errors import STANDING, KnapperError, damaged
from knapper.events import cloudevents
from knapper.events.cloudevents import Event
from knapper.ids import TinkerPath
from knapper.jobs import completion, control, needs, outputs, progress, sample_usage, schedule
from knapper.jobs.job_files import Folder
from knapper.jobs.names import Round, Start
from knapper.jobs.outputs import Metrics
from knapper.jobs.progress import Progress, ProgressReader
from knapper.jobs.recipes import Lines, Recipe
from knapper.jobs.rl import Reinforcing
from knapper.jobs.rollouts import step_name
from knapper.jobs.run_client import Journal, RunClient
from knapper.jobs.spec import DpoJob, RlJob, SftJob
from knapper.jobs.supervised import Dpo, Sft
from knapper.jobs.tokenized_rows import RowTokenizer
from knapper.jobs.worker import Slice, Worker
from knapper.state.checkpoints import Checkpoints
from knapper.state.job_records import Evaluated, Trained, encode, read
from knapper.state.journal.records import Spec
from knapper.state.sessions import DAY_S, Session, Sessions
from knapper.state.tenant_index import Register
from knapper.store.cache import LruCache

SOURCE = "knapper/train_step"
_COURSES_MAX = 8


@dataclass
class Training:
    """`context`: tokens that the model takes."""

    worker: Worker
    journal: Journal
    language: Language
    context: int
    _courses: LruCache[Start, Recipe] = field(default_factory=lambda: LruCache(_COURSES_MAX))

    def __post_init__(self) -> None:
        self._place = self.worker.place
        self._looks = ProgressReader(self._place.store)
        self._checkpoints = Checkpoints(self._place.store, self._place.clock)
        self._metrics = Metrics(self._place)

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
        await Sessions(self._place.store).record_heartbeat(folder.start.session, int(self._place.clock() // DAY_S))
        course = await self._course(folder)
        await self._create(folder, course)
        while True:
            await within.go_on()
            now = await self._looks.look(folder.outline, course.steps)
            if progress.finished(folder.outline, now, course.steps):
                await self._finish(folder, course, within, event)
                return
            if not await self._advance(folder, course, now, within, event):
                return

    async def _advance(self, folder: Folder, course: Recipe, now: Progress, within: Slice, event: Event) -> bool:
        """Do the next thing that can be done here. False if there is none."""
        for version in progress.evaluations(folder.outline, now, course.steps):
            if _scored(course, now, "evaluations", version):
                await self._evaluate(folder, course, version, within)
                return True
        if now.trained < course.steps and _scored(course, now, "steps", now.trained):
            await self._train(folder, course, now.trained, within)
            await self._place.bells.ring(event, cloudevents.ADAPTER_STEPPED, SOURCE, now.trained + 1)
            return True
        return False

    async def _train(self, folder: Folder, course: Recipe, step: int, within: Slice) -> None:
        lines = await self._lines(folder, course, step, within, before_step=True)
        outcome = await course.train(lines, step)
        made_s = 0.0 if step else sum([await self.journal.creation_s(run) for run in course.runs])
        ended_at = self._place.clock()
        trained = Trained(
            next_seq=lines.run.seq, reference_seq=lines.reference.seq, steps=course.steps, metrics=outcome.metrics,
            tokens=lines.tokens, bytes=lines.sent_bytes, spent=outcome.spent, before_at=lines.before_at,
            began_at=lines.began_at or ended_at, ended_at=ended_at, device_s=lines.device_s + made_s,
            uncounted=await sample_usage.after_step(self._place.store, folder, step, outcome.spent, ended_at),
        )  # fmt: skip
        await outputs.publish_rollouts(self._place, folder, f"step-{step + 1}", outcome.readable)
        await self._place.store.put_if_absent(folder.start.trained(step), encode(trained))
        await self._forget_adapters(folder, step + 1, course.steps)
        await self._metrics.publish(folder)
        await control.note(self._place.store, folder.start, "", self._place.clock())
        await outputs.publish_status(self._place, folder.started)

    async def _evaluate(self, folder: Folder, course: Recipe, version: int, within: Slice) -> None:
        lines = await self._lines(folder, course, version, within)
        outcome = await course.evaluate(lines, version)
        ended_at = self._place.clock()
        evaluated = Evaluated(
            next_seq=lines.run.seq, reference_seq=lines.reference.seq, metrics=outcome.metrics,
            tokens=lines.tokens, bytes=lines.sent_bytes, spent=outcome.spent, began_at=lines.began_at or ended_at,
            ended_at=ended_at, device_s=lines.device_s,
        )  # fmt: skip
        await sample_usage.after_evaluation(self._place.store, folder, version, outcome.spent)
        await outputs.publish_rollouts(self._place, folder, f"evaluation-{version}", outcome.readable)
        await self._place.store.put_if_absent(folder.start.evaluated(version), encode(evaluated))
        await outputs.publish_evaluations(self._place, folder, course.steps)
        await control.note(self._place.store, folder.start, "", self._place.clock())
        await outputs.publish_status(self._place, folder.started)

    async def _note(self, folder: Folder, reason: str) -> None:
        if await control.note(self._place.store, folder.start, reason, self._place.clock()):
            await outputs.publish_status(self._place, folder.started)

    async def _lines(
        self, folder: Folder, course: Recipe, version: int, within: Slice, *, before_step: bool = False
    ) -> Lines:
        """Where the journal goes on after this version was made, or also after it was evaluated."""
        start, store = folder.start, self._place.store
        seq = reference_seq = 1
        before: Trained | Evaluated | None = None
        if before_step and course.evaluates_in_run and schedule.evaluated(folder.job, version, course.steps):
            before = await read(store, start.evaluated(version), Evaluated)
            if before is None:
                raise damaged(start.evaluated(version), "it is missing")
        elif version:
            before = await read(store, start.trained(version - 1), Trained)
            if before is None:
                raise damaged(start.trained(version - 1), "it is missing")
        if before is not None:
            seq, reference_seq = before.next_seq, before.reference_seq
        return Lines(
            RunClient(self.journal, start.run, seq, within.go_on),
            RunClient(self.journal, start.reference, reference_seq, within.go_on),
            folder.started.started_at if before is None else before.ended_at,
        )

    async def _finish(self, folder: Folder, course: Recipe, within: Slice, event: Event) -> None:
        lines = await self._lines(folder, course, course.steps, within, before_step=True)
        await self._metrics.publish(folder)
        await completion.write(self._place, self._checkpoints, folder, lines, course.steps)
        self._metrics.forget(folder)
        for run in (folder.start.run, folder.start.reference):
            self.journal.forget(run)
        self._courses.forget(folder.start)
        await self._place.bells.ring(event, cloudevents.JOB_COMPLETED, SOURCE, course.steps)

    async def _course(self, folder: Folder) -> Recipe:
        return await self._courses.get_once(folder.start, lambda: self._make(folder))

    async def _make(self, folder: Folder) -> Recipe:
        job, store = folder.job, self._place.store
        if isinstance(job, RlJob):
            return Reinforcing(folder, job, store)
        asked = job.max_tokens or self.context
        texts = RowTokenizer(self.language, folder.started.started_at, min(asked, self.context))
        if isinstance(job, SftJob):
            return await Sft.read(folder, job, texts)
        assert isinstance(job, DpoJob)
        return await Dpo.read(folder, job, texts)

    async def _create(self, folder: Folder, course: Recipe) -> None:
        """The runs, registered like a client's, so that `tinker` finds them and their checkpoints."""
        start, started = folder.start, folder.started
        if await self._place.store.get(start.trained(0)) is not None:
            return
        session = Session(
            session=start.session, tenant=start.tenant, created_at=started.started_at, display_name=start.job,
            tags=[needs.TAG, folder.job.kind],
        )  # fmt: skip
        register = Register(self._place.store)
        await register.add_session(session)
        await Sessions(self._place.store).find_or_create(session)
        for run in course.runs:
            await register.add_run(session, run)
            await self.journal.create(_spec(folder, run == start.reference, run))

    async def _forget_adapters(self, folder: Folder, newest: int, steps: int) -> None:
        """A version that no round can be sampled from any more loses its name, and soon its files."""
        job = folder.job
        if not isinstance(job, RlJob):
            return
        version = newest - job.max_staleness - 1
        if version > 0 and not schedule.evaluated(job, version, steps):
            path = TinkerPath(folder.start.run, "sampler_weights", step_name(version))
            await self._checkpoints.delete(path, folder.start.tenant)


def _scored(course: Recipe, now: Progress, kind: Round, n: int) -> bool:
    return len(now.parts(kind, n).scores) >= course.scores[kind]


def _spec(folder: Folder, reference: bool, run: str) -> Spec:
    """`reference`: the smallest adapter there is, as it stays untouched."""
    lora = folder.job.lora
    return Spec(
        run=run, tenant=folder.start.tenant, base_model=folder.started.base_model, rank=1 if reference else lora.rank,
        alpha=lora.alpha, seed=lora.seed, train_attn=lora.train_attn, train_mlp=lora.train_mlp,
        train_unembed=lora.train_unembed,
    )  # fmt: skip
