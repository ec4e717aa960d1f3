"""Quotas, as users of the unmodified SDK and of jobs meet them: what waits, what raises, and what they are told."""

import json
import logging
import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tinker
from tinker import types

from knapper.state.sessions import DAY_S
from tests import command
from tests.conformance import data
from tests.conformance.server import Server, wait_until
from tests.conformance.test_jobs_by_http import environment_of, told
from tests.security.test_keys import knapper

PAUSED = "The job is paused due to billing status. Error: Error code: 402"
PRICES = {
    "KNAPPER_PRICE_TRAINED": "3.5", "KNAPPER_PRICE_PREFILLED": "0.5", "KNAPPER_PRICE_SAMPLED": "11",
    "KNAPPER_PRICE_DEVICE_SECOND": "0.25", "KNAPPER_PRICE_STORED": "0.125", "KNAPPER_JOB_STALLED_S": "1",
}  # fmt: skip
SFT = "kind: sft\ndata: d.jsonl\nsteps: 4\nlora: {rank: 2}\nbatch: {sequences: 1}\n"
UNLIMITED = ("runs", "bytes", "tokens-a-day", "samples-in-flight", "rank")


@pytest.fixture(scope="module")
def priced(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server.start(model, tmp_path_factory.mktemp("priced") / "data", settings=PRICES) as running:
        yield running
    assert "Traceback" not in running.log(), running.log()[-4000:]


@pytest.fixture
def house(priced: Server) -> Iterator[Server]:
    """Without quotas at first. No day ends during a test."""
    if DAY_S - time.time() % DAY_S < 120:
        time.sleep(121)
    yield priced
    allow(priced, *(f"--{name}=unlimited" for name in UNLIMITED))


@pytest.fixture
def service(house: Server) -> Iterator[tinker.ServiceClient]:
    with tinker.ServiceClient(base_url=house.url, api_key="tml-local") as client:
        yield client


def quota(server: Server) -> dict[str, Any]:
    answer = httpx.get(f"{server.url}/api/v1/quota", headers={"X-API-Key": "tml-local"}, timeout=30)
    report: dict[str, Any] = answer.raise_for_status().json()
    return report


def used(server: Server) -> int:
    number: int = quota(server)["tokens_a_day"]["used"]
    return number


def window() -> tuple[datetime, datetime]:
    """The last day."""
    end = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) + timedelta(hours=1)
    return end - timedelta(hours=24), end


def events(server: Server) -> list[dict[str, Any]]:
    begin, end = window()
    query = {"starting_on": begin.isoformat(), "ending_before": end.isoformat()}
    url = f"{server.url}/api/v1/billing/usage/events"
    answer = httpx.get(url, params=query, headers={"X-API-Key": "tml-local"}, timeout=30).raise_for_status()
    rows: list[dict[str, Any]] = answer.json()["data"]
    return rows


def allow(server: Server, *options: str) -> None:
    """By the command; returns once it is in force."""
    made = knapper(server.data, "quota", "set", "local", *options)
    assert made.returncode == 0, made.stderr
    time.sleep(5.1)


def trained(client: tinker.TrainingClient, seed: int) -> Any:
    return client.forward_backward(data.batch(np.random.default_rng(seed)), "cross_entropy")


