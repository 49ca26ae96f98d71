"""From logits to text: distributions against a loop, sampling against uniform numbers, a cache against none."""

import functools
import inspect
import math

import numpy as np
import pytest
import wrong_generation
from hypothesis import assume, given
from hypothesis import strategies as st

from minift.conformance.bounds import gamma
from minift.models import generation, llama
from minift.models.generation import choose, probabilities, sample
from nn import checks

CONFIG = llama.Config(19, 12, 20, 2, 4, 2, 6, rope_theta=100.0)

# --- probabilities(logits, temperature, top_k, top_p) -----------------------------------------------------------------

# seed, batch, vocab, temperature, top_k, top_p; kind
CASES = [
    (1, 3, 7, 0.7, None, None, "normal"),
    (2, 2, 9, 1.3, 3, None, "normal"),
    (3, 2, 9, 1.0, None, 0.6, "normal"),
    (4, 3, 12, 2.5, 5, 0.8, "normal"),
    (5, 2, 8, 0.5, 3, None, "ties"),
    (6, 2, 8, 1.0, None, 0.5, "equal"),  # 1/8 each, summed exactly: half of them are kept
    (7, 2, 8, 1.0, 4, 0.5, "equal"),
    (8, 2, 6, 1.0, None, 1e-9, "normal"),
    (9, 2, 6, 0.01, 4, 0.9, "large"),
    (10, 2, 5, 1.0, 50, 1.0, "normal"),
    (11, 1, 1, 1.7, 1, 0.3, "normal"),
]


def make(case):
    seed, batch, vocab, *_, kind = case
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((batch, vocab)) * (100 if kind == "large" else 2)
    if kind == "ties":
        logits = np.rint(logits)
    return 0 * logits if kind == "equal" else logits


def one_row_at_a_time(row, temperature, top_k, top_p):
    """The distribution by a loop, and how far its nearest decision is from going the other way."""
    top = max(row)
    weights = [math.exp((x - top) / temperature) for x in row]
    ranked = sorted(range(len(row)), key=lambda i: (-row[i], i))[:top_k]
    total = math.fsum(weights[i] for i in ranked)
    kept, before, margin = [], [], 1.0
    for i in ranked:
        share = math.fsum(before)
        if top_p is not None:
            margin = min(margin, abs(share - top_p)) if kept else margin
            if kept and share >= top_p:
                break
        kept.append(i)
        before.append(weights[i] / total)
    total = math.fsum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(row))], margin


def is_the_loops(op, case):
    logits = make(case)
    found = op(logits, *case[3:6])
    assert found.dtype == np.float64
    for b, row in enumerate(logits.tolist()):
        exact, _ = one_row_at_a_time(row, *case[3:6])
        # x / T rounds by u |x| / T twice over, two exponentials and two sums
        spread = max(row) - min(row) + max(map(abs, row))
        relative = gamma(4 * len(row) + 40 + 4 * spread / case[3], np.float64)
        for i, p in enumerate(exact):
            assert (found[b, i] == 0) == (p == 0), f"row {b}: token {i} has {found[b, i]}, needed {p}"
            assert abs(found[b, i] - p) <= relative * p, f"row {b}: token {i} has {found[b, i]}, needed {p}"


def sums_to_one_and_keeps_the_order(op, case):
    logits = make(case)
    found = op(logits, *case[3:6])
    assert (np.abs(found.sum(-1) - 1) <= gamma(logits.shape[-1] + 2, np.float64)).all()
    for row, p in zip(logits, found, strict=True):
        kept = p > 0
        assert kept[row.argmax()]
        assert case[4] is None or kept.sum() <= case[4]
        assert row[kept].min() >= row[~kept].max(initial=-np.inf)


def the_logits_are_unchanged(op, case):
    logits = make(case)
    before = logits.tobytes()
    first = op(logits, *case[3:6])
    assert logits.tobytes() == before
    checks.same_bits(op(logits, *case[3:6]), first, "a second call")


def refuses_settings_outside(op, case):
    logits = make(case)
    for top_k, top_p in ((0, None), (-1, None), (None, 0.0), (None, 1.5), (None, -0.1)):
        try:
            op(logits, 1.0, top_k, top_p)
        except ValueError as error:
            assert "top_k" in str(error) or "top_p" in str(error)
        else:
            raise AssertionError(f"top_k={top_k}, top_p={top_p} was accepted")


