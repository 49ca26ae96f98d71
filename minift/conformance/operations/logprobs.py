"""Log-probabilities of tokens and entropies: within their bound, with a temperature, and both with a gradient.

An answer's entropy may be asked for and not be used; logits may be huge, far from 0, or −∞ for tokens that cannot be.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from minift.conformance import bounds, common
from minift.conformance.ball import Ball
from minift.conformance.operation import Operation, arithmetic, rounded
from minift.rlhf import logprobs

KINDS = ("normal", "shifted", "large", "rising", "peaked")


class Sampled(NamedTuple):
    shape: tuple[int, ...]  # of the tokens
    vocab: int
    kind: str = "normal"
    temperature: float = 0.7
    dtype: str = "float32"
    seed: int = 0


def arrays(case: Sampled) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits, tokens and the cotangents of both results. The first tokens are the last ones of the vocabulary."""
    rng = np.random.default_rng(case.seed)
    logits = rng.standard_normal((*case.shape, case.vocab))
    if case.kind == "shifted":
        logits += 1000
    elif case.kind == "large":
        logits *= 200
    elif case.kind == "rising":
        logits += np.linspace(-20, 20, case.vocab)  # every tile has a new maximum
    elif case.kind == "peaked":
        logits[..., -1] += 30  # an entropy near 0
    tokens = rng.integers(0, case.vocab, case.shape)
    edges = np.array([case.vocab - 1, 0, max(case.vocab - 2, 0)])
    tokens.reshape(-1)[:3] = edges[: tokens.size]
    cotangents = rounded(rng.standard_normal((2, *case.shape)), case.dtype)
    return rounded(logits, case.dtype), tokens, cotangents.astype(arithmetic(case.dtype))


def oracle(tokens: np.ndarray, temperature: float, dlogp, dentropy, logits: Ball) -> tuple[Ball, Ball, Ball]:
    """log p, H and dlogits. An entropy may be formed in two ways, and its radius is the wider one's."""
    onehot = (np.arange(logits.value.shape[-1]) == tokens[..., None]) * 1.0
    z = logits / temperature
    shifted = z - z.max()
    e = shifted.exp()
    total = e.sum(-1)
    log_p = shifted - total.log()
    p = e / total
    logp = (log_p * onehot).sum(-1)
    entropy, other = -(p * log_p).sum(-1), total.log() - (e * shifted).sum(-1) / total
    entropy = Ball(entropy.value, entropy.dtype, np.maximum(entropy.radius, other.radius))
    from_entropy = dentropy * p * (log_p + entropy)
    dz = dlogp * onehot - dlogp * p - from_entropy
    return logp.reshape(*tokens.shape), entropy.reshape(*tokens.shape), dz / temperature


def balls(case: Sampled) -> tuple[Ball, Ball, Ball]:
    logits, tokens, cotangents = arrays(case)
    type_ = arithmetic(case.dtype)
    numbers = [Ball(a, type_) for a in (*cotangents[..., None], logits)]
    return oracle(tokens, case.temperature, *numbers)


def is_within_its_bound(f, case, layout=np.asarray):
    logits, tokens, cotangents = arrays(case)
    of_logp, of_entropy, of_logits = balls(case)
    (logp, entropy), vjp = f(layout(logits), layout(tokens) if tokens.ndim else tokens, case.temperature)
    of_logp.check(logp, "log-probabilities")
    of_entropy.check(entropy, "entropies")
    of_logits.stored(case.dtype).check(vjp(*cotangents), "dlogits")


def any_layout(f, case):
    """Logits and tokens; not to the bit, for what lies otherwise may be summed in another order."""
    for layout in (common.strided, common.transposed, common.misaligned, common.apart):
        try:
            is_within_its_bound(f, case, layout)
        except AssertionError as error:
            raise AssertionError(f"{layout.__name__} arguments: {error}") from error


def changes_nothing(f, case):
    """Nothing that was given changes, and a second call gives the same bits."""
    logits, tokens, cotangents = arrays(case)
    before = [a.tobytes() for a in (logits, tokens, cotangents)]
    (pair, vjp), (again, again_vjp) = (f(logits, tokens, case.temperature) for _ in range(2))
    first = np.array(vjp(*cotangents))
    for what, a, b in zip(("log-probabilities", "entropies"), pair, again, strict=True):
        common.same_bits(b, a, f"{what} of a second call")
    common.same_bits(vjp(*cotangents), first, "dlogits of a second pullback")
    common.same_bits(again_vjp(*cotangents), first, "dlogits of a second call")
    assert [a.tobytes() for a in (logits, tokens, cotangents)] == before, "an argument was changed"


