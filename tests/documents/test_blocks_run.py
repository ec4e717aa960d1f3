"""The pages' commands and programs, pasted into a shell beside a running server, in the order in which they lie here.

`RUN` has what is run; `elsewhere.py` what is not, and what holds it. A block that is in neither is red.
"""

import ast
import json
import os
import re
import signal
from collections.abc import Iterator

import pytest

from tests.documents.elsewhere import NOT_RUN, TESTS
from tests.documents.pages import ROOT, Block, block, blocks
from tests.documents.place import Place, opened

pytestmark = pytest.mark.timeout(110)

UP = ("docs/quickstart.md", ".venv/bin/knapper up")
BANNER = ("docs/quickstart.md", "ready: http://127.0.0.1:8000")
LOOP = ("README.md", "import tinker")
SHELL = ("docs/quickstart.md", "export TINKER_BASE_URL=")
INBOX = ("README.md", "mkdir -p ~/.local/share/knapper/inbox/local")
CHAT = ("docs/openai.md", "curl -N http://127.0.0.1:8000/v1/chat/completions")
DELETE = ("docs/checkpoints.md", "curl -X DELETE")
KEYS = ("docs/security.md", "export KNAPPER_KEYS=true")
REWARD = ("docs/rewards.md", "def reward(prompt, completion, answer) -> float:")
SCORES = ("docs/rewards.md", "answer = httpx.post(")
EXPORTED = "export TINKER_BASE_URL=http://127.0.0.1:8000 TINKER_API_KEY=tml-local\n"
RUN = [UP, BANNER, LOOP, SHELL, INBOX, CHAT, DELETE, KEYS, REWARD, SCORES]


def _holders(each: Block) -> list[tuple[str, str]]:
    return [key for key in (*RUN, *TESTS, *NOT_RUN) if key[0] == each.page and each.first_line.startswith(key[1])]


def test_every_block_is_run_or_held_by_another_test_or_has_a_reason() -> None:
    everything = list(blocks())
    unheld = [each.key for each in everything if not _holders(each)]
    assert not unheld, f"neither run in {__file__} nor named in tests/documents/elsewhere.py: {unheld}"
    assert [each.key for each in everything if len(_holders(each)) > 1] == [], "held in two ways"
    held = {key for each in everything for key in _holders(each)}
    assert {*RUN, *TESTS, *NOT_RUN} == held, "what is named is on no page any more"


@pytest.mark.parametrize("named", sorted(set(TESTS.values())))
def test_a_test_that_holds_a_block_exists(named: str) -> None:
    path, _, name = named.partition("::")
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with opened(tmp_path_factory.mktemp("checkout")) as it:
        yield it


def test_the_server_says_what_the_page_shows(place: Place) -> None:
    def labels(lines: list[str]) -> list[str]:
        return [line.split()[0] for line in lines]

    assert labels(place.banner) == labels(block(*BANNER).text.splitlines())


def test_the_loop_learns_and_its_run_can_be_deleted(place: Place) -> None:
    """README's program as quickstart's `your_loop.py`; then the curl of checkpoints.md with the run that it made."""
    before = _runs(place)
    (place.folder / "your_loop.py").write_text(block(*LOOP).text.replace("http://127.0.0.1:8000", place.url))
    said = place.run(block(*SHELL).text)
    losses = [float(loss) for loss in re.findall(r"^\d+ (\S+)$", said, flags=re.MULTILINE)]
    assert len(losses) == 10
    assert losses[-1] < 0.75 * losses[0]
    (made,) = _runs(place) - before
    script = block(*DELETE).text
    assert script.count("RUN") == 1
    place.run(EXPORTED + script.replace("curl", "curl -fsS", 1).replace("RUN", made))
    assert made not in _runs(place)


def _runs(place: Place) -> set[str]:
    listing = EXPORTED + 'curl -fsS -H "X-API-Key: $TINKER_API_KEY" $TINKER_BASE_URL/api/v1/training_runs'
    return {run["training_run_id"] for run in json.loads(place.run(listing))["training_runs"]}


def test_a_folder_in_the_inbox_is_trained(place: Place) -> None:
    """Until the first line of its metrics; the page's last command follows them without end."""
    with place.begin(block(*INBOX).text) as process:
        try:
            assert process.stdout is not None
            first = json.loads(process.stdout.readline())
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    assert first["step"] == 1
    assert 0 <= first["reward/mean"] <= 1


def test_a_chat_is_streamed(place: Place) -> None:
    said = place.run(block(*CHAT).text)
    assert '"delta"' in said
    assert said.rstrip().endswith("data: [DONE]")


def test_a_loop_of_ones_own_has_its_rollouts_scored_as_the_page_shows(place: Place) -> None:
    program = block(*SCORES).text
    (shown,) = re.findall(r"^# (\{.*\})$", program, flags=re.MULTILINE)
    assert json.loads(place.python(f"import httpx, json\n{program}\nprint(json.dumps(answer.json()))")) == json.loads(
        shown
    )


def test_the_reward_of_the_page_compares_with_the_answer(place: Place) -> None:
    calls = 'print(reward("1 + 1", "so: 2 ", 2), reward("1 + 1", "3", 2))'
    assert place.python(f"{block(*REWARD).text}\n{calls}") == "1.0 0.0\n"


def test_keys_are_made_listed_and_revoked(place: Place) -> None:
    script = block(*KEYS).text
    (shown,) = re.findall(r"knapper key revoke (\w+)", script)
    made = "$(knapper key list | grep laptop | cut -d' ' -f1)"
    said = place.run(script.replace(shown, made) + "knapper key list\n")
    key, listed, revoked, after = said.splitlines()
    assert re.fullmatch("tml-[0-9a-f]{64}", key)
    assert " alice " in listed
    assert listed.endswith("valid  laptop")
    assert "revoked" in revoked
    assert after.split()[0] == listed.split()[0]
    assert "revoked" in after
