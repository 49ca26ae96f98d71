"""Questions about topics: they say what stands in their answers, and what is held out is not learned from."""

from minift.data import topics
from minift.data.split import normalize
from minift.data.stdlib_docs import embedded
from minift.data.words import content_words, stem


def asked(example_or_prompt):
    """The two topics of a question."""
    messages = getattr(example_or_prompt, "messages", example_or_prompt)
    one, other = messages[0].content.removeprefix("Write a docstring about ").removesuffix(".").split(" and ")
    return one, other


def test_topics_are_words_of_many_docstrings():
    found = topics.topics()
    assert 25 < len(found) < 80 and list(found) == sorted(set(found))
    assert len({stem(topic) for topic in found}) == len(found)
    answers = [set(map(stem, content_words(e.answer))) for e in embedded().train_pairs]
    for topic in found:
        assert sum(stem(topic) in words for words in answers) >= topics.OFTEN


def test_an_answer_is_about_the_topics_of_its_question():
    for side in topics.topic_pairs():
        assert len(side) > 150
        for example in side:
            words = set(map(stem, content_words(example.answer)))
            assert {stem(topic) for topic in asked(example)} <= words


def test_nothing_that_is_held_out_is_learned_from():
    learn, held_out = topics.topic_pairs()
    answers = {normalize(e.answer) for e in learn}
    assert answers <= {normalize(e.answer) for e in embedded().train_pairs}
    assert not answers & {normalize(e.answer) for e in held_out}
    to_learn, to_measure = topics.questions()
    measured = {frozenset(asked(prompt)) for prompt in to_measure}
    assert not measured & {frozenset(asked(prompt)) for prompt in to_learn}
    assert not measured & {frozenset(asked(e)) for e in learn}


def test_every_pair_of_topics_is_asked_about_in_both_orders():
    n, sides = len(topics.topics()), topics.questions()
    assert sum(map(len, sides)) == n * (n - 1)
    for side in sides:
        found = set(map(asked, side))
        assert len(found) == len(side) and found == {(other, one) for one, other in found}
    assert 0.1 < len(sides[1]) / (n * (n - 1)) < 0.3
