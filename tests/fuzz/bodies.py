"""Who sends, what a request is, and the legal bodies of those routes that take much."""

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
from tinker.proto import tinker_public_pb2 as pb

from tests.security.test_doors import Objects

JSON, PROTOBUF = "application/json", "application/x-protobuf"


@dataclass
class World:
    """What one sender has, and what a neighbour has. `seq`: the next number of the sender's run."""

    model: str
    key: str
    mine: Objects
    theirs: Objects
    never: Objects
    spare_key: Callable[[], str]  # one that may be revoked
    seq: int = 1


@dataclass
class Ask:
    """A request. `body`: a JSON value, a protobuf message, bytes, or None for none."""

    path: dict[str, Any] = field(default_factory=dict)
    query: list[tuple[str, Any]] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    body: Any = None


def _tokens(rng: Random, count: int) -> list[int]:
    return [rng.randrange(260) for _ in range(count)]


LOSSES: dict[str, tuple[tuple[str, ...], dict[str, float]]] = {
    "cross_entropy": (("weights",), {}),
    "importance_sampling": (("logprobs", "advantages"), {}),
    "ppo": (("logprobs", "advantages"), {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}),
    "cispo": (("logprobs", "advantages"), {"clip_low_threshold": 0.8}),
    "dro": (("logprobs", "advantages"), {"beta": 0.1}),
    "gspo": (
        ("logprobs", "advantages", "sequence_ratio_mask"), {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
    ),
}  # fmt: skip


def _inputs(rng: Random, loss: str, count: int) -> dict[str, Any]:
    values: dict[str, Any] = {"target_tokens": np.array(_tokens(rng, count), np.int64)}
    for name in LOSSES[loss][0]:
        drawn = [1.0 if name == "sequence_ratio_mask" else rng.uniform(-2, 0) for _ in range(count)]
        values[name] = np.array(drawn, np.float32)
    return values


def _tensor(array: Any) -> dict[str, Any]:
    kind = "int64" if array.dtype.kind == "i" else "float32"
    return {"data": array.ravel().tolist(), "dtype": kind, "shape": list(array.shape)}


def forward_json(world: World, rng: Random, name: str) -> Any:
    """As SDK 0.18 to 0.24 send it."""
    loss = rng.choice(list(LOSSES))
    data = []
    for _ in range(rng.randint(1, 3)):
        count = rng.randint(1, 8)
        inputs = {key: _tensor(array) for key, array in _inputs(rng, loss, count).items()}
        chunks = [{"type": "encoded_text", "tokens": _tokens(rng, count)}]
        data.append({"model_input": {"chunks": chunks}, "loss_fn_inputs": inputs})
    sent = {"data": data, "loss_fn": loss, "loss_fn_config": LOSSES[loss][1]}
    return {"model_id": world.mine.run, "seq_id": world.seq, name: sent}


def forward_protobuf(world: World, rng: Random) -> pb.ForwardBackwardRequest:
    """As newer SDKs send it."""
    loss = rng.choice(list(LOSSES))
    sent = pb.ForwardBackwardRequest(
        model_id=world.mine.run, seq_id=world.seq, loss_fn=loss, forward_only=rng.random() < 0.3
    )
    for key, value in LOSSES[loss][1].items():
        sent.loss_fn_config_v2[key].number = value
    for _ in range(rng.randint(1, 3)):
        count = rng.randint(1, 8)
        datum = sent.data.add()
        datum.model_input.add().encoded_text.tokens = np.array(_tokens(rng, count), "<i4").tobytes()
        for name, array in _inputs(rng, loss, count).items():
            tensor = datum.loss_fn_inputs[name]
            tensor.dense = array.tobytes()
            tensor.dtype = pb.DTYPE_INT64 if array.dtype.kind == "i" else pb.DTYPE_FLOAT32
            tensor.shape.append(count)
    return sent


def forward_backward(world: World, rng: Random) -> Ask:
    accept = {"Accept": rng.choice([JSON, PROTOBUF])}
    if rng.random() < 0.4:
        return Ask(headers=accept, body=forward_json(world, rng, "forward_backward_input"))
    return Ask(headers={"Content-Type": PROTOBUF, **accept}, body=forward_protobuf(world, rng))


def sample(world: World, rng: Random) -> Any:
    sent = {
        "sampling_session_id": world.mine.sampler, "seq_id": rng.randrange(10**6), "num_samples": rng.randint(1, 3),
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": _tokens(rng, rng.randint(1, 12))}]},
        "sampling_params": {
            "max_tokens": 3, "seed": rng.randrange(100), "stop": rng.choice([None, "a", ["a", "bc"], [5, 6]]),
            "temperature": rng.choice([0.0, 1.0]), "top_k": rng.choice([-1, 5]), "top_p": rng.choice([1.0, 0.5]),
        },
        "prompt_logprobs": True, "topk_prompt_logprobs": 2, "topk_sample_logprobs": 2, "prompt_alt_tokens_k": 1,
        "prompt_logprobs_last_n": 2, "type": "sample",
    }  # fmt: skip
    if rng.random() < 0.3:
        count = len(sent["prompt"]["chunks"][0]["tokens"])  # type: ignore[index]
        sent["target_prompt_logprobs"] = {"data": _tokens(rng, count), "dtype": "int64", "shape": [count, 1]}
    return sent


def job(rng: Random) -> dict[str, Any]:
    """One of each kind. JSON is YAML."""
    job: dict[str, Any] = {
        "kind": rng.choice(["sft", "dpo", "rl", "episodes"]), "data": "d.jsonl", "steps": 1, "seed": 3,
        "lora": {"rank": 2, "alpha": 4.0, "seed": 1, "train_unembed": True},
        "optimizer": {"learning_rate": 0.01, "schedule": "cosine", "warmup_steps": 1, "grad_clip_norm": 0.5},
    }  # fmt: skip
    if job["kind"] == "rl":
        job |= {
            "batch": {"prompts": 1, "samples": 2}, "sampling": {"max_tokens": 2, "stop": ["x"]},
            "loss": {"name": "ppo", "clip_low_threshold": 0.8}, "reward": rng.choice(REWARDS)[0],
            "on_reward_error": "skip_group",
        }  # fmt: skip
        if rng.random() < 0.3:
            del job["reward"]
            job["environment"] = {"code": "env.py", "turns": 2, "timeout_s": 1.0}
    elif job["kind"] == "sft":
        job |= {"batch": {"sequences": 1}, "loss_on": ["assistant"], "evaluate": {"data": "e.jsonl", "every": 1}}
    elif job["kind"] == "episodes":
        job |= {"batch": {"episodes": 1}, "max_tokens": 64, "advantage": "group_centred"}
    else:
        job |= {"batch": {"pairs": 1}, "beta": 0.2, "max_tokens": 64}
    return job


def rows(kind: str) -> list[dict[str, Any]]:
    if kind == "rl":
        return [{"prompt": [{"role": "user", "content": "1+1"}], "answer": "2"}]
    if kind == "dpo":
        return [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    if kind == "episodes":
        sequence = {"tokens": [5, 6, 7], "sampled": [[1, 3]], "logprobs": [-0.5, -1.5]}
        return [{"episode": "a", "group": "g", "reward": reward, "sequences": [sequence]} for reward in (0.0, 1.0)]
    return [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]


@dataclass
class Text:
    """A file whose content is JSON that is mutated too: `values` one a line."""

    values: list[Any]


def submitted(world: World, rng: Random) -> Any:
    wanted = job(rng)
    data = Text(rows(wanted["kind"]))
    files: dict[str, Any] = {"job.yaml": Text([wanted]), "d.jsonl": data, "e.jsonl": data, **FILES}
    return {"name": f"job-{rng.randrange(20)}", "files": files}


REWARDS: list[tuple[Any, Any]] = [  # each with an answer that it can compare with
    ({"name": "exact_match"}, "2"), ({"name": "numeric", "relative": 1e-3, "weight": 0.5}, 2),
    ({"name": "length", "max": 5}, None),
    ({"name": "regex", "pattern": "[a-z]+", "take": "last_line", "timeout_s": 1.0}, {"a": 1}),
    ({"name": "maths", "timeout_s": 1.0}, "\\frac{1}{2}"), ({"name": "json_schema", "json_schema": "s.json"}, None),
    ({"name": "sql", "database": "t.sql", "timeout_s": 1.0}, [[1]]), ({"code": "reward.py", "timeout_s": 1.0}, [1]),
    ({"name": "python_tests", "timeout_s": 1.0}, ["assert f(1) == 1"]),
    ([{"name": "numeric", "weight": 2.0}, {"name": "exact_match", "label": "x", "weight": -1.0}], "2.5"),
]  # fmt: skip


FILES = {
    "reward.py": "def reward(prompt, completion, answer):\n    return float(len(completion))\n",
    "env.py": "class Environment:\n"
    "    def reset(self, prompt, answer):\n        return prompt\n"
    "    def step(self, message):\n        return [{'role': 'user', 'content': 'again'}], 1.0, False\n",
    "s.json": '{"type": "object", "required": ["a"]}',
    "t.sql": "create table t (a); insert into t values (1);",
}
COMPLETIONS = ["2", "the answer is 2", '{"a": 1}', "select a from t", "```python\ndef f(x): return x\n```", "1/2", ""]


def score(world: World, rng: Random) -> Any:
    reward, right = rng.choice(REWARDS)
    rollouts = [
        {"id": str(n), "prompt": "p", "completion": rng.choice(COMPLETIONS), "answer": right}
        for n in range(rng.randint(1, 2))
    ]
    return {"reward": reward, "files": FILES, "rollouts": rollouts}


def openai(world: World, rng: Random) -> dict[str, Any]:
    model = rng.choice([world.model, world.mine.path("sampler_weights"), world.mine.run])
    return {
        "model": model, "n": rng.randint(1, 2), "temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": ["x", "yz"],
        "max_tokens": 3, "stream": rng.random() < 0.3, "user": "u", "presence_penalty": 0, "top_k": 5,
    }  # fmt: skip


def completion(world: World, rng: Random) -> Any:
    prompt = rng.choice(["once", ["a", "b"], [1, 2, 3], [[1, 2], [3]]])
    asked = openai(world, rng)
    return asked | {"prompt": prompt, "echo": not asked["stream"], "logprobs": 2}


_ARGUMENTS = {"type": "object", "properties": {"a": {"enum": ["x", 1]}}, "required": ["a"], "$defs": {"b": {}}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "n", "schema": _ARGUMENTS, "strict": True}}
TOOLS: dict[str, Any] = {
    "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": _ARGUMENTS}}],
    "tool_choice": {"type": "function", "function": {"name": "f"}}, "parallel_tool_calls": False,
}  # fmt: skip
CALLED: list[Any] = [
    {"role": "assistant", "content": None, "tool_calls": [
        {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
    ]},
    {"role": "tool", "tool_call_id": "c", "content": "2"},
]  # fmt: skip


def chat(world: World, rng: Random) -> Any:
    parts = [{"type": "text", "text": "hi"}]
    messages = [
        {"role": "system", "content": "be"},
        {"role": "user", "content": rng.choice(["hi", parts]), "name": "n"},
    ]
    more = rng.choice([{}, {"response_format": SCHEMA}, TOOLS, TOOLS | {"messages": [*messages, *CALLED]}])
    return openai(world, rng) | {"messages": messages, "logprobs": True, "top_logprobs": 2, "metadata": {}} | more


def response(world: World, rng: Random) -> Any:
    """Of OpenAI's Responses protocol."""
    called = [
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"a": 1}', "status": "completed"},
        {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "2"}]},
    ]
    said = {"role": "user", "content": [{"type": "input_text", "text": "hi"}]}
    tool = {"type": "function", "name": "f", "description": "d", "parameters": _ARGUMENTS, "strict": True}
    form: Any = {"text": {"format": {"type": "json_schema", "name": "n", "schema": _ARGUMENTS}, "verbosity": "low"}}
    calls: Any = {"tools": [tool], "tool_choice": {"type": "function", "name": "f"}}
    return rng.choice([form, calls]) | {
        "model": world.model, "input": rng.choice(["hi", [said], [said, *called]]), "instructions": "be",
        "max_output_tokens": 2, "temperature": 0.5, "top_p": 0.9, "store": False, "metadata": {"a": "b"},
    }  # fmt: skip


