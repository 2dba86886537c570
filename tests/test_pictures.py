"""Pictures of the documents are those that their scripts draw."""

import runpy
from pathlib import Path

ASSETS = Path(__file__).parents[1] / "docs" / "assets"


def test_the_closed_form_is_drawn_by_its_script() -> None:
    script = runpy.run_path(str(ASSETS / "closed_form.py"))
    assert script["picture"]() == (ASSETS / "closed-form.svg").read_text(encoding="utf-8")
