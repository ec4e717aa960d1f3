"""Who comes in: with a key, for one tenant, until it signs out or the key ends; without keys this machine alone."""

import time

import httpx
import pytest

from knapper import limits
from knapper.state.api_keys import Keys
from tests.gateway.console.conftest import HTML, World, csrf, sign_in
from tests.gateway.running import gateway

MUST_BE_SIGNED_IN = ("/", "/jobs", "/sessions", "/checkpoints", "/compare", "/playground", "/usage", "/admin")


@pytest.mark.parametrize("path", MUST_BE_SIGNED_IN)
def test_a_browser_without_a_session_is_sent_to_sign_in(world: World, path: str) -> None:
    answer = world.browser().get(path)
    assert (answer.status_code, answer.headers["location"]) == (303, f"/signin?next={path}")
    assert world.browser().get(path, headers={"Accept": "application/json"}).status_code == 401


def test_a_key_opens_a_session_that_scripts_and_other_sites_cannot_use(world: World) -> None:
    browser, key = world.browser(), world.key("alice")
    answer = sign_in(browser, key)
    cookie = answer.headers["set-cookie"].lower()
    assert answer.status_code == 303
    assert all(word in cookie for word in ("httponly", "samesite=strict", "path=/", "max-age="))
    assert key.lower() not in cookie
    page = browser.get("/")
    assert page.status_code == 200
    assert "alice" in page.text
    assert key not in page.text
    assert page.headers["content-security-policy"].startswith("default-src 'self'; base-uri 'none'; form-action 'self'")
    assert page.headers["cache-control"] == "no-store"


def test_over_tls_the_cookie_is_this_host_s_alone(world: World) -> None:
    with httpx.Client(base_url=world.running.url, headers={**HTML, "X-Forwarded-Proto": "https"}) as browser:
        cookie = browser.get("/signin").headers["set-cookie"]
    assert cookie.startswith("__Host-knapper=")
    assert "Secure" in cookie


def test_over_tls_signing_out_is_heeded_too(world: World) -> None:
    """A browser ignores a `__Host-` cookie that comes without Secure, also where it is to be deleted."""
    tls = {"X-Forwarded-Proto": "https", "Origin": world.running.url.replace("http:", "https:")}
    with httpx.Client(base_url=world.running.url, headers={**HTML, **tls}) as browser:
        first = browser.get("/signin")
        held = {"Cookie": first.headers["set-cookie"].partition(";")[0]}  # httpx sends no Secure cookie over http
        data = {"csrf": csrf(first), "key": world.key("alice")}
        signed_in = browser.post("/signin", data=data, headers=held)
        held = {"Cookie": signed_in.headers["set-cookie"].partition(";")[0]}
        data = {"csrf": csrf(browser.get("/", headers=held))}
        gone = browser.post("/signout", data=data, headers=held).headers["set-cookie"]
    assert gone.startswith('__Host-knapper=""; ')
    assert "Max-Age=0" in gone
    assert "Secure" in gone


def test_what_is_no_key_opens_nothing(world: World) -> None:
    for wrong in ("", "tml-local", f"tml-{'0' * 64}", world.key("alice")[:-1], "x" * 3000):
        browser = world.browser()
        answer = sign_in(browser, wrong)
        assert answer.status_code == 401
        assert "not a key of this server" in answer.text
        assert wrong not in answer.text or not wrong
        assert browser.get("/").status_code == 303
    assert world.browser().post("/signin", content=b"key=" + b"x" * limits.console_form_bytes_max).status_code == 422
    long = {"Content-Type": "application/x-www-form-urlencoded"}
    at_limit, beyond = (b"a" * size for size in (limits.console_form_bytes_max, limits.console_form_bytes_max + 1))
    assert world.browser().post("/signin", content=at_limit, headers=long).status_code == 422
    assert world.browser().post("/signin", content=beyond, headers=long).status_code == 413


def test_a_form_needs_its_session_s_token(world: World) -> None:
    browser, other = world.signed_in(world.key("alice")), world.signed_in(world.key("bob"))
    tokens = ["", "0" * 64, csrf(other.get("/")), "\u00e9"]
    for token in tokens:
        assert browser.post("/signout", data={"csrf": token}).status_code == 422
        assert browser.get("/").status_code == 200
    anonymous = world.browser()
    anonymous.get("/signin")
    assert anonymous.post("/signin", data={"key": world.key("alice"), "csrf": tokens[2]}).status_code == 422
    chat = {"model": "x", "messages": [{"role": "user", "content": "x"}]}
    assert browser.post("/playground/chat", json=chat).status_code == 422
    served = browser.post("/playground/chat", json=chat, headers={"X-CSRF-Token": csrf(browser.get("/"))})
    assert served.json()["error"]["code"] == "not_found", "it went on to look for the model"


