"""Padding and packing keep every token, label and position; the order of the data is a pure function of the step."""

import numpy as np
import pytest
from data_properties import encoded, examples_of, order_is_a_stream_of_epochs, packing_preserves, padding_preserves
from hypothesis import given
from hypothesis import strategies as st

from minift.data.batches import batch_indices, chunks, count_labels, first_fit_decreasing, pack, pad


def test_padding_preserves_every_example():
    padding_preserves(pad)


def test_packing_preserves_every_example():
    packing_preserves(pack)


def test_order_is_a_stream_of_epochs():
    order_is_a_stream_of_epochs(batch_indices)


@given(examples_of, st.integers(12, 40))
def test_padded_packed_and_split_batches_count_the_same_labels(examples, length):
    by_hand = sum(int(label) != -100 for _, labels in examples for label in labels[1:])
    assert count_labels(pad(examples)) == count_labels(pack(examples, length)) == by_hand
    assert sum(count_labels(pad([e])) for e in examples) == by_hand  # micro-batches of one


def test_the_loss_does_not_see_how_a_batch_is_filled():
    """A model whose attention stays in its segment: here, log p(label | the segment's tokens so far) from a hash."""

    def loss(batch):
        total = 0.0
        for row in range(len(batch.tokens)):
            for t in range(batch.tokens.shape[1] - 1):
                label = int(batch.labels[row, t + 1])
                if label == -100:
                    continue
                segments = np.zeros(batch.tokens.shape[1], int) if batch.segments is None else batch.segments[row]
                seen = [int(k) for k in batch.tokens[row, : t + 1][segments[: t + 1] == segments[t]]]
                total += (hash((tuple(seen), label)) % 1000) / 1000
        return total / count_labels(batch)

    @given(st.lists(encoded(), min_size=1, max_size=8).filter(lambda e: any((y[1:] != -100).any() for _, y in e)))
    def check(examples):
        losses = [loss(pad(examples)), loss(pad(examples, length=20, pad_id=3)), loss(pack(examples, 25))]
        assert np.ptp(losses) < 1e-12  # sums of at most 100 terms under 1, in another order

    check()


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 50))
def test_first_fit_decreasing(lengths, capacity):
    bins = first_fit_decreasing(lengths, capacity)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    fill = [sum(lengths[i] for i in b) for b in bins]
    assert all(f <= capacity for f in fill)
    assert len(bins) <= 2 * sum(lengths) / capacity + 1  # two bins at most half full would have been one
    slow = []  # the definition, item by item
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for b in slow:
            if sum(lengths[j] for j in b) + lengths[i] <= capacity:
                b.append(i)
                break
        else:
            slow.append([i])
    assert bins == slow


def test_packing_known_answer():
    a, b, c = (np.array(t, np.int32) for t in ([5, 6], [7, 8, 9], [4]))
    batch = pack([(a, a), (b, b), (c, c)], 4, pad_id=99)
    assert batch.tokens.tolist() == [[7, 8, 9, 4], [5, 6, 99, 99]]
    assert batch.labels.tolist() == [[-100, 8, 9, -100], [-100, 6, -100, -100]]
    assert batch.segments.tolist() == [[0, 0, 0, 1], [0, 0, -1, -1]]
    assert batch.lengths.tolist() == [4, 2]
    assert count_labels(batch) == 3
    one = batch.take(np.array([1]))
    assert one.tokens.tolist() == [[5, 6, 99, 99]] and one.segments.tolist() == [[0, 0, -1, -1]]


@given(st.integers(0, 60), st.integers(2, 20))
def test_chunks_predict_every_token_but_the_first_once(n, length):
    ids = np.arange(n, dtype=np.int64)
    pieces = chunks(ids, length)
    assert all(2 <= len(t) <= length for t, _ in pieces)
    assert [int(y) for _, labels in pieces for y in labels if y != -100] == list(range(1, n))
    for tokens, labels in pieces:
        assert labels[0] == -100 and (labels[1:] == tokens[1:]).all() and (np.diff(tokens) == 1).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pad([]), "at least one example"),
        (lambda: pack([], 4), "at least one example"),
        (lambda: pad([(np.zeros(0, np.int32), np.zeros(0, np.int32))]), "example 0 has 0 tokens"),
        (lambda: pad([(np.zeros(2, np.int32), np.zeros(3, np.int32))]), "2 tokens and 3 labels"),
        (lambda: pad([(np.zeros(5, np.int32),) * 2], length=4), "example 0 has 5 tokens, more than length=4"),
        (lambda: pack([(np.zeros(5, np.int32),) * 2], 4), "example 0 has 5 tokens, more than length=4"),
        (lambda: batch_indices(0, 1, 0, 0), "n=0"),
        (lambda: batch_indices(3, 1, 0, -1), "step=-1"),
        (lambda: chunks([1, 2, 3], 1), "length is 1"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_padding_does_not_touch_the_examples():
    tokens = np.array([1, 2, 3], np.int32)
    tokens.setflags(write=False)
    pad([(tokens, tokens)])
    pack([(tokens, tokens)], 5)
    chunks(tokens, 2)
