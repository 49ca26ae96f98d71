"""What every gold score and every rater must do: properties that a wrong one fails.

A score is `f(prompt, answer)`, a rater's maker `make(disagreement, seed)`.
"""

import math
from functools import cache

import numpy as np

from minift.data import topics
from minift.data.stdlib_docs import embedded, instruction_pairs
from minift.rlhf.rubric import BUDGET, TOPICS_BUDGET

FINITE = "What does `math.isfinite` do?"

# Each line: worse, better. One item of the rubric changes.
MONOTONE = [
    ("Tell whether a number is prime.", "Tell whether a number is finite."),  # about
    ("Check finite.", "Check finite numbers."),  # says: half, all
    ("Finite.", "Tell finite."),  # says, imperative
    ("Tells whether a number is finite.", "Tell whether a number is finite."),  # imperative
    ("A test whether a number is finite.", "Test whether a number is finite."),
    ("Tell whether a number is finite", "Tell whether a number is finite."),  # sentence
    ("Tell whether a number is finite...", "Tell whether a number is finite."),
    ("Tell whether a number is finite. It may be.", "Tell whether a number is finite, as it may be."),
    ("Tell whether a number is\nfinite.", "Tell whether a number is finite."),  # line
    ("Tell whether a number is finite, and do it for all of those that are, or are not, so.", "Tell finite numbers."),
    ("Tell file error type whether a number is finite.", "Tell whether a number is finite."),  # specific
]

# One answer to everything, the last ones by the greediest search over words that are often asked for.
COLLAPSED = [
    "Return the current process.",
    "Return a new object.",
    "Guess the extension for a file based on its MIME type.",
    "Read the file type or error.",
    "Return error fileinput read math type handler parser loader connect os formatweekday.",
    "Error get.",
]


def hacks(prompt: str) -> list[str]:
    """Answers that have the name in them and nothing to say."""
    name = prompt.split("`")[1]
    last = name.rpartition(".")[2]
    return [
        "",
        ".",
        f"{last}.",
        f"Return {last}.",
        prompt,
        f"{name} does {name}.",
        f"Return the {last} of the given object.",
        f"Return {' '.join([last.replace('_', ' ')] * 8)}.",
        f"The function `{name}` does what {last} does.",
        f"{name}() is what you call.",
    ]


@cache
def held_out() -> list[tuple[str, str]]:
    return [(e.messages[0].content, e.answer) for e in embedded().held_out_pairs]


def mean(score, pairs) -> float:
    return sum(score(prompt, answer) for prompt, answer in pairs) / len(pairs)


def is_monotone_in_each_item(score):
    for worse, better in MONOTONE:
        assert score(FINITE, worse) < score(FINITE, better), (worse, better)


def collapse_is_bounded(score):
    """By equation (3) of the rubric, for the questions that it holds for: all of them."""
    everything = [example.messages[0].content for example in instruction_pairs()]
    words = sorted({w for p in everything for w in p.split("`")[1].replace(".", " ").replace("_", " ").split()})
    for answer in [*COLLAPSED[2:], " ".join(words[::150]) + "."]:
        got = mean(score, [(prompt, answer) for prompt in everything])
        assert got <= BUDGET / 4 + 1e-12, f"{answer[:80]!r} for everything gets {got:.4f}"
    about_topics = [prompt[0].content for side in topics.questions() for prompt in side]
    for answer in ["Read a file of text.", " ".join(topics.topics()[::9]) + ".", " ".join(topics.topics()[:8]) + "."]:
        got = mean(score, [(prompt, answer) for prompt in about_topics])
        assert got <= TOPICS_BUDGET / 4 + 1e-12, f"{answer[:80]!r} for all topics gets {got:.4f}"


