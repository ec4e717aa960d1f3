"""A number that never arrives: whoever waits behind it is told, and closing the session lets the rest run."""

import httpx
import tinker

from tests.conformance.server import Server


def test_whoever_waits_behind_a_missing_operation_is_told_which(server: Server, model: object) -> None:
    service = tinker.ServiceClient(base_url=server.url, api_key="tml-local")
    training = service.create_lora_training_client(str(model), rank=4, seed=1).result()
    with httpx.Client(base_url=server.url, headers={"X-API-Key": "tml-local"}, timeout=45) as http:
        body = {"model_id": training.model_id, "seq_id": 2, "type": "optim_step", "adam_params": {}}
        promise = http.post("/api/v1/optim_step", json=body).raise_for_status().json()["request_id"]

        answer = http.post("/api/v1/retrieve_future", json={"request_id": promise})
        assert answer.status_code == 408
        assert answer.json()["queue_state"] == "paused_capacity"
        assert "operation 1 has not arrived" in answer.json()["queue_state_reason"]

        service.close("success").result()
        while (answer := http.post("/api/v1/retrieve_future", json={"request_id": promise})).status_code == 408:
            pass
        assert answer.json()["metrics"]["optimizer_steps"] == 1.0
        missing = http.post("/api/v1/retrieve_future", json={"request_id": promise[:-1] + "1"}).json()
        assert missing["category"] == "user"
        assert "never arrived" in missing["error"]
