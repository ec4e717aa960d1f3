"""`knapper demo`: start knapper, teach a small real model to add and to answer a question, and show what changed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import tinker
from matplotlib import pyplot as plt
from tinker import types

from examples import rl_addition, sft_chat

OUT = Path("out")
DATA = OUT / "data"
RL_STEPS, SFT_STEPS = 25, 15
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
SUMS = [(3, 4), (2, 6), (5, 1), (4, 4)]


@contextmanager
def knapper(model: str) -> Iterator[str]:
    """A running `knapper up` of our own, on a free port: its address. Its data goes too, unless it failed."""
    command = [sys.executable, "-m", "knapper", "up", "--model", model, "--port", "0", "--data", str(DATA)]
    failed = False
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            for line in server.stdout:
                print(line, end="", flush=True)
                if line.startswith("ready: "):
                    yield line.removeprefix("ready: ").strip()
                    break
            else:
                sys.exit("knapper did not start; its last lines above say why")
        except (Exception, SystemExit):
            failed = True
            print(f"what the server stored stays in {DATA}", file=sys.stderr)
            raise
        finally:
            server.send_signal(signal.SIGINT)
            server.wait()
            if not failed:  # also after Ctrl-C
                shutil.rmtree(DATA, ignore_errors=True)


def show(what: str, steps: int, high: float, began: float) -> Callable[[int, float], None]:
    """A printer of one line a step, with a bar as long as the value."""

    def line(step: int, value: float) -> None:
        bar = "#" * round(30 * min(value / high, 1.0))
        print(f"{time.monotonic() - began:5.0f} s  {what} {step + 1:2d}/{steps}  {value:6.3f}  {bar}", flush=True)

    return line


def ask(training: tinker.TrainingClient, prompts: list[str], stop: str) -> list[str]:
    """The greedy answers of the model as it is now, one line each."""
    sampler, tokenizer = training.save_weights_and_get_sampling_client().result(), training.get_tokenizer()
    params = types.SamplingParams(max_tokens=24, temperature=0.0, stop=[stop])
    given = [types.ModelInput.from_ints(tokenizer.encode(prompt)) for prompt in prompts]
    futures = [sampler.sample(each, num_samples=1, sampling_params=params) for each in given]
    answers = [str(tokenizer.decode(future.result().sequences[0].tokens)) for future in futures]
    return [answer.removesuffix(stop).strip().replace("\n", " ") for answer in answers]


def fifths(values: list[float]) -> tuple[float, float]:
    """Means over the first and the last fifth."""
    n = max(1, len(values) // 5)
    return sum(values[:n]) / n, sum(values[-n:]) / n


def draw(rewards: list[float], losses: list[float], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    left.plot(range(1, len(rewards) + 1), rewards, marker="o", color="tab:green")
    left.set(title="Reinforcement learning: addition", xlabel="step", ylabel="mean reward", ylim=(0, 1))
    right.plot(range(1, len(losses) + 1), losses, marker="o", color="tab:blue")
    right.set(title="Supervised: what is knapper?", xlabel="step", ylabel="loss per token", ylim=(0, None))
    figure.savefig(path, dpi=120)


def run(url: str) -> None:
    began = time.monotonic()
    rest = tinker.RestClient(base_url=url, api_key="tml-local")
    model = str(rest.get_server_capabilities().result().supported_models[0].model_name)
    service = tinker.ServiceClient(base_url=url, api_key="tml-local")
    adder = service.create_lora_training_client(model, rank=16, seed=0, train_unembed=False).result()
    chatter = service.create_lora_training_client(model, rank=16, seed=0).result()
    sums, question = [rl_addition.prompt(*each) for each in SUMS], [sft_chat.chat(sft_chat.QUESTION)]
    before = ask(adder, sums, "\n") + ask(chatter, question, "<|im_end|>")
    print("\nReinforcement learning: 8 questions x 8 answers a step, reward 1 for the right sum")
    rewards = rl_addition.train(adder, RL_STEPS, show("reward", RL_STEPS, 1.0, began))
    print("\nSupervised fine-tuning: four conversations about knapper")
    losses = sft_chat.train(chatter, SFT_STEPS, show("loss  ", SFT_STEPS, 4.0, began))
    after = ask(adder, sums, "\n") + ask(chatter, question, "<|im_end|>")
    service.close("success").result()

    (reward_first, reward_last), (loss_first, loss_last) = fifths(rewards), fifths(losses)
    figures = {
        "reward_first": reward_first, "reward_last": reward_last, "loss_first": loss_first, "loss_last": loss_last,
        "seconds": time.monotonic() - began,
    }  # fmt: skip
    (OUT / "demo.json").write_text(json.dumps(figures, indent=2) + "\n")
    draw(rewards, losses, OUT / "demo.png")
    print(f"\n{'':14}{'first fifth':>12}{'last fifth':>12}")
    print(f"{'mean reward':14}{reward_first:12.3f}{reward_last:12.3f}\n{'loss':14}{loss_first:12.3f}{loss_last:12.3f}")
    print("\nThe model's own words, before -> after")
    asked = [*(f"{a} plus {b}" for a, b in SUMS), sft_chat.QUESTION]
    for what, old, new in zip(asked, before, after, strict=True):
        print(f"  {what:18} {old[:90]!r} -> {new[:90]!r}")
    print(f"\n{figures['seconds']:.0f} s; curves in {OUT / 'demo.png'}, figures in {OUT / 'demo.json'}")


def main(model: str = MODEL) -> None:
    OUT.mkdir(exist_ok=True)
    os.environ.setdefault("TINKER_TELEMETRY", "0")
    try:
        with knapper(model) as address:
            run(address)
    except KeyboardInterrupt:
        print("\nstopped")
        sys.exit(130)


if __name__ == "__main__":
    main()
