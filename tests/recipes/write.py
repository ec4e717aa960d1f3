"""Execute notebooks of recipes/ as they are, and keep what came out: outputs, result.json, the figures on the pages.

knapper up &
TINKER_BASE_URL=http://127.0.0.1:8000 python -m tests.recipes.write pig_latin arithmetic

Without a name the pages alone are written anew, from the results that are kept.
"""

import os
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat

from tests.recipes import notebooks, pages
from tests.recipes.notebooks import RECIPES, ROOT


def run(recipe: str) -> None:
    with TemporaryDirectory() as folder:
        notebook = notebooks.execute(notebooks.read(recipe), os.environ["TINKER_BASE_URL"], Path(folder), 3600)
        shutil.copyfile(Path(folder) / "out" / "recipes" / f"{recipe}.json", ROOT / "recipes" / recipe / "result.json")
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of this machine
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    nbformat.write(notebook, notebooks.path_of(recipe))
    print(notebooks.printed(notebook)[-500:], flush=True)


def write_pages() -> None:
    for recipe in RECIPES:
        if (ROOT / "recipes" / recipe / "result.json").exists():
            text = pages.readme(recipe)
            (ROOT / "recipes" / recipe / "README.md").write_text(text, encoding="utf-8")
    pages.OVERVIEW.write_text(pages.overview(), encoding="utf-8")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        run(name)
    write_pages()
