"""Pictures of the report for the documents: ``python docs/screenshots.py runs/demo/report.html``."""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

ASSETS = Path(__file__).parent / "assets"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PICTURES = {
    "report.png": {"viewport": {"width": 1200, "height": 900}, "color_scheme": "light"},
    "report-phone-dark.png": {"viewport": {"width": 390, "height": 900}, "color_scheme": "dark"},
}


def main(report: Path) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=next(path for path in map(shutil.which, BROWSERS) if path), args=["--no-sandbox"]
        )
        for name, settings in PICTURES.items():
            page = browser.new_page(**settings)
            page.goto(report.resolve().as_uri())
            page.wait_for_timeout(3000)  # charts in view are drawn
            page.screenshot(path=ASSETS / name)
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
