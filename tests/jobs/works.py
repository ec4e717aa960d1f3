"""The functions of jobs over the real engine on a tiny model, and a Broker that loses, doubles and shuffles.

Everything hostile comes from one seed. A process that is killed loses its memory and whatever it was doing; the store
and the device's thread stay.
"""

import asyncio
import itertools
import random
import weakref
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from knapper.catalogue.tokenizer import Language
from knapper.engine.executor import Executor
from knapper.engine.models import weights
from knapper.engine.models.config import ModelConfig
from knapper.engine.models.decoder import Decoder
from knapper.engine.run_machine import TrainingMachine
from knapper.engine.sampling.sampler import EngineSampler
from knapper.engine.training.trainer import Trainer
from knapper.errors import Fenced, KnapperError, Unavailable
from knapper.events import cloudevents
from knapper.events.cloudevents import Event
from knapper.ids import LOCAL_TENANT
from knapper.jobs import control, inbox, plays, revive
from knapper.jobs.activity import Function
from knapper.jobs.job_files import Folders
from knapper.jobs.names import Start
from knapper.jobs.notifications import Notifier
from knapper.jobs.plays import EnvironmentCode, EpisodeSoFar, Played
from knapper.jobs.revive import Seen
from knapper.jobs.rollouts import RolloutSampler
from knapper.jobs.run_client import Journal
from knapper.jobs.runner import Training
from knapper.jobs.scores import Judge, Scoring
from knapper.jobs.services import JobServices
from knapper.jobs.spec import KINDS, Kind
from knapper.jobs.sweep import dispatch
from knapper.jobs.worker import Worker
from knapper.rewards.rollouts import ScorableRollout
from knapper.rewards.scorer import RewardScore
from knapper.rewards.spec import Reward
from knapper.sandbox.pool import Sandbox
from knapper.serving.engine import StoredAdapters
from knapper.serving.runs import ClaimedRuns
from knapper.state.journal.holder import Holder
from knapper.state.journal.records import Terms
from knapper.state.prices import Prices
from knapper.store.memory import MemoryStore
from tests.engine.tiny import tiny_model
from tests.jobs.services import Clock, Folder, serve

FUNCTIONS: tuple[Function, ...] = ("sample", "reward", "train_step")
Process = Function | Literal["gateway"]
CONTEXT = 512
SAMPLED_BY = "engine float32"
CHAT = (
    "{% for message in messages %}<|begin|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|begin|>assistant\n{% endif %}"
)
FREE = Prices()
TERMS = Terms(device="cpu", dtype="float32", threads=1, versions="")


class House:
    """A tiny model in memory: what takes long to make, and has no state."""

    def __init__(self, directory: Path) -> None:
        self.directory = tiny_model(directory)
        (directory / "chat_template.jinja").write_text(CHAT)
        self.config = ModelConfig.read(directory)
        self.decoder = Decoder(self.config, weights.load(directory, self.config, torch.float32))
        self.language = Language.read(directory)
        self.device = Executor()
        weakref.finalize(self, self.device.close)


@dataclass(frozen=True)
class Malice:
    """What the Broker and the machines do to a job. Chances, of each event or call."""

    lose: float = 0.0
    copies_max: int = 1
    shuffle: bool = False
    kill: float = 0.0


