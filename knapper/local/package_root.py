"""Where the deployables lie: beside the library in a checkout, inside it in an installed wheel."""

from pathlib import Path

import knapper
from knapper.errors import NotFound


def deployables(package: Path = Path(knapper.__file__).parent) -> Path:
    """The directory that holds gateway/ and functions/. Raises NotFound."""
    candidates = (package / "_deployables", package.parent)
    for root in candidates:
        if (root / "gateway" / "app.py").is_file() and (root / "functions").is_dir():
            return root
    places = " or ".join(str(root) for root in candidates)
    raise NotFound(f"gateway/app.py and functions/ are not in {places}; reinstall knapper, or run it from a checkout")
