"""The documentation as a site. `make site` runs this: pages for MkDocs, its strict build, and a look at what came out.

The pages stay as a reader of the repository wants them. The site has the same ones, with links to what is not on it as
plain text, beside the built ones too: docs/llms.txt names those.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from os.path import normpath, relpath
from pathlib import Path, PurePosixPath
from typing import Final

ROOT: Final = Path(__file__).parents[2]
_MKDOCS: Final = ROOT / ".venv" / "site" / "bin" / "mkdocs"
_PAGES, _SITE = ROOT / "out" / "pages", ROOT / "out" / "site"

# Pages that lie elsewhere than on the site. SECURITY.md and docs/security.md would be one file to some file systems.
_MOVED: Final = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "vulnerabilities.md",
    "docs/decisions/README.md": "decisions/index.md",
}
_FENCED: Final = re.compile(r"(^```.*?^```$)", flags=re.MULTILINE | re.DOTALL)
_LINK: Final = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
_ELSEWHERE: Final = re.compile(r"([a-z][a-z0-9+.-]*:)?//|(?!data:)[a-z][a-z0-9+.-]*:", flags=re.IGNORECASE)


def places() -> dict[str, str]:
    """Where each file of the repository that the site has lies on it."""
    docs = [path for path in sorted((ROOT / "docs").rglob("*")) if path.suffix in {".md", ".png", ".txt"}]
    names = [str(path.relative_to(ROOT)) for path in docs]
    return {name: name.removeprefix("docs/") for name in names} | _MOVED


def linked(text: str, source: str, where: dict[str, str]) -> str:
    """The page with its links as the site needs them. `source`: its path in the repository."""

    def link(found: re.Match[str]) -> str:
        name, (target, hash_, anchor) = found[1], found[2].partition("#")
        if _ELSEWHERE.match(target) or not target:
            return found[0]
        place = where.get(normpath(PurePosixPath(source).parent / target))
        if place is None:
            return name
        return f"[{name}]({relpath(place, PurePosixPath(where[source]).parent)}{hash_}{anchor})"

    parts = _FENCED.split(text)
    return "".join(part if part.startswith("```") else _LINK.sub(link, part) for part in parts)


def title(page: Path) -> str:
    return page.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def decisions() -> str:
    """A list of links, below the page that says what a decision is."""
    found = sorted((ROOT / "docs" / "decisions").glob("0*.md"))
    return "\n" + "".join(f"- {path.stem[:4]} [{title(path)}]({path.name})\n" for path in found)


def write_pages(out: Path) -> None:
    """Everything that MkDocs reads, into an empty folder."""
    where = places()
    for source, place in where.items():
        path = out / place
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix != ".md":
            shutil.copyfile(ROOT / source, path)
            continue
        text = linked((ROOT / source).read_text(encoding="utf-8"), source, where)
        path.write_text(text + (decisions() if place == "decisions/index.md" else ""), encoding="utf-8")


class _Requests(HTMLParser):
    """URLs that a browser asks for by itself; `a` is what a reader may follow."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in {"src", "data", "poster"} or (name == "href" and tag in {"link", "use", "image"}):
                self.urls.append(value or "")
            elif name == "srcset":
                self.urls += [each.split()[0] for each in (value or "").split(",") if each.strip()]
            elif name == "style":
                self.urls += _of_style(value or "")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "style":
            self.urls += _of_style(data)


def _of_style(text: str) -> list[str]:
    return re.findall(r"""(?:url\(|@import)\s*["']?([^"')\s;]+)""", text)


def foreign(site: Path) -> Iterator[str]:
    """`file: URL` of each request to elsewhere that opening a page makes. Scripts cannot: every page forbids it."""
    for path in sorted([*site.rglob("*.html"), *site.rglob("*.css")]):
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".css":
            urls = _of_style(text)
        else:
            parser = _Requests()
            parser.feed(text)
            urls = parser.urls
            if "default-src 'self';" not in text:
                yield f"{path.relative_to(site)}: no Content-Security-Policy"
        yield from (f"{path.relative_to(site)}: {url}" for url in urls if _ELSEWHERE.match(url))


def build() -> None:
    """MkDocs' strict build. Exits with what it says if it warns of anything; --quiet would hide that from --strict."""
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # of a next version, at every build
    command = [str(_MKDOCS), "build", "--strict", "--config-file", str(ROOT / "mkdocs.yml")]
    done = subprocess.run(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(done.stdout)


def main() -> None:
    for folder in (_PAGES, _SITE):
        shutil.rmtree(folder, ignore_errors=True)
    write_pages(_PAGES)
    build()
    for page in _PAGES.rglob("*.md"):
        shutil.copyfile(page, _SITE / page.relative_to(_PAGES))
    if wrong := [*foreign(_SITE)]:
        sys.exit("\n".join(["the site asks others:", *wrong]))
    print(f"{len([*_SITE.rglob('*.html')])} pages in {_SITE.relative_to(ROOT)}; python -m http.server -d out/site")


if __name__ == "__main__":
    main()
