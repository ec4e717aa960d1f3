"""The notebooks of recipes/: executed as they are, or in a reduced form, against a server that runs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT: Final = Path(__file__).parents[2]
RECIPES: Final = sorted(path.parent.name for path in (ROOT / "recipes").glob("*/notebook.ipynb"))
_PARAMETERS = "parameters"  # the tag of the cell with the options, as papermill has it


def path_of(recipe: str) -> Path:
    return ROOT / "recipes" / recipe / "notebook.ipynb"


def read(recipe: str) -> NotebookNode:
    notebook: NotebookNode = nbformat.read(path_of(recipe), as_version=4)
    return notebook


def reduced(notebook: NotebookNode, options: dict[str, int]) -> NotebookNode:
    """With other options, set by a cell behind the tagged one."""
    (at,) = [n for n, cell in enumerate(notebook.cells) if _PARAMETERS in cell.metadata.get("tags", [])]
    given = ", ".join(f"{name}={value}" for name, value in options.items())
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(f"options = train.Options({given})"))
    return notebook


@contextmanager
def environment(**changes: str) -> Iterator[None]:
    """Of the kernels that start within."""
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def execute(notebook: NotebookNode, url: str, folder: Path, timeout_s: float) -> NotebookNode:
    """Run all cells in a kernel of its own whose working directory is `folder`. Raises what a cell raises."""
    with environment(TINKER_BASE_URL=url, TINKER_API_KEY="tml-local", PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"):
        client = NotebookClient(notebook, timeout=timeout_s, resources={"metadata": {"path": str(folder)}})
        return client.execute()


def printed(notebook: NotebookNode) -> str:
    """What its cells wrote to standard output."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.text for output in outputs if output.get("name") == "stdout")
