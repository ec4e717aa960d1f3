"""Signs that ranks leave in the directory where they meet, before they can talk to each other."""

from pathlib import Path
from typing import Final

READY: Final = "ready"  # about to join the group
LOADED: Final = "loaded"  # the weights are there; how their products are computed
FAILED: Final = "failed"  # why it ends


def write(directory: Path, rank: int, sign: str, text: str = "") -> None:
    part = directory / f"{rank}.{sign}.part"
    part.write_text(text, encoding="utf-8")
    part.replace(directory / f"{rank}.{sign}")


def read(directory: Path, rank: int, sign: str) -> str | None:
    """None: not left yet."""
    path = directory / f"{rank}.{sign}"
    return path.read_text(encoding="utf-8") if path.exists() else None
