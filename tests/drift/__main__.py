"""`make drift`: install the newest neighbours beside the pinned ones, say what is new, and run the tests with them.

    python -m tests.drift [--only sdk libraries] [--without-tests]

Two environments in .venv/drift, each from nothing: one with the newest SDK and cookbook, one with the newest torch,
transformers and peft. The report goes to out/drift.md as well. Ends with 1 if a method of the SDK is new or gone, a
number is another one, or a test fails, each by its name.
"""

import argparse
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tests.drift import numbers, surface
from tests.drift.environments import ENVIRONMENTS, Environment, changed, of_this_process, printed
from tests.test_house import ROOT

REPORT: Final = ROOT / "out" / "drift.md"
_BAD: Final = ("new method", "gone", "OTHER NUMBERS", "not computed", "failed", "cannot be installed")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make drift", description=__doc__)
    names = [environment.name for environment in ENVIRONMENTS]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--without-tests", action="store_true", help="say only what is new and what is computed")
    return parser.parse_args()


def report(environment: Environment, *, with_tests: bool) -> Iterator[str]:
    """Lines of findings, as they are found."""
    try:
        environment.make()
    except subprocess.CalledProcessError as error:
        yield f"cannot be installed: {error}"
        return
    yield from changed(of_this_process(), environment.versions())
    yield from sdk_lines(environment) if "tinker" in environment.newest else number_lines(environment)
    if with_tests:
        results = REPORT.with_name(f"drift-{environment.name}.xml")
        environment.test(results)
        yield from failures(results)


def sdk_lines(environment: Environment) -> list[str]:
    return surface.differences(surface.surface(), printed(environment.python, "-m", "tests.drift.surface")["surface"])


def number_lines(environment: Environment) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as directory:
        models, ours, newest = (Path(directory) / name for name in ("models", "ours.npz", "newest.npz"))
        before = printed(Path(sys.executable), "-m", "tests.drift.numbers", str(models), str(ours))
        after = printed(environment.python, "-m", "tests.drift.numbers", str(models), str(newest))
        yield from numbers.differences(ours, newest)
        yield f"seconds of three steps of every family: {before['seconds']} -> {after['seconds']}"


def failures(results: Path) -> list[str]:
    """A line for each test that failed, and for a run that came to none."""
    if not results.exists():
        return ["failed: pytest wrote no results"]
    cases = list(ET.parse(results).getroot().iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    lines = [f"failed: {case.get('classname')}::{case.get('name')}" for case in failed]
    return lines or ([f"{len(cases)} tests passed or were skipped"] if cases else ["failed: no test ran"])


def main() -> int:
    options = arguments()
    REPORT.parent.mkdir(exist_ok=True)
    lines = []
    with REPORT.open("w", encoding="utf-8") as page:
        for environment in ENVIRONMENTS:
            if environment.name not in options.only:
                continue
            print(f"## {environment.name}", file=page)
            for line in report(environment, with_tests=not options.without_tests):
                lines.append(line)
                print(f"- {line}", file=page, flush=True)
                print(f"{environment.name}: {line}", flush=True)
    return int(any(line.startswith(_BAD) for line in lines))


if __name__ == "__main__":
    sys.exit(main())
