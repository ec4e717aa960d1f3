import pytest

from tests.store.emulator import bucket_in_a_directory, gcs, gcs_in_a_directory, new_bucket

__all__ = ["bucket_in_a_directory", "gcs", "gcs_in_a_directory", "new_bucket"]


def pytest_configure(config: pytest.Config) -> None:
    """The client leaves a connection that broke off to the garbage collector, whenever that comes."""
    config.addinivalue_line("filterwarnings", "ignore:unclosed <socket:ResourceWarning")
