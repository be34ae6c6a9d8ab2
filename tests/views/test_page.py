"""The page of a plan, in a real browser without a network."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_core_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

import remat
from remat.budget import format_bytes
from remat.table import notebook
from remat.views import charts
from tests.models import mlp
from tests.views.cases import data_of, with_copies, with_recompute


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None and not os.environ.get("CI"):
        pytest.skip("needs Chromium")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with everything on it."""
    model, x = mlp(dropout=0.0)
    plans = remat.frontier(model, (x,), points=5)
    path = tmp_path_factory.mktemp("page") / "plan.html"
    with_recompute().to_html(path, plans)
    return path


def opened(browser: Browser, file: Path, width: int = 1280, dark: bool = False) -> tuple[Page, list[str]]:
    """A page once it is drawn, and what it complained about or asked the network for."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light")
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url) if not request.url.startswith(("file:", "data:")) else None)
    page.goto(file.as_uri())
    page.wait_for_selector("html[data-ready=true]")
    return page, said


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, pytest.param(768, marks=pytest.mark.slow), 390])
def test_it_draws_everything_and_is_accessible(browser: Browser, file: Path, width: int, dark: bool) -> None:
    page, said = opened(browser, file, width, dark)
    assert said == []
    for name in ("timeline", "before", "blocks", "lanes", "frontier"):
        picture = page.locator(f"#{name} svg")
        assert picture.locator("path").count() > 2
        box = picture.bounding_box()
        assert box is not None
        assert box["width"] <= width
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for details in page.locator("details").all():
        details.locator("summary").click()
    violations = Axe().run(page, options={"resultTypes": ["violations"]})["violations"]  # the others take three times as long
    assert [(found["id"], found["nodes"][0]["html"]) for found in violations] == []
    page.close()


def test_its_figures_are_the_plans(browser: Browser, file: Path) -> None:
    page, _ = opened(browser, file)
    plan, text = with_recompute(), page.inner_text("body")
    for size in (plan.peak_bytes, plan.baseline_peak_bytes, plan.saved_bytes):
        assert format_bytes(size) in text
    assert plan.budget_bytes is not None
    assert f"budget {format_bytes(plan.budget_bytes)}" in text
    assert page.locator("#count").inner_text() == f"1 to {min(100, len(plan.decisions))} of {len(plan.decisions)}"
    page.close()


def rows(page: Page) -> list[list[str]]:
    found: list[list[str]] = page.evaluate(
        "[...document.querySelectorAll('#values tbody tr')].map(row => [...row.children].map(cell => cell.innerText))"
    )
    return found


def test_values_are_sorted_and_searched_by_keyboard(browser: Browser, file: Path) -> None:
    page, _ = opened(browser, file)
    page.get_by_role("button", name="bytes").focus()
    page.keyboard.press("Enter")
    assert page.get_by_role("columnheader", name="bytes").get_attribute("aria-sort") == "descending"
    largest = max(a.bytes for block in with_recompute().blocks for a in block.activations)
    assert rows(page)[0][2] == format_bytes(largest)
    page.keyboard.press("Enter")
    assert page.get_by_role("columnheader", name="bytes").get_attribute("aria-sort") == "ascending"
    page.get_by_label("Search").focus()
    page.keyboard.type("layers.2.mlp recompute")
    found = rows(page)
    assert found
    assert all(row[1].startswith("model.layers.2.mlp") and row[3] == "recompute" for row in found)
    page.keyboard.type(" nowhere")
    assert rows(page) == []
    assert page.locator("#count").inner_text() == "none"
    page.close()


def test_the_theme_can_be_changed(browser: Browser, file: Path) -> None:
    page, _ = opened(browser, file)
    back = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(back)
    page.get_by_role("button", name="Dark").click()
    assert page.evaluate(back) != light
    assert page.get_by_role("button", name="Dark").get_attribute("aria-pressed") == "true"
    page.close()


def test_it_prints_in_black_on_white(browser: Browser, file: Path) -> None:
    page, _ = opened(browser, file, dark=True)
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert not page.get_by_role("button", name="Dark").is_visible()
    assert page.get_by_role("columnheader", name="bytes").inner_text() == "bytes"
    assert page.evaluate("document.querySelector('#values').scrollWidth <= document.body.clientWidth")
    page.pdf()
    assert page.locator("details:not([open])").count() == 0
    page.close()


def test_copies_have_lanes(browser: Browser, tmp_path: Path) -> None:
    with_copies().to_html(tmp_path / "plan.html")
    page, said = opened(browser, tmp_path / "plan.html")
    assert said == []
    assert {"copy out", "copy in"} <= set(page.locator("#lanes").inner_text().splitlines())
    assert "on the host meanwhile" in page.inner_text("body")
    assert page.locator("#frontier").count() == 0
    page.close()


def test_ten_thousand_values(browser: Browser, tmp_path: Path) -> None:
    plan = with_recompute()
    (block, *_) = (block for block in plan.blocks if len(block.activations) > 3)
    many = tuple(dataclasses.replace(block.activations[i % 3], name=f"value_{i}", bytes=i + 1) for i in range(10_000))
    dataclasses.replace(plan, blocks=(dataclasses.replace(block, activations=many),)).to_html(tmp_path / "plan.html")
    page, said = opened(browser, tmp_path / "plan.html")
    assert said == []
    page.get_by_role("button", name="bytes").click()
    assert rows(page)[0][0] == "value_9999"
    page.get_by_role("button", name="Next").click()
    assert rows(page)[0][0] == "value_9899"
    page.get_by_label("Search").fill("value_777")
    assert len(rows(page)) == 11
    page.close()


def test_names_cannot_break_out(browser: Browser, tmp_path: Path) -> None:
    plan = with_recompute()
    wild = '</script><script>document.title="broken"</script><img src=x onerror=alert(1)>'
    block = plan.blocks[0]
    activations = tuple(dataclasses.replace(a, name=wild, reason=wild) for a in block.activations)
    blocks = (dataclasses.replace(block, module=wild, activations=activations), *plan.blocks[1:])
    dataclasses.replace(plan, blocks=blocks, model=wild).to_html(tmp_path / "plan.html")
    page, said = opened(browser, tmp_path / "plan.html")
    assert said == []
    assert page.title().startswith(wild)
    page.close()


def test_a_notebook_shows_the_timeline() -> None:
    found = with_recompute()._repr_html_()
    assert "<svg" in found
    assert format_bytes(with_recompute().peak_bytes) in found


def test_without_charts_a_notebook_shows_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "altair", None)
    for name in ("charts", "page"):
        monkeypatch.delitem(sys.modules, f"remat.views.{name}", raising=False)
    monkeypatch.delattr("remat.views.charts")
    assert notebook(with_recompute()).startswith("<pre>budget")
    with pytest.raises(remat.RematError, match=r"pip install 'remat\[report\]'"):
        with_recompute().to_html()


def test_a_timeline_is_drawn_by_its_highest_moments() -> None:
    plan = with_recompute()
    many = tuple(m._replace(start_us=m.start_us + i * 1e-3) for m in plan.timeline for i in range(20))
    chart: Any = charts.timeline(dataclasses.replace(plan, timeline=many)).to_dict()
    drawn = [row for data in data_of(chart) for row in data if "live" in row]
    assert len(drawn) <= 2 * (charts.COLUMNS + 1)
    assert max(row["live"] for row in drawn) == pytest.approx(plan.peak_bytes / 2**20, rel=1e-4)