PROPERTIES = (is_the_loops, sums_to_one_and_keeps_the_order, the_logits_are_unchanged, refuses_settings_outside)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("holds", PROPERTIES)
def test_probabilities(holds, case):
    holds(probabilities, case)


def test_probabilities_kill_matrix():
    checks.kill_matrix(PROPERTIES, wrong_generation.PROBABILITIES, CASES)


@given(
    st.tuples(
        st.integers(0, 9999),
        st.integers(1, 3),
        st.integers(1, 40),
        st.floats(0.05, 5),
        st.one_of(st.none(), st.integers(1, 45)),
        st.one_of(st.none(), st.floats(0.01, 1)),
        st.sampled_from(("normal", "ties")),
    )
)
def test_any_settings(case):
    """Where a sum comes within rounding of top_p, either decision is right."""
    assume(all(one_row_at_a_time(row, *case[3:6])[1] > 1e-12 for row in make(case).tolist()))
    for holds in (is_the_loops, sums_to_one_and_keeps_the_order):
        holds(probabilities, case)


def test_the_errors_say_what_they_got():
    for settings, message in (
        ({"top_k": 0}, "top_k is 0, needed at least 1"),
        ({"top_p": 1.5}, r"top_p is 1\.5, needed 0 <"),
    ):
        with pytest.raises(ValueError, match=message):
            probabilities(np.zeros((1, 3)), **settings)
        with pytest.raises(ValueError, match=message):  # also where they would not be used
            choose(np.zeros((1, 3)), **settings)
    with pytest.raises(ValueError, match="max_new_tokens is -1, needed 0 or more"):
        next(generation.stream(lambda text, lengths: np.zeros((1, 3)), np.zeros((1, 2), np.int64), -1))


def test_float32_logits_are_tempered_in_float64(rng):
    logits = rng.standard_normal((2, 9)).astype(np.float32)
    checks.same_bits(probabilities(logits, 0.3), probabilities(logits.astype(np.float64), 0.3), "p")


# --- sample(p, rng) and choose ----------------------------------------------------------------------------------------


def drawn(case):
    rng = np.random.default_rng(case)
    p = rng.random((200, 6)) * (rng.random((200, 6)) < 0.6)
    p[:, 3] += 1e-3
    return p


def first_whose_sum_exceeds(op, case):
    """One uniform number a row, in order; the weights need not sum to one."""
    p = drawn(case)
    found = op(p, np.random.default_rng(case))
    assert found.shape == (200,)
    for row, u, token in zip(p.tolist(), np.random.default_rng(case).random(200).tolist(), found.tolist(), strict=True):
        sums = np.cumsum(row)
        expected = next(i for i, s in enumerate(sums) if s > u * sums[-1])
        assert token == expected, f"{row} at {u}: {token}, needed {expected}"


def never_what_is_impossible(op, case):
    """A probability of exactly zero, also where the uniform number is exactly zero."""
    p = drawn(case)
    assert (p[np.arange(200), op(p, np.random.default_rng(case))] > 0).all()

    class Zero:
        def random(self, shape):
            return np.zeros(shape)

    ends = np.array([[0, 0, 0.4, 0.6, 0, 0]])
    assert op(ends, Zero()).tolist() == [2]

    class AlmostOne:
        def random(self, shape):
            return np.full(shape, 1 - 2.0**-53)

    assert op(ends, AlmostOne()).tolist() == [3]
    assert op(ends / 3, AlmostOne()).tolist() == [3]


def shares_are_the_probabilities(op, case):
    """Of 20,000 draws: each share within six standard deviations of its probability."""
    p = np.array([0.1, 0.0, 0.55, 0.05, 0.3])
    n = 20_000
    found = np.bincount(op(np.tile(p, (n, 1)), np.random.default_rng(case)), minlength=5) / n
    assert (np.abs(found - p) <= 6 * np.sqrt(p * (1 - p) / n)).all()


SAMPLE_PROPERTIES = (first_whose_sum_exceeds, never_what_is_impossible, shares_are_the_probabilities)


@pytest.mark.parametrize("case", [1, 2])
@pytest.mark.parametrize("holds", SAMPLE_PROPERTIES)
def test_sample(holds, case):
    if holds is never_what_is_impossible:
        holds(inspect.unwrap(sample), case)  # the generators that return 0 and almost 1 are no np.random.Generator
    else:
        holds(sample, case)


