"""`make bench`: each figure beside the bare loop that it is compared with, measured in turns in the same run.

    python -m benchmarks [--quick] [--only operations training ...] [--dtype bfloat16] [--base-url URL --model NAME]

With --base-url, any server that speaks the Tinker protocol is measured instead of our own; the bare loops need the
model's files here all the same. Written to out/bench.json with the machine, and out/sharing.png; with --dtype bfloat16,
which is that of our server's base weights, to out/bench-bfloat16.json. A section that fails is reported, and the others
go on; the exit status is 1 then. `python -m benchmarks.page` makes docs/performance.md's tables of both;
`python -m benchmarks.check` compares counted work with floors.json;
`python -m benchmarks.backends` measures vLLM beside the torch sampler, in an environment of its own.
"""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from benchmarks import figures, operations, overlap, reinforcement, samples, startup, stores, train_steps
from benchmarks.figures import Figure
from benchmarks.page import BFLOAT16, FIGURES
from benchmarks.served import Setting, serving
from knapper.catalogue.download import obtain
from knapper.settings import Settings

_SERVED: dict[str, Callable[[Setting], Iterable[Figure]]] = {
    "training": train_steps.measure,
    "sampling": samples.measure,
    "reinforcement": reinforcement.measure,
}
_OURS: dict[str, Callable[[Setting], Iterable[Figure]]] = {
    "operations": lambda setting: operations.measure(20 if setting.quick else operations.REPEATS),
    "starting": startup.measure,
    "stores": lambda _: stores.figures(),
    "jobs": lambda setting: overlap.figures(1 if setting.quick else overlap.REPEATS),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under five minutes: smaller, fewer repeats, no jobs")
    parser.add_argument("--only", nargs="+", choices=[*_SERVED, *_OURS], default=[], help="these sections")
    parser.add_argument("--base-url", default="", help="another server, with its key in TINKER_API_KEY")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="the base model")
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16"], help="of our server's base weights"
    )
    args = parser.parse_args()
    os.environ.setdefault("TINKER_TELEMETRY", "0")
    settings = Settings.load({**os.environ, "KNAPPER_MODEL": args.model})
    directory = obtain(args.model, settings.cache, say=lambda *header, **_: print(*header, file=sys.stderr))
    torch.set_num_threads(os.cpu_count() or 1)
    machine = figures.machine()
    where = "{cpu}, {cores} cores, {capability}, torch {torch}, load {load_1min:.1f}"
    print(where.format(**machine))
    ours = [name for name in _OURS if not (args.quick and name == "jobs")]  # whose shortest run is half a minute
    served_only = args.base_url or args.dtype != "float32"
    sections = args.only or ([] if served_only else ours) + [*_SERVED]
    if served_only and (own := [name for name in sections if name in _OURS]):
        served = ", ".join(_SERVED)
        parser.error(
            f"--only {' '.join(own)}: on servers of their own, of float32; with --base-url or --dtype: {served}"
        )
    results: list[Figure] = []
    failed: dict[str, str] = {}
    began = time.monotonic()

    def store_results() -> None:
        """What there is so far."""
        took_s = round(time.monotonic() - began)
        header = {"machine": machine, "load_1min_after": os.getloadavg()[0], "took_s": took_s, "failed": failed}
        stored = FIGURES if args.dtype == "float32" else BFLOAT16
        figures.store(results, stored.stored, model=args.model, quick=args.quick, dtype=args.dtype, **header)

    print(figures.HEADER)
    threads = torch.get_num_threads()
    with serving(
        Path(directory), args.model, args.base_url, quick=args.quick, threads=threads, dtype=args.dtype
    ) as setting:
        for name in sections:
            print(f"[{time.monotonic() - began:5.0f} s] {name} ...", file=sys.stderr, flush=True)
            failed[name] = "the run was stopped"  # unless it goes on
            try:
                for figure in (_SERVED | _OURS)[name](setting):
                    results.append(figure)
                    print(figure.line(), flush=True)
                    store_results()
                del failed[name]
            except Exception as error:  # noqa: BLE001  reported below; the other sections go on
                traceback.print_exc()
                failed[name] = f"{type(error).__name__}: {error}"
            store_results()
    for name, reason in failed.items():
        print(f"section {name} failed: {reason}", file=sys.stderr)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