def counted(world: World, rng: Random) -> Any:
    """Of Anthropic's protocol."""
    called = [
        {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "2", "is_error": True}]},
    ]
    tool = {"name": "f", "description": "d", "input_schema": _ARGUMENTS, "cache_control": {"type": "ephemeral"}}
    more = rng.choice([{}, {"tools": [tool], "tool_choice": {"type": "tool", "name": "f"}}])
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, *rng.choice([[], called])]
    return {
        "model": world.model,
        "messages": messages,
        "system": rng.choice(["be", [{"type": "text", "text": "b"}]]),
    } | more


def message(world: World, rng: Random) -> Any:
    parameters = {
        "max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "stop_sequences": ["x"], "stream": False,
        "metadata": {"user_id": "u"}, "thinking": {"type": "disabled"},
    }  # fmt: skip
    return counted(world, rng) | parameters


def event(type_: str, data: dict[str, Any]) -> Callable[[World, Random], Ask]:
    def ask(world: World, rng: Random) -> Ask:
        attributes = {
            "specversion": "1.0", "type": type_, "source": "s", "id": str(rng.randrange(10**6)), "subject": "x/y",
            "time": "2026-01-01T00:00:00Z",
        }  # fmt: skip
        if rng.random() < 0.5:
            return Ask(headers={"Content-Type": "application/cloudevents+json"}, body=attributes | {"data": data})
        return Ask(headers={f"ce-{name}": value for name, value in attributes.items()}, body=data)

    return ask


def upload(world: World, rng: Random) -> Ask:
    name = rng.choice([f"inbox/{tenant}/{world.mine.job}/job.yaml" for tenant in ("mallory", "alice", "nobody")])
    data = {"bucket": "local", "name": name, "generation": "1", "size": "5", "contentType": "text/plain"}
    return rng.choice([event("google.cloud.storage.object.v1.finalized", data), event("dev.knapper.tick", {})])(
        world, rng
    )


SHORT_JOB = {"kind": "sft", "data": "d.jsonl", "steps": 1, "lora": {"rank": 1}}
