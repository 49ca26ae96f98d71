"""Rows shared out among threads: the loss and gradient of the whole batch, whoever computes which rows.

The model is in float64. A sum in another order differs by its condition times 2⁻⁵³, measured as in test_llama: 16 times
2⁻²⁹ of what float32 moves the same result by."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from minift.data.batches import count_labels, pack, pad
from minift.models import llama
from minift.nn import threads as cores
from minift.nn.dropout import fold_in
from minift.peft import lora
from minift.quant import blockwise, codebooks, nf4
from minift.train import sft
from minift.train.allocator import keep_freed_memory
from minift.train.parallel import share, side_by_side
from nn import checks

CONFIG = llama.Config(31, 12, 20, 2, 4, 2, 4)


def model(seed=3, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return {n: (0.5 * rng.standard_normal(s)).astype(dtype) for n, s in llama.shapes(CONFIG).items()}


def texts(lengths=(7, 3, 5, 2, 6), seed=0, ignored=()):
    """Examples whose first two labels do not count; of those in `ignored` none does."""
    rng = np.random.default_rng(seed)
    found = []
    for i, n in enumerate(lengths):
        tokens = rng.integers(0, 31, n).astype(np.int32)
        found.append((tokens, np.where((np.arange(n) < 1) | (i in ignored), -100, tokens).astype(np.int32)))
    return found


def loss(params, batch, normalizer, key):
    return sft.loss(params, batch, CONFIG, normalizer, key)


BATCHES = {
    "padded": pad(texts()),
    "packed": pack(texts((5, 4, 3, 6, 2, 2)), 8),
    "one row": pad(texts((4,))),
    "wide": pad(texts(), 12),
    "parts without a label": pad(texts(ignored=(0, 2))),
    "no label at all": pad(texts(ignored=range(5))),
}


def is_the_whole(shared, case):
    """Value and gradients of the unshared loss, with its own normalizer or a given one, and dloss not 1."""
    name, normalizer = case
    batch = BATCHES[name]
    params = model()
    low = {n: w.astype(np.float32) for n, w in params.items()}
    value, vjp = loss(params, batch, normalizer, 0)
    low_value, low_vjp = loss(low, batch, normalizer, 0)
    found, found_vjp = shared(loss)(params, batch, normalizer, 0)
    assert abs(found - value) <= slack(value, low_value)
    expected, low_gradients = vjp(1.7), low_vjp(1.7)
    for _ in range(2):  # a pullback may be called twice
        gradients = found_vjp(1.7)
        assert gradients.keys() == expected.keys() == params.keys()
        for n, g in expected.items():
            assert gradients[n].dtype == np.float64
            assert np.abs(gradients[n] - g).max() <= slack(g, low_gradients[n]), n


def slack(double, single):
    """At least an ulp of the largest number, where float32 happens to be exact."""
    return 16 * 2.0**-29 * max(np.abs(double - single).max(), 2.0**-24 * np.abs(double).max(), 1e-30)


CASES = [("padded", None), ("packed", 11.0), ("one row", None), ("wide", 11.0), ("parts without a label", None),
         ("no label at all", None)]  # fmt: skip


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("case", CASES)
def test_the_loss_of_the_whole_batch(case, threads):
    is_the_whole(lambda f: side_by_side(f, threads), case)


def wrong_versions():
    """One switch each: what people forget when they share out a batch."""

    def maker(name, *, count="whole", add_up="sum", parts=share, last=True):
        def shared(f):
            def run(params, batch, normalizer, key):
                dealt = parts(batch, 3)
                dealt = dealt if last or len(dealt) == 1 else dealt[:-1]
                whole = float(max(count_labels(batch), 1)) if normalizer is None else normalizer
                n = {"whole": whole, "own": None, "ignores": float(max(count_labels(batch), 1))}[count]
                values, pullbacks = zip(*(f(params, part, n, key) for part in dealt), strict=True)

                def vjp(dloss):
                    found = [pullback(dloss) for pullback in pullbacks]
                    scale = len(found) if add_up == "mean" else 1
                    return {n: sum(g[n] for g in found) / scale for n in found[0]}

                return (sum(values) / len(values) if add_up == "mean" else sum(values)), vjp

            return run

        shared.__name__ = name
        return shared

    def without_segments(batch, n):
        return [type(p)(p.tokens, p.labels, p.lengths) for p in share(batch, n)]

    def cut_to_the_shortest(batch, n):
        return [p.cut(int(p.lengths.min())) for p in share(batch, n)]

    return (
        maker("each part by its own labels", count="own"),
        maker("the normalizer ignored", count="ignores"),
        maker("a mean of parts", add_up="mean"),
        maker("the last part left out", last=False),
        maker("segments left out", parts=without_segments),
        maker("cut to the shortest row", parts=cut_to_the_shortest),
    )


def test_wrong_ways_to_share_are_rejected():
    checks.kill_matrix((is_the_whole,), wrong_versions(), CASES[:2])


def test_two_runs_agree_in_every_bit():
    params = lora.attach(model(), r=2, lora_alpha=3, lora_dropout=0.4, rng=np.random.default_rng(0))
    runs = [side_by_side(loss, 3)(params, BATCHES["packed"], None, 5) for _ in range(3)]
    for value, vjp in runs[1:]:
        checks.same_bits(value, runs[0][0], "loss")
        for name, g in vjp(1.0).items():
            checks.same_bits(g, runs[0][1](1.0)[name], name)


def test_each_part_draws_its_own_dropout():
    keys, lock = [], threading.Lock()

    def listening(params, batch, normalizer, key):
        with lock:
            keys.append(key)
        return loss(params, batch, normalizer, key)

    side_by_side(listening, 3)(model(), BATCHES["padded"], None, 5)
    assert sorted(keys) == sorted(fold_in(5, i) for i in range(3))
    assert len(set(keys)) == 3
    side_by_side(listening, 3)(model(), BATCHES["one row"], None, 5)
    assert keys[3:] == [5]  # a batch that is not shared out is the unshared loss


@given(st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=9), st.integers(1, 5), st.booleans())
def test_every_row_is_dealt_once_and_cut_behind_its_last_token(rows, parts, packed):
    examples = texts([n for n, _ in rows], ignored=[i for i, (_, ignored) in enumerate(rows) if ignored])
    batch = pack(examples, 12) if packed else pad(examples, 12)
    before = [None if a is None else a.tobytes() for a in vars(batch).values()]
    dealt = share(batch, parts)
    assert len(dealt) == min(parts, len(batch.tokens))
    assert max(len(p.tokens) for p in dealt) - min(len(p.tokens) for p in dealt) <= 1
    seen = []
    for part in dealt:
        assert part.tokens.shape[1] == part.lengths.max()
        assert (part.segments is None) == (batch.segments is None)
        for row, n in enumerate(part.lengths):
            assert (part.labels[row, n:] == -100).all()
            segments = None if part.segments is None else part.segments[row, :n].tolist()
            seen.append((part.tokens[row, :n].tolist(), part.labels[row, :n].tolist(), segments))
    expected = [
        (t[:n].tolist(), y[:n].tolist(), None if batch.segments is None else batch.segments[row, :n].tolist())
        for row, (t, y, n) in enumerate(zip(batch.tokens, batch.labels, batch.lengths, strict=True))
    ]
    assert sorted(seen, key=str) == sorted(expected, key=str)
    assert sum(count_labels(p) for p in dealt) == count_labels(batch)
    assert [None if a is None else a.tobytes() for a in vars(batch).values()] == before


def test_no_thread_is_refused():
    for threads in (0, -1):
        with pytest.raises(ValueError, match=f"threads is {threads}, needed at least 1"):
            side_by_side(loss, threads)


# --- the threads themselves -------------------------------------------------------------------------------------------


def test_blas_has_one_thread_inside_and_its_own_number_after():
    inside = []

    def watching(params, batch, normalizer, key):
        inside.append(cores.count())
        value, vjp = loss(params, batch, normalizer, key)

        def watched(dloss):
            inside.append(cores.count())
            return vjp(dloss)

        return value, watched

    with threadpool_limits(2, user_api="blas"):
        assert cores.count() == 2
        _, vjp = side_by_side(watching)(model(), BATCHES["padded"], None, 0)  # as many parts as BLAS has threads
        assert cores.count() == 2
        vjp(1.0)
        assert cores.count() == 2
    assert inside == [1, 1, 1, 1]


def test_what_a_worker_raises_reaches_the_caller():
    def second_fails(params, batch, normalizer, key):
        if key == fold_in(5, 1):
            raise ValueError("the second part")
        return 1.0, lambda dloss: {"w": np.ones(1)}

    def pullback_fails(params, batch, normalizer, key):
        def vjp(dloss):
            raise KeyError("a pullback")

        return 1.0, vjp

    with threadpool_limits(2, user_api="blas"):
        with pytest.raises(ValueError, match="the second part"):
            side_by_side(second_fails, 3)(model(), BATCHES["padded"], None, 5)
        assert cores.count() == 2
        with pytest.raises(KeyError, match="a pullback"):
            side_by_side(pullback_fails, 3)(model(), BATCHES["padded"], None, 5)[1](1.0)
        assert cores.count() == 2
        with pytest.raises(ZeroDivisionError):
            cores.on_all_cores(lambda n: 1 // n, [(n,) for n in range(cores.MANY)])


@pytest.mark.parametrize("pieces", [0, 1, cores.MANY - 1, cores.MANY, cores.MANY + 1, 101])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_piece_of_work_is_done_once(pieces, threads):
    done, workers = np.zeros(pieces, int), set()

    def work(i, step):
        workers.add(threading.get_ident())
        done[i] += step

    with threadpool_limits(threads, user_api="blas"):
        cores.on_all_cores(work, ((i, 1) for i in range(pieces)))
    assert (done == 1).all()
    if pieces < cores.MANY or threads == 1:
        assert workers <= {threading.get_ident()}
    else:
        assert threading.get_ident() not in workers


def test_quantization_by_two_threads_gives_the_same_bits(rng, monkeypatch):
    """41 chunks, the last block short."""
    monkeypatch.setattr(blockwise, "CHUNK", 256)
    w = rng.standard_normal(40 * 256 + 77).astype(np.float32)
    found = []
    for threads in (1, 2):
        with threadpool_limits(threads, user_api="blas"):
            q, b = nf4.quantize(w), blockwise.quantize(w, codebooks.DYNAMIC, 64)
            found.append((q.codes, q.absmax, nf4.dequantize(q), b.codes, b.absmax, blockwise.dequantize(b)))
            w[-1], kept = np.nan, w[-1]
            with pytest.raises(ValueError, match=r"cannot quantize nan at index \(10316,\)"):
                nf4.quantize(w)
            w[-1] = kept
    for one, two in zip(*found, strict=True):
        checks.same_bits(two, one, "with two threads")


def test_kept_memory_changes_no_number():
    """glibc's mallopt says yes to all three; what was computed before is computed again."""
    before, vjp = loss(model(), BATCHES["padded"], None, 0)
    assert keep_freed_memory() is True
    after, after_vjp = loss(model(), BATCHES["padded"], None, 0)
    checks.same_bits(after, before, "loss")
    for name, g in vjp(1.0).items():
        checks.same_bits(after_vjp(1.0)[name], g, name)
