"""What `knapper up` says once it serves."""

from pathlib import Path

import pytest

from knapper.local.banner import banner
from knapper.local.base_model import served
from knapper.settings import Settings
from tests.engine.tiny import tiny_model


def said(directory: Path, **environ: str) -> dict[str, str]:
    """By the word that each line begins with."""
    model = tiny_model(directory / "tiny")
    settings = Settings.load(
        {"KNAPPER_MODEL": str(model), "KNAPPER_MODEL_DIRECTORY": str(model), "KNAPPER_DATA": str(directory), **environ}
    )
    record = served(settings, {"train_step": "", "sample": ""})
    first, *lines = banner(settings, [record], "http://127.0.0.1:8000")
    assert first == "ready: http://127.0.0.1:8000"
    return {line.split()[0]: line.split(maxsplit=1)[1] for line in lines}


def test_it_says_what_is_served_where_and_how_it_ends(tmp_path: Path) -> None:
    lines = said(tmp_path)
    assert lines["model"].startswith(f"{tmp_path}/tiny (LlamaForCausalLM, ")
    assert "tokens of context" in lines["model"]
    assert lines["device"].startswith("auto: ")
    assert lines["dtype"].startswith("auto: ")
    assert lines["data"] == str(tmp_path)
    assert lines["inbox"] == f"{tmp_path}/inbox/local/JOB/"
    assert lines["/v1"] == "http://127.0.0.1:8000/v1"
    assert "TINKER_API_KEY=tml-local" in lines["key"]
    assert lines["stop"].startswith("Ctrl-C")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_chosen_is_said_as_it_is(tmp_path: Path, dtype: str) -> None:
    lines = said(tmp_path, KNAPPER_DTYPE=dtype, KNAPPER_KEYS="true", KNAPPER_EXCHANGE="gs://bucket/team")
    assert lines["dtype"] == dtype
    assert lines["inbox"] == "gs://bucket/team/inbox/TENANT/JOB/"
    assert lines["key"] == "one that `knapper key create TENANT` prints"