def the_entropy_may_be_left_out(f, case):
    """Without a cotangent of the entropy: what a cotangent of 0 gives."""
    logits, tokens, (dlogp, dentropy) = arrays(case)
    _, vjp = f(logits, tokens, case.temperature)
    common.same_bits(vjp(dlogp) + 0, vjp(dlogp, 0 * dentropy) + 0, "dlogits")


def pullback_is_the_transpose_of_the_derivative(f, case):
    if case.dtype == "float64" and case.kind == "normal":
        logits, tokens, _ = arrays(case)

        def both(logits):
            pair, vjp = f(logits, tokens, case.temperature)
            return np.stack(pair), lambda dy: vjp(dy[0], dy[1])

        common.is_differentiated(both, [logits], np.random.default_rng(case.seed))


def is_log_vocab_where_all_are_equal(f, case):
    logits, tokens, _ = arrays(case)
    (logp, entropy), _ = f(np.full_like(logits, 3), tokens, case.temperature)
    exact = math.log(case.vocab)
    allowed = bounds.gamma(20 + case.vocab, arithmetic(case.dtype)) * (1 + exact)
    assert (np.abs(logp.astype(np.float64) + exact) <= allowed).all(), f"log p is {logp}, needed {-exact}"
    assert (np.abs(entropy.astype(np.float64) - exact) <= allowed).all(), f"H is {entropy}, needed {exact}"


def what_cannot_be_has_no_part(f, case):
    """Tokens with a logit of −∞, which are not the ones given: as if they were not in the vocabulary."""
    logits, tokens, cotangents = arrays(case)
    if case.vocab < 3:
        return
    last = case.vocab // 2 + 1
    tokens = np.minimum(tokens, last - 1)
    logits[..., last:] = -np.inf
    with np.errstate(invalid="ignore"):
        (logp, entropy), vjp = f(logits, tokens, case.temperature)
        dlogits = vjp(*cotangents)
    type_ = arithmetic(case.dtype)
    numbers = [Ball(a, type_) for a in (*cotangents[..., None], logits[..., :last])]
    of_logp, of_entropy, of_logits = oracle(tokens, case.temperature, *numbers)
    of_logp.check(logp, "log-probabilities")
    of_entropy.check(entropy, "entropies")
    of_logits.stored(case.dtype).check(dlogits[..., :last], "dlogits")
    assert not dlogits[..., last:].any(), "what cannot be has a gradient"


def refuses_tokens_outside(f, case):
    """With a ValueError or, where nobody can wait to look, with a NaN: never with a number. There is none to ignore."""
    logits, tokens, _ = arrays(case)
    if tokens.size:
        for token in (-1, -100, case.vocab):
            wrong = tokens.copy()
            wrong.reshape(-1)[-1] = token
            try:
                (logp, _), _ = f(logits, wrong, case.temperature)
            except ValueError as error:
                assert str(case.vocab - 1) in str(error), f"token {token}: the error does not say what is needed"
            else:
                assert np.isnan(logp.reshape(-1)[-1]), f"token {token} was accepted, with log p {logp}"


def cases(dtypes):
    return st.builds(
        Sampled,
        st.lists(st.integers(0, 4), max_size=3).map(tuple),
        st.integers(1, 300),
        st.sampled_from(KINDS),
        st.sampled_from((0.3, 0.7, 1.0, 2.5)),
        st.sampled_from(sorted(dtypes)),
        st.integers(0, 99),
    )


FIXED = (
    Sampled((2, 5), 7, "normal", 1.0, seed=1),
    Sampled((6,), 5, "shifted", 0.7, seed=2),
    Sampled((2, 3), 3, "large", 2.5, seed=3),
    Sampled((1,), 6),
    Sampled((0, 4), 3),
    Sampled((3,), 1, temperature=1.3),
    Sampled((4,), 37, "rising", 0.7),
    Sampled((3,), 19, "peaked", 1.0),
    *(Sampled((4,), 17, kind, 0.7, dtype) for kind in KINDS for dtype in ("float16", "bfloat16")),
    *(Sampled((2, 3), 11, kind, temperature, "float64", 4) for kind in KINDS for temperature in (1.0, 0.6)),
)

OPERATIONS = (
    Operation(
        "logprobs.token_log_probs",
        logprobs.token_log_probs,
        "f(logits (..., vocab), tokens (...), temperature) -> (log_p (...), entropy (...)), vjp;"
        " vjp(dlog_p, dentropy=None) -> dlogits",
        cases,
        FIXED,
        (
            is_within_its_bound,
            changes_nothing,
            any_layout,
            the_entropy_may_be_left_out,
            pullback_is_the_transpose_of_the_derivative,
            is_log_vocab_where_all_are_equal,
            what_cannot_be_has_no_part,
            refuses_tokens_outside,
        ),
    ),
)
