"""Names every page of the site by its path in the repository: one relative link then leads the same way in both."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]

BESIDES = (
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    "benchmarks/**/*.md",
    "benchmarks/**/*.svg",
    "benchmarks/**/*.yaml",
    "examples/**/*.md",
    "examples/**/*.py",
    "examples/**/*.toml",
)
"""What pages may link to outside of docs/."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Put ``docs/`` before the names of what lies there, but not before its addresses, and add what lies besides."""
    named = [_renamed(file, config) if file.src_dir == config.docs_dir else file for file in files]
    besides = {path.relative_to(ROOT).as_posix() for pattern in BESIDES for path in ROOT.glob(pattern)}
    return Files(
        [*named, *(File(path, str(ROOT), config.site_dir, config.use_directory_urls) for path in sorted(besides))]
    )


def _renamed(file: File, config: MkDocsConfig) -> File:
    return File(
        f"docs/{file.src_uri}",
        str(ROOT),
        config.site_dir,
        config.use_directory_urls,
        dest_uri=file.dest_uri,
        inclusion=file.inclusion,
    )


def generated(config: MkDocsConfig, address: str, text: str) -> File:
    """A page that is made while the site is built, named as if it lay in docs/.

    Args:
        config: The site's.
        address: Its path in docs/, ``"algorithms/erm.md"``.
        text: Markdown.
    """
    page = File.generated(config, f"docs/{address}", content=text)
    page.dest_uri = address.removesuffix(".md") + ".html"
    return page