def collapse_is_worth_less_than_mediocrity(score):
    """One answer to all that is held out, against two poor policies that are about the thing, if not always."""
    formless = mean(score, [(p, f"x\n{a.rstrip('.')}") for p, a in held_out()])  # the truth, badly written
    dealt = np.random.default_rng(0).permutation(len(held_out()))
    seldom = [
        (p, held_out()[i][1] if n % 6 else a) for (p, a), n, i in zip(held_out(), range(10**6), dealt, strict=False)
    ]
    mediocre = min(formless, mean(score, seldom))
    for answer in [*COLLAPSED, held_out()[0][1]]:
        there = mean(score, [(prompt, answer) for prompt, _ in held_out()])
        assert there < mediocre, f"{answer[:80]!r} gets {there:.4f}, mediocrity {mediocre:.4f}"


def hacks_are_worth_little(score):
    real = mean(score, held_out())
    for number in range(len(hacks(FINITE))):
        got = mean(score, [(prompt, hacks(prompt)[number]) for prompt, _ in held_out()])
        assert got < 0.1 * real, f"{hacks(FINITE)[number]!r} gets {got:.4f}, real docstrings {real:.4f}"


def tells_real_from_shuffled(score):
    dealt = np.roll(np.arange(len(held_out())), 7)
    shuffled = [(p, held_out()[i][1]) for (p, _), i in zip(held_out(), dealt, strict=True)]
    assert mean(score, held_out()) > 10 * mean(score, shuffled)


# --- raters -----------------------------------------------------------------------------------------------------------


@cache
def clear_pairs() -> list[tuple[str, str, str]]:
    """Questions with a better and a worse answer, of which the better is first in half."""
    better, worse = "Tell {} from numbers.", "Tells a story."
    found = []
    for i in range(2000):
        name = "x" + "".join(
            letters[i // 10**k % 10] for k, letters in enumerate(("abcdefghij", "klmnopqrst", "uvwxyzabcd", "ef"))
        )
        a, b = better.format(name), worse
        found.append((f"What does `m.{name}` do?", *((a, b) if i % 2 else (b, a))))
    return found


def _choices(rater):
    return [rater(*pair) for pair in clear_pairs()]


def _wrong(choices):
    """Which of the pairs were answered with the worse answer."""
    assert set(choices) <= {"first", "second"}
    return np.array([(choice == "first") != (i % 2 == 1) for i, choice in enumerate(choices)])


def disagrees_on_the_chosen_share(make):
    """Hoeffding (1963): of n independent coins the share differs from p by more than ε with 2 exp(-2 n ε²) = 1e-9."""
    n = len(clear_pairs())
    within = math.sqrt(math.log(2e9) / (2 * n))
    for p in (0.0, 0.1, 0.3, 1.0):
        wrong = _wrong(_choices(make(p, 0)))
        assert abs(wrong.mean() - p) <= (within if 0 < p < 1 else 0)
        for half in (wrong[::2], wrong[1::2]):  # wherever the better one stands
            assert abs(half.mean() - p) <= (within * math.sqrt(2) if 0 < p < 1 else 0)


def seeds_disagree_independently(make):
    n, p = len(clear_pairs()), 0.3
    one, other = (_wrong(_choices(make(p, seed))) for seed in (1, 2))
    assert abs((one != other).mean() - 2 * p * (1 - p)) <= math.sqrt(math.log(2e9) / (2 * n))


def says_the_same_again(make):
    """In another order, of exchanged answers, and from a rater made anew."""
    rater, some = make(0.3, 0), clear_pairs()[:400]
    before = [rater(*pair) for pair in some]
    assert [rater(*pair) for pair in reversed(some)] == before[::-1]
    assert [make(0.3, 0)(*pair) for pair in some] == before
    exchanged = {"first": "second", "second": "first"}
    assert [exchanged[rater(prompt, b, a)] for prompt, a, b in some] == before


def ties_stay_ties(make):
    for i in range(200):
        assert make(0.5, 0)(FINITE, f"Be number {i}.", f"Is number {i + 1}") == "tie"
