"""The documentation site as it is built: complete, and without another server."""

import re
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from griffe import NameResolutionError
from typer.main import get_command

import command_page
import fishr
from docstrings import as_markdown
from fishr.algorithms import ALGORITHMS
from fishr.algorithms.describe import describe
from fishr.cli.app import app

ROOT = Path(__file__).parents[1]

API = ("algorithms", "analysis", "data", "deploy", "functional", "models", "nn", "training")
"""Modules that say what of them is public."""


class Page(HTMLParser):
    """What a page fetches, its links to other servers aside, and the tags in its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self._in_article = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self._in_article |= tag == "article"
        if self._in_article:
            self.tags.append(tag)
        fetches = tag in ("script", "img", "iframe", "source") or (tag == "link" and given.get("rel") != "canonical")
        self.fetched += [given[name] or "" for name in ("src", "href") if fetches and given.get(name)]

    def handle_endtag(self, tag: str) -> None:
        self._in_article &= tag != "article"

    def handle_data(self, data: str) -> None:
        if self._in_article:
            self.text += data


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Page]:
    return {path.relative_to(site).as_posix(): Page(path) for path in site.rglob("*.html")}


def test_nothing_is_fetched_from_another_server(site: Path, pages: dict[str, Page]) -> None:
    assert pages["index.html"].fetched
    for name, page in pages.items():
        assert [address for address in page.fetched if re.match(r"(https?:)?//", address)] == [], name
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet


def test_every_algorithm_has_a_page_with_all_that_it_says_of_itself(pages: dict[str, Page]) -> None:
    own = [name for name in ALGORITHMS if ALGORITHMS[name].__module__.startswith("fishr.")]  # tests register others
    for name in own:
        described = describe(name)
        page = pages[f"algorithms/{name}.html"]
        said = [described.title, described.idea, described.reference, *described.text.split("\n\n")]
        for each in described.hyperparameters:
            said += [each.name, each.meaning, *each.spaces.values()]
        for text in said:
            assert _words(text) in _words(page.text), (name, text)
        assert described.title in pages["algorithms/index.html"].text


def test_every_command_has_its_options_on_the_page(pages: dict[str, Page]) -> None:
    for name, command in command_page.commands("fishr", get_command(app)):
        for parameter in command.params:
            assert _words(parameter.help) in _words(pages["commands.html"].text), (name, parameter.name)


def test_what_is_public_is_in_the_api(site: Path) -> None:
    *_, content = (site / "objects.inv").read_bytes().split(b"\n", 4)
    documented = {line.split()[0] for line in zlib.decompress(content).decode().splitlines()}
    public = [(home, name) for name, home in fishr._HOMES.items()]
    for room in API:
        public += [(f"fishr.{room}", name) for name in import_module(f"fishr.{room}").__all__]
    for home, name in public:
        made_in = getattr(getattr(import_module(home), name), "__module__", home)
        assert {f"{home}.{name}", f"{made_in}.{name}"} & documented, f"{home}.{name}"


def test_formulas_and_examples_of_docstrings_come_out_as_written(pages: dict[str, Page]) -> None:
    for name, page in pages.items():
        if name.startswith(("api/", "algorithms/")):
            assert {"em", "blockquote"}.isdisjoint(page.tags), name
            assert re.findall(r":\w+:`|``", page.text) == [], name


def test_roles_become_links_and_doctests_become_code() -> None:
    def resolve(name: str) -> str:
        if name == "unknown":
            raise NameResolutionError(name)
        return f"fishr.room.{name}"

    scope: Any = SimpleNamespace(resolve=resolve)
    assert as_markdown("See :class:`Thing`, :func:`~other.place.f` and :data:`unknown`.", scope) == (
        'See <autoref identifier="fishr.room.Thing" optional><code>Thing</code></autoref>, '
        '<autoref identifier="fishr.room.other.place.f" optional><code>f</code></autoref> and '
        '<autoref identifier="unknown" optional><code>unknown</code></autoref>.'
    )
    assert as_markdown("It adds::\n\n    1 + 1\n\n>>> 1 + 1\n2\n\nAnd so on.", scope) == (
        "It adds:\n\n    1 + 1\n\n```pycon\n>>> 1 + 1\n2\n```\n\nAnd so on."
    )


def _words(text: str) -> str:
    return " ".join(text.replace("`", "").split())
