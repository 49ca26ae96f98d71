"""A written rubric for one-line docstrings (PEP 257), and its score without noise: the gold score.

The questions are those of the embedded set, "What does `math.isqrt` do?", or those of `data.topics`, "Write a docstring
about file and path.", and the answer is to be a docstring's first line. The rubric has six items, each in [0, 1], read
off the question and the answer alone:

    about         names the thing asked for: how much of `isqrt` stands in the answer, or which of the two topics
    specific      and does not name everything else as well
    says          says something of it: content words beyond the thing's own, two or more for the full mark
    imperative    begins with a verb in the imperative ("Return", not "Returns"), where the thing is one that *does*
    sentence      is one sentence that ends in a period
    line          fits on a line of 72 characters (PEP 8)

    gold = about · specific · says · (1 + imperative + sentence + line) / 4                                        (1)

The first three are factors, not summands. If items are added up, a policy finds the one well-formed sentence that
answers every question alike, and stays there. In (1) the best form in the world is worth nothing where the answer is
not about the thing, and an answer that is about it keeps a quarter of its worth without any form.

What `about` sees. The last part of the name is split at "_" and at capitals (`set_childWatcher`: child, watcher), words
that names and docstrings use for everything ("get", "return", "object") do not count, and of each word left it is
measured how many of its letters are found in the answer, by three rules: a word of the same stem ("parse": "parsing"),
a longer word that the part abbreviates ("dir": "directory"), a word inside a part that is written together ("isfinite":
"finite"). What the last part leaves open, the part before it (the class, the module) can half fill. Of two topics each
is half of what is asked.

What `specific` is for. "Error: read a file type." names a little of everything. How much a word names on average over
all questions q of a kind is its commonness c(w), and an answer a with the set of content words W(a) has

    m(a) = Σ_{w ∈ W(a)} c(w),     c(w) = mean_q about(q, {w}),     specific(a) = max(0, 1 - m(a) / BUDGET)         (2)

`about` is subadditive in the words, so mean_q about(q, a) ≤ m(a), and whoever gives *one* answer to all questions gets

    mean_q gold(q, a) ≤ m (1 - m / BUDGET) ≤ BUDGET / 4                                                            (3)

however it is worded and however long it is: 0.015 where names are asked for; 0.05 of topics, which are few, so that
every answer names more of them.

What it cannot see. Whether the answer is *true*: "Return the finite part of a number." does as well as the truth does.
What is said in other words: "Change the access permissions of a file." names nothing of `chmod`. Grammar, and nonsense
made of words. A policy can learn to put the name into a template, and only its answers, read by a person, will show it.
It reads English in Latin letters only. The docstring that the question was made from is not consulted, so the score can
be had for any question, and nothing of what is held out leaks through it.

How real first lines fare (`python -c "from minift.rlhf import rubric; print(rubric.real_docstrings())"`, Python 3.11,
the mean of each item; "shuffled" gives each question the answer to another one):

                          about   specific       says imperative   sentence       line       gold   names it
    what it does          0.681      0.716      0.864      0.810      0.999      0.868      0.351      0.773
    what it is            0.721      0.711      0.882      1.000      0.998      0.877      0.404      0.801
    both                  0.691      0.714      0.869      0.856      0.999      0.870      0.364      0.780
    both shuffled         0.015      0.714      0.991      0.724      0.999      0.870      0.007      0.016
    topics                1.000      0.639      0.931      0.719      1.000      0.764      0.514      1.000
    topics shuffled       0.106      0.639      0.998      0.719      1.000      0.764      0.055      0.190
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np

from minift.data import topics
from minift.data.docstrings import SENTENCE_END
from minift.data.stdlib_docs import instruction_pairs
from minift.data.words import IGNORED, WORD, content_words, stem

LINE = 72  # characters: PEP 8 for docstrings
ENOUGH = 2  # content words beyond the thing's own say something
BUDGET = 0.06  # of commonness; 1.0 % of real first lines have more
TOPICS_BUDGET = 0.2  # of commonness

_NAME = re.compile(r"`([^`\s]+)`")
_TOPICS = re.compile(r"\babout ([a-z]+) and ([a-z]+)\.$")
_DOES = re.compile(r"\bdoes\b")
# What docstrings of functions begin with, in the base form.
_IMPERATIVES = """
    abort accept access acquire activate adapt add adjust advance align allocate allow announce append apply arrange
    ask assert assign associate attach attempt authenticate await begin bind block break bring build byte-compile
    cache calculate call cancel capture cast change check choose clean clear clone close collapse collect combine
    commit compare compile complete compose compress compute concatenate configure connect construct consume convert
    copy count create deallocate decide decode decompress decrease decrement decrypt define delay delegate delete
    deliver dequeue derive describe deserialize detach detect determine disable disassemble discard disconnect
    dispatch display divide do download draw drop dump duplicate emit empty enable encode encrypt end enqueue ensure
    enter enumerate escape establish estimate evaluate examine exchange execute exit expand expect export extend
    extract fail feed fetch fill filter find finish fire flatten flush fold follow force fork format free freeze
    gather generate get give go grow guess handle hash hide hook identify ignore import increase increment indent
    indicate initialize initiate inquire insert inspect install instantiate interact interpret interrupt invalidate
    invert invoke isolate issue iterate join jump keep kill launch leave let link list listen load locate lock log
    look lookup make map mark match measure merge minimize modify move multiply name negate normalize notify obtain
    open optimize order override pack pad paint parse partition pass pause perform permit permute pickle place play
    poll pop populate post predict prefix prepare prevent print process produce prompt propagate protect provide
    publish pull purge push put query quit quote raise rank reach read rebuild recalculate receive recompute
    reconfigure record recover redirect reduce reformat refresh register reject release reload remove rename render
    reopen repeat replace reply report represent request require reserve reset resize resolve respond restart
    restore restrict resume retrieve retry return reverse revert roll rotate round run sample save scan schedule
    scroll seal search seed seek select send separate serialize serve set setup shift show shuffle shut shutdown
    signal simulate skip sleep slice solve sort spawn specify split start stop store stream strip submit subscribe
    substitute subtract sum summarize suppress suspend swap switch synchronize take tear tell terminate test tidy
    time toggle tokenize touch trace track transfer transform translate transmit traverse trim truncate try turn
    unblock undo unfreeze unify unlink unload unlock unpack unquote unregister unsubscribe unwrap update upgrade
    upload use validate verify visit wait wake walk warn watch wrap write yield zip
