"""The HTML page: whole in one file, and in a browser without a complaint, light and dark, at any width."""

import copy
import json
import math
import re
import shutil
from html.parser import HTMLParser

import pytest

from hf_gdn.eval import html, writers
from hf_gdn.eval.records import read
from hf_gdn.eval.results import Report

VOID = {"meta", "link", "br", "img", "input"}


class Tags(HTMLParser):
    """Notes ids, what is loaded from elsewhere, and whether tags close in order."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.loaded, self.open, self.text = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids += [values["id"]] if "id" in values else []
        self.loaded += [values[name] for name in ("src", "href", "xlink:href") if name in values]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_one_file_that_loads_nothing(found):
    text = html.to_html(read(Report, found))
    tags = Tags(text)
    assert not tags.open and len(tags.ids) == len(set(tags.ids))
    assert all(place.startswith(("#", "data:")) for place in tags.loaded)
    assert "@import" not in text and "url(http" not in text and "<script" not in text
    assert text.count("<svg") == 8 and text.count("<figure") == 8  # four plots a model
    assert len(text) < 1_000_000


def test_verdict_first_and_tables_behind_plots(found):
    text = html.to_html(read(Report, found))
    assert text.index("PASSED") < text.index("kimi_linear-tiny: is it") < text.index("Manifest")
    assert len(re.findall(r"</svg>\s*<details><summary>Table</summary>", text)) == 8
    for word in ("Speed-up", "Tokens per second", "KL divergence", "Along the text", "causal_conv1d_fn: torch"):
        assert word in text
    assert "model.layers.0.linear_attn" in text  # which kernel each layer ran on


def test_names_are_escaped(found):
    result = {**found["results"][0], "model": "<script>alert(1)</script>"}
    assert "<script" not in html.to_html(read(Report, {**found, "results": [result]}))


def test_a_report_without_a_finite_figure(found):
    """The page of a model whose logits are all NaN is still a page."""
    result = copy.deepcopy(found["results"][0])
    for row in result["parity"]["comparisons"]:
        row.update(grade="not finite", why="NaN", first_bad={"run": "patched, prefill", "window": 0, "text_token": 1})
        row["statistics"] = {
            name: {"value": math.nan, "error": math.nan} if isinstance(value, dict) else value
            for name, value in row["statistics"].items()
        }
        row["kl_histogram"]["counts"] = [0] * len(row["kl_histogram"]["counts"])
        row["trace"]["mean"] = [math.nan] * len(row["trace"]["mean"])
    result["speed"]["cells"] = [
        {"batch": 1, "prompt": 8, "new_tokens": 4, "variant": "eager", "counts": False, "failed": "OutOfMemoryError: x"}
    ]
    report = read(Report, {**found, "results": [result], "passed": False})
    text = html.to_html(report)
    assert "FAILED" in text and "NOT FINITE (NaN, first at token 1 (patched, prefill, window 0))" in text
    assert "OutOfMemoryError: x" in text and "OutOfMemoryError: x" in writers.to_markdown(report)
    assert json.loads(writers.to_json(report))["results"][0]["parity"]["comparisons"][0]["trace"]["mean"][0] is None


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        started = driver.chromium.launch(executable_path=chromium, args=options)
        yield started
        started.close()


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(browser, width, scheme, default_report):
    tab = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    said = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on(
        "request", lambda request: said.append(request.url) if not request.url.startswith(("file:", "data:")) else None
    )
    tab.goto((default_report[0] / "report.html").as_uri())
    assert not said
    assert tab.evaluate("document.documentElement.scrollWidth") <= width  # tables scroll in their own boxes
    assert tab.locator(".verdict").bounding_box()["y"] < 300 and "PASSED" in tab.locator(".verdict").inner_text()
    back, text = (
        [int(part) for part in re.findall(r"\d+", tab.evaluate(f"getComputedStyle(document.body).{name}"))[:3]]
        for name in ("backgroundColor", "color")
    )
    assert (sum(back) > sum(text)) == (scheme == "light") and abs(sum(back) - sum(text)) > 500
    for plot in tab.locator("figure svg").all():
        box = plot.bounding_box()
        assert box["width"] > 0.7 * min(width, 600) * 0.8 and box["height"] > 80
    labels = tab.locator("figure svg text")
    assert labels.count() > 50
    assert {tab.evaluate("e => getComputedStyle(e).fill", label) for label in labels.element_handles()} == {
        f"rgb({', '.join(map(str, text))})"
    }
    tables = tab.locator("figure details")
    tables.first.locator("summary").click()
    assert tables.first.locator("table").is_visible()
    tab.close()
