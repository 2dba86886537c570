"""The HTML report of 1,000 runs: its size, how long it takes to make and to open in a browser."""

import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import common
from playwright.sync_api import Browser, sync_playwright
from report_scale import write_runs

from fishr.reports.page import write_report
from fishr.reports.tables import markdown_table

METHOD = """Runs as in report_scale, one draw and one trial: 4 datasets of 4 domains, each domain and each pair held
out, 25 algorithms, 17 records a run. Made: from folders without an index to the file. Opened: in headless Chromium, a
new window each time, from the request to the load event, and to the first chart. Medians."""

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ALL_RUNS = {"draws": 1, "trials": 1}


def seconds_to_open(browser: Browser, address: str) -> tuple[float, float]:
    """Until the load event, and until the first chart is drawn."""
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    began = time.perf_counter()
    page.goto(address)
    loaded = time.perf_counter() - began
    page.locator("#curves").scroll_into_view_if_needed()
    page.locator(".plot[data-drawn] .scatterlayer .trace").first.wait_for(state="attached")
    drawn = time.perf_counter() - began
    page.close()
    return loaded, drawn


def measure(folder: Path, repeats: int) -> dict[str, float]:
    runs, file = folder / "runs", folder / "report.html"
    runs.mkdir()
    count = write_runs(runs, **ALL_RUNS)
    began = time.perf_counter()
    write_report(file, [runs])
    made = time.perf_counter() - began
    with sync_playwright() as playwright:
        found = next(path for path in map(shutil.which, BROWSERS) if path)
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        opened = [seconds_to_open(browser, file.as_uri()) for _ in range(repeats)]
        browser.close()
    loaded, drawn = (statistics.median(values) for values in zip(*opened, strict=True))
    return {
        "runs": count,
        "megabytes": file.stat().st_size / 1e6,
        "seconds to make": made,
        "seconds to open": loaded,
        "seconds to the first chart": drawn,
    }


def table(results: Mapping[str, float]) -> str:
    return markdown_table(list(results), [[f"{value:,.4g}" for value in results.values()]])


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.argument_parser(__doc__, repeats=7)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        results: dict[str, Any] = measure(Path(folder), arguments.repeats)
    goals = [
        common.Goal(f"{name} of the report of 1,000 runs", bound, False, results[name])
        for name, bound in (("megabytes", 20.0), ("seconds to open", 3.0))
    ]
    setup = common.describe_setup(arguments, ["playwright", "plotly", "fishr"], METHOD)
    common.write_results(arguments.output, "report_page", setup, results, goals, table(results))


if __name__ == "__main__":
    main()