"""
_VERBS = frozenset(_IMPERATIVES.split())


@dataclass(frozen=True)
class Items:
    """What the rubric says of one answer, item by item, each in [0, 1]; `gold` is equation (1)."""

    about: float
    specific: float
    says: float
    imperative: float
    sentence: float
    line: float

    @property
    def gold(self) -> float:
        return self.about * self.specific * self.says * (1 + self.imperative + self.sentence + self.line) / 4

    @property
    def names_it(self) -> bool:
        """Whether at least half of the thing asked for is named."""
        return self.about >= 0.5


def gold(prompt: str, answer: str) -> float:
    """The score of an answer, in [0, 1], by equation (1), without noise.

    It judges; nothing is trained on it but through a rater's comparisons. Raises ValueError as `items` does."""
    return items(prompt, answer).gold


def items(prompt: str, answer: str) -> Items:
    """The items of the rubric for one answer.

    Raises ValueError for a prompt that asks for no `name` in backticks: the rubric has nothing to say of it."""
    asked = _asked(prompt)
    text = answer.strip()
    words = content_words(text)
    return Items(
        about=_about(asked, words),
        specific=max(0.0, 1 - sum(_commonness(word, asked.of_topics) for word in words) / asked.budget),
        says=min(1.0, len(_new(asked, words)) / ENOUGH),
        imperative=float(not asked.does or _is_imperative(text)),
        sentence=float(text.endswith(".") and not text.endswith("..") and len(SENTENCE_END.split(text)) == 1),
        line=float(0 < len(text) <= LINE and len(text.splitlines()) == 1),
    )


# --- is it about the thing, and does it say something of it -----------------------------------------------------------


def _about_names() -> list[str]:
    return [example.messages[0].content for example in instruction_pairs()]


def _about_topics() -> list[str]:
    return [prompt[0].content for side in topics.questions() for prompt in side]


@dataclass(frozen=True)
class _Asked:
    """The words of the name's last part, of the part before it, of all parts; and whether it is to *do* something.

    Of a question about topics: the topics."""

    last: tuple[str, ...]
    before: tuple[str, ...]
    all: tuple[str, ...]
    does: bool
    of_topics: bool = False

    @property
    def budget(self) -> float:
        return TOPICS_BUDGET if self.of_topics else BUDGET


@lru_cache(maxsize=8192)
def _asked(prompt: str) -> _Asked:
    if about := _TOPICS.search(prompt):
        return _Asked(about.groups(), (), about.groups(), True, of_topics=True)
    names = _NAME.findall(prompt)
    if not names:
        raise ValueError(
            'the rubric judges answers to questions about a `name` in backticks, or "about one topic and another.", '
            f"got {prompt[:100]!r}; use another rater for other questions"
        )
    before, last = ["", *names[-1].rstrip(".()").split(".")][-2:]
    return _Asked(_parts(last), _parts(before), _parts(names[-1]), bool(_DOES.search(prompt)))


