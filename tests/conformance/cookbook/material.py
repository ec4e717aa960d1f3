"""What the loops learn from, all of it made here: no recipe needs a dataset of the hub.

Some recipes name one. `datasets` looks for a directory of that name first, and there it finds ours.
"""

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

SUMS, LANGUAGES, MARKETS, DOCUMENT = "sums.jsonl", "languages.jsonl", "markets.csv", "document.py"
_document_chars = 1800  # the tiny model's context holds as many


def lay_out(directory: Path) -> None:
    """Write all of it below `directory`, where the cookbook's commands run."""
    rng = np.random.default_rng(11)
    pairs = rng.integers(0, 101, (512, 2)).tolist()
    _write(directory / SUMS, [_chat("What is 4 + 5?", "9", f"What is {x} + {y}?", str(x + y)) for x, y in pairs])
    _write(directory / LANGUAGES, [_chat(text, answer) for text, answer in _greetings * 16])
    _write(directory / "HuggingFaceH4/no_robots/train.jsonl", [_chat(text, answer) for text, answer in _greetings * 16])
    _write(directory / "zwhe99/DeepMath-103K/train.jsonl", [{"question": f"What is {x} + {y}?"} for x, y in pairs])
    preferred = [
        {
            "chosen": f"\n\nHuman: Say {n}.\n\nAssistant: yes {n}",
            "rejected": f"\n\nHuman: Say {n}.\n\nAssistant: no {n}",
        }
        for n in range(128)
    ]
    _write(directory / "Anthropic/hh-rlhf/train.jsonl", preferred[:-8])
    _write(directory / "Anthropic/hh-rlhf/test.jsonl", preferred[-8:])
    _write_markets(directory / MARKETS)
    source = Path(torch.__file__).parent / "autograd" / "forward_ad.py"  # what the script would download, as it is here
    (directory / DOCUMENT).write_text(source.read_text(encoding="utf-8")[:_document_chars], encoding="utf-8")


_greetings = [
    ("Good morning, how are you?", "Final Answer: en"),
    ("Guten Morgen, wie geht es dir?", "Final Answer: de"),
    ("Bonjour, comment vas-tu ?", "Final Answer: fr"),
    ("Buenos días, ¿cómo estás?", "Final Answer: es"),
]


def _chat(*turns: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)]}


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _write_markets(path: Path) -> None:
    """Forecasts of events in the form of the forecasting recipe's file; those about rain come true."""
    with path.open("w", newline="", encoding="utf-8") as out:
        rows = csv.writer(out)
        rows.writerow([
            "submission_id", "event_ticker", "title", "snapshot_time", "close_time", "market_outcome", "category",
            "markets", "sources",
        ])  # fmt: skip
        for n in range(40):
            what, month = ("rain" if n % 2 else "snow"), ("11" if n >= 32 else "09")  # those of November are held out
            market = f"{what} in town {n}"
            rows.writerow([
                f"s{n}", f"e{n}", "Weather", f"2025-{month}-01T00:00:00Z", f"2025-{month}-02T00:00:00Z",
                json.dumps({market: n % 2}), "Weather", json.dumps([market]),
                json.dumps([{"title": "Sky", "summary": "grey", "ranking": 1}]),
            ])  # fmt: skip
