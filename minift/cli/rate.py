"""`minift rate`: compare answers two by two."""

from __future__ import annotations

import os
import sys
import termios
import tty
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich.columns import Columns
from rich.panel import Panel
from rich.text import Text

from minift.cli.common import answer, console, emit, load_with_adapter
from minift.cli.policy import digest
from minift.data import candidates, comparisons
from minift.data.candidates import Candidates
from minift.data.comparisons import Comparison, as_text
from minift.data.example import Message
from minift.data.journal import Journal
from minift.data.stdlib_docs import embedded
from minift.io import load_tokenizer
from minift.models import module_of
from minift.models.generation import check_settings
from minift.rlhf.raters import Choice, FunctionRater, Pair, Rater, RubricRater, agreement, pairs, rate, visible
from minift.rlhf.rubric import gold
from minift.train.loop import at_least

KEYS: dict[str, Choice | Literal["quit"]] = {"1": "first", "2": "second", "t": "tie", "s": "skip", "q": "quit"}


class Quit(Exception):
    """The person wants to stop for today."""


@dataclass
class Rate:
    """Compare answers two by two: 1 the left one, 2 the right one, t a tie, s skip, q quit.

    Each choice is saved at once, in TRL's preference format, and the same command goes on where you stopped; what was
    skipped comes again. Left and right are shuffled, so that a habit of preferring one side can be seen.

    minift rate --adapter runs/finetune/adapter      answers that the model gives now
    minift rate answers.jsonl                        {"prompt": "2 + 2?", "answers": ["4", "5"]} a line, all pairs of it
    """

    answers: Annotated[Path | None, tyro.conf.Positional] = None
    """A JSONL file of questions with their answers. Without one, a model answers questions of the built-in set."""
    model: str = "tiny"
    """tiny (built in), a Hugging Face folder (Llama or GPT-2), or a .gguf file."""
    adapter: Path | None = None
    """An adapter folder, such as runs/finetune/adapter."""
    questions: int = 20
    """How many questions of the built-in set the model answers, drawn from the training side."""
    answers_each: int = 2
    """Answers to each question; of more than two, all pairs are compared."""
    max_new_tokens: int = 48
    """Longest answer, in tokens."""
    temperature: float = 1.0
    """1 samples from the model's own distribution; lower, and more answers are equal."""
    rater: Literal["person", "rubric"] = "person"
    """person: you. rubric: the built-in rubric of one-line docstrings, without asking anybody."""
    name: str | None = None
    """Who rates, as it is saved; by default person or rubric. Each name rates each pair once."""
    disagreement: float = 0.1
    """Share of the pairs on which the rubric prefers the worse answer, as people disagree."""
    agreement: bool = False
    """Show in how many pairs you and the rubric, without disagreement, prefer the same answer."""
    seed: int = 0
    """Decides the questions, the answers, left and right, and where the rubric errs."""
    out: Path = Path("runs/rate")
    """Where comparisons.jsonl, answers.jsonl (those sampled) and summary.json go."""
    json: bool = False
    """Print the summary as one JSON object on the last line."""

    def run(self) -> int:
        at_least(1, questions=self.questions)
        at_least(2, answers_each=self.answers_each)
        check_settings(self.max_new_tokens, self.temperature)
        if self.temperature == 0 and self.answers is None:
            raise ValueError("temperature is 0, which gives the same answer every time; needed more, such as 1")
        rater = Person() if self.rater == "person" else RubricRater(self.disagreement, self.seed)
        shown = [pair for found in self._candidates() for pair in pairs(found.prompt, found.answers, self.seed)]
        if not shown:
            raise ValueError("all answers to each question are equal, so there is nothing to compare")
        if self.rater == "rubric" or self.agreement:
            for pair in shown:
                gold(as_text(pair.prompt), "")  # complains now about a question that the rubric is not for
        with comparisons.journal(self.out / "comparisons.jsonl") as journal:
            counts, stopped = self._rate(shown, rater, journal)
            summary = self._summary(shown, journal, counts)
        self._show(summary)
        emit(summary, self.json, self.out)
        return 130 if stopped else 0

    @property
    def _name(self) -> str:
        rubric = f"rubric, disagreement {self.disagreement:g}, seed {self.seed}"  # another one says other things
        return self.name or ("person" if self.rater == "person" else rubric)

    def _rate(self, shown: list[Pair], rater: Rater, journal: Journal[Comparison]) -> tuple[Counter[Choice], bool]:
        """How often each choice was made, and whether Ctrl-C ended it."""
        counts: Counter[Choice] = Counter()
        console.print(self._progress(shown, journal))
        try:
            for _, choice in rate(shown, rater, self._name, journal):
                counts[choice] += 1
                if self.rater == "person":
                    console.print(self._progress(shown, journal))
        except (Quit, EOFError):
            pass
        except KeyboardInterrupt:
            return counts, True
        return counts, False

    def _progress(self, shown: list[Pair], journal: Journal[Comparison]) -> str:
        said = self._said(shown, journal)
        text = f"{len(said):,} of {len(set(map(_key, shown))):,} pairs rated"
        if self.agreement:
            text += "; the rubric prefers the same answer in {} of {}".format(*agreement(said, FunctionRater(gold)))
        return text

    def _said(self, shown: list[Pair], journal: Journal[Comparison]) -> list[Comparison]:
        """What this rater has said, now or earlier, of these pairs."""
        keys = set(map(_key, shown))
        return [
            c
            for c in journal.entries
            if c.rater == self._name and (c.prompt, frozenset((c.chosen, c.rejected))) in keys
        ]

    def _candidates(self) -> list[Candidates]:
        return candidates.read(self.answers) if self.answers is not None else self._sample()

    def _sample(self) -> list[Candidates]:
        """Answers of the model to questions of the training side: those in --out, and as many more as are missing.

        Each question has its own generator, so that sampling can stop after any of them."""
        source = {
            "model": self.model,
            "adapter": None if self.adapter is None else f"{self.adapter}, sha256 {digest(self.adapter)}",
            "temperature": self.temperature,
            "max_new_tokens": self.max_new_tokens,
            "seed": self.seed,
        }
        train = embedded().train_pairs
        chosen = np.random.default_rng(self.seed).permutation(len(train))[: self.questions]
        with candidates.journal(self.out / "answers.jsonl") as journal:
            for number, found in enumerate(journal.entries, 1):
                if found.source != source or len(found.answers) != self.answers_each:
                    raise ValueError(
                        f"{journal.path}, line {number}: found {len(found.answers)} answers of {found.source}, needed "
                        f"{self.answers_each} of {source}; give another --out, or rate {journal.path} as a file"
                    )
            missing = range(len(journal.entries), len(chosen))
            if missing:
                config, params = load_with_adapter(self.model, self.adapter)
                tokenizer, ready = load_tokenizer(self.model), module_of(config).fuse(params)
            for i in missing:
                messages, rng = train[chosen[i]].messages[:1], np.random.default_rng([self.seed, i])
                texts = tuple(
                    "".join(
                        answer(ready, config, tokenizer, messages, self.max_new_tokens, self.temperature, rng)
                    ).strip()
                    for _ in range(self.answers_each)
                )
                journal.append(Candidates(messages, texts, source))
                if (i + 1) % 100 == 0:
                    console.print(f"{i + 1:,} of {len(chosen):,} questions answered")
            return journal.entries[: len(chosen)]

    def _summary(self, shown: list[Pair], journal: Journal[Comparison], counts: Counter[Choice]) -> dict[str, Any]:
        said = self._said(shown, journal)
        preferred = [c for c in said if not c.tie]
        summary = {
            "comparisons": str(journal.path),
            "rater": self._name,
            "pairs": len(set(map(_key, shown))),
            "rated": len(said),
            "rated_now": counts.total() - counts["skip"],
            "ties": len(said) - len(preferred),
            "skipped": counts["skip"],
            "left_share": sum(c.side == "left" for c in preferred) / len(preferred) if preferred else None,
        }
        if self.agreement:
            same, of = agreement(said, FunctionRater(gold))
            summary["rubric_agreement"] = same / of if of else None
        return summary

    def _show(self, summary: dict[str, Any]) -> None:
        console.print(f"{summary['rated']:,} of {summary['pairs']:,} pairs rated, {summary['ties']:,} of them ties")
        if summary["left_share"] is not None:
            console.print(f"the left answer was preferred in {summary['left_share']:.0%}; without a habit, about 50%")
        if summary.get("rubric_agreement") is not None:
            console.print(f"the rubric prefers the same answer in {summary['rubric_agreement']:.0%}")
        console.print(f"saved: {summary['comparisons']}")