def _parts(name: str) -> tuple[str, ...]:
    """The words of a name without those that say nothing, unless it has no other."""
    words = tuple(word.lower() for word in WORD.findall(name))
    return tuple(word for word in words if word not in IGNORED) or words


def _about(asked: _Asked, words: Iterable[str]) -> float:
    """The share of the last part that is named; of what it leaves open, the part before can fill half."""
    last, before = _named(asked.last, words), _named(asked.before, words)
    return last + (1 - last) * before / 2


def _named(parts: Sequence[str], words: Iterable[str]) -> float:
    """Of how much of each part the words cover, in letters, the mean; 0 where there are none."""
    covered = (set().union(*(_cover(part, word) for word in words)) for part in parts)
    return sum(len(letters) / len(part) for letters, part in zip(covered, parts, strict=True)) / max(1, len(parts))


@lru_cache(maxsize=1 << 17)
def _cover(part: str, word: str) -> frozenset[int]:
    """Which letters of a part of a name a word accounts for."""
    cut = stem(word)
    if cut == stem(part) or (len(part) >= 3 and word.startswith(part)):  # parse: parsing; dir: directory
        return frozenset(range(len(part)))
    inside = word if word in part else cut
    if len(inside) >= 4 or (len(inside) == 3 and (part.startswith(inside) or part.endswith(inside))):
        at = part.find(inside)  # isfinite: finite
        return frozenset(range(at, at + len(inside))) if at >= 0 else frozenset()
    return frozenset()


def _new(asked: _Asked, words: Iterable[str]) -> set[str]:
    """The stems of the words that are not the thing's own."""
    return {stem(word) for word in words if not any(_cover(part, word) for part in asked.all) and len(word) > 1}


@lru_cache(maxsize=1 << 15)
def _commonness(word: str, of_topics: bool) -> float:
    """c(w) of equation (2): how much of what is asked this word names, on average over all questions of a kind."""
    questions, asking = _pool(of_topics)
    cut = stem(word)
    could = {q for part, found in asking.items() if cut in part or word.startswith(part) for q in found}
    return sum(_about(questions[q], (word,)) for q in could) / len(questions)


@cache
def _pool(of_topics: bool) -> tuple[list[_Asked], dict[str, list[int]]]:
    """What all questions of a kind ask for, and which of them ask for a word."""
    questions = [_asked(prompt) for prompt in (_about_topics() if of_topics else _about_names())]
    asking: dict[str, list[int]] = {}
    for q, asked in enumerate(questions):
        for part in {*asked.last, *asked.before}:
            asking.setdefault(part, []).append(q)
    return questions, asking


# --- form -------------------------------------------------------------------------------------------------------------


def _is_imperative(text: str) -> bool:
    """Whether it begins with a verb of the list, or with an adverb and such a verb ("Recursively delete")."""
    words = [word.strip(",;:.").lower() for word in text.split()[:2]]
    return bool(words) and (words[0] in _VERBS or (words[0].endswith("ly") and words[-1] in _VERBS))


# --- how others fare --------------------------------------------------------------------------------------------------


def table(answers: Mapping[str, Sequence[tuple[str, str]]]) -> str:
    """For each named list of (prompt, answer): the mean of each item and of gold, and the share that names the thing.

    Text, a row a list."""
    columns = ("about", "specific", "says", "imperative", "sentence", "line", "gold")
    lines = [" " * 16 + "".join(f"{name:>11}" for name in (*columns, "names it"))]
    for name, pairs in answers.items():
        found = [items(prompt, answer) for prompt, answer in pairs]
        means = [sum(getattr(item, column) for item in found) / len(found) for column in columns]
        named = sum(item.names_it for item in found) / len(found)
        lines.append(f"{name:<16}" + "".join(f"{mean:11.3f}" for mean in (*means, named)))
    return "\n".join(lines)


def real_docstrings() -> str:
    """`table` for the embedded set's own answers, and for the same answers dealt out at random."""
    pairs, about_topics = (
        [(example.messages[0].content, example.answer) for example in found]
        for found in (instruction_pairs(), [e for side in topics.topic_pairs() for e in side])
    )
    return table(
        {
            "what it does": [pair for pair in pairs if _asked(pair[0]).does],
            "what it is": [pair for pair in pairs if not _asked(pair[0]).does],
            "both": pairs,
            "both shuffled": _shuffled(pairs),
            "topics": about_topics,
            "topics shuffled": _shuffled(about_topics),
        }
    )


def _shuffled(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    dealt = np.random.default_rng(0).permutation(len(pairs))
    return [(prompt, pairs[other][1]) for (prompt, _), other in zip(pairs, dealt, strict=True)]
