"""What people see: the terminal, the page and the notebook show the recorded values, whole and in order."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from minift.nn.linear import linear
from minift.step import describe, html, products, show, step
from minift.step.lessons import LESSONS
from minift.step.notebook import as_lesson
from minift.step.terminal import print_all, walk

X, W = np.array([[1.0, 2.0, 0.0]]), np.array([[1.0, 0, 2], [0, 1, 0], [1, 1, 0], [2, 0, 1]])


@pytest.fixture(scope="module")
def lora_lesson():
    return LESSONS["lora"]()


class Elements(HTMLParser):
    """Every element of a page: (tag, attributes), and whether all that was opened was closed in order."""

    VOID = {"meta", "input", "br", "link", "img"}  # noqa: RUF012

    def __init__(self, text):
        super().__init__()
        self.found, self.open, self.texts = [], [], []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if not {"script", "style"} & {*self.open}:
            self.texts.append(data)

    def of_class(self, name):
        return [(tag, a) for tag, a in self.found if name in (a.get("class") or "").split()]


# --- the terminal -----------------------------------------------------------------------------------------------------


def walked(lesson, answers, **options):
    text, answers = io.StringIO(), iter(answers)
    prompts = []

    def ask(prompt):
        prompts.append(prompt)
        try:
            return next(answers)
        except StopIteration:
            raise EOFError from None

    walk(lesson, Console(file=text, highlight=False, markup=False, soft_wrap=True, **options), ask)
    return text.getvalue(), prompts


def test_enter_goes_on_to_the_end_and_b_goes_back(lora_lesson):
    steps = sum(len(scene.recording.steps) for scene in lora_lesson.scenes)
    questions = sum(len(scene.questions) for scene in lora_lesson.scenes)
    text, prompts = walked(lora_lesson, [""] * (steps + questions))
    assert "That was all of it." in text and len(prompts) == steps + questions
    text, prompts = walked(lora_lesson, ["", "", "", "b", "q"])
    at = [re.search(r"(\d+)/", prompt)[1] for prompt in prompts if "/" in prompt]
    assert at == ["1", "2", "3", "2"]


def test_a_question_comes_first_and_what_is_typed_is_judged(lora_lesson):
    right, _ = walked(lora_lesson, ["7", "q"])
    wrong, _ = walked(lora_lesson, ["12", "q"])
    assert right.index("How many are trainable") < right.index("→ 7") < right.index("def forward")
    assert "Yes." in right and "Not quite." in wrong and "→ 7" in wrong


@pytest.mark.parametrize("answers", [["q"], ["", "q"], []])
def test_q_and_the_end_of_input_end_it(lora_lesson, answers):
    text, prompts = walked(lora_lesson, answers)
    assert "That was all of it." not in text and len(prompts) == max(len(answers), 1)


def test_the_current_line_is_marked_among_its_neighbors(lora_lesson):
    text, _ = walked(lora_lesson, ["7", "", "", ""])
    marked = [line for line in text.splitlines() if re.match(r"  → +\d+  ", line)]
    assert any("y, base_vjp = base.linear(x)" in line for line in marked)
    assert re.search(r"^    +\d+      base = Frozen", text, re.MULTILINE), "its neighbor, without a mark"
    assert '"""' not in text, "a docstring is no neighbor"


def test_color_is_for_terminals_only_and_changed_cells_are_seen_without_it():
    def write_one(x):
        x[0, 1] = 5.0
        return x

    lesson = as_lesson(step(write_one, np.arange(6.0).reshape(2, 3)))
    plain, colored = io.StringIO(), io.StringIO()
    print_all(lesson, Console(file=plain, highlight=False, soft_wrap=True))
    print_all(
        lesson, Console(file=colored, highlight=False, soft_wrap=True, force_terminal=True, color_system="standard")
    )
    assert "\x1b[" in colored.getvalue() and "\x1b" not in plain.getvalue()
    assert re.search(r"0   +5\*  +2 ", plain.getvalue())


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.0, "1"), (-0.25, "−0.25"), (1e-8, "1e-8"), (np.float32(1 / 3), "0.3333"), (np.inf, "inf"), (np.nan, "nan"),
        (True, "●"), (np.bool_(False), "·"), (7, "7"), (np.uint8(200), "200"), (-3, "-3"), (123456.0, "1.235e+5"),
    ],
)  # fmt: skip
def test_numbers(value, text):
    assert describe.number(value) == text


