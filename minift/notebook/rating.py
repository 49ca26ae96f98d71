"""Two answers with buttons under them, for a person who compares.

    from minift.notebook import rate_in_notebook
    from minift.rlhf import raters

    rate_in_notebook(raters.pairs(prompt, answers), "mine.jsonl", name="me")

It is `minift rate` with buttons: the same pairs, and the same file, into which each choice goes as it is made. The file
is open only while a choice is written, so that the terminal may go on where the notebook stopped. Needs ipywidgets,
which is part of Jupyter; without it, `list(raters.rate(pairs, cli.rate.Person(), "me", journal))` asks by a line.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from html import escape
from typing import Any

from minift.data import comparisons
from minift.data.comparisons import as_text
from minift.rlhf.raters import Choice, Pair, comparison, unrated, visible

LABELS: dict[Choice, str] = {"first": "1", "second": "2", "tie": "tie", "skip": "skip"}


class RatingPanel:
    """Two answers side by side, and buttons; `widget` is what a notebook shows, `choose` what a button does."""

    def __init__(self, pairs: Iterable[Pair], path: str | os.PathLike[str], name: str = "person"):
        self.path, self.name = path, name
        with comparisons.journal(path) as journal:
            self._left = list(unrated(pairs, name, journal))
        self.saved = self.skipped = 0
        widgets = _ipywidgets()
        self._question, self._progress = widgets.HTML(), widgets.HTML()
        self._answers = widgets.HTML(), widgets.HTML()
        self.buttons: dict[Choice, Any] = {}
        for choice, label in LABELS.items():
            self.buttons[choice] = button = widgets.Button(description=label)
            button.on_click(lambda _, choice=choice: self.choose(choice))
        rows = [self._question, widgets.GridBox(self._answers, layout={"grid_template_columns": "1fr 1fr"})]
        self.widget = widgets.VBox([*rows, widgets.HBox(list(self.buttons.values())), self._progress])
        self._show()

    @property
    def pair(self) -> Pair | None:
        """What is asked now; None at the end."""
        return self._left[0] if self._left else None

    def choose(self, choice: Choice) -> None:
        """Save a choice and show the next pair; a pair that is skipped is not saved, and comes again next time.

        Raises DataError where another process is writing into the file; the same pair is then asked again."""
        if self.pair is None:
            return
        if choice == "skip":
            self.skipped += 1
        else:
            with comparisons.journal(self.path) as journal:
                if next(unrated([self.pair], self.name, journal), None):  # or it was rated elsewhere meanwhile
                    journal.append(comparison(self.pair, choice, self.name))
                    self.saved += 1
        self._left.pop(0)
        self._show()

    def _show(self) -> None:
        pair = self.pair
        self._question.value = f"<b>{_html(as_text(pair.prompt))}</b>" if pair else "<b>That was the last pair.</b>"
        for box, label, text in zip(self._answers, "12", (pair.left, pair.right) if pair else ("", ""), strict=True):
            box.value = f"<b>{label}</b><br>{_html(text)}" if pair else ""
        for button in self.buttons.values():
            button.disabled = pair is None
        where = _html(os.fspath(self.path))
        self._progress.value = f"{self.saved:,} saved in {where}, {self.skipped:,} skipped, {len(self._left):,} to go"


def rate_in_notebook(pairs: Iterable[Pair], path: str | os.PathLike[str], name: str = "person") -> RatingPanel:
    """Show a panel of buttons for the pairs that `name` has not rated yet in the file at `path`.

    Raises DataError for a file of anything else, or one that another process is writing; ImportError without
    ipywidgets."""
    panel = RatingPanel(pairs, path, name)
    from IPython.display import display

    display(panel.widget)
    return panel


def _html(text: str) -> str:
    """As text: an answer may hold tags, and what cannot be seen is written out."""
    return f'<span style="white-space: pre-wrap">{escape(visible(text))}</span>'


def _ipywidgets() -> Any:
    try:
        import ipywidgets
    except ModuleNotFoundError:
        raise ImportError(
            "ipywidgets is not installed: pip install 'minift[notebook]', or rate in a terminal, `minift rate`"
        ) from None
    return ipywidgets
