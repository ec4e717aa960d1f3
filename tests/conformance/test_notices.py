"""What a user sees in the terminal when a client starts: with the newest SDK. Of the oldest, see test_oldest_sdk."""

import pytest
import tinker

from tests.gateway.running import MODEL, gateway

NOTICE = "Down at 18:00 for an hour."


def test_the_operator_s_notice_is_printed_once_by_every_client(caplog: pytest.LogCaptureFixture) -> None:
    with gateway(notice=NOTICE) as running:
        rest = tinker.RestClient(base_url=running.url, api_key="tml-local")
        assert rest.get_server_capabilities().result().supported_models
        assert caplog.text.count(NOTICE) == 1
        with tinker.ServiceClient(base_url=running.url, api_key="tml-local") as service:
            service.create_sampling_client(base_model=MODEL.name).result()
        assert caplog.text.count(NOTICE) == 2


def test_the_newest_sdk_is_told_nothing_of_itself(caplog: pytest.LogCaptureFixture) -> None:
    with gateway() as running, tinker.ServiceClient(base_url=running.url, api_key="tml-local") as service:
        service.create_sampling_client(base_model=MODEL.name).result()
    assert not [record for record in caplog.records if record.name.startswith("tinker") and record.levelname != "DEBUG"]