@pytest.mark.parametrize("headers", [
    {"Origin": "https://elsewhere.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
])  # fmt: skip
def test_forms_of_other_sites_are_refused(world: World, headers: dict[str, str]) -> None:
    browser = world.browser()
    data = {"csrf": csrf(browser.get("/signin")), "key": world.key("alice")}
    assert browser.post("/signin", data=data, headers=headers).status_code == 403
    own = {"Origin": world.running.url, "Sec-Fetch-Site": "same-origin"}
    assert browser.post("/signin", data=data, headers=own).status_code == 303


def test_signing_out_ends_the_session_of_the_browser(world: World) -> None:
    browser = world.signed_in(world.key("alice"))
    assert browser.post("/signout", data={"csrf": csrf(browser.get("/"))}).headers["location"] == "/signin"
    assert browser.get("/").status_code == 303


def test_a_revoked_key_ends_its_sessions_within_a_second(world: World) -> None:
    key = world.key("alice")
    browser = world.signed_in(key)
    assert browser.get("/").status_code == 200
    keys = Keys(world.running.store, world.running.parts.clock)
    revoked = next(each for each in world.running.run(keys.listed())[::-1] if each.tenant == "alice")
    world.running.run(keys.revoke(revoked.id))
    time.sleep(2 * limits.key_fresh_s)
    assert browser.get("/").status_code == 303
    assert browser.get("/signin").status_code == 200


def test_a_cookie_is_no_key_and_a_changed_one_nothing(world: World) -> None:
    browser = world.signed_in(world.key("alice"))
    cookie = browser.cookies["knapper"]
    assert browser.get("/api/v1/sessions").status_code == 401
    for header in ({"X-API-Key": cookie}, {"Authorization": f"Bearer {cookie}"}):
        assert httpx.get(f"{world.running.url}/api/v1/sessions", headers=header).status_code == 401
    for at in range(0, len(cookie), 9):
        changed = cookie[:at] + ("A" if cookie[at] != "A" else "B") + cookie[at + 1 :]
        answer = httpx.get(world.running.url, headers={**HTML, "Cookie": f"knapper={changed}"})
        assert answer.status_code == 303, at


def test_a_session_ends_by_itself() -> None:
    now = [1_800_000_000.0]
    with gateway(keys=True, clock=lambda: now[0]) as running:
        world = World(running)
        browser = world.signed_in(world.key("alice"))
        now[0] += limits.console_session_s - 1
        assert browser.get("/").status_code == 200
        now[0] += 1
        assert browser.get("/").status_code == 303
        browser.close()


@pytest.mark.parametrize("path", ["//evil.example", "/\\evil.example", "https://evil.example", "/a\r\nSet-Cookie: x=y"])
def test_after_signing_in_one_stays_on_this_server(world: World, path: str) -> None:
    assert sign_in(world.browser(), world.key("alice"), next=path).headers["location"] == "/"
    run = "/runs/ses-0123456789abcdef0123456789abcdef:train:0"
    assert sign_in(world.browser(), world.key("alice"), next=run).headers["location"] == run


def test_without_keys_this_machine_comes_straight_in_by_its_own_name() -> None:
    with gateway() as running, httpx.Client(base_url=running.url, headers=HTML) as browser:
        assert browser.get("/").status_code == 200
        assert browser.get("/signin").headers["location"] == "/"
        assert httpx.get(running.url, headers={**HTML, "Host": "evil.example"}).status_code == 403
        assert httpx.get(running.url, headers={**HTML, "Origin": "http://evil.example"}).status_code == 403
        chat = {"model": "x", "messages": [{"role": "user", "content": "x"}]}
        assert browser.post("/playground/chat", json=chat).status_code == 422, "forms need their token here, too"
        elsewhere = httpx.get(running.url, headers={**HTML, "X-Forwarded-For": "192.0.2.7"})
        assert elsewhere.status_code == 401


def test_only_the_operator_s_tenant_sees_keys_and_other_tenants(world: World) -> None:
    alice, ops = world.signed_in(world.key("alice", "of alice")), world.signed_in(world.key("ops"))
    assert alice.get("/admin").status_code == alice.get("/usage?tenant=bob").status_code == 404
    assert "of alice" in ops.get("/admin").text
    assert ops.get("/usage?tenant=alice").status_code == 200
    assert alice.post("/admin/keys", data={"csrf": csrf(alice.get("/")), "tenant": "alice"}).status_code == 404
    made = ops.post("/admin/keys", data={"csrf": csrf(ops.get("/")), "tenant": "carol", "note": "<i>new</i>"})
    key = "tml-" + made.text.partition("<code>tml-")[2].partition("<")[0]
    carol = world.signed_in(key)
    page = ops.get("/admin")
    assert key not in page.text
    assert "&lt;i&gt;new&lt;/i&gt;" in page.text
    key_id = httpx.get(f"{world.running.url}/api/v1/auth/apikey/me", headers={"X-API-Key": key}).json()["name"]
    assert ops.post("/admin/keys/revoke", data={"csrf": csrf(page), "id": "../../x"}).status_code == 404
    assert ops.post("/admin/keys/revoke", data={"csrf": csrf(page), "id": key_id}).status_code == 303
    assert carol.get("/").status_code == 303
