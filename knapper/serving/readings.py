"""What the engine's metrics read: training, samples, and the account of memory."""

from collections.abc import Sequence

from knapper.engine.memory import Account
from knapper.engine.run_machine import TrainingMachine
from knapper.engine.sampling.sampler import EngineSampler
from knapper.observability.metrics import Reading

_TOP_RUNS = 8  # the number of runs whose share is a metric


def readings(machine: TrainingMachine, sampler: EngineSampler) -> list[Reading]:
    """The metrics of both."""
    passes, counts = machine.scheduler.counters, sampler.counters
    return [
        Reading("knapper_device_busy_seconds", "Total seconds the device was busy.",
                lambda: machine.device.busy_s, counts=True),
        Reading("knapper_train_forward_passes", "Forward passes of training, with or without a backward pass.",
                lambda: passes.passes, counts=True),
        Reading("knapper_train_tokens", "Tokens computed in those passes.", lambda: passes.rows, counts=True),
        Reading("knapper_train_microbatches", "Micro-batches in those passes, each of one request; divided by the "
                "passes: how many requests share one.", lambda: passes.shares, counts=True),
        Reading("knapper_train_capacity_tokens", "Tokens those passes had capacity for; knapper_train_tokens divided "
                "by it: their utilisation.", lambda: passes.capacity, counts=True),
        Reading("knapper_train_requests_waiting", "Training requests waiting for a pass.",
                lambda: machine.scheduler.waiting),
        Reading("knapper_train_queue_age_seconds", "How long the oldest of those has waited.",
                machine.scheduler.oldest_s),
        Reading("knapper_train_run_token_ratio", "Fraction of the tokens of the last 1,024 micro-batches that belonged "
                "to the run with the most (position 1), the second most, ...; `knapper usage` names the runs.",
                lambda: _by_position(machine.scheduler.shares(_TOP_RUNS)), label="position"),
        Reading("knapper_prefilled_tokens", "Prompt tokens computed.", lambda: counts.prefilled_tokens, counts=True),
        Reading("knapper_reused_tokens", "Prompt tokens found in the prefix cache.", lambda: counts.reused_tokens,
                counts=True),
        Reading("knapper_sampled_tokens", "Tokens sampled.", lambda: counts.decoded_tokens, counts=True),
        Reading("knapper_sample_device_seconds", "Device seconds of samples.", lambda: counts.device_s,
                counts=True),
        Reading("knapper_sample_steps", "Decoding steps; tokens over steps: how full they are.", lambda: counts.steps,
                counts=True),
        Reading("knapper_sample_preemptions", "Sequences preempted because memory ran out.",
                lambda: counts.parked, counts=True),
        Reading("knapper_sample_slots", "Sequences that decode now.", lambda: sampler.active),
        Reading("knapper_sample_slots_max", "Sequences that can decode at once.", lambda: sampler.slots_max),
    ]  # fmt: skip


def memory_readings(account: Account) -> list[Reading]:
    """The account by part, and what may be computed by it."""
    return [
        Reading("knapper_memory_bytes", "The process's account of memory by part: what each may take.",
                lambda: {name: float(size) for name, size in account.parts.items()}, label="part"),
        Reading("knapper_memory_total_bytes", "What the process may take of its device's memory, weights included.",
                lambda: account.total),
        Reading("knapper_train_pass_rows_max", "Tokens of a training pass, by the account of memory.",
                lambda: account.rows_max),
    ]  # fmt: skip


def _by_position(shares: Sequence[float]) -> dict[str, float]:
    """All positions, so that none keeps an old value."""
    return {str(index + 1): shares[index] if index < len(shares) else 0.0 for index in range(_TOP_RUNS)}
