"""The console in a browser, of a running knapper: from signing in to a token, with nothing from anywhere else."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect

from tests.browser import chromium
from tests.browser.world import HOSTILE, World, pages, world

AXE = Path(__file__).with_name("axe.min.js")
AXE_SHA256 = "29348999450cdf2849a8e70b7912fc2da85a849da39c0d0d5394f51d4a9ed95c"
JOB = "sums"
pytestmark = pytest.mark.timeout(300)  # the first has a knapper and a browser to start
_ALL_READ = "() => !/reading …|is read …|are read …/.test(document.body.innerText)"


@pytest.fixture(scope="module")
def browser(trained: World) -> Iterator[Browser]:
    """`trained`: made before, since Playwright's loop runs in this thread from here on."""
    with chromium.browser() as found:
        yield found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """With a job of two steps and a run."""
    chromium.path()  # else all this is for nobody
    with world(tmp_path_factory.mktemp("console")) as made:
        made.submit(JOB, steps=2)
        made.train()
        made.completed(JOB)
        yield made


@dataclass
class Visit:
    """A page of a tenant's, and everything that should not happen on it."""

    page: Page
    url: str
    errors: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)

    def open(self, path: str) -> None:
        self.page.goto(f"{self.url}{path}")


def visit(context: BrowserContext, url: str) -> Visit:
    made = Visit(context.new_page(), url)
    made.page.set_default_timeout(20_000)
    made.page.on("console", lambda line: made.errors.append(line.text) if line.type in ("error", "warning") else None)
    made.page.on("pageerror", lambda error: made.errors.append(str(error)))
    made.page.on("dialog", lambda dialog: made.errors.append(f"a dialog: {dialog.message}"))
    made.page.on("request", lambda sent: made.elsewhere.append(sent.url) if not sent.url.startswith(url) else None)
    return made


def sign_in(browser: Browser, world: World, tenant: str, **options: Any) -> tuple[BrowserContext, Visit]:
    context = browser.new_context(**options)
    made = visit(context, world.url)
    made.open("/")
    made.page.get_by_label("Key").fill(world.keys[tenant])
    made.page.get_by_role("button", name="Sign in").click()
    expect(made.page.get_by_role("heading", level=1)).to_have_text("Runs")
    return context, made


@pytest.fixture
def alice(browser: Browser, trained: World) -> Iterator[Visit]:
    context, made = sign_in(browser, trained, "alice")
    yield made
    assert not made.errors, made.errors
    assert not made.elsewhere, made.elsewhere
    context.close()


def test_a_job_is_followed_while_it_trains(alice: Visit, trained: World) -> None:
    trained.submit("live", steps=3)
    alice.open("/jobs/live")
    page = alice.page
    expect(page.locator(".chart [data-status]")).to_contain_text("following")
    expect(page.locator(".chart [data-status]")).to_contain_text("3 steps", timeout=40_000)
    expect(page.locator("#status")).to_contain_text("completed", timeout=40_000)
    expect(page.locator(".plot h3", has_text="reward/mean")).to_be_visible()
    assert page.locator(".plot canvas").count() >= 4


def test_from_a_curve_to_a_token(alice: Visit) -> None:
    page = alice.page
    page.get_by_role("link", name=JOB).first.click()
    expect(page.locator(".chart [data-status]")).to_contain_text("2 steps")
    page.get_by_role("link", name="of step 2").click()
    page.get_by_role("link", name="Step 1").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Rollouts of step 1")
    page.get_by_role("link", name="Completion 2 of prompt 1, token by token").click()
    tokens = page.locator(".tokens .t")
    assert 1 <= tokens.count() <= 16
    page.locator(".tokens").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#token")).to_contain_text("token 0")
    told = page.locator("#token").inner_text()
    cell = tokens.first
    assert f"log-probability {cell.get_attribute('data-lp')}" in told
    background = "element => getComputedStyle(element).backgroundColor"
    shades = {tokens.nth(n).evaluate(background) for n in range(tokens.count())}
    assert len(shades) > 1, "a model that draws at random is not equally sure of all"
    page.get_by_label("advantage").check()
    assert len({tokens.nth(n).evaluate(background) for n in range(tokens.count())}) == 1, "one for the completion"


def test_from_an_alarm_to_the_tokens_where_sampler_and_trainer_differ(alice: Visit, trained: World) -> None:
    page = alice.page
    page.get_by_role("link", name="1 alarm").click()
    expect(page.get_by_role("region", name="Alarms")).to_contain_text(
        "all 2 rollouts of step 4 were drawn by weights that are 1 updates old"
    )
    expect(page.locator(".plot h3", has_text="staleness")).to_contain_text("1")
    page.get_by_role("link", name="datum by datum").first.click()
    expect(page.locator(".facts")).to_contain_text("of this run, step 2; engine float32, temperature 1")
    page.get_by_role("link", name="Datum 1, token by token").click()
    tokens = page.locator(".tokens .t")
    assert tokens.count() == 12
    page.locator(".tokens").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#token")).to_contain_text("; by the sampler -")
    background = "element => getComputedStyle(element).backgroundColor"
    assert len({tokens.nth(n).evaluate(background) for n in range(12)}) > 1, "one step has moved some tokens more"
    page.get_by_label("advantage").check()
    assert len({tokens.nth(n).evaluate(background) for n in range(12)}) == 1
    expect(page.locator("[data-for=difference]")).to_be_hidden()


