"""The HTML report in a browser: it draws, sorts, toggles, follows the reader's colors, and runs no text of the data."""

import json
from collections.abc import Callable, Iterator
from threading import Thread

import pytest
from playwright.sync_api import Browser, Page

from fishr.reports.page import write_report
from fishr.reports.page.serve import Server
from runs_to_show import mistakes_of, write_run, write_sweep

EVIL = "<script>alert(1)</script>"

Open = Callable[..., Page]


@pytest.fixture
def open_page(chromium: Browser) -> Iterator[Open]:
    """Open an address; whatever the browser complains of, or fetches from elsewhere, fails the test."""
    complaints: list[str] = []
    fetched: list[tuple[str, str]] = []
    contexts = []

    def opened(address: str, *, width: int = 1440, scheme: str = "light") -> Page:
        contexts.append(chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: fetched.append((request.url, address)))
        page.goto(address)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []
    assert [url for url, address in fetched if not url.startswith((address, "data:", "about:"))] == []


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Address of the report of a sweep."""
    folder = tmp_path_factory.mktemp("sweep")
    write_report(folder / "report.html", [write_sweep(folder / "runs")])
    return (folder / "report.html").as_uri()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_every_plot_is_drawn_and_not_empty(open_page, sweep, width, scheme):
    page = open_page(sweep, width=width, scheme=scheme)
    page.evaluate("document.querySelectorAll('details.group').forEach((group) => (group.open = true))")
    plots = page.locator(".plot")
    assert plots.count() == 3 * 3 + 1 + 1
    for number in range(plots.count()):
        plot = plots.nth(number)
        plot.scroll_into_view_if_needed()
        plot.locator(".scatterlayer .trace").first.wait_for(state="attached")
        assert plot.locator(".scatterlayer path").count() > 1
        box = plot.locator("svg.main-svg").first.bounding_box()
        assert box["width"] > 200
        assert box["height"] > 200
    overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert overflow == 0


def test_colors_follow_the_reader(open_page, sweep):
    page = open_page(sweep)
    page.locator(".plot[data-drawn]").first.wait_for()
    title = page.locator(".plot .xtitle").first
    light = title.evaluate("(element) => getComputedStyle(element).fill")
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("(light) => getComputedStyle(document.querySelector('.xtitle')).fill !== light", arg=light)
    assert title.evaluate("(element) => getComputedStyle(element).fill") == "rgb(230, 237, 243)"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(13, 17, 23)"


def test_print_is_light_and_complete(open_page, sweep):
    page = open_page(sweep, scheme="dark")
    color = "getComputedStyle(document.querySelector('.xtitle')).fill"
    page.evaluate("addEventListener('beforeprint', () => (window.inPrint = " + color + "))")
    folded = page.locator("details.group:not([open])").count()
    assert folded > 0
    page.pdf()
    assert page.evaluate("inPrint") == "rgb(0, 0, 0)"
    assert page.locator(".plot[data-drawn]").count() == page.locator(".plot").count()
    assert page.locator("details.group:not([open])").count() == folded
    page.wait_for_function(color + " === 'rgb(230, 237, 243)'")

    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("nav").is_hidden()
    assert page.locator(".toggles input").first.is_hidden()
    assert page.locator(".toggles").first.is_visible()  # the legend


def test_tables_are_sorted_by_keyboard(open_page, sweep):
    page = open_page(sweep)
    table = page.locator("table.sortable").first
    column = [cell.inner_text() for cell in table.locator("tbody tr td:nth-child(2)").all()]
    assert column == ["40.5 ± 0.4", "45.5 ± 0.4"]
    heading = table.locator("thead th").nth(1)
    heading.locator("button").focus()
    page.keyboard.press("Enter")
    assert heading.get_attribute("aria-sort") == "descending"
    assert table.locator("tbody tr th").all_inner_texts() == ["fishr", "erm"]
    page.keyboard.press("Enter")
    assert heading.get_attribute("aria-sort") == "ascending"
    assert table.locator("tbody tr th").all_inner_texts() == ["erm", "fishr"]
    names = table.locator("thead th").first
    names.locator("button").click()
    assert heading.get_attribute("aria-sort") is None
    assert table.locator("tbody tr th").all_inner_texts() == ["fishr", "erm"]


def test_toggles_hide_an_algorithm_in_all_charts_of_their_group(open_page, sweep):
    page = open_page(sweep)
    group = page.locator("#curves details.group").first
    group.scroll_into_view_if_needed()
    group.locator(".plot[data-drawn]").nth(2).wait_for()
    lines = group.locator(".plot").first.locator(".scatterlayer .trace")
    assert lines.count() == 6  # of each algorithm a mean, and two ends of a band
    box = group.get_by_label("fishr")
    box.focus()
    page.keyboard.press("Space")
    assert not box.is_checked()
    page.wait_for_function(
        "[...document.querySelectorAll('#curves details.group:first-of-type .plot')].every("
        "(plot) => plot.querySelectorAll('.scatterlayer .trace').length === 3)"
    )
    page.keyboard.press("Space")
    page.wait_for_function("document.querySelectorAll('#curves .plot')[0].querySelectorAll('.trace').length === 6")


def test_text_of_the_data_is_text(open_page, tmp_path):
    run = write_run(tmp_path / "run", EVIL, held_out=(EVIL,), domains=("north", EVIL), draw=None)
    (run / "mistakes.json").write_text(mistakes_of(classes=(EVIL, "dog"), held_out=EVIL).to_json())
    made_by = {"command": f"fishr train --data '{EVIL}'", "versions": {"fishr": EVIL}}
    (run / "made_by.json").write_text(json.dumps(made_by))
    write_report(tmp_path / "report.html", [run])
    page = open_page((tmp_path / "report.html").as_uri())
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("script").count() == 2 + page.locator(".plot").count()
    assert page.get_by_text(f"{EVIL}, taken for dog").count() == 1
    assert page.locator("h2").first.is_visible()


def test_sections_are_named_and_reached_from_the_top(open_page, sweep):
    page = open_page(sweep)
    for link in page.locator("nav a").all():
        assert page.locator(f"{link.get_attribute('href')} h2").inner_text() == link.inner_text()
    assert all(label for label in page.locator(".plot").evaluate_all("(all) => all.map((each) => each.ariaLabel)"))
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"


def test_a_page_that_is_served_follows_the_runs(open_page, tmp_path, monkeypatch):
    monkeypatch.setattr("fishr.reports.page.serve.LEAST_AGE", 0.1)
    write_run(tmp_path / "runs" / "first", draw=None)
    with Server([tmp_path / "runs"], 0) as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        page = open_page(server.address)
        assert page.locator("#runs tbody tr").count() == 1
        page.locator("#curves summary").first.click()
        write_run(tmp_path / "runs" / "second", draw=None, trial=1)
        page.locator("#runs tbody tr").nth(1).wait_for(timeout=15_000)
        assert not page.locator("#curves details.group").first.evaluate("(group) => group.open")
        page.goto("about:blank")
        server.shutdown()