def _key(pair: Pair) -> tuple[tuple[Message, ...], frozenset[str]]:
    return pair.prompt, frozenset((pair.left, pair.right))


class Person:
    """A rater that shows two answers side by side and asks. For buttons in a notebook see `minift.notebook`.

    Raises Quit, and EOFError where there is nobody to ask any more."""

    def __call__(self, prompt: str, a: str, b: str) -> Choice:
        width = max(30, console.width // 2 - 2)
        boxes = [Panel(Text(visible(text)), title=key, width=width) for key, text in (("1", a), ("2", b))]
        console.print(Text(f"\n{visible(prompt)}", style="bold"))
        console.print(Columns(boxes, padding=(0, 1)), soft_wrap=False)
        while (said := KEYS.get(_pressed("1 left, 2 right, t tie, s skip, q quit: "))) is None:
            console.print("needed one of 1, 2, t, s, q")
        if said == "quit":
            raise Quit
        return said


def _pressed(prompt: str) -> str:
    """One key where there is a terminal, or else the first letter of a line."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return input(prompt).strip().lower()[:1]
    print(prompt, end="", flush=True)
    handle = sys.stdin.fileno()
    before = termios.tcgetattr(handle)
    try:
        tty.setcbreak(handle, termios.TCSADRAIN)  # keys as they come, also early ones; Ctrl-C still interrupts
        pressed = os.read(handle, 1)
    finally:
        termios.tcsetattr(handle, termios.TCSADRAIN, before)
    if pressed in (b"", b"\x04"):
        raise EOFError
    key = pressed.decode("latin-1").lower()
    print(key if key.isprintable() else "")
    return key
