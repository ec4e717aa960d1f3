"""Two trainings compared, and the report."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from knapper.chaos.workload import TrainingTrace
from knapper.wire.tensors import Array

_SHOWN_MAX = 10


@dataclass(frozen=True)
class Comparison:
    """`differences`: what counts. `remarks`: reported, but not judged."""

    differences: list[str]
    remarks: list[str]


def compare(calm: TrainingTrace, wild: TrainingTrace, tolerance: float) -> Comparison:
    """Bit for bit at tolerance 0. Else answers may differ by it, and samples and bytes of files are not judged:
    one bit decides a token, and a hash.
    """
    differences, remarks = list(_differ(calm.answers, wild.answers, tolerance)), list[str]()
    strict = differences if tolerance == 0 else remarks
    strict += _differ(calm.drawn, wild.drawn, 0.0)
    if calm.weights != wild.weights:
        strict.append(f"final weights: SHA-256 {wild.weights[:16]}, undisturbed {calm.weights[:16]}")
    return Comparison(differences, remarks)


def report(
    calm: TrainingTrace, wild: TrainingTrace, killed: Mapping[str, int], recoveries: str, verdict: Comparison
) -> Iterator[str]:
    """Lines. `recoveries`: how often another process took the wild run over, as far as that is known."""
    roles = ", ".join(f"{role} {count}" for role, count in sorted(killed.items()))
    yield f"kills: {sum(killed.values())} ({roles or 'none'})"
    yield f"recoveries: {recoveries}"
    for name, outcome in (("undisturbed", calm), ("under kills", wild)):
        seconds, what = outcome.pause
        yield f"longest wait, {name}: {seconds:.1f} s ({what})"
    compared = f"{len(calm.answers)} values of answers, {len(calm.drawn)} of samples"
    yield f"compared: {compared}, weights {calm.weights[:16]}"
    for about, found in (("differs", verdict.differences), ("not judged", verdict.remarks)):
        for line in found[:_SHOWN_MAX]:
            yield f"{about}: {line}"
        if len(found) > _SHOWN_MAX:
            yield f"{about}: and {len(found) - _SHOWN_MAX} more"
    yield "verdict: " + ("DIFFERENT" if verdict.differences else "the same")


def _differ(calm: Mapping[str, Array], wild: Mapping[str, Array], tolerance: float) -> Iterator[str]:
    for name in [*calm, *(wild.keys() - calm.keys())]:
        before, after = calm.get(name), wild.get(name)
        if before is None or after is None or before.shape != after.shape or before.dtype != after.dtype:
            yield f"{name}: of another form"
        elif before.tobytes() != after.tobytes():
            furthest = float(np.max(np.abs(after.astype(np.float64) - before.astype(np.float64))))
            if not furthest <= tolerance:
                yield f"{name}: by up to {furthest:.3g}"
            elif tolerance == 0:  # zeros of two signs
                yield f"{name}: in its bits"
