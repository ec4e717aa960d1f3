"""Settings come from KNAPPER_ variables, are checked, explained, and reach child processes unchanged."""

from pathlib import Path

import msgspec
import pytest

from knapper.errors import InvalidField
from knapper.settings import Settings, describe

HOME = {"HOME": "/home/ada"}


def test_defaults_lie_in_the_home_directory_and_listen_on_loopback() -> None:
    settings = Settings.load(HOME)
    assert settings.data == Path("/home/ada/.local/share/knapper")
    assert settings.cache == Path("/home/ada/.cache/knapper/models")
    assert settings.host == "127.0.0.1"


def test_xdg_directories_are_honoured() -> None:
    settings = Settings.load({**HOME, "XDG_DATA_HOME": "/data", "XDG_CACHE_HOME": "/cache"})
    assert (settings.data, settings.cache) == (Path("/data/knapper"), Path("/cache/knapper/models"))


def test_a_child_reads_equal_settings() -> None:
    given = {"KNAPPER_PORT": "0", "KNAPPER_DTYPE": "bfloat16", "KNAPPER_IDLE_S": "0.25", "KNAPPER_DATA": "/d"}
    settings = Settings.load({**HOME, **given})
    assert (settings.port, settings.dtype, settings.idle_s, settings.data) == (0, "bfloat16", 0.25, Path("/d"))
    assert Settings.load(settings.environment()) == settings


@pytest.mark.parametrize(
    ("variable", "value", "allowed"),
    [
        ("KNAPPER_PORT", "65536", "a whole number from 0 to 65535"),
        ("KNAPPER_PORT", "-1", "a whole number from 0 to 65535"),
        ("KNAPPER_PORT", "http", "a whole number from 0 to 65535"),
        ("KNAPPER_IDLE_S", "0", "a number above 0"),
        ("KNAPPER_IDLE_S", "nan", "a number above 0"),
        ("KNAPPER_GPU_MEMORY_SHARE", "0", "a number above 0 to 1"),
        ("KNAPPER_GPU_MEMORY_SHARE", "1.01", "a number above 0 to 1"),
        ("KNAPPER_DTYPE", "float16", "auto, float32, bfloat16"),
        ("KNAPPER_MODEL", "", "a text that is not empty"),
        ("KNAPPER_DATA", "", "a directory"),
        ("KNAPPER_SUBSCRIPTION", "uploads", "projects/P/subscriptions/S, or empty"),
        ("KNAPPER_FAULT_INJECTION_SEED", "seven", "a whole number of at most 9 digits, or empty"),
    ],
)
def test_a_wrong_value_names_the_variable_and_what_is_allowed(variable: str, value: str, allowed: str) -> None:
    with pytest.raises(InvalidField) as raised:
        Settings.load({**HOME, variable: value})
    assert str(raised.value).startswith(f"{variable} is {value!r}; allowed: {allowed}")


@pytest.mark.parametrize("port", [0, 65535])
def test_the_limits_themselves_are_allowed(port: int) -> None:
    assert Settings.load({"KNAPPER_PORT": str(port)}).port == port


def test_a_misspelt_variable_is_refused() -> None:
    with pytest.raises(InvalidField, match=r"KNAPPER_PROT.*KNAPPER_PORT"):
        Settings.load({"KNAPPER_PROT": "1"})


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("KNAPPER_EXACT", "KNAPPER_BATCH_INVARIANT"),
        ("KNAPPER_JOB_QUIET_S", "KNAPPER_JOB_STALLED_S"),
        ("KNAPPER_MISCHIEF", "KNAPPER_FAULT_INJECTION_SEED"),
        ("KNAPPER_REST_S", "KNAPPER_RUN_IDLE_S"),
        ("KNAPPER_VLLM_REST_S", "KNAPPER_VLLM_IDLE_S"),
        ("KNAPPER_VLLM_SHELF", "KNAPPER_VLLM_ADAPTER_DIRECTORY"),
    ],
)
def test_a_renamed_variable_is_refused_with_its_new_name(old: str, new: str) -> None:
    with pytest.raises(InvalidField) as raised:
        Settings.load({**HOME, old: "1"})
    assert str(raised.value) == f"environment variable is {old!r}; allowed: {new}. Set {new} in its place"
    assert new in {setting.variable for setting in describe(HOME)}


def test_every_setting_is_described_with_source_and_reason() -> None:
    lines = {line.variable: line for line in describe({**HOME, "KNAPPER_PORT": "9"})}
    assert len(lines) == len(msgspec.structs.fields(Settings))
    assert (lines["KNAPPER_PORT"].value, lines["KNAPPER_PORT"].source) == ("9", "environment")
    assert lines["KNAPPER_DTYPE"].source == "default"
    assert all(line.reason.endswith(".") for line in lines.values())
