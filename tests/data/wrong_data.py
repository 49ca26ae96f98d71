"""Ways to prepare data wrongly, most of them once found in real trainers. Each runs without complaint."""

from __future__ import annotations

import hashlib
from itertools import pairwise

import numpy as np

from minift.data import batches, templates
from minift.data.batches import IGNORE_INDEX, PADDING, Batch
from minift.data.split import is_held_out


def _relabel(example, tokenizer, template, max_length, change):
    tokens, labels = templates.encode_example(example, tokenizer, template)
    tokens, labels = change(tokens.copy(), labels.copy())
    return tokens[:max_length], labels[:max_length]


class Labels:
    """Instead of `encode_example`."""

    def shifted_here_and_again_in_the_loss(example, tokenizer, template=None, max_length=None):
        return _relabel(example, tokenizer, template, max_length, lambda t, y: (t, np.append(y[1:], -100)))

    def prompt_too(example, tokenizer, template=None, max_length=None):
        return _relabel(example, tokenizer, template, max_length, lambda t, y: (t, t.copy()))

    def every_eos_ignored(example, tokenizer, template=None, max_length=None):
        """Padding = eos and "ignore all padding tokens": the model never learns to stop (trl #1623)."""
        ignore = lambda t, y: (t, np.where(t == tokenizer.eos_token_id, -100, y))  # noqa: E731
        return _relabel(example, tokenizer, template, max_length, ignore)

    def last_answer_only(example, tokenizer, template=None, max_length=None):
        def change(t, y):
            learned = y != -100
            ends = np.flatnonzero(learned & ~np.append(learned[1:], False))
            if len(ends) > 1:
                y[: ends[-2] + 1] = -100
            return t, y

        return _relabel(example, tokenizer, template, max_length, change)

    def white_space_after_the_end(example, tokenizer, template=None, max_length=None):
        def change(t, y):
            after = np.append(False, (y[:-1] == tokenizer.eos_token_id)) & (y == -100)
            return t, np.where(after, t, y)

        return _relabel(example, tokenizer, template, max_length, change)

    def tokenized_in_pieces(example, tokenizer, template=None, max_length=None):
        """Prompt and answer apart: pairs that merge across the border are not what the model will read."""
        if example.text:
            return templates.encode_example(example, tokenizer, template, max_length)
        text, spans = templates.answer_spans(example.messages, templates.CHATML)
        borders = [0, *(b for span in spans for b in span), len(text)]
        tokens, labels = [], []
        for number, (start, end) in enumerate(pairwise(borders)):
            ids = tokenizer.encode(text[start:end])
            tokens += ids
            labels += ids if number % 2 else [IGNORE_INDEX] * len(ids)
        return np.array(tokens, np.int32)[:max_length], np.array(labels, np.int32)[:max_length]

    def token_across_the_border_is_learned(example, tokenizer, template=None, max_length=None):
        if example.text:
            return templates.encode_example(example, tokenizer, template, max_length)
        text, spans = templates.answer_spans(example.messages, templates.CHATML)
        ids, offsets = tokenizer.encode_with_offsets(text)
        tokens = np.array(ids, np.int32)
        inside = [any(s < end and e > start for start, end in spans) for s, e in offsets]
        return tokens[:max_length], np.where(inside, tokens, -100)[:max_length]

    def text_without_its_end(example, tokenizer, template=None, max_length=None):
        tokens, labels = templates.encode_example(example, tokenizer, template, max_length)
        return (tokens[:-1], labels[:-1]) if example.text else (tokens, labels)

    def cut_at_the_beginning(example, tokenizer, template=None, max_length=None):
        return _relabel(
            example, tokenizer, template, None, lambda t, y: (t[-(max_length or 0) :], y[-(max_length or 0) :])
        )


class Padding:
    """Instead of `pad`."""

    def padding_learned(examples, length=None, multiple_of=1, pad_id=0):
        batch = batches.pad(examples, length, multiple_of, pad_id)
        outside = np.arange(batch.tokens.shape[1]) >= batch.lengths[:, None]
        return Batch(batch.tokens, np.where(outside, pad_id, batch.labels), batch.lengths)

    def every_token_like_padding_ignored(examples, length=None, multiple_of=1, pad_id=0):
        batch = batches.pad(examples, length, multiple_of, pad_id)
        return Batch(batch.tokens, np.where(batch.tokens == pad_id, -100, batch.labels), batch.lengths)

    def on_the_left(examples, length=None, multiple_of=1, pad_id=0):
        batch = batches.pad(examples, length, multiple_of, pad_id)
        width = batch.tokens.shape[1]
        turn = [np.roll(np.arange(width), width - n) for n in batch.lengths]
        return Batch(np.take_along_axis(batch.tokens, np.array(turn), 1), batch.labels, batch.lengths)

    def lengths_of_the_rectangle(examples, length=None, multiple_of=1, pad_id=0):
        batch = batches.pad(examples, length, multiple_of, pad_id)
        return Batch(batch.tokens, batch.labels, np.full_like(batch.lengths, batch.tokens.shape[1]))

    def last_token_lost(examples, length=None, multiple_of=1, pad_id=0):
        return batches.pad(
            [(t[:-1], y[:-1]) if len(t) > 1 else (t, y) for t, y in examples], length, multiple_of, pad_id
        )

    def sorted_by_length(examples, length=None, multiple_of=1, pad_id=0):
        return batches.pad(sorted(examples, key=lambda e: len(e[0])), length, multiple_of, pad_id)


