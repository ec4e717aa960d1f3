"""`make fuzz`: tens of thousands of bodies by a seed, at every route of a server of its own."""

import argparse
import sys
import tempfile
from pathlib import Path

from tests.fuzz.fuzz import Report, model, run


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=50_000, help="how many bodies")
    parser.add_argument("--first", type=int, default=0, help="the number of the first of them")
    parser.add_argument("--only", type=int, help="this one alone")
    parser.add_argument("--senders", type=int, default=4, help="at once; with 1, bodies come in order")
    parser.add_argument("--out", type=Path, default=Path("out/fuzz"), help="where what was wrong is written")
    return parser.parse_args()


def tell(report: Report) -> None:
    for way, statuses in report.by_way.items():
        print(f"{way[0]:7}{way[1]:70}", *(f"{status}: {count}" for status, count in sorted(statuses.items())))
    for each in report.resident:
        print(", ".join(f"{role} {size if role == 'seconds' else f'{size >> 20} MiB'}" for role, size in each.items()))
    print("highest:", ", ".join(f"{role} {size >> 20} MiB" for role, size in report.peak.items()))
    print(
        f"{report.bodies} bodies, {report.held} of them polls that were held; "
        f"statuses {dict(sorted(report.statuses.items()))}"
    )
    print(f"{report.turns} turns of the healthy client; {len(report.faults)} faults")
    for fault in report.faults:
        print(fault)


def main() -> int:
    given = arguments()
    first, count = (given.first, given.count) if given.only is None else (given.only, 1)
    with tempfile.TemporaryDirectory(prefix="knapper-fuzz-") as place:
        made = model(Path(place))
        report = run(
            made, Path(place) / "data", seed=given.seed, first=first, count=count, senders=given.senders, out=given.out
        )
    tell(report)
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
