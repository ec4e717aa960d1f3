"""What the server makes of work that comes together: ratios, which no machine's speed is in, and two speeds."""

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from tinker import types

from knapper.referee.court import Court, Observation, check, text, texts

_TIMES = 3


def _seconds(court: Court, work: Callable[[], Any]) -> float:
    """The median of a few, after one that warms up."""
    took = []
    for _ in range(_TIMES + 1):
        began = court.now()
        work()
        took.append(court.now() - began)
    return median(took[1:])


def _all(futures: Sequence[Any]) -> None:
    for each in futures:
        each.result()


@check("speed", "forward_backward, in times of forward")
def backward(court: Court) -> Observation:
    training, data = court.run(), texts(8, length=64)
    once = _seconds(court, lambda: training.forward(data, "cross_entropy").result())
    both = _seconds(court, lambda: training.forward_backward(data, "cross_entropy").result())
    tokens = sum(each.model_input.length for each in data)
    return Observation(
        f"{both / once:.2f}; {tokens / both:.0f} tokens/s", {"ratio": both / once, "tokens_per_s": tokens / both}
    )


@check("speed", "8 datums one by one, in times of one batch")
def batches(court: Court) -> Observation:
    training, data = court.run(), texts(8, length=64)
    together = _seconds(court, lambda: training.forward_backward(data, "cross_entropy").result())
    alone = _seconds(court, lambda: [training.forward_backward([each], "cross_entropy").result() for each in data])
    return Observation(f"{alone / together:.2f}", {"ratio": alone / together})


@check("speed", "4 runs in turn, in times of 4 at once")
def runs(court: Court) -> Observation:
    data = texts(2, length=64)
    clients = [court.run(seed) for seed in range(4)]
    turns = _seconds(court, lambda: [each.forward_backward(data, "cross_entropy").result() for each in clients])
    at_once = _seconds(court, lambda: _all([each.forward_backward(data, "cross_entropy") for each in clients]))
    return Observation(f"{turns / at_once:.2f}", {"ratio": turns / at_once})


@check("speed", "16 samples in turn, in times of 16 at once")
def samples(court: Court) -> Observation:
    prompt = types.ModelInput.from_ints(text(16))
    params = [types.SamplingParams(max_tokens=16, seed=seed, stop=[]) for seed in range(16)]
    turns = _seconds(court, lambda: [court.base.sample(prompt, 1, each).result() for each in params])
    at_once = _seconds(court, lambda: _all([court.base.sample(prompt, 1, each) for each in params]))
    return Observation(
        f"{turns / at_once:.2f}; {256 / at_once:.0f} tokens/s",
        {"ratio": turns / at_once, "tokens_per_s": 256 / at_once},
    )
