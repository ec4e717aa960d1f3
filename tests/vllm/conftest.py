"""One core for all tests here that need vLLM: it takes half a minute to start."""

from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from tests.engine.tiny import tiny_model
from tests.vllm.house import House

collect_ignore = (
    [] if find_spec("vllm") else ["test_contract.py", "test_bfloat16.py", "test_leaving.py", "test_sleep.py"]
)


@pytest.fixture(scope="session")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    model = tiny_model(tmp_path_factory.mktemp("model") / "tiny", kind="llama_wide")
    made = House(model, tmp_path_factory.mktemp("memory"))
    yield made
    made.close()