@pytest.mark.timeout(180)
def test_training_over_the_tokens_of_a_day_pauses_says_why_and_goes_on(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """On a server of its own: samples of another test are counted up to a minute later."""
    with (
        Server.start(model, tmp_path / "data") as house,
        tinker.ServiceClient(base_url=house.url, api_key="tml-local") as service,
    ):
        client = service.create_lora_training_client(str(model), rank=2, seed=1).result()
        trained(client, 1).result()
        before = used(house)
        assert before > 0
        allow(house, "--tokens-a-day", str(before))
        caplog.set_level(logging.WARNING)
        future = trained(client, 2)
        wait_until(lambda: PAUSED in caplog.text, "the SDK says that it is paused")
        assert f"tenant local has used {before} tokens today" in caplog.text
        assert "The next day begins at 00:00 UTC" in caplog.text
        client.optim_step(types.AdamParams(learning_rate=1e-3))
        house.kill("gateway")
        wait_until(lambda: _answers(house), "the gateway is back")
        assert used(house) == before, "a kill forgets nothing, and retries count nothing"
        allow(house, "--tokens-a-day", "10M")
        assert future.result().metrics["loss:sum"] > 0
        assert used(house) == 2 * before
        client.save_state("after").result()


def _answers(server: Server) -> bool:
    try:
        return httpx.get(f"{server.url}/api/v1/healthz", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.timeout(120)
def test_too_many_runs_and_too_high_a_rank_raise_our_sentence_at_once(
    house: Server, service: tinker.ServiceClient, model: Path
) -> None:
    before = quota(house)["runs"]["used"]
    allow(house, "--runs", str(before + 1), "--rank", "4")
    began = time.monotonic()
    with pytest.raises(tinker.UnprocessableEntityError, match="rank is 8; allowed: 1 to 4: the quota of tenant local"):
        service.create_lora_training_client(str(model), rank=8).result()
    service.create_lora_training_client(str(model), rank=4).result()
    with pytest.raises(tinker.RateLimitError, match=f"has {before + 1} open training runs; allowed: {before + 1}"):
        service.create_lora_training_client(str(model), rank=4).result()
    assert time.monotonic() - began < 60, "the SDK would retry for minutes"


@pytest.mark.timeout(120)
def test_samples_in_flight_wait_for_each_other_in_the_sdk(model: Path, tmp_path: Path) -> None:
    """On a server of its own: samples are counted up to a minute later, which other tests would see."""
    with Server.start(model, tmp_path / "data") as server:
        allow(server, "--samples-in-flight", "2")
        with tinker.ServiceClient(base_url=server.url, api_key="tml-local") as service:
            _samples_wait(service.create_sampling_client(base_model=str(model)).result())


def _samples_wait(client: tinker.SamplingClient) -> None:
    params = types.SamplingParams(max_tokens=4, seed=1)
    futures = [client.sample(types.ModelInput.from_ints([1, 2, n]), 2, params) for n in range(3, 8)]
    assert [len(future.result().sequences) for future in futures] == [2] * 5
    with pytest.raises(tinker.UnprocessableEntityError, match="num_samples is 3; allowed: at most 2 at the same time"):
        client.sample(types.ModelInput.from_ints([1]), 3, params).result()


@pytest.mark.timeout(120)
def test_a_save_over_the_bytes_pauses_until_a_checkpoint_is_deleted(
    house: Server, service: tinker.ServiceClient, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = service.create_lora_training_client(str(model), rank=2).result()
    path = client.save_state("first").result().path
    allow(house, "--bytes", str(quota(house)["bytes"]["used"]))
    caplog.set_level(logging.WARNING)
    future = client.save_state("second")
    wait_until(lambda: "the checkpoints of tenant local have" in caplog.text, "the SDK says why it is paused")
    tinker.RestClient(base_url=house.url, api_key="tml-local").delete_checkpoint_from_tinker_path(path).result()
    assert future.result().path.endswith("/weights/second")


@pytest.mark.timeout(240)
def test_a_job_over_its_quota_pauses_with_the_reason_and_goes_on(house: Server, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "job.yaml").write_text(SFT)
    (folder / "d.jsonl").write_text('{"prompt": "and the", "completion": " of a"}\n' * 4)
    (folder / "high.yaml").write_text(SFT.replace("rank: 2", "rank: 64"))
    allow(house, "--tokens-a-day", str(used(house)), "--rank", "8")
    told(house, "submit", str(folder / "job.yaml"))
    listed = ""

    def paused() -> bool:
        nonlocal listed
        listed = told(house, "jobs", "list")
        return "paused by its quota" in listed

    wait_until(paused, "the list of jobs says that it is paused", 90)
    assert re.search(r"small +sft +running +0/4 .* paused by its quota: tenant local has used \d+ tokens today", listed)
    shown = told(house, "jobs", "show", "small")
    assert "The job goes on by itself when the next day has begun, at 00:00 UTC" in shown
    allow(house, "--tokens-a-day", "10M")
    wait_until(lambda: "small: completed" in told(house, "jobs", "show", "small"), "it goes on by itself", 120)
    bill = json.loads(told(house, "jobs", "show", "small", "--json"))["bill"]
    of_job = [row for row in events(house) if row["job"] == "small"]
    assert sum(row["cost"] or 0.0 for row in of_job) == pytest.approx(bill["cost"]["total"], rel=1e-6)
    trained = sum(row["event_info"]["token_count"] for row in of_job if row["event_info"]["type"] == "training")
    assert trained == bill["tokens"]["trained"] > 0
    (folder / "job.yaml").write_text((folder / "high.yaml").read_text())
    refused = knapper_submit(house, folder)
    assert "job.yaml, line 4: lora.rank is 64; allowed: 1 to 8: the quota of tenant local" in refused
    told(house, "jobs", "delete", "high")  # it would start once it may, beside the next test


def knapper_submit(server: Server, folder: Path) -> str:
    submit = ("submit", str(folder / "job.yaml"), "--name", "high")
    return command.knapper(*submit, environment=environment_of(server)).stdout


@pytest.mark.timeout(120)
def test_usage_speaks_money_and_quotas(house: Server, service: tinker.ServiceClient, model: Path) -> None:
    client = service.create_lora_training_client(str(model), rank=2).result()
    trained(client, 3).result()
    client.save_state("kept").result()
    allow(house, "--tokens-a-day", "1M", "--bytes", "1GiB", "--rank", "8")
    admin = tinker.AdminClient(base_url=house.url, api_key="tml-local")

    def cost() -> float:
        rows = admin.get_billing_usage(*window()).result().data
        return sum(row.estimated_cost_usd or 0.0 for row in rows)

    before = cost()
    printed = told(house, "usage")
    after = cost()  # what the tests before used may be counted at any moment
    assert re.search(r"tokens trained, \d+\.\d+ device seconds.*, \d+\.\d{4} USD\n", printed)
    assert re.search(r"^total: \d+\.\d{4} USD; checkpoints: \d+\.\d{4} USD a month$", printed, flags=re.MULTILINE)
    assert re.search(r"^quota: \d+ of 1000000 tokens used today$", printed, flags=re.MULTILINE)
    assert re.search(r"^quota: [\d.]+ (MiB|KiB) of 1.0 GiB in checkpoints$", printed, flags=re.MULTILINE)
    assert "quota: rank up to 8\n" in printed
    assert "runs open" not in printed, "there is no quota of runs"
    assert before - 1e-4 <= printed_total(printed) <= after + 1e-4
    assert before > 1e-4
    storage = admin.get_current_checkpoint_storage_usage().result()
    assert storage.effective_rate_usd_per_gigabyte_month == pytest.approx(0.125 * 1e9 / 2**30)
    assert storage.data[0].estimated_monthly_cost_usd == pytest.approx(storage.data[0].size_bytes / 2**30 * 0.125)


def printed_total(printed: str) -> float:
    match = re.search(r"^total: (\d+\.\d{4}) USD", printed, flags=re.MULTILINE)
    assert match
    return float(match[1])
