"""What any padding, packing, order, labeling and split must satisfy, as functions of the implementation.

`test_batches`, `test_templates` and `test_split` hold minift's own against these; `test_wrong_data` shows that each
rejects the mistakes that people make."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from minift.data.example import Example, Message, pair

LABEL = st.booleans()


@st.composite
def encoded(draw, longest: int = 12):
    """Tokens from a few values, 0 among them, so that padding cannot be told from text by its token."""
    tokens = draw(st.lists(st.integers(0, 3), min_size=1, max_size=longest))
    learned = draw(st.lists(LABEL, min_size=len(tokens), max_size=len(tokens)))
    tokens = np.array(tokens, np.int32)
    return tokens, np.where(learned, tokens, np.int32(-100))


examples_of = st.lists(encoded(), min_size=1, max_size=12)


def texts(examples) -> Counter:
    """What must be learned: of each example its tokens, and the labels after its first token."""
    return Counter((tuple(t.tolist()), tuple(y.tolist())[1:]) for t, y in examples)


def texts_in(batch) -> Counter:
    """The same, read back from a batch, token by token."""
    found = []
    for row in range(len(batch.tokens)):
        length = int(batch.lengths[row])
        segments = np.zeros(length, int) if batch.segments is None else batch.segments[row, :length]
        assert (segments >= 0).all(), "padding among the tokens"
        borders = [0, *(np.flatnonzero(np.diff(segments)) + 1).tolist(), length]
        numbers = [int(segments[start]) for start in borders[:-1]]
        assert len(numbers) == len(set(numbers)), "two examples in one segment number see each other"
        for start, end in pairwise(borders):
            tokens, labels = batch.tokens[row, start:end].tolist(), batch.labels[row, start:end].tolist()
            assert labels[0] == -100, "the first token of an example is predicted from another example or from nothing"
            found.append((tuple(tokens), tuple(labels[1:])))
        assert (batch.labels[row, length:] == -100).all(), "padding is learned"
        if batch.segments is not None:
            assert not np.isin(batch.segments[row, length:], segments).any(), "padding belongs to a segment"
    return Counter(found)


def padding_preserves(pad) -> None:
    @given(examples_of, st.integers(1, 8), st.integers(0, 3))
    def check(examples, multiple, pad_id):
        batch = pad(examples, multiple_of=multiple, pad_id=pad_id)
        longest = max(len(t) for t, _ in examples)
        assert longest <= batch.tokens.shape[1] < longest + multiple and batch.tokens.shape[1] % multiple == 0
        assert batch.segments is None
        assert [r[:n].tolist() for r, n in zip(batch.tokens, batch.lengths, strict=True)] == [
            t.tolist() for t, _ in examples
        ]
        assert (batch.tokens[np.arange(batch.tokens.shape[1]) >= batch.lengths[:, None]] == pad_id).all()
        assert texts_in(batch) == texts(examples)

    check()


def packing_preserves(pack) -> None:
    @given(examples_of, st.integers(12, 30), st.integers(0, 3))
    def check(examples, length, pad_id):
        batch = pack(examples, length, pad_id=pad_id)
        assert batch.tokens.shape[1] == length
        assert texts_in(batch) == texts(examples)

    check()


def order_is_a_stream_of_epochs(batch_indices) -> None:
    """Every epoch holds each index once, batches flow over its end, and a step's batch depends on nothing before."""

    @given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 2**32), st.integers(1, 4))
    def check(n, batch_size, seed, epochs):
        steps = -(-n * epochs // batch_size)
        batches = [batch_indices(n, batch_size, seed, step) for step in range(steps)]
        assert all(len(b) == batch_size for b in batches), "a short batch"
        stream = np.concatenate(batches)[: n * epochs].reshape(epochs, n)
        assert (np.sort(stream, axis=1) == np.arange(n)).all(), "an epoch that leaves out or repeats an example"
        for step in reversed(range(steps)):  # resumed at any step, in any order
            assert (batch_indices(n, batch_size, seed, step) == batches[step]).all()

    check()
    first = np.concatenate([batch_indices(1000, 100, 0, step) for step in range(20)]).reshape(2, 1000)
    assert (first[0] != first[1]).any(), "every epoch has the same order"
    assert (first[0] != np.arange(1000)).any(), "not shuffled"
    assert (batch_indices(1000, 100, 1, 0) != first[0, :100]).any(), "the seed changes nothing"


# What people write: plain, with blanks and line breaks at the ends, in other scripts, looking like a role.
contents = st.one_of(
    st.sampled_from(
        ["4", "yes", " yes", "two words", "\nline", "line\n", "a\n\nb", "user", "assistant", "é", "😀", "?!"]
    ),
    st.text(st.sampled_from("ab c\nöß1?"), min_size=1, max_size=12).filter(str.strip),
)


@st.composite
def conversations(draw) -> tuple[Message, ...]:
    """A system message or none, then user and assistant in turn; the last word is the assistant's."""
    system = [Message("system", draw(contents))] if draw(st.booleans()) else []
    turns = [
        [Message("user", draw(contents)), Message("assistant", draw(contents))] for _ in range(draw(st.integers(1, 3)))
    ]
    return tuple(system + [message for turn in turns for message in turn])


def chatml_learned(messages) -> tuple[str, list[bool]]:
    """ChatML written out by hand, and for each character whether it is to be learned."""
    pieces = []
    for m in messages:
        answer = m.role == "assistant"
        pieces += [(f"<|im_start|>{m.role}\n", False), (f"{m.content}<|im_end|>", answer), ("\n", False)]
    return "".join(p for p, _ in pieces), [learned for p, learned in pieces for _ in p]


def answers_are_labeled(encode_example, tokenizer) -> None:
    """Exactly the tokens that lie in an answer or end it are labeled, each with itself; in plain text all are."""

    @given(conversations())
    def check_conversation(messages):
        tokens, labels = encode_example(Example(messages), tokenizer)
        text, learned = chatml_learned(messages)
        ids, offsets = tokenizer.encode_with_offsets(text)
        assert tokens.tolist() == ids
        expected = [i if all(learned[s:e]) else -100 for i, (s, e) in zip(ids, offsets, strict=True)]
        assert labels.tolist() == expected
        ends = [i for i, label in zip(ids, labels.tolist(), strict=True) if i == tokenizer.eos_token_id == label]
        assert len(ends) == sum(m.role == "assistant" for m in messages), "the end of an answer is not learned"

    @given(contents)
    def check_text(text):
        tokens, labels = encode_example(Example(text=text), tokenizer)
        assert tokens.tolist() == labels.tolist() == [*tokenizer.encode(text), tokenizer.eos_token_id]

    @given(conversations(), st.integers(2, 40))
    def check_truncation(messages, max_length):
        whole = encode_example(Example(messages), tokenizer)
        for cut, full in zip(encode_example(Example(messages), tokenizer, max_length=max_length), whole, strict=True):
            assert cut.tolist() == full.tolist()[:max_length]

    check_conversation()
    check_text()
    check_truncation()


def words(text: str) -> str:
    """The answer as a reader compares it; written apart from `split.normalize` on purpose."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def held_out_is_unseen(train_and_held_out) -> None:
    """No held-out answer, as words, stands in the training side; sides are fixed and lose only leaks."""
    word = st.sampled_from(["get", "set", "the", "value", "Value", "a", "x."])
    answer = st.lists(word, min_size=1, max_size=4).map(" ".join)
    sets = st.lists(st.tuples(st.sampled_from(["q", "get the value?", "r"]), answer), max_size=30)

    @given(sets, st.sampled_from([0.1, 0.5]), st.randoms())
    def check(pairs, share, random):
        examples = [pair(question, answer) for question, answer in pairs]
        train, held_out = train_and_held_out(examples, share=share)
        for h in held_out:
            for e in train:
                for message in e.messages:
                    assert f" {words(h.answer)} " not in f" {words(message.content)} ", (h, e)
        assert not set(train) & set(held_out)
        assert set(train) | set(held_out) <= set(examples)
        shuffled = random.sample(examples, len(examples))
        again = train_and_held_out(shuffled, share=share)
        assert (Counter(again[0]), Counter(again[1])) == (Counter(train), Counter(held_out)), "depends on the order"
        more = train_and_held_out([*examples, pair("new", "something else")], share=share)
        assert set(train) <= set(more[0]), "another example moves an old one to the other side"

    check()
    many = [pair(f"question {i}", f"answer number {i} of many") for i in range(3000)]
    for share in (0.1, 0.5):
        n = len(train_and_held_out(many, share=share)[1])
        assert abs(n - 3000 * share) < 5 * (3000 * share * (1 - share)) ** 0.5, n  # five standard deviations
    for example in many[:200]:  # no question decides
        sides = {bool(train_and_held_out([pair(q, example.answer)])[1]) for q in ("a?", "b?", "c?", "d?", "e?", "f?")}
        assert len(sides) == 1, "one answer on both sides"
