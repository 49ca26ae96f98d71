"""Docstrings by topic: a set of questions that even a small model learns to answer to the point.

    "Write a docstring about file and path."     "Return the path of the file that holds the entry."

To say what `math.isqrt` does one must know it, and to copy an unknown name a model needs more layers than the built-in
one has. A topic is one of some forty words, each of which stands in at least `OFTEN` docstrings of the training side;
an answer is about it if a form of the word stands in it. The pairs are made of the same docstrings as the embedded set,
with topics that stand in them. Like it, they are fixed by the Python that runs.

Two things are held out, since there are two things to learn. The answers of the embedded set that are held out appear
in no training text here either. And of all pairs of topics a fifth is never asked in training: `questions` gives them
apart, to measure a policy on.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from functools import cache
from itertools import permutations

from minift.data.example import Example, Message, pair
from minift.data.split import is_held_out
from minift.data.stdlib_docs import embedded
from minift.data.words import content_words, stem

OFTEN = 60  # docstrings in which a word stands that is a topic
TO_MEASURE = 0.2  # share of the pairs of topics
EACH = 4  # questions that are made of one docstring, at most

# Said of many things, and about none of them.
_NO_TOPICS = """
    true false none otherwise like self first two base representation description argument implement abstract provide
    contain support single create raised named result object return value type
"""


@cache
def topics() -> tuple[str, ...]:
    """The topics in order, each in its most frequent form."""
    docstrings, forms = Counter[str](), Counter[str]()
    for example in embedded().train_pairs:
        words = {word for word in content_words(example.answer) if len(word) > 2}
        docstrings.update(set(map(stem, words)))
        forms.update(words)
    ignored = set(map(stem, _NO_TOPICS.split()))
    often = {name for name, count in docstrings.items() if count >= OFTEN} - ignored
    first = {stem(word): word for word, _ in sorted(forms.items(), key=lambda form: (form[1], form[0]))}
    return tuple(sorted(first[name] for name in often))


def question(one: str, other: str) -> str:
    return f"Write a docstring about {one} and {other}."


@cache
def topic_pairs() -> tuple[list[Example], list[Example]]:
    """(to learn from, held out): up to `EACH` questions about each docstring that has two topics or more.

    Held-out docstrings stand in no example that is learned from, nor are pairs of topics that are asked to measure."""
    found = embedded()
    learn = [e for example in found.train_pairs for e in _examples(example.answer, asked_in_training=True)]
    return learn, [e for example in found.held_out_pairs for e in _examples(example.answer)]


def _examples(answer: str, asked_in_training: bool = False) -> list[Example]:
    stems = set(map(stem, content_words(answer)))
    there = [topic for topic in topics() if stem(topic) in stems]
    asked = [two for two in permutations(there, 2) if not (asked_in_training and _to_measure(*two))]
    asked.sort(key=lambda two: hashlib.sha256(" ".join((*two, answer)).encode()).digest())
    return [pair(question(*two), answer) for two in asked[:EACH]]


@cache
def questions() -> tuple[list[tuple[Message, ...]], list[tuple[Message, ...]]]:
    """(to learn from, to measure on): a question about every pair of topics in either order, whether a docstring has
    both or not."""
    sides: tuple[list[tuple[Message, ...]], list[tuple[Message, ...]]] = ([], [])
    for two in permutations(topics(), 2):
        sides[_to_measure(*two)].append((Message("user", question(*two)),))
    return sides


def _to_measure(one: str, other: str) -> bool:
    return is_held_out(" ".join(sorted((one, other))), TO_MEASURE)