def test_large_arrays_are_shortened_for_show():
    grids = describe.grids(np.zeros((3, 40, 50)))
    assert [grid.label for grid in grids] == ["[0]", "[1]", "[2]"]
    rows = grids[0].rows
    assert len(rows) == describe.ROWS and all(len(row) == describe.COLUMNS for row in rows)
    assert rows[0][0] == (0, 0, 0) and rows[-1][-1] == (0, 39, 49) and rows[-2] == [None] * describe.COLUMNS
    assert describe.grids(np.zeros((0, 3))) == []
    assert [row for grid in describe.grids(np.zeros(3)) for row in grid.rows] == [[(0,), (1,), (2,)]]


def test_a_pullback_says_what_it_keeps():
    recording = step(linear, X, W)
    kept = describe.said(recording.value[1])
    assert kept == f"vjp(dy), which keeps weight, x: {W.nbytes + X.nbytes:,} bytes"


def test_a_matrix_product_is_written_out():
    recording = step(linear, X, W, cotangent=np.array([[1.0, 0, -1, 2]]))
    found = {s.text.split(" ")[0]: products.of(s) for s in recording.steps if products.of(s)}
    assert found["y"].sum_at(0, 2) == "1·1 + 2·1 + 0·0 = 3"
    assert found["dx"].sum_at(0, 0) == "1·1 + 0·0 + −1·1 + 2·2 = 4"
    assert found["dweight"].shape == W.shape


# --- the page ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LESSONS)
def test_the_page_holds_every_step_and_needs_nothing_else(name):
    lesson = LESSONS[name]()
    text = html.page(lesson)
    page = Elements(text)
    steps = [s for scene in lesson.scenes for s in scene.recording.steps]
    questions = [q for scene in lesson.scenes for q in scene.questions]
    assert len(page.of_class("step")) == len(steps) and len(page.of_class("question")) == len(questions)
    assert [tag for tag, _ in page.found].count("details") == len(questions)
    links = [a.get(key) for _, a in page.found for key in ("src", "href", "data", "action") if a.get(key)]
    assert not links and "@import" not in text and "url(" not in text and "http" not in text
    assert sum(tag == "script" for tag, _ in page.found) == 1
    assert "color-scheme: light dark" in text and "light-dark(" in text
    listed = {(a["data-source"], tag) for tag, a in page.found if tag == "figure"}
    assert {(a["data-source"], "figure") for _, a in page.of_class("stop")} == listed


def test_a_step_is_marked_in_its_listing_with_its_equation(lora_lesson):
    page = Elements(html.page(lora_lesson))
    stop = next(a for _, a in page.of_class("step") if a.get("data-term") == "h = s x̃ Aᵀ")
    lines = {a["data-line"] for _, a in page.of_class("line") if a.get("data-line")}
    assert stop["data-first"] in lines
    assert stop["data-equation"] in {a.get("data-equation") for tag, a in page.found if tag == "li"}
    assert stop["data-term"] in stop["data-equation"].replace("  ", " ")


def test_cells_carry_their_value_and_the_sum_behind_it(lora_lesson):
    page = Elements(html.page(lora_lesson))
    titles = [a["title"] for tag, a in page.found if tag == "td" and "title" in a]
    assert "[0, 0] = 1.0   x_tilde @ A.T: 1·1 + 2·0 + 0·(−1) = 1" in titles


def test_only_the_cells_that_changed_are_marked_as_new():
    def write_one(x):
        x[0, 1] = 5.0
        return x

    page = Elements(html.page(as_lesson(step(write_one, np.arange(6.0).reshape(2, 3)))))
    new = [a["title"] for _, a in page.of_class("new")]
    assert new == ["[0, 1] = 5.0"]


def test_what_is_shown_is_escaped():
    def compare(x):
        text = "<script>alert(1)</script>"
        return x < 1 and text

    text = html.page(as_lesson(step(compare, 0)))
    Elements(text)
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)" in text


# --- the notebook -----------------------------------------------------------------------------------------------------


def test_a_notebook_gets_the_page_and_a_table_where_frames_are_not_shown(lora_lesson):
    shown = show(lora_lesson)
    page = Elements(shown._repr_html_())
    frames = [a for tag, a in page.found if tag == "iframe"]
    assert len(frames) == 1 and frames[0]["srcdoc"] == html.page(lora_lesson)
    steps = sum(len(scene.recording.steps) for scene in lora_lesson.scenes)
    questions = sum(len(scene.questions) for scene in lora_lesson.scenes)
    assert sum(tag == "tr" for tag, _ in page.found) == steps + questions + 1
    text = "".join(page.texts)
    assert "h = s x̃ Aᵀ  (2)" in text and "dB  float64 (4, 1), 32 bytes" in text
    assert "x_tilde @ A.T" in repr(shown) and "\x1b" not in repr(shown)


def test_a_recording_shows_itself():
    recording = step(linear, X, W)
    assert recording._repr_html_() == show(recording)._repr_html_()