class Works:
    """One store, one exchange, and three functions that may die."""

    def __init__(
        self,
        house: House,
        seed: int = 0,
        malice: Malice = Malice(),
        slice_s: float = 30.0,
        prices: Prices = FREE,
    ) -> None:
        self.store, self.folder, self.clock = MemoryStore(), Folder(), Clock()
        self.terms, self.prices = TERMS, prices
        self.house, self.malice, self.slice_s = house, malice, slice_s
        self.judge: Judge = variety
        self.sandbox = Sandbox()  # for environments; a story that uses it closes it
        self.log: list[Event] = []
        self._die = random.Random(seed)
        self._queue: list[tuple[Process, Event]] = []
        self._seen = Seen()
        self._lives = itertools.count()
        self._processes: dict[str, Callable[[Event], Awaitable[None]]] = {}
        self.services = JobServices(self.store, self.folder, Notifier(self.post, self.clock), self.clock)
        processes: tuple[Process, ...] = (*FUNCTIONS, "gateway")
        for name in processes:
            self._begin(name)

    def _begin(self, name: Process) -> None:
        """A process with an empty memory."""
        services = JobServices(self.store, self.folder, Notifier(self.post, self.clock), self.clock, self.prices)
        if name == "gateway":
            self._processes[name] = partial(_after, services)
            return
        kinds: Sequence[Kind] = KINDS if name == "train_step" else ["rl"]
        worker = Worker(
            name,
            services,
            Folders(self.store),
            kinds,
            "" if name == "reward" else "tiny",
            self.slice_s,
        )
        house = self.house
        if name == "reward":
            self._processes[name] = Scoring(worker, self._judge, self._play).answer
        elif name == "sample":
            adapters = StoredAdapters(self.store, house.config, torch.device("cpu"), torch.float32)
            sampler = EngineSampler(
                house.decoder,
                house.device,
                adapters,
                house.language.tokenizer,
                slots_max=16,
                kv_tokens_max=8192,
                now=self.clock,
            )
            self._processes[name] = RolloutSampler(worker, sampler, house.language, CONTEXT, SAMPLED_BY).answer
        else:
            machine = TrainingMachine(Trainer(house.decoder), house.device, self.clock)
            holder = Holder(f"life-{next(self._lives)}", "", self.terms)
            claimed_runs = ClaimedRuns(self.store, machine, holder, self.clock)
            journal = Journal(self.store, claimed_runs, self.clock)
            self._processes[name] = Training(worker, journal, house.language, CONTEXT).answer

    async def _judge(self, reward: Reward, rollouts: Sequence[ScorableRollout]) -> list[RewardScore]:
        return await self.judge(reward, rollouts)

    async def _play(self, code: EnvironmentCode, episode: EpisodeSoFar) -> Played:
        return await plays.play(code, episode, self.sandbox)

    def restart(self, terms: Terms) -> None:
        """train_step begins anew, with other terms."""
        self.terms = terms
        self._begin("train_step")

    async def post(self, event: Event) -> None:
        """What the Broker does with an event."""
        self.log.append(event)
        for target in triggered(event):
            if self._die.random() >= self.malice.lose:
                copies = self._die.randint(1, self.malice.copies_max)
                self._queue += [(target, event)] * copies

    async def submit(self, files: Mapping[str, str | bytes], job: str = "j") -> Start:
        await serve(self.store)
        self.folder.put(job, files)
        begun = await inbox.look(self.services, LOCAL_TENANT, job)
        assert begun is not None, self.folder.files.get(f"inbox/local/{job}/job.error.json")
        for event in await revive.first(self.services, begun):
            await self.post(event)
        return begun

    async def run(self, begun: Start, turns_max: int = 3000) -> None:
        """Deliver until the job has ended."""
        for _ in range(turns_max):
            if not await control.runs(self.store, begun):
                return
            if not self._queue:
                for event in await revive.due(self.services, self._seen, quiet_s=0):
                    await self.post(event)
                continue
            await self.deliver()
        raise AssertionError(f"job {begun} did not end in {turns_max} turns: {self.log[-5:]}")

    async def drain(self) -> None:
        """Deliver what is still under way."""
        while self._queue:
            await self.deliver()

    def waits(self) -> bool:
        """Whether anything is under way."""
        return bool(self._queue)

    def silence(self) -> None:
        """Lose every bell that is under way."""
        self._queue.clear()

    async def drain_once(self) -> None:
        """Deliver what is there now, and lose whatever it leads to."""
        given, self._queue = self._queue, []
        for target, event in given:
            await self._call(target, event)
        self.silence()

    async def deliver(self) -> None:
        at = self._die.randrange(len(self._queue)) if self.malice.shuffle else 0
        count = 2 if self.malice.shuffle and len(self._queue) > 1 and self._die.random() < 0.3 else 1
        chosen = [self._queue.pop(min(at, len(self._queue) - 1)) for _ in range(count)]
        await asyncio.gather(*(self._call(target, event) for target, event in chosen))

    async def _call(self, target: Process, event: Event) -> None:
        task = asyncio.ensure_future(self._processes[target](event))
        if self._die.random() < self.malice.kill:
            for _ in range(self._die.randint(0, 400)):
                await asyncio.sleep(0)
                if task.done():
                    break
            task.cancel()
            self._begin(target)
        try:
            await task
        except asyncio.CancelledError:
            self._queue.append((target, event))  # the Broker got no answer
        except (Unavailable, Fenced):
            self._queue.append((target, event))
        except KnapperError as error:
            if error.status < 500:
                raise
            self._queue.append((target, event))

    async def call(self, target: Function, event: Event) -> None:
        """The function itself, with nobody in between."""
        await self._processes[target](event)

    def output(self, name: str, job: str = "j") -> bytes:
        return self.folder.files[f"jobs/local/{job}/{name}"]

    def adapter(self, job: str = "j") -> bytes:
        return self.output("adapter/adapter_model.safetensors", job)


async def _after(services: JobServices, event: Event) -> None:
    """What the gateway does when a job has ended."""
    for rung in await dispatch.go_on_after(services, Start.parse(event.subject)):
        await services.notifier.post(rung)


async def variety(_reward: Reward, rollouts: Sequence[ScorableRollout]) -> list[RewardScore]:
    """How many different characters a completion has: even a tiny random model's differ in that."""
    return [RewardScore(len(set(rollout.completion)) / 6, {}) for rollout in rollouts]


def triggered(event: Event) -> list[Process]:
    """Whom the Triggers send it to."""
    if event.type in (cloudevents.JOB_STARTED, cloudevents.ADAPTER_STEPPED):
        return ["sample"] if event.kind == "rl" else ["train_step"]
    if event.type in cloudevents.JOB_ENDED:
        return ["gateway"]
    after: dict[str, list[Process]] = {
        cloudevents.ROLLOUTS_SAMPLED: ["reward"],
        cloudevents.ROLLOUTS_SCORED: ["train_step"],
        cloudevents.ROLLOUTS_ANSWERED: ["sample"],
    }
    return after.get(event.type, [])


def run(story: Callable[[], Any]) -> Any:
    return asyncio.run(asyncio.wait_for(story(), 100))