def test_sample_kill_matrix():
    checks.kill_matrix(SAMPLE_PROPERTIES, wrong_generation.SAMPLE, (1, 2))


def test_choose(rng):
    logits = rng.standard_normal((50, 7))
    logits[3] = 1.0
    assert choose(logits).tolist() == [row.index(max(row)) for row in logits.tolist()]  # greedy; of equals, the first
    assert choose(logits)[3] == 0
    one, two = np.random.default_rng(5), np.random.default_rng(5)
    found = choose(logits, 0.7, one, 4, 0.9)
    assert found.tolist() == sample(probabilities(logits, 0.7, 4, 0.9), two).tolist()
    assert choose(logits, 1.0, rng, top_k=1).tolist() == choose(logits).tolist()
    assert choose(logits, 1e-3, rng).tolist()[4:] == choose(logits).tolist()[4:]  # cold is greedy
    with pytest.raises(ValueError, match=r"temperature is -1\.0, needed 0 \(greedy\) or more"):
        choose(logits, -1.0, rng)
    with pytest.raises(ValueError, match=r"needs rng=np\.random\.default_rng"):
        choose(logits, 0.5)


# --- generate ---------------------------------------------------------------------------------------------------------


def model(seed):
    """Far from its initial values, so that texts do not repeat one token; float64, so that no two logits tie."""
    return parameters(seed), np.random.default_rng(seed)


@functools.cache
def parameters(seed):
    rng = np.random.default_rng([seed, 1])
    return {name: 0.7 * rng.standard_normal(shape) for name, shape in llama.shapes(CONFIG).items()}


def without_a_cache(params, prompt, n, prefix=None):
    """Greedy, one text, the whole of it read again for every token."""
    text = list(prompt)
    for _ in range(n):
        text.append(int(wrong_generation.last_logits(params, text, CONFIG, prefix).argmax()))
    return text[len(prompt) :]


def greedy_is_repeated_forward(op, case):
    params, rng = model(case)
    tokens = rng.integers(0, 19, (3, 4))
    found = op(params, tokens, CONFIG, 7)
    assert found.dtype == tokens.dtype
    assert np.array_equal(found[:, :4], tokens)
    for row, prompt in zip(found.tolist(), tokens.tolist(), strict=True):
        assert row[4:] == without_a_cache(params, prompt, 7)


def a_ragged_batch_is_each_prompt_alone(op, case):
    """Right-padded with anything; the new tokens stand in the last columns."""
    params, rng = model(case)
    tokens, lengths = rng.integers(0, 19, (4, 5)), np.array([5, 1, 3, 4])
    for padding in (0, 18):
        padded = np.where(np.arange(5) < lengths[:, None], tokens, padding)
        found = op(params, padded, CONFIG, 6, lengths=lengths)
        assert np.array_equal(found[:, :5], padded)
        for row, prompt, n in zip(found.tolist(), tokens.tolist(), lengths, strict=True):
            assert row[5:] == without_a_cache(params, prompt[:n], 6)


def behind_a_prefix(op, case):
    params, rng = model(case)
    tokens, prefix = rng.integers(0, 19, (2, 3)), 2 * rng.standard_normal((2, 2, 2, 3, 6))
    found = op(params, tokens, CONFIG, 5, prefix=prefix)
    for row, prompt in zip(found.tolist(), tokens.tolist(), strict=True):
        assert row[3:] == without_a_cache(params, prompt, 5, prefix)


def stops_and_repeats(op, case):
    """A row that has stopped repeats its stop token; when all have, the text ends."""
    params, rng = model(case)
    tokens = rng.integers(0, 19, (3, 4))
    free = [without_a_cache(params, prompt, 9) for prompt in tokens.tolist()]
    stops = {free[0][2], free[1][5]}
    ends = [next((i for i, t in enumerate(row) if t in stops), None) for row in free]
    found = op(params, tokens, CONFIG, 9, stop_tokens=stops)[:, 4:].tolist()
    steps = 9 if None in ends else max(ends) + 1
    for row, text, end in zip(found, free, ends, strict=True):
        end = steps - 1 if end is None else end
        assert row == (text[: end + 1] + [text[end]] * 9)[:steps]
    two = op(params, tokens[:2], CONFIG, 9, stop_tokens=stops)
    assert two.shape[1] == 4 + max(ends[:2]) + 1, "all have stopped: the text ends"
    assert op(params, tokens, CONFIG, 9, stop_tokens={-1}).shape == (3, 13)


