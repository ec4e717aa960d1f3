"""Run every loop in full and write docs/cookbook.md."""

import tempfile
import time
from pathlib import Path

from tests.conformance.cookbook.loops import LOOPS
from tests.conformance.cookbook.page import PATH, render
from tests.conformance.cookbook.workplace import opened

figures = {}
with tempfile.TemporaryDirectory(prefix="knapper-cookbook-") as directory, opened(Path(directory)) as at:
    for loop in LOOPS:
        began = time.monotonic()
        seen = figures[loop.name] = loop.follow(at, loop.steps[1])
        took_s = time.monotonic() - began
        print(f"{loop.name}: {loop.figure} {seen.first:.3g} -> {seen.last:.3g} in {took_s:.0f} s", flush=True)
PATH.write_text(render(figures), encoding="utf-8")
print(f"wrote {PATH}")