class Packing:
    """Instead of `pack`."""

    def one_segment_a_row(examples, length, pad_id=0):
        batch = batches.pack(examples, length, pad_id)
        return Batch(batch.tokens, batch.labels, batch.lengths, np.where(batch.segments == PADDING, PADDING, 0))

    def first_label_of_a_segment_counts(examples, length, pad_id=0):
        batch = batches.pack(examples, length, pad_id)
        first = (np.diff(batch.segments, axis=1, prepend=PADDING) != 0) & (batch.segments > 0)
        return Batch(batch.tokens, np.where(first, batch.tokens, batch.labels), batch.lengths, batch.segments)

    def segment_numbers_reused(examples, length, pad_id=0):
        """0, 1, 0: the third example sees the first."""
        batch = batches.pack(examples, length, pad_id)
        numbers = np.where(batch.segments == PADDING, PADDING, batch.segments % 2)
        return Batch(batch.tokens, batch.labels, batch.lengths, numbers)

    def padding_in_the_last_segment(examples, length, pad_id=0):
        batch = batches.pack(examples, length, pad_id)
        segments = np.where(batch.segments == PADDING, batch.segments.max(1, keepdims=True), batch.segments)
        return Batch(batch.tokens, batch.labels, batch.lengths, segments)

    def wrapped(examples, length, pad_id=0):
        """All in one long stream, cut into rows: examples lose their beginnings."""
        tokens = np.concatenate([t for t, _ in examples])
        labels = np.concatenate([y for _, y in examples])
        pieces = [(tokens[i : i + length], labels[i : i + length]) for i in range(0, len(tokens), length)]
        return batches.pack(pieces, length, pad_id)

    def what_does_not_fit_the_last_row_is_lost(examples, length, pad_id=0):
        batch = batches.pack(examples, length, pad_id)
        full = batch.lengths > length // 2
        return batch.take(np.flatnonzero(full)) if full.any() else batch


class Order:
    """Instead of `batch_indices`."""

    def with_replacement(n, batch_size, seed, step):
        return np.random.default_rng([seed, step]).integers(0, n, batch_size)

    def new_permutation_each_step(n, batch_size, seed, step):
        return np.resize(np.random.default_rng([seed, step]).permutation(n), batch_size)

    def every_epoch_the_same(n, batch_size, seed, step):
        where = np.arange(step * batch_size, (step + 1) * batch_size) % n
        return np.random.default_rng(seed).permutation(n)[where]

    def not_shuffled(n, batch_size, seed, step):
        return np.arange(step * batch_size, (step + 1) * batch_size) % n

    def seed_ignored(n, batch_size, seed, step):
        return batches.batch_indices(n, batch_size, 0, step)

    def end_of_an_epoch_dropped(n, batch_size, seed, step):
        per_epoch = max(n // batch_size, 1)
        order = np.random.default_rng([seed, step // per_epoch]).permutation(n)
        return np.resize(order, max(n, batch_size))[step % per_epoch * batch_size :][:batch_size]

    def short_batch_at_the_end_of_an_epoch(n, batch_size, seed, step):
        per_epoch = -(-n // batch_size)
        order = np.random.default_rng([seed, step // per_epoch]).permutation(n)
        return order[step % per_epoch * batch_size :][:batch_size]

    def next_from_a_generator(n, batch_size, seed, step):
        """State: a resumed run starts its order anew."""
        rng = Order._generators.setdefault((n, batch_size, seed), np.random.default_rng(seed))
        return rng.permutation(max(n, batch_size))[:batch_size] % n

    _generators: dict = {}  # noqa: RUF012


class Split:
    """Instead of `train_and_held_out`."""

    def _sides(examples, held_out):
        examples = list(examples)
        return [e for e in examples if not held_out(e)], [e for e in examples if held_out(e)]

    def by_question(examples, other_training_text=(), share=0.1):
        return Split._sides(examples, lambda e: is_held_out(e.messages[0].content, share))

    def by_hash_alone(examples, other_training_text=(), share=0.1):
        return Split._sides(examples, lambda e: is_held_out(e.answer, share))

    def by_exact_text(examples, other_training_text=(), share=0.1):
        first = lambda e: int(hashlib.sha256(e.answer.encode()).hexdigest()[:16], 16)  # noqa: E731
        return Split._sides(examples, lambda e: first(e) < share * 2**64)

    def last_tenth(examples, other_training_text=(), share=0.1):
        examples = list(examples)
        cut = round(len(examples) * (1 - share))
        return examples[:cut], examples[cut:]

    def every_tenth(examples, other_training_text=(), share=0.1):
        examples = list(examples)
        return [e for i, e in enumerate(examples) if i % 10], examples[::10]

    def everything_in_training(examples, other_training_text=(), share=0.1):
        examples = list(examples)
        return examples, [e for e in examples if is_held_out(e.answer, share)]

    def nothing_held_out(examples, other_training_text=(), share=0.1):
        return list(examples), []