def sampling_is_what_the_seed_says(op, case):
    """One uniform number a row and step, applied to the distribution of the full forward pass."""
    params, rng = model(case)
    tokens = rng.integers(0, 19, (2, 3))
    settings = {"temperature": 1.5, "top_k": 9, "top_p": 0.9}
    found = op(params, tokens, CONFIG, 6, rng=np.random.default_rng(case), **settings)
    again = op(params, tokens, CONFIG, 6, rng=np.random.default_rng(case), **settings)
    assert np.array_equal(found, again)
    other = op(params, tokens, CONFIG, 6, rng=np.random.default_rng(case + 1), **settings)
    assert not np.array_equal(found, other)
    uniform, text = np.random.default_rng(case), tokens
    for step in range(6):
        logits = np.stack([wrong_generation.last_logits(params, row, CONFIG) for row in text.tolist()])
        p = probabilities(logits, 1.5, 9, 0.9)
        u = uniform.random((2, 1))
        chosen = (np.cumsum(p, -1) <= u * p.sum(-1, keepdims=True)).sum(-1)
        assert found[:, 3 + step].tolist() == chosen.tolist(), f"step {step}"
        text = np.concatenate([text, chosen[:, None]], axis=1)


def exactly_as_many_as_asked(op, case):
    params, rng = model(case)
    tokens = rng.integers(0, 19, (2, 3)).astype(np.int32)
    before = {n: w.tobytes() for n, w in params.items()}, tokens.tobytes()
    for n in (0, 1, 3):
        found = op(params, tokens, CONFIG, n)
        assert found.shape == (2, 3 + n)
        assert found.dtype == np.int32
    assert ({n: w.tobytes() for n, w in params.items()}, tokens.tobytes()) == before


GENERATE_PROPERTIES = (
    greedy_is_repeated_forward,
    a_ragged_batch_is_each_prompt_alone,
    behind_a_prefix,
    stops_and_repeats,
    sampling_is_what_the_seed_says,
    exactly_as_many_as_asked,
)


@pytest.mark.parametrize("case", [1, 2])
@pytest.mark.parametrize("holds", GENERATE_PROPERTIES)
def test_generate(holds, case):
    holds(llama.generate, case)


def test_generate_kill_matrix():
    checks.kill_matrix(GENERATE_PROPERTIES, wrong_generation.GENERATE, (1,))
    for holds in GENERATE_PROPERTIES:  # with no switch turned it is right
        holds(wrong_generation._generate, 1)


def test_stream_yields_what_generate_appends():
    params, rng = model(4)
    tokens = rng.integers(0, 19, (2, 3))
    columns = list(llama.stream(params, tokens, CONFIG, 5))
    assert np.array_equal(np.stack(columns, axis=1), llama.generate(params, tokens, CONFIG, 5)[:, 3:])


def test_stream_asks_for_what_is_new_only():
    """The whole prompt with its lengths, then one token a row."""
    asked = []

    def next_logits(text, lengths):
        asked.append((text.tolist(), lengths.tolist()))
        return np.eye(5)[[len(asked), 0]]

    prompt = np.array([[3, 4, 0], [1, 2, 3]])
    found = [c.tolist() for c in generation.stream(next_logits, prompt, 4, lengths=np.array([2, 3]), stop_tokens=[0])]
    assert found == [[1, 0], [2, 0], [3, 0], [4, 0]]
    assert asked == [
        (prompt.tolist(), [2, 3]),
        ([[1], [0]], [1, 1]),
        ([[2], [0]], [1, 1]),
        ([[3], [0]], [1, 1]),
    ]


def test_an_empty_prompt_is_refused():
    params, _ = model(5)
    for tokens, lengths in ((np.zeros((2, 0), int), None), (np.zeros((2, 3), int), np.array([3, 0]))):
        with pytest.raises(ValueError, match="a prompt is empty: generation needs at least one token"):
            llama.generate(params, tokens, CONFIG, 2, lengths=lengths)


def test_float32_models_have_float32_caches():
    params, rng = model(6)
    single = {n: w.astype(np.float32) for n, w in params.items()}
    tokens = rng.integers(0, 19, (2, 3))
    assert np.array_equal(llama.generate(single, tokens, CONFIG, 4), llama.generate(params, tokens, CONFIG, 4))
