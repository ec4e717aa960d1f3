"""docs/cluster-trial.md, as a stranger would paste it."""

import re
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "cluster-trial.md").read_text(encoding="utf-8")
COMMANDS = "\n".join(re.findall(r"^```sh\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL))


def file(name: str) -> str:
    """What its commands write into a file."""
    (text,) = re.findall(rf"^cat > {re.escape(name)} <<'END'\n(.*?)^END$", COMMANDS, flags=re.MULTILINE | re.DOTALL)
    return str(text)
