"""What the SDK leaves to the garbage collector is none of these tests' faults."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    for left in ("unclosed <socket", "unclosed transport"):
        config.addinivalue_line("filterwarnings", f"ignore:{left}:ResourceWarning")
