"""Ways to judge answers wrongly. Each gives numbers between 0 and 1, or choices, without complaint."""

import random

from minift.data.words import content_words
from minift.rlhf.raters import FunctionRater, RubricRater, coin
from minift.rlhf.rubric import gold, items


class Scores:
    """Instead of `gold`."""

    def items_added_up(prompt, answer):
        """The trap: form alone is worth two thirds."""
        i = items(prompt, answer)
        return (i.about + i.specific + i.says + i.imperative + i.sentence + i.line) / 6

    def relevance_a_large_summand(prompt, answer):
        i = items(prompt, answer)
        return 0.7 * i.about * i.specific * i.says + 0.1 * (i.imperative + i.sentence + i.line)

    def not_specific(prompt, answer):
        i = items(prompt, answer)
        return i.about * i.says * (1 + i.imperative + i.sentence + i.line) / 4

    def naming_is_enough(prompt, answer):
        i = items(prompt, answer)
        return i.about * i.specific * (1 + i.imperative + i.sentence + i.line) / 4

    def form_decides_all(prompt, answer):
        i = items(prompt, answer)
        return i.about * i.specific * i.says * i.imperative * i.sentence * i.line

    def without_the_mood(prompt, answer):
        i = items(prompt, answer)
        return i.about * i.specific * i.says * (2 + i.sentence + i.line) / 4

    def any_end_will_do(prompt, answer):
        i = items(prompt, answer)
        return i.about * i.specific * i.says * (2 + i.imperative + i.line) / 4

    def as_long_as_it_likes(prompt, answer):
        i = items(prompt, answer)
        return i.about * i.specific * i.says * (2 + i.imperative + i.sentence) / 4

    def says_counts_the_name(prompt, answer):
        i = items(prompt, answer)
        says = min(1, len(content_words(answer)) / 2)
        return i.about * i.specific * says * (1 + i.imperative + i.sentence + i.line) / 4

    def words_of_the_question(prompt, answer):
        """How many words of the answer stand in the question."""
        asked, said = (set(text.lower().split()) for text in (prompt, answer))
        return len(asked & said) / max(1, len(said))


class Raters:
    """Instead of `RubricRater`."""

    class RandomStream(RubricRater):
        """Another answer each time it is asked."""

        def __init__(self, disagreement, seed):
            super().__init__(disagreement, seed)
            self._random = random.Random(seed)

        def __call__(self, prompt, a, b):
            choice = FunctionRater(gold)(prompt, a, b)
            flip = choice != "tie" and self._random.random() < self.disagreement
            return {"first": "second", "second": "first"}[choice] if flip else choice

    class ChoosesAtRandomInstead(RubricRater):
        """A coin toss on a share of the pairs is right half of the time."""

        def __call__(self, prompt, a, b):
            if coin(self.seed, prompt, a, b) < self.disagreement:
                return "first" if (coin(self.seed + 1, prompt, a, b) < 0.5) == (a < b) else "second"
            return FunctionRater(gold)(prompt, a, b)

    class PairInOrder(RubricRater):
        """The coin depends on which answer comes first."""

        def __call__(self, prompt, a, b):
            choice = FunctionRater(gold)(prompt, a, b)
            flip = choice != "tie" and coin(self.seed, prompt + a, a, b) < self.disagreement
            return {"first": "second", "second": "first"}[choice] if flip else choice

    class WithoutSeed(RubricRater):
        def __init__(self, disagreement, seed):
            super().__init__(disagreement, 0)

    class SeedOfTheProcess(RubricRater):
        """A new one in every process, or as here, in every rater."""

        def __init__(self, disagreement, seed):
            super().__init__(disagreement, random.SystemRandom().randrange(2**60))

    class FirstOfATie(RubricRater):
        def __call__(self, prompt, a, b):
            choice = super().__call__(prompt, a, b)
            return "first" if choice == "tie" else choice

    class NeverErrs(RubricRater):
        def __init__(self, disagreement, seed):
            super().__init__(0.0, seed)

    class LikesTheLeft(RubricRater):
        """What it errs on is given to the first answer."""

        def __call__(self, prompt, a, b):
            choice = FunctionRater(gold)(prompt, a, b)
            return "first" if coin(self.seed, prompt, a, b) < self.disagreement else choice
