"""A process that measures phases in order, and says each figure as a line that begins with `@`.

After a phase that failed it ends: nobody knows what the failure left on the card. `__main__` begins another one.
"""

import argparse
import json
import logging
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Final

import structlog

from benchmarks.figures import Figure
from benchmarks.gpu import kernels, loop, machine, plain, sampling, training
from benchmarks.gpu.rig import Rig
from benchmarks.gpu.sizes import SIZES
from knapper.errors import InvalidField

PHASES: Final[Mapping[str, Callable[[Rig], Iterator[Figure]]]] = {
    "start": machine.start,
    "peaks": machine.peaks,
    "kernels": kernels.measure,
    "parity": plain.parity,
    "packed": training.packed,
    "tenants": training.tenants,
    "agreement": sampling.agreement,
    "sampling": sampling.cells,
    "grpo": loop.grpo,
    "kept": training.kept,
    "durable": loop.durable,
    "bare": plain.speed,
    "exact": training.exact,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.worker")
    parser.add_argument("--phases", nargs="+", choices=list(PHASES), required=True)
    parser.add_argument("--sizes", choices=list(SIZES), required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    args = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.INFO))
    rig = Rig(SIZES[args.sizes], args.device, args.dtype, args.scratch)
    try:
        say(machine=machine.described(rig.device_now))
    except InvalidField as error:  # no such device, or a driver that torch does not take
        say(refused=str(error))
        sys.exit(2)
    for name in args.phases:
        say(begun=name)
        try:
            for figure in PHASES[name](rig):
                say(phase=name, figure={**asdict(figure), "remarks": figure.remarks})
        except Exception as error:  # noqa: BLE001  reported; the other phases go on in another process
            traceback.print_exc()
            say(failed=name, reason=f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")
            sys.exit(1)
        say(ended=name)


def say(**report: object) -> None:
    print("@" + json.dumps(report, default=str), flush=True)


if __name__ == "__main__":
    main()
