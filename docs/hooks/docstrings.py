"""Docstrings of this package as Markdown: roles become links, doctests become code."""

import re
from typing import Any

from griffe import Extension, NameResolutionError, Object


class Docstrings(Extension):
    """What mkdocstrings calls on each object of the package."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value, obj)


def as_markdown(text: str, scope: Object) -> str:
    """A docstring with its roles as links, resolved from where it stands, and its doctests as blocks of code.

    Args:
        text: The docstring; reStructuredText of a few kinds: roles, ``::`` before code, doctests.
        scope: What it is the docstring of.
    """

    def link(role: re.Match[str]) -> str:
        name = role[1].removeprefix("~")
        try:
            target = scope.resolve(name)
        except NameResolutionError:
            target = name
        shown = name.rpartition(".")[2] if role[1].startswith("~") else name
        return f'<autoref identifier="{target}" optional><code>{shown}</code></autoref>'

    text = re.sub(r"::$", ":", re.sub(r":\w+:`([^`]+)`", link, text), flags=re.MULTILINE)
    return re.sub(r"^>>>.*(?:\n.+)*", r"```pycon\n\g<0>\n```", text, flags=re.MULTILINE)
