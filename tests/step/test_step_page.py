"""The page in a real browser, Chromium: clicked through in a frame, as a notebook would show it, wide and narrow."""

from __future__ import annotations

import re
from html import escape

import pytest

import browser
from minift.step import html
from minift.step.lessons import LESSONS

pytestmark = browser.needs_browser

CLICK_THROUGH = """
const found = { errors: [], shown: [], overflow: 0 };
const frame = document.querySelector("iframe");
frame.addEventListener("load", () => {
  const page = frame.contentDocument, view = frame.contentWindow;
  view.addEventListener("error", (event) => found.errors.push(event.message));
  const next = page.getElementById("next"), back = page.getElementById("back"), slider = page.getElementById("slider");
  const press = (key) => page.body.dispatchEvent(new view.KeyboardEvent("keydown", { key, bubbles: true }));
  const seen = () => [...page.querySelectorAll(".stop")].filter((stop) => stop.getClientRects().length);
  const state = () => ({
    stops: seen().length,
    text: seen().map((stop) => (stop.querySelector(".code, summary") || stop).textContent).join("|"),
    lines: [...page.querySelectorAll(".line.now")].filter((line) => line.getClientRects().length).length,
    term: [...page.querySelectorAll(".equations mark")].map((mark) => mark.textContent).join("|"),
    open: !!page.querySelector(".stop.now details[open]"),
    count: page.getElementById("count").textContent,
  });
  found.first = state();
  found.backAtStart = back.disabled;
  for (let i = 0; i < 400 && !next.disabled; i += 1) {
    next.click();
    found.shown.push(state());
    found.overflow = Math.max(found.overflow, page.documentElement.scrollWidth - view.innerWidth);
  }
  press("ArrowLeft");
  found.afterLeft = state();
  press("Home");
  found.afterHome = state();
  slider.value = "3";
  slider.dispatchEvent(new view.Event("input"));
  found.afterSlider = state();
  page.getElementById("everything").click();
  found.all = state();
  found.total = page.querySelectorAll(".stop").length;
  const result = document.createElement("pre");
  result.id = "result";
  result.textContent = JSON.stringify(found);
  document.body.replaceChildren(result);
});
"""


def browse(tmp_path, page, width):
    outer = tmp_path / "outer.html"
    frame = f'<iframe srcdoc="{escape(page)}" style="width:{width}px;height:900px;border:0"></iframe>'
    outer.write_text(f"<!doctype html><meta charset=utf-8><body>{frame}<script>{CLICK_THROUGH}</script></body>")
    return browser.found(tmp_path, outer.as_uri())


@pytest.mark.parametrize("width", [1300, 390])
@pytest.mark.parametrize("name", ["lora", "nf4"])
def test_next_back_keys_and_slider_go_through_the_page(tmp_path, name, width):
    lesson = LESSONS[name]()
    found = browse(tmp_path, html.page(lesson), width)
    assert found["errors"] == []
    steps = sum(len(scene.recording.steps) for scene in lesson.scenes)
    questions = sum(len(scene.questions) for scene in lesson.scenes)
    assert found["total"] == steps + questions
    assert len(found["shown"]) == steps + 2 * questions - 1, "a question takes two: its answer, then on"
    assert all(state["stops"] == 1 and state["lines"] >= 1 for state in found["shown"])
    assert found["backAtStart"] and found["first"]["count"] == f"1 / {found['total']}"
    answers = [state["text"] for state in found["shown"] if state["open"]]
    assert len(answers) == questions
    assert found["shown"][-1]["count"] == f"{found['total']} / {found['total']}"
    assert found["afterLeft"]["count"].startswith(f"{found['total'] - 1} /")
    assert found["afterHome"]["count"].startswith("1 /") and found["afterSlider"]["count"].startswith("4 /")
    assert found["all"]["stops"] == found["total"]
    assert found["overflow"] <= 0, "nothing sticks out to the side"
    terms = {state["term"] for state in found["shown"]}
    assert name != "lora" or {"h = s x̃ Aᵀ", "dA = dhᵀ x̃", "dB = dyᵀ h"} <= terms


def test_without_scripts_everything_is_there_to_read(tmp_path):
    page = html.page(LESSONS["lora"]())
    without = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    outer = tmp_path / "plain.html"
    probe = """
    const stops = [...document.querySelectorAll(".stop")];
    document.title = `${stops.filter((s) => s.getClientRects().length).length} of ${stops.length}, ` +
      `nav ${document.querySelector("nav").getClientRects().length}`;
    """
    outer.write_text(without.replace("</body>", f"<script>{probe}</script></body>"))
    title = re.search(r"<title>(\d+) of (\d+), nav 0</title>", browser.dumped(tmp_path, outer.as_uri()))
    assert title is not None and int(title[1]) == int(title[2]) > 40
