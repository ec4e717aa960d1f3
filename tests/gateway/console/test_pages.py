"""Pages: what users wrote is text in them, they are bounded in bytes, and lists go on page by page."""

import asyncio
import html
import re

import httpx
import pytest

from knapper import limits
from knapper.ids import LOCAL_TENANT, RunId
from knapper.state.tenant_index import Register
from knapper.store.memory import MemoryStore
from tests.gateway.console.conftest import HTML
from tests.gateway.finished import lay_jobs, lay_runs
from tests.gateway.hours import CountingStore, clock, gateway, lived
from tests.gateway.running import Running, create_model
from tests.gateway.running import gateway as served

MARKUP = "</td><script>alert(1)</script>\"'><img src=x onerror=alert(1)> {{ 7 * 7 }}"
PAGE_BYTES_MAX = 512 * 1024


def _page(running: Running, path: str) -> httpx.Response:
    answer = httpx.get(f"{running.url}{path}", headers=HTML, timeout=60)
    assert answer.status_code == 200, answer.text[:500]
    return answer


def _hostile(running: Running) -> tuple[str, str]:
    """(session, run) of a client that writes what it may, as long as it may be."""
    metadata = {MARKUP: MARKUP, **{f"k{n}": "\u202e<b>" * 20 for n in range(60)}}
    body = {
        "tags": [MARKUP] * limits.tags_max, "user_metadata": metadata, "sdk_version": MARKUP[:20], "project_id": "<i>p",
        "display_name": MARKUP * 8, "type": "create_session",
    }  # fmt: skip
    session = running.post("create_session", body)["session_id"]
    run = running.post("create_model", create_model(session) | {"user_metadata": metadata})["model_id"]
    reason = {"type": "errored"}
    running.post(f"sessions/{session}/finish", {"reason": reason, "detail": MARKUP * 1000})
    return session, run


def test_what_users_wrote_is_text_and_its_pages_are_bounded() -> None:
    with served() as running:
        session, run = _hostile(running)
        for path in ("/", "/sessions", f"/sessions/{session}", f"/runs/{run}", f"/runs/{run}/operations"):
            page = _page(running, path)
            assert len(page.content) <= PAGE_BYTES_MAX, path
            assert not re.search(r"<(?:script>|img|i>|b>)", page.text), path
            assert "alert(1)</script>" not in page.text
            assert "\u202e" not in page.text, "it would turn the text after it around"
            assert "49" not in re.sub(r"[0-9a-f:-]{8,}", "", page.text).replace("149", ""), "no template in a template"
        told = html.unescape(_page(running, f"/sessions/{session}").text)
        assert MARKUP in told
        assert "characters more)" in told


def test_what_is_asked_for_is_text_in_the_refusal() -> None:
    with served() as running:
        for path in (f"/runs/{MARKUP}", f"/jobs/{MARKUP}", f"/compare?of={MARKUP}", f"/?before={MARKUP}"):
            answer = httpx.get(f"{running.url}{path}", headers=HTML)
            assert answer.status_code in (404, 422), path
            is_page = answer.headers["content-type"].startswith("text/html")
            assert is_page or answer.headers["content-type"] == "application/json"
            assert not is_page or not re.search(r"<script>|<img", answer.text)
        echoed = _page(running, f"/playground?model={MARKUP}&base={MARKUP}")
        assert not re.search(r"<script>|<img", echoed.text)


@pytest.mark.parametrize(("path", "allowed"), [
    ("/?before=-1", "a cursor"), ("/?before=x", "a cursor"), (f"/?before={9 * 10**30}-0", "a cursor"),
    ("/usage?days=15", "a whole number"), ("/compare?" + "of=a&" * 9, "of"),
])  # fmt: skip
def test_wrong_numbers_say_what_is_allowed(path: str, allowed: str) -> None:
    with served() as running:
        answer = httpx.get(f"{running.url}{path}", headers=HTML)
        assert answer.status_code in (404, 422)
        assert allowed in answer.text


def test_lists_go_on_until_everything_was_shown() -> None:
    """Of runs and jobs alike, and each is on one page."""

    async def story() -> None:
        store = MemoryStore()
        runs = await lay_runs(store, clock, 40, LOCAL_TENANT)
        await asyncio.sleep(40 * 86400.0)
        await lay_jobs(store, clock, 60)
        await asyncio.sleep(60.0)
        async with gateway(store) as running:
            for path, wanted in (
                ("/", {f"/runs/{run.replace(':', '%3A')}" for run in runs}),
                ("/jobs", {f"/jobs/job-{n}" for n in range(60)}),
            ):  # fmt: skip
                shown, page = list[str](), path
                while page:
                    answer = await running.http.get(f"http://127.0.0.1{page}", headers=HTML)
                    table = answer.text.partition("<h2>Jobs</h2>")[0]
                    shown += re.findall(r'<td data-label="(?:Run|Job)"><a href="([^"]+)"', table)
                    older = re.search(r'href="([^"]+before=[0-9-]+)">Older', answer.text)
                    page = older[1] if older else ""
                assert len(shown) == len(set(shown)), path
                assert {link.replace(":", "%3A") for link in shown} == wanted, path

    lived(story)


def test_a_page_costs_the_same_however_many_there_are() -> None:
    """600 runs and jobs cost as many calls of the store as 60, on the first page and on one in the middle."""

    async def calls(count: int) -> list[int]:
        memory = MemoryStore()
        await lay_runs(memory, clock, count)
        await lay_jobs(memory, clock, count)
        await asyncio.sleep(86400.0)
        store, costs = CountingStore(memory), []
        async with gateway(store) as running:
            await asyncio.sleep(6 * 3600.0)
            for path in ("/", "/jobs", "/sessions", "/checkpoints"):
                store.calls.clear()
                await running.http.get(f"http://127.0.0.1{path}", headers=HTML)
                costs.append(sum(store.calls.values()))
        return costs

    few, many = lived(lambda: calls(60)), lived(lambda: calls(600))
    assert all(more <= 1.2 * fewer + 16 for fewer, more in zip(few, many, strict=True)), (few, many)


def test_a_run_that_was_never_created_is_left_out() -> None:
    async def story() -> None:
        store = MemoryStore()
        (run,) = await lay_runs(store, clock, 1)
        async with gateway(store) as running:
            session = await running.parts.lookups.session(run.partition(":")[0], LOCAL_TENANT)
            await Register(store).add_run(session, RunId(run[:-1] + "7"))
            answer = await running.http.get("http://127.0.0.1/", headers=HTML)
            assert answer.status_code == 200
            assert run in answer.text
            assert run[:-1] + "7" not in answer.text

    lived(story)