def test_runs_and_jobs_are_compared_on_one_chart(alice: Visit, trained: World) -> None:
    page = alice.page
    page.locator(f"input[value='{trained.run}']").check()
    page.get_by_role("button", name="Compare the chosen").first.click()
    page.get_by_label("Add a run by its id").fill(JOB)
    page.get_by_role("button", name="Add").click()
    expect(page.locator(".compare tbody tr")).to_have_count(2)
    expect(page.locator(".compare canvas")).to_have_count(1)
    page.get_by_label("Metric").select_option("learning_rate")
    for row in page.locator("[data-last]").all():
        expect(row).not_to_be_empty()
    expect(page.locator("[data-last]").first).to_have_text("8.33e-4")


def test_a_checkpoint_chats_beside_its_base(alice: Visit, trained: World) -> None:
    alice.open(f"/playground?model=tinker://{trained.run}/sampler_weights/adapter")
    page = alice.page
    page.get_by_label("Message").fill(HOSTILE)
    page.get_by_label("Tokens at most").fill("8")
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("button", name="Send")).to_be_enabled()
    for side in ("model", "base"):
        expect(page.locator(f"[data-side={side}] li")).to_have_count(2)
        expect(page.locator(f"[data-side={side}] .user")).to_have_text(HOSTILE)
        expect(page.locator(f"[data-side={side}] .failed")).to_have_count(0)
        expect(page.locator(f"[data-side={side}] .assistant")).not_to_be_empty()


def test_a_checkpoint_is_downloaded(alice: Visit, trained: World) -> None:
    alice.open(f"/runs/{trained.run}/checkpoints/sampler_weights/adapter")
    with alice.page.expect_download() as started:
        alice.page.get_by_role("link", name="adapter_config.json").click()
    assert b'"r": 4' in Path(started.value.path()).read_bytes() or b'"r":4' in Path(started.value.path()).read_bytes()


def test_another_tenant_sees_nothing_of_it(browser: Browser, trained: World) -> None:
    context, bob = sign_in(browser, trained, "bob")
    own = {"/", "/jobs", "/sessions", "/checkpoints", "/usage"}
    for path in pages(trained, JOB).values():
        bob.open(path)
        text = bob.page.content()
        named = trained.run in path or JOB in path
        if named and not path.startswith("/playground"):
            assert "Not found" in text, path
        assert path not in own or trained.run not in text
    bob.page.get_by_role("button", name="Sign out").click()
    expect(bob.page.get_by_role("heading", level=1)).to_have_text("Sign in")
    context.close()


def test_what_users_wrote_is_text(alice: Visit, trained: World) -> None:
    for path in (f"/sessions/{trained.run.partition(':')[0]}", f"/jobs/{JOB}/rollouts/steps/0"):
        alice.open(path)
        assert HOSTILE in alice.page.inner_text("main")
        assert alice.page.locator("main img, main b").count() == 0


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_page_is_fit_for_everyone(browser: Browser, trained: World, theme: Any) -> None:
    """No serious finding of axe's, no error on the console, no request to elsewhere, nothing beyond 375 pixels."""
    axe = AXE.read_text()
    assert hashlib.sha256(axe.encode()).hexdigest() == AXE_SHA256
    context, alice = sign_in(browser, trained, "alice", color_scheme=theme, viewport={"width": 375, "height": 700})
    session = context.new_cdp_session(alice.page)
    for name, path in pages(trained, JOB).items():
        alice.open(path)
        alice.page.wait_for_function(_ALL_READ)
        session.send("Runtime.evaluate", {"expression": axe})  # as a page's own script could not: its policy forbids
        rules = "null" if theme == "light" else "['color-contrast']"  # all else is the same in the other theme
        found = alice.page.evaluate(f"axe.run(document, {{runOnly: {rules} ?? undefined}})")["violations"]
        serious = [
            (each["id"], each["nodes"][0]["html"]) for each in found if each["impact"] in ("serious", "critical")
        ]
        assert not serious, f"{name}: {serious}"
        assert alice.page.evaluate("document.documentElement.scrollWidth") <= 375, name
        ours = [error for error in alice.errors if name != "not-found" or "404" not in error]
        assert not ours, f"{name}: {ours}"
    assert not alice.elsewhere
    context.close()


def test_the_keyboard_reaches_everything(alice: Visit) -> None:
    page = alice.page
    alice.open("/")
    page.keyboard.press("Tab")
    expect(page.locator(":focus")).to_have_text("Skip to the content")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.getElementById('main').contains(document.activeElement)")
    seen = set()
    for _ in range(45):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.textContent.trim()"))
    assert {"Runs", "Jobs", "Playground", "Sign out", JOB} <= seen
