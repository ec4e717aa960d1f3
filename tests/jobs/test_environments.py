"""Jobs whose rollouts have several turns: a model, and an environment in Python between what it says."""

import json
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from knapper.errors import UserError
from knapper.jobs import control, plays, rl, spec
from knapper.jobs.names import Start
from knapper.jobs.plays import EnvironmentCode, EpisodeSoFar
from knapper.jobs.rows import EpisodeSequence
from knapper.jobs.spec import RlJob
from knapper.jobs.turns import TurnTokens
from knapper.sandbox.pool import Sandbox
from knapper.state.job_records import EnvironmentAnswer, Rollouts, SampledTurns, decode, read
from tests.jobs.services import lines
from tests.jobs.works import House, Malice, Works, run

JOB = """\
kind: rl
data: p.jsonl
steps: 3
batch: {prompts: 2, samples: 4}
sampling: {max_tokens: 6, temperature: 2.0}
lora: {rank: 4}
optimizer: {learning_rate: 0.01}
environment: {code: env.py, turns: 3}
evaluate: {data: e.jsonl, every: 2}
"""
ROWS = lines(*({"prompt": f"the {word} and", "answer": word} for word in ("in", "on", "her")))
ENVIRONMENT = """\
import random

class Environment:
    def reset(self, prompt, answer):
        self.wanted, self.heard = random.choice("aeiou"), 0
        return [{"role": "system", "content": f"say {self.wanted}"}, {"role": "user", "content": prompt}]

    def step(self, message):
        said = message["content"]
        self.heard += len(set(said))
        if len(said) % 3 == 0:
            return [], self.heard / 10, True
        return [{"role": "user", "content": f"heard {len(said)} of {random.randint(0, 9)}"}], 0.5, False
"""
FILES = {"job.yaml": JOB, "p.jsonl": ROWS, "e.jsonl": ROWS, "env.py": ENVIRONMENT}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    return House(tmp_path_factory.mktemp("tiny"))


def played(works: Works, files: dict[str, str], then: Callable[[Start], Awaitable[Any]] | None = None) -> Any:
    """How the job ended, or what `then` finds when it has."""

    async def story() -> Any:
        try:
            begun = await works.submit(files)
            await works.run(begun)
            await works.drain()
            now = await control.now(works.store, begun)
            return f"{now.state}: {now.reason}" if then is None else await then(begun)
        finally:
            await works.sandbox.close()

    return run(story)


def rollouts(works: Works, name: str = "step-1") -> list[dict[str, Any]]:
    return [json.loads(line) for line in works.output(f"rollouts/{name}.jsonl").splitlines()]


def test_a_job_with_an_environment_ends_with_an_adapter_and_shows_its_turns(house: House) -> None:
    works = Works(house)
    assert played(works, FILES) == "completed: "
    metrics = [json.loads(line) for line in works.output("metrics.jsonl").splitlines()]
    assert [each["step"] for each in metrics] == [1, 2, 3]
    assert all("grad_norm" in each for each in metrics)
    shown = [each for step in (1, 2, 3) for each in rollouts(works, f"step-{step}")]
    assert {len(each["turns"]) for each in shown} >= {1, 3}, "some episodes end early, some by the limit"
    for each in shown:
        assert each["reward"] == pytest.approx(sum(turn["reward"] for turn in each["turns"]))
        assert each["ended"] == ("done" if each["turns"][-1]["messages"] == [] else "turns")
        assert all(len(turn["completion"]) % 3 for turn in each["turns"][:-1])
    assert metrics[0]["turns/mean"] == np.mean([len(each["turns"]) for each in shown[:8]])
    bill = json.loads(works.output("bill.json"))
    assert bill["tokens"]["sampled"] >= sum(each["tokens"] for each in shown)


async def groups_of(works: Works, begun: Start) -> list[tuple[Rollouts, list[SampledTurns]]]:
    """All prompts of the first step, with their turns."""
    found = []
    for part in range(2):
        rollouts = await read(works.store, begun.rollouts("steps", 0, part), Rollouts)
        names = [n for n in await works.store.list(begun.rounds("steps")) if f"/turns/{part:020d}/" in n]
        names = [n for n in names if n.startswith(f"{begun.rounds('steps')}{0:020d}/")]
        turns = [decode(await works.store.get(name) or b"", SampledTurns, name) for name in names]
        assert rollouts is not None
        found.append((rollouts, turns))
    return found


