"""The SDK's command line in a process of its own: a JSON list of arguments a line in, what came of it a line out.

One process for many commands: starting one takes seconds, nearly all of them for imports. Not the process of the tests:
there the SDK's event loop serves a hundred clients, and what those left open is closed by the garbage collector while
the loop still watches its number. A new connection of the same number is then never told of its answer.
"""

import contextlib
import gc
import io
import json
import sys

from tinker.cli.__main__ import main_cli
from tinker.cli.exceptions import TinkerCliError


def main() -> None:
    gc.disable()
    for line in sys.stdin:
        printed, error = io.StringIO(), None
        try:
            with contextlib.redirect_stdout(printed):
                main_cli.main(["--format", "json", *json.loads(line)], standalone_mode=False)
        except TinkerCliError as failed:
            error = f"{failed.message} {failed.details}"
        print(json.dumps({"printed": printed.getvalue(), "error": error}), flush=True)


if __name__ == "__main__":
    main()
