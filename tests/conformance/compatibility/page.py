"""docs/compatibility.md, from the SDK's methods and what is checked of them."""

from pathlib import Path

import tinker

from tests.conformance.compatibility.checks import CHECKS, REFUSALS, Check
from tests.conformance.compatibility.methods import CLIENTS, public, twin_of
from tests.conformance.test_oldest_sdk import VERSION as OLDEST

PATH = Path(__file__).parents[3] / "docs" / "compatibility.md"
_NOTES = Path(__file__).with_name("notes.md")
COMMAND = "python -m tests.conformance.compatibility"
_ADMIN = tinker.AdminClient


def check_of(method: str) -> Check | None:
    """The check of the method, or of the one that it is the twin of."""
    return next((check for check in CHECKS if twin_of(method) in check.methods), None)


def unknown() -> list[str]:
    """Public methods that no check knows: a new SDK brings them."""
    return [method for client in CLIENTS for method in public(client) if check_of(method) is None]


def render() -> str:
    """The whole page."""
    methods = [method for client in CLIENTS for method in public(client)]
    admin = public(_ADMIN)
    served = [method for method in methods if check_of(method) is not None]
    rest, served_rest = len(methods) - len(admin), len(set(served) - set(admin))
    lines = [
        "# Compatibility",
        "",
        f"<!-- Written by `{COMMAND}`; tests/conformance/test_compatibility.py holds it to the truth. -->",
        "",
        f"With `tinker=={tinker.__version__}`, {served_rest} of {rest} public methods of ServiceClient,",
        f"TrainingClient, SamplingClient and RestClient work; with AdminClient's, {len(served)} of {len(methods)}.",
        "A test calls each of them against a running server, and looks at what the call brings about. *local*: the SDK",
        "answers by itself, without a request. A method and its deprecated `_async` twin share a row.",
    ]
    for client in CLIENTS:
        lines += ["", f"## {client.__name__}", "", "| method | | what the test sees |", "|---|---|---|"]
        names = public(client)
        for method in names:
            if twin_of(method) == method or twin_of(method) not in names:
                lines.append(_row(method, twin=f"{method}_async" in names))
    lines += [
        "",
        "## Refused",
        "",
        "Nothing is ignored in silence: each of these is an error that says what to do instead.",
    ]
    lines += ["", "| what | the error says |", "|---|---|"]
    lines += [f"| {refusal.what} | {refusal.says} |" for refusal in REFUSALS]
    notes = _NOTES.read_text(encoding="utf-8").replace("NEWEST", tinker.__version__).replace("OLDEST", OLDEST)
    return "\n".join([*lines, "", notes])


def _row(method: str, *, twin: bool) -> str:
    name = method.partition(".")[2] + (", …`_async`" if twin else "")
    name = f"`{name.replace(',', '`,', 1)}" if twin else f"`{name}`"
    check = check_of(method)
    if check is None:
        return f"| {name} | **unknown** | nothing: no test knows this method |"
    return f"| {name} | {'local' if check.local else 'works'} | {check.sees} |"
