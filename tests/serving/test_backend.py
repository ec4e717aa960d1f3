"""vLLM samples on a GPU that can and where it is installed, in the part of the card that training leaves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from knapper.engine import hardware
from knapper.errors import InvalidField, UserError
from knapper.serving.backend import chosen, divided
from knapper.settings import Settings
from tests.engine.gpu import Driver, with_gpu
from tests.engine.strange import strange_model
from tests.engine.tiny import tiny_model

Install = Callable[[str], None]
POD = {"K_SERVICE": "sample"}


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """What pip leaves of a release of vLLM, as far as its version is asked."""

    def put(version: str) -> None:
        about = tmp_path / "site" / f"vllm-{version}.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
        monkeypatch.syspath_prepend(str(tmp_path / "site"))

    return put


def settings(directory: Path, **values: Any) -> Settings:
    loaded = Settings.load({"KNAPPER_MODEL_DIRECTORY": str(directory), "KNAPPER_MODEL": "some/model"})
    return msgspec.structs.replace(loaded, **values)


def test_on_a_gpu_vllm_samples_where_it_is_installed(
    tmp_path: Path, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpu(monkeypatch, Driver())
    model = tiny_model(tmp_path / "model")
    assert chosen(settings(model)) == ("torch", "vLLM is not installed")
    install("0.32.1")
    assert chosen(settings(model)) == ("vllm", "a GPU, and vLLM 0.32.1")
    assert chosen(settings(model, sampler="torch")) == ("torch", "KNAPPER_SAMPLER=torch")
    assert chosen(settings(model, sampler="vllm")) == ("vllm", "KNAPPER_SAMPLER=vllm")


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
@pytest.mark.parametrize(
    ("version", "values", "kind", "driver", "reason"),
    [
        ("0.31.9", {}, "", Driver(), "vLLM 0.31.9 is installed, which is not 0.32"),
        ("0.33.0", {}, "", Driver(), "vLLM 0.33.0 is installed, which is not 0.32"),
        ("0.32.0", {"device": "cpu"}, "", Driver(), "KNAPPER_DEVICE=cpu"),
        ("0.32.0", {"engines": 2}, "", Driver(), "2 base models share the machine"),
        ("0.32.0", {}, "lfm2", Driver(), "vLLM does not sample some/model, whose layers have states"),
        ("0.32.0", {}, "", Driver(capability=(7, 5)), "stub has no bfloat16"),
        ("0.32.0", {}, "", None, "no GPU"),
    ],
)
def test_where_vllm_cannot_the_engine_samples_and_says_why(
    tmp_path: Path, install: Install, monkeypatch: pytest.MonkeyPatch,
    version: str, values: dict[str, Any], kind: str, driver: Driver | None, reason: str,
) -> None:  # fmt: skip
    model = strange_model(tmp_path / "model", kind) if kind else tiny_model(tmp_path / "model")
    if driver is not None:
        with_gpu(monkeypatch, driver)
    install(version)
    sampler = chosen(settings(model, **values))
    assert sampler.name == "torch"
    assert sampler.reason.startswith(reason)


def test_vllm_by_name_is_refused_where_it_is_not_or_is_another(tmp_path: Path, install: Install) -> None:
    model = tiny_model(tmp_path / "model")
    with pytest.raises(UserError, match=r"vllm is not installed in \S+: see docs/vllm.md, or unset KNAPPER_SAMPLER"):
        chosen(settings(model, sampler="vllm"))
    install("0.30.0")
    with pytest.raises(UserError, match=r"vLLM 0.30.0 is installed in .*for 0.32: install vllm==0.32.\*, or unset"):
        chosen(settings(model, sampler="vllm"))


def test_one_number_divides_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpu(monkeypatch, Driver())
    together = {"FUNCTION_SOURCES": "/app/functions/sample/main.py:/app/functions/train_step/main.py"}

    def parts(environ: dict[str, str], **values: Any) -> tuple[float, float]:
        found = divided(settings(tmp_path, **{"sampler": "vllm", **values}), environ)
        return found.gpu_memory_share, found.vllm_memory

    assert parts({}) == parts(POD | together) == (0.45, 0.5), "halves, and what CUDA takes itself"
    assert parts({}, gpu_memory_share=0.3) == parts(POD, gpu_memory_share=0.3) == (0.3, 0.65)
    assert parts({}, gpu_memory_share=0.3, vllm_memory=0.4) == (0.3, 0.4)
    assert parts(POD) == (1.0, 0.9), "a card of its own"
    assert parts({}, sampler="torch") == (1.0, 0.0)
    assert parts({}, device="cpu") == (1.0, 0.0)
    resting = divided(settings(tmp_path, sampler="vllm"), POD | together)
    assert resting.vllm_idle_s == 10, "training beside it has its memory meanwhile"
    by_hand = POD | together | {"KNAPPER_VLLM_IDLE_S": "0"}
    assert divided(settings(tmp_path, sampler="vllm"), by_hand).vllm_idle_s == 0
    assert divided(settings(tmp_path, sampler="vllm"), {}).vllm_idle_s == 0, "nobody in this process would have it"
    with pytest.raises(InvalidField, match=r"KNAPPER_GPU_MEMORY_SHARE is 0.9; allowed: up to 0.85 where vLLM samples"):
        parts({}, gpu_memory_share=0.9)
    with pytest.raises(InvalidField, match=r"KNAPPER_VLLM_MEMORY is 0.8; allowed: up to 0.55, which training leaves"):
        parts({}, vllm_memory=0.8)


@pytest.mark.parametrize("share", ["0", "2", "nan"])
def test_a_share_that_is_none_is_refused(share: str) -> None:
    with pytest.raises(InvalidField, match=r"KNAPPER_GPU_MEMORY_SHARE is '\S+'; allowed: a number above 0 to 1"):
        Settings.load({"KNAPPER_GPU_MEMORY_SHARE": share})


def test_a_driver_that_torch_cannot_use_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = tmp_path / "version"
    assert hardware.why_no_cuda(said) == ""
    said.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82.01  Wed Oct 27 21:21:55 UTC 2021\n")
    assert "the NVIDIA driver 470.82.01 is here, and this torch" in hardware.why_no_cuda(said)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    assert hardware.why_no_cuda(said).startswith(
        "torch is built for CUDA 13.0 and cannot use the NVIDIA driver 470.82.01: it is too old"
    )
    with_gpu(monkeypatch, Driver())
    assert hardware.why_no_cuda(said) == ""


def test_vllm_divides_a_model_by_its_heads_alone() -> None:
    from knapper.engine.memory_table import SPREAD
    from knapper.vllm.factory import expect_divisible

    facts = SPREAD["Llama-3.3-70B"]  # 64 heads
    for devices in ("1", "2", "8", "64"):
        expect_divisible(facts, Settings.load({"KNAPPER_DEVICES": devices}))
    with pytest.raises(InvalidField, match="KNAPPER_DEVICES is 3; allowed: a divisor of 64"):
        expect_divisible(facts, Settings.load({"KNAPPER_DEVICES": "3"}))