def test_what_is_trained_on_are_the_tokens_that_were_sampled_in_the_context_that_they_were_sampled_in(
    house: House,
) -> None:
    works = Works(house)
    groups = played(works, FILES, lambda begun: groups_of(works, begun))
    several = 0
    for record, turns in groups:
        prompt = np.frombuffer(record.prompt_tokens, "<i4").astype(np.int32)
        for n, rollout in enumerate(record.rollouts):
            own = [turn for each in turns if (turn := each.turns[n]) is not None]
            sequence = rl.sequence_of(prompt, rollout)
            said = np.concatenate([np.frombuffer(turn.tokens, "<i4") for turn in own])
            logprobs = np.concatenate([np.frombuffer(turn.logprobs, "<f4") for turn in own])
            assert sequence.tokens_T[sequence.sampled_T].tolist() == said.tolist()
            assert sequence.logprobs_T[sequence.sampled_T].tolist() == logprobs.tolist()
            assert not sequence.logprobs_T[~sequence.sampled_T].any()
            whole = house.language.tokenizer.decode(sequence.tokens_T.tolist(), skip_special_tokens=False)
            for turn in rollout.turns[:-1]:
                heard = json.loads(turn.messages)[0]["content"]
                assert f"<|end|>\n<|begin|>user\n{heard}<|end|>\n<|begin|>assistant\n" in whole
            several += len(own) > 1
            _expect_drawn(house, sequence)
    assert several


def _expect_drawn(house: House, sequence: EpisodeSequence) -> None:
    """transformers, with the untrained weights, gives each sampled token the log-probability that is stored."""
    model = AutoModelForCausalLM.from_pretrained(house.directory, dtype=torch.float32)
    tokens_T = torch.from_numpy(sequence.tokens_T).long()
    with torch.no_grad():
        logits_TV = model(tokens_T[None]).logits[0, :-1].double() / 2.0  # the job's temperature
    truth_T = logits_TV.log_softmax(-1).gather(1, tokens_T[1:, None])[:, 0].numpy()
    sampled_T = sequence.sampled_T[1:]
    np.testing.assert_allclose(truth_T[sampled_T], sequence.logprobs_T[1:][sampled_T], atol=2e-4)


@pytest.fixture(scope="module")
def calm(house: House) -> Works:
    works = Works(house)
    assert played(works, FILES) == "completed: "
    return works


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(2, 30))])
def test_whatever_happens_to_bells_and_processes_the_episodes_and_the_adapter_are_the_same_bit_for_bit(
    house: House, calm: Works, seed: int
) -> None:
    """An environment's process dies with reward's, and each answer is a process of its own anyway."""
    malice = Malice(lose=0.2, copies_max=3, shuffle=True, kill=0.2)
    wild = Works(house, seed, malice, slice_s=0.3)
    assert played(wild, FILES) == "completed: "
    for step in (1, 2, 3):
        assert rollouts(wild, f"step-{step}") == rollouts(calm, f"step-{step}")
    assert wild.output("rollouts/evaluation-2.jsonl") == calm.output("rollouts/evaluation-2.jsonl")
    assert wild.adapter() == calm.adapter()
    tokens = [json.loads(works.output("bill.json"))["tokens"] for works in (wild, calm)]
    assert tokens[0] == tokens[1], "nothing is counted twice"


PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
IMAGE = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}}]
WRONG = {
    "raises": ('        said = message["content"]\n', "        return int('seven')\n",
               "with base 10: 'seven' (env.py, line 9: return int('seven'))"),
    "resets to nothing": ("        return [{\"role\": \"system\"", "        return [] and [{\"role\": \"system\"",
                          "reset of env.py returned messages = a list; allowed: a text, or a list of at"),
    "answers again": ("import random\n", "import os\nclass random: choice, randint = min, lambda *_: os.urandom(1)\n",
                          "env.py answered otherwise than before, to the same turns"),
    "gives no reward": ("self.heard / 10, True", "None, True",
                        "the reward: env.py returned NoneType; allowed: a finite number"),
    "is no pair": ("self.heard / 10, True", "self.heard / 10, True, {}",
                   "step of env.py returned a tuple; allowed: (messages, reward, done)"),
    "hangs": ('        said = message["content"]\n', "        while True: pass\n", "it ran over its 1 s"),
    "has no class": ("class Environment", "class Env", "env.py has no class `Environment` with `reset"),
    "opens a file": ('        said = message["content"]\n', "        open('/etc/passwd')\n",
                     "turn 1: PermissionError"),
    "says a role that is none": ('[{"role": "user", "content": f"heard', '[{"role": 3, "content": f"heard',
                                 "messages[0].role"),
    "says half a character": ('[{"role": "user", "content": f"heard', '[{"role": "user", "content": f"\\ud800',
                              "env.py answered what is not plain JSON: 'utf-8' codec can't encode"),
    "says half a character alone": ('[{"role": "user", "content": f"heard {len(said)} of {random.randint(0, 9)}"}]',
                                    "chr(0xD800)", "env.py answered what is not plain JSON"),
    "names half a character": ('[{"role": "user", "content": f"heard', '[{"\\ud800": 1, "content": f"heard',
                               "env.py answered what is not plain JSON"),
    "shows an image": ('[{"role": "user", "content": f"heard', f'[{{"role": "user", "content": {IMAGE} or f"heard',
                       "messages[0].content is 'an image'; allowed: texts"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_fault_of_the_environment_fails_the_job_with_the_rollout_and_the_line(house: House, name: str) -> None:
    old, new, says = WRONG[name]
    assert old in ENVIRONMENT
    job = JOB.replace("turns: 3", "turns: 3, timeout_s: 1").replace("evaluate: {data: e.jsonl, every: 2}\n", "")
    told = played(Works(house), {**FILES, "job.yaml": job, "env.py": ENVIRONMENT.replace(old, new)})
    assert told.startswith("failed: rollout 1/"), told
    assert says in told, told


def test_with_skip_group_a_fault_leaves_out_its_group_and_the_job_goes_on(house: House) -> None:
    broken = ENVIRONMENT.replace("self.heard = ", "self.heard = 1 // (answer != 'on') and ")
    works = Works(house)
    files = {**FILES, "job.yaml": JOB + "on_reward_error: skip_group\n", "env.py": broken}
    assert played(works, files) == "completed: "
    metrics = [json.loads(line) for line in works.output("metrics.jsonl").splitlines()]
    assert sum(each["groups/refused"] for each in metrics) == 2, "of six prompts, two are the row that breaks it"
    refused = [each for step in (1, 2, 3) for each in rollouts(works, f"step-{step}") if "refused" in each]
    assert {each["refused"][-60:] for each in refused} == {refused[0]["refused"][-60:]}
    assert "ZeroDivisionError" in refused[0]["refused"]


def test_an_episode_that_outgrows_the_context_ends_there_with_what_it_has(house: House) -> None:
    talking = ENVIRONMENT.replace('f"heard {len(said)}', 'f"{400 * said[:1]} {len(said)}')
    works = Works(house)
    assert played(works, {**FILES, "env.py": talking}) == "completed: "
    shown = rollouts(works)
    assert {each["ended"] for each in shown} <= {"context", "done"}
    (metrics, *_) = [json.loads(line) for line in works.output("metrics.jsonl").splitlines()]
    assert metrics["ended/context"] == np.mean([each["ended"] == "context" for each in shown]) > 0
    assert all(each["reward"] == 0.5 for each in shown if each["ended"] == "context")


def test_what_reset_says_must_fit_the_context(house: House) -> None:
    told = played(Works(house), {**FILES, "env.py": ENVIRONMENT.replace('f"say {self.wanted}"', '"x " * 400')})
    assert told.startswith("failed: what reset of the environment returns: the prompt's length in tokens"), told
    assert "1 to 506" in told


TEXTS = """\
class Environment:
    def reset(self, prompt, answer):
        return prompt

    def step(self, message):
        return f" [{len(message['content'])}] ", float(len(set(message["content"]))), False
"""


def test_an_environment_of_plain_texts_needs_no_chat_template(house: House) -> None:
    works = Works(house)
    assert played(works, {**FILES, "env.py": TEXTS}) == "completed: "
    shown = rollouts(works)
    assert {each["ended"] for each in shown} == {"turns"}
    assert all(turn["messages"] == f" [{len(turn['completion'])}] " for each in shown for turn in each["turns"])


TOOLS = """\
class Environment:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]

    def reset(self, prompt, answer):
        return [{"role": "user", "content": prompt}]

    def step(self, message):
        if "tool_calls" not in message:
            return [{"role": "user", "content": "call it"}], 0.0, False
        (call, *_) = message["tool_calls"]
        result = {"role": "tool", "tool_call_id": call["id"], "content": "3"}
        return [result], 1.0 if call["function"]["name"] == "add" else 0.0, False
"""


def test_a_models_calls_of_an_environments_tools_reach_it_as_calls(house: House) -> None:
    """A tiny model writes no calls: what it would have sampled goes the same way."""

    async def story() -> None:
        sandbox, code = Sandbox(), EnvironmentCode("env.py", TOOLS, 10.0)
        try:
            began = await plays.play(code, EpisodeSoFar("1/0/0", "s", "1 + 2", 3), sandbox)
            tokens, tools = TurnTokens(house.language, 0.0, 512), plays.tools_of(began.tools)
            said = 'So: <tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
            message = tokens.message(said, tools, 0)
            assert message["content"] == "So:"
            assert message["tool_calls"] == [
                {"id": "call_000000000", "type": "function",
                 "function": {"name": "add", "arguments": '{"a": 1}'}}
            ]  # fmt: skip
            episode = EpisodeSoFar("1/0/0", "s", "1 + 2", 3, [message], began.digests)
            after = await plays.play(code, episode, sandbox)
            assert after.said.reward == 1.0
            answer = EnvironmentAnswer(messages=msgspec.json.encode(after.said.messages), digest=after.digests[-1])
            ended = np.array(house.language.tokenizer.encode("x<|end|>").ids, "<i4").tobytes()
            following = house.language.tokenizer.decode(
                tokens.following(answer, tools, ended).tolist(), skip_special_tokens=False
            )
            assert following == (
                "\n<|begin|>user\n<tool_response>\n3\n</tool_response><|end|>\n<|begin|>assistant\n"
            ), "the token that ends the turn was sampled, and stands there once"
            cut = tokens.following(answer, tools, ended[:4])
            assert house.language.tokenizer.id_to_token(int(cut[0])) == "<|end|>", "it was not sampled"
        finally:
            await sandbox.close()

    run(story)
    assert played(Works(house), {**FILES, "env.py": TOOLS}) == "completed: "


def test_the_environment_of_the_page_plays() -> None:
    page = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text().partition("## Environments")[2]
    example, code = page.partition("```yaml\n")[2].partition("```")[0], page.partition("```python\n")[2]
    job = spec.parse(f"kind: rl\ndata: d\nsteps: 9\n{example}".encode()).job
    assert isinstance(job, RlJob)
    assert job.environment == spec.EnvironmentSpec(code="env.py", turns=8)

    async def story() -> None:
        sandbox = Sandbox()
        try:
            environment = EnvironmentCode("env.py", code.partition("```")[0], 10.0)
            began = await plays.play(environment, EpisodeSoFar("1/0/0", "s", "", None), sandbox)
            digests, turns = began.digests, list[dict[str, Any]]()
            played = began
            for guess in range(1, 21):
                turns.append({"role": "assistant", "content": f" {guess}\n"})
                episode = EpisodeSoFar("1/0/0", "s", "", None, turns, digests)
                played = await plays.play(environment, episode, sandbox)
                if played.said.done:
                    break
                assert played.said.messages == [{"role": "user", "content": "higher"}]
                digests = played.digests
            assert played.said.reward == 1.0
        finally:
            await sandbox.close()

    run(story)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("environment: {code: env.py, turns: 3}\n", "", "`reward:`, or `environment:`"),
        ("lora:", "reward: {name: exact_match}\nlora:", "none beside `environment:`"),
        ("turns: 3", "turns: 65", "environment.turns"),
        ("turns: 3", "turns: 0", "environment.turns"),
        ("turns: 3", "timeout_s: 60.1", "environment.timeout_s"),
    ],
)
def test_a_job_has_a_reward_or_an_environment_within_its_limits(old: str, new: str, says: str) -> None:
    assert old in JOB
    with pytest.raises(UserError, match=re.escape(says)):
        spec.parse(JOB.replace(old, new).encode())
    spec.parse(JOB.replace("turns: 3", "turns: 64, timeout_s: 60").encode())
