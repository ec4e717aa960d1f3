"""`make mutants`: does a test notice? Small changes by a seed, each tried against the tests of its module."""

import argparse
import os
import sys
import tempfile
import time
from collections import deque
from functools import cache
from pathlib import Path
from random import Random

from tests.mutants import trial
from tests.mutants.modules import EQUIVALENT, MODULES
from tests.mutants.mutations import Mutation, mutations
from tests.mutants.trial import ROOT, Trial, Verdict

_GRACE_S = 5.0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make mutants", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of the sample")
    parser.add_argument("--count", type=int, default=240, help="how many; 0: all")
    parser.add_argument("--only", help="one, as `knapper/ids.py:17`, or all of a module, as `knapper/ids.py`")
    parser.add_argument("--of", default="", help="of the sample, those whose path begins so")
    parser.add_argument("--quick", action="store_true", help="survivors are not tried against the longer tests")
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--killed-min", type=float, default=0.95, help="the part of them that must be killed")
    return parser.parse_args()


@cache
def source_of(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def sample(seed: int, count: int, of: str, only: str | None) -> list[Mutation]:
    """The wanted mutations; drawn from all modules together, so that a longer one has more."""
    candidates = [mutation for path in MODULES for mutation in mutations(path, source_of(path))]
    if only is not None:
        return [mutation for mutation in candidates if only in (mutation.name, mutation.path)]
    candidates = [mutation for mutation in candidates if why_equivalent(mutation) is None]
    drawn = Random(seed).sample(candidates, count) if count else candidates
    return sorted((mutation for mutation in drawn if mutation.path.startswith(of)), key=lambda mutation: mutation.name)


def why_equivalent(mutation: Mutation) -> str | None:
    line = source_of(mutation.path).splitlines()[mutation.line - 1].strip()
    return EQUIVALENT.get((mutation.path, line, mutation.said))


class Cover:
    """Which tests of a group come to which function, and how much all of them compute. They must pass as things are."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, ...], tuple[dict[str, list[str]], float]] = {}

    def __call__(self, mutation: Mutation, tests: tuple[str, ...]) -> tuple[list[str], float]:
        """(the tests to try, the quickest first, the seconds that all of the group compute)."""
        if tests not in self._known:
            self._known[tests] = self._watched(mutation.path, tests)
        calls, cpu_s = self._known[tests]
        return calls.get(f"{mutation.path}:{mutation.function}" if mutation.function else "", []), cpu_s

    @staticmethod
    def _watched(path: str, tests: tuple[str, ...]) -> tuple[dict[str, list[str]], float]:
        with tempfile.NamedTemporaryFile(prefix="mutant-") as file:
            begun = trial.begin(path, None, tests, 600.0, Path(file.name))
            if begun.end(wait=True) != "survived":
                sys.exit(f"the tests of {path} fail without any mutation:\n{begun.output.read_text()[-4000:]}")
            begun.output.unlink()
            return trial.read_calls(Path(file.name)), begun.cpu_s


def tried(wanted: list[Mutation], at_once: int, quick: bool) -> dict[str, Verdict]:
    """The verdict on each, printed as it comes."""
    cover = Cover()
    waiting = deque((each, MODULES[each.path].first) for each in wanted)
    going: list[tuple[Trial | None, Mutation, tuple[str, ...]]] = []
    verdicts: dict[str, Verdict] = {}
    while waiting or going:
        while waiting and len(going) < at_once:
            mutation, tests = waiting.popleft()
            chosen, cpu_s = cover(mutation, tests)
            tree = mutation.apply(source_of(mutation.path))
            begun = trial.begin(mutation.path, tree, chosen, 3 * cpu_s + _GRACE_S) if chosen else None
            going.append((begun, mutation, tests))
        time.sleep(0.02)
        for each in list(going):
            begun, mutation, tests = each
            if (verdict := "survived" if begun is None else begun.end()) is None:
                continue
            going.remove(each)
            if begun is not None:
                begun.output.unlink()
            then = () if quick else MODULES[mutation.path].then
            if verdict == "survived" and then and tests != then:
                waiting.appendleft((mutation, then))
                continue
            verdicts[mutation.name] = verdict
            tell(mutation, verdict)
    return verdicts


def tell(mutation: Mutation, verdict: Verdict) -> None:
    print(f"{verdict:9} {mutation.path}:{mutation.line}  {mutation.said}", flush=True)
    if verdict == "survived":
        print(f"          replay: make mutants MUTANTS_ARGS='--only {mutation.name}'", flush=True)


def main() -> int:
    options = arguments()
    os.chdir(ROOT)
    trial.warm_up()
    wanted = sample(options.seed, options.count, options.of, options.only)
    verdicts = tried(wanted, options.at_once, options.quick)
    survived = [name for name, verdict in verdicts.items() if verdict == "survived"]
    part = 1 - len(survived) / max(len(verdicts), 1)
    summary = f"{len(verdicts) - len(survived)} killed ({part:.1%}), {len(survived)} survived"
    print(f"{len(verdicts)} mutants of {len(MODULES)} modules: {summary}")
    print(f"{len(EQUIVALENT)} that no test can tell from the original are left out; tests/mutants/modules.py says why")
    return 0 if part >= options.killed_min and verdicts else 1


if __name__ == "__main__":
    sys.exit(main())
