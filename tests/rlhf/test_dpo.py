"""DPO: number by number, against torch, at a margin of zero, and on a model whose reference is itself, bare."""

import math

import numpy as np
import pytest
import small_policy
import torch
import wrong_dpo
from small_policy import CONFIG

from minift.conformance.gradients import check_gradients, check_vjp
from minift.nn.weight import trainable
from minift.rlhf import dpo
from minift.rlhf.dpo import answer_log_probs, implicit_rewards, preference_loss, reference_log_probs, statistics
from minift.rlhf.logprobs import sequence_log_probs
from minift.rlhf.pairs import Pairs
from minift.rlhf.reward_model import pairwise_loss
from nn import checks

# seed, pairs, scale of the differences, beta, label smoothing, type, normalizer
CASES = [
    (1, 4, 1.0, 0.1, 0.0, "sigmoid", None),
    (2, 3, 10.0, 0.5, 0.1, "sigmoid", 7.0),
    (3, 5, 4000.0, 0.3, 0.0, "sigmoid", None),
    (4, 2, 1.0, 0.2, 0.0, "ipo", None),
    (5, 3, 3.0, 0.7, 0.3, "sigmoid", 2.5),
    (6, 0, 1.0, 0.1, 0.0, "sigmoid", None),
    (7, 1, 2.0, 0.4, 0.2, "sigmoid", None),
]


def make(case, dtype=np.float64):
    rng = np.random.default_rng(case[0])
    reference = -rng.exponential(20.0, (2, case[1]))
    logps = reference + case[2] * rng.standard_normal((2, case[1]))
    return (*logps.astype(dtype), *reference.astype(dtype)), rng


def softplus(x):
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def number_by_number(op, case):
    _, n, _, beta, eps, kind, normalizer = case
    for dtype in checks.DTYPES:
        given, _ = make(case, dtype)
        found, vjp = op(*given, beta, eps, kind, normalizer)
        dchosen, drejected, *none = vjp(dtype(0.7))
        assert none == [None, None], "the reference does not learn"
        assert found.dtype == dchosen.dtype == dtype
        exact, slack, u = 0.0, 1e-300, np.finfo(dtype).eps / 2
        for i, (w, l, rw, rl) in enumerate(zip(*(x.tolist() for x in given), strict=True)):
            h, off = (w - rw) - (l - rl), 2 * u * (abs(w - rw) + abs(l - rl))
            if kind == "ipo":
                value, slope = (h - 1 / (2 * beta)) ** 2, 2 * (h - 1 / (2 * beta))
                steep, bend = abs(slope), 2.0
            else:
                z = beta * h
                value = (1 - eps) * softplus(-z) + eps * softplus(z)
                slope = beta * (eps * math.exp(-softplus(-z)) - (1 - eps) * math.exp(-softplus(z)))
                steep, bend = beta, beta * beta
            exact += value / (normalizer or n)
            slack += (steep * off + (20 + n) * u * (value + beta * abs(h))) / (normalizer or n)
            allowed = (bend * off * 2 + 40 * u * (abs(slope) + beta)) / (normalizer or n)
            assert abs(dchosen[i] - 0.7 * slope / (normalizer or n)) <= allowed
        assert abs(found - exact) <= slack, f"{found}, needed {exact}"
        checks.same_bits(dchosen + drejected, np.zeros(n, dtype), "the sum of both gradients")


def gradients(op, case):
    given, rng = make(case)
    if case[2] <= 10 and case[1]:
        check_vjp(lambda *x: op(*x, *case[3:]), *given, rng=rng, frozen=[2, 3])


def torch_agrees(op, case):
    _, n, _, beta, eps, kind, normalizer = case
    given, _ = make(case)
    w, l, rw, rl = (torch.tensor(x, requires_grad=i < 2) for i, x in enumerate(given))
    h, log_sigmoid = (w - rw) - (l - rl), torch.nn.functional.logsigmoid
    each = -(1 - eps) * log_sigmoid(beta * h) - eps * log_sigmoid(-beta * h)
    loss = (each if kind == "sigmoid" else (h - 1 / (2 * beta)) ** 2).sum() / (normalizer or max(n, 1))
    loss.backward()
    found, vjp = op(*given, *case[3:])
    assert abs(found - loss.item()) <= 1e-13 * (1 + abs(loss.item()))
    for a, b in zip(vjp(1.0), (w.grad, l.grad), strict=False):
        assert np.abs(a - b.numpy()).max(initial=0) <= 1e-14


def no_margin_costs_ln_2(op, case):
    """To the bit, whatever the log-probabilities are: policy and reference are equal. Gradients are ∓β/2 (1 − 2ε)."""
    for dtype in checks.DTYPES:
        same = (-100 * np.random.default_rng(case[0]).random((2, 4))).astype(dtype)
        value, vjp = op(*same, *same, 0.5, 0.25)
        assert value == dtype(math.log(2)), f"{value!r}, needed ln 2"
        assert value.dtype == dtype
        assert np.abs(vjp(1.0)[0] + 0.5 / 4 * 0.25).max() <= (1e-6 if dtype == np.float32 else 1e-15)


def micro_batches_add_up(op, case):
    given, _ = make(case)
    n = float(max(case[1], 1))
    whole, _ = op(*given, *case[3:6])
    parts = [op(*(x[i : i + 2] for x in given), *case[3:6], n)[0] for i in range(0, case[1], 2)]
    assert abs(sum(parts) - whole) <= 1e-13 * (1 + abs(whole))


def refuses_what_is_out_of_range(op, case):
    given, _ = make(case)
    for beta, eps in ((0.0, 0.0), (-0.1, 0.0), (math.nan, 0.0), (0.1, 0.5), (0.1, -0.1), (0.1, math.nan)):
        try:
            op(*given, beta, eps)
        except ValueError:
            continue
        raise AssertionError(f"beta {beta}, label_smoothing {eps} were accepted")


PROPERTIES = (
    number_by_number,
    gradients,
    torch_agrees,
    no_margin_costs_ln_2,
    micro_batches_add_up,
    refuses_what_is_out_of_range,
)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("holds", PROPERTIES)
def test_preference_loss(holds, case):
    holds(preference_loss, case)


def test_preference_kill_matrix():
    checks.kill_matrix(PROPERTIES, wrong_dpo.DPO, CASES)


def test_refusals_name_the_argument():
    given = np.zeros((4, 2))
    with pytest.raises(ValueError, match=r"^beta is 0, needed a positive number$"):
        preference_loss(*given, 0)
    with pytest.raises(ValueError, match=r"^label_smoothing is 0\.5, needed 0 <= label_smoothing < 0\.5$"):
        preference_loss(*given, 0.1, 0.5)
    with pytest.raises(ValueError, match=r"^loss_type is 'hinge', needed one of \('sigmoid', 'ipo'\)$"):
        preference_loss.__wrapped__(*given, loss_type="hinge")


def test_just_under_half_of_the_labels_may_be_wrong():
    given, _ = make(CASES[0])
    assert preference_loss(*given, 0.1, 0.4999)[0] > 0


def test_the_loss_is_the_reward_model_s_on_implicit_rewards():
    """Equation (2) is equation (3) of the reward model."""
    given, _ = make(CASES[1])
    w, l = (implicit_rewards(a, b, 0.5) for a, b in zip(given[:2], given[2:], strict=True))
    assert abs(preference_loss(*given, 0.5)[0] - pairwise_loss(w, l)[0]) <= 1e-14


def test_statistics():
    """A tie is no success."""
    logps, reference = np.array([[-1.0, -4], [-4, -2], [-1, -1], [0, -3]]), np.full((4, 2), -2.0)
    assert statistics(logps[:3], reference[:3])["rewards/accuracies"] == 1 / 3
    assert statistics(logps, reference, beta=0.5) == {
        "rewards/chosen": 0.25,
        "rewards/rejected": -0.25,
        "rewards/margins": 0.5,
        "rewards/accuracies": 0.5,
        "logps/chosen": -1.5,
        "logps/rejected": -2.5,
    }


# --- the model --------------------------------------------------------------------------------------------------------


def with_reference(params, batch, average=False):
    (reference,) = reference_log_probs(params, [batch], CONFIG, average=average)
    return Pairs(batch, reference=reference.reshape(-1, 2))


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_a_fresh_adapter_costs_ln_2(kind):
    """B is 0, so policy and reference agree to the bit."""
    params = small_policy.params(kind, moved=False)
    pairs = with_reference(params, small_policy.batch(rows=8))
    value, vjp = dpo.loss(params, pairs, CONFIG)
    assert value == math.log(2)
    gradients = vjp(1.0)
    assert set(gradients) == set(trainable(params))
    assert not any(g.any() for name, g in gradients.items() if "lora_A" in name)
    assert all(g.any() for name, g in gradients.items() if "lora_B" in name)


def test_the_reference_is_the_policy_with_its_adapter_off():
    params, batch = small_policy.params("lora"), small_policy.batch()
    base = small_policy.params("full")
    (found,) = reference_log_probs(params, [batch], CONFIG)
    checks.same_bits(found, answer_log_probs(base, batch, CONFIG)[0], "log π_ref")
    assert np.abs(found - answer_log_probs(params, batch, CONFIG)[0]).min() > 1e-3
    (found,) = reference_log_probs(base, [batch], CONFIG)
    checks.same_bits(found, answer_log_probs(base, batch, CONFIG)[0], "without an adapter the model itself")


def test_answers_are_sums_or_means():
    params, batch = small_policy.params("lora"), small_policy.batch()
    (logp, _), _ = sequence_log_probs(params, batch, CONFIG)
    tokens = (batch.labels != -100).sum(axis=1)
    for average in (False, True):
        found, _ = answer_log_probs(params, batch, CONFIG, average=average)
        exact = [math.fsum(row) / (n if average else 1) for row, n in zip(logp.tolist(), tokens.tolist(), strict=True)]
        assert np.abs(found - exact).max() <= 1e-14
        check_gradients(
            lambda p, average=average: answer_log_probs(p, batch, CONFIG, average=average),
            params,
            rng=np.random.default_rng(0),
        )


def test_of_an_answer_without_a_token_sum_and_mean_are_zero():
    params, batch = small_policy.params("lora"), small_policy.batch()
    silent = type(batch)(batch.tokens, np.where(np.arange(len(batch))[:, None] == 1, -100, batch.labels), batch.lengths)
    for average in (False, True):
        found, vjp = answer_log_probs(params, silent, CONFIG, average=average)
        assert found[1] == 0 and (found[[0, 2, 3]] < 0).all()
        assert all(np.isfinite(g).all() for g in vjp(np.ones(len(batch))).values())


@pytest.mark.parametrize("options", [{"beta": 0.5, "label_smoothing": 0.1}, {"beta": 0.3, "loss_type": "ipo"}])
def test_the_loss_of_a_model(options):
    params, average = small_policy.params("lora"), options.get("loss_type") == "ipo"
    pairs = with_reference(params, small_policy.batch(rows=6), average)
    value, _ = dpo.loss(params, pairs, CONFIG, 5.0, **options)
    logps, _ = answer_log_probs(params, pairs.batch, CONFIG, average=average)
    exact, _ = preference_loss(logps[::2], logps[1::2], *pairs.reference.T.copy(), normalizer=5.0, **options)
    checks.same_bits(value, exact, "loss")
    check_gradients(lambda p: dpo.loss(p, pairs, CONFIG, 5.0, **options), params, rng=np.random.default_rng(0))


def test_what_fills_a_row_up_does_not_matter():
    params = small_policy.params("lora")
    pairs = with_reference(params, small_policy.batch())
    other = Pairs(small_policy.other_padding(pairs.batch), reference=pairs.reference)
    (a, a_vjp), (b, b_vjp) = (dpo.loss(params, p, CONFIG) for p in (pairs, other))
    checks.same_bits(b, a, "loss")
    for name, gradient in a_vjp(1.0).items():
        checks.same_bits(b_vjp(1.0)[name], gradient, name)


def test_pairs_without_a_reference_are_refused():
    with pytest.raises(
        ValueError, match=r"^the pairs carry no reference log-probabilities: compute them once, `reference_log_probs`$"
    ):
        dpo.loss(small_policy.params("lora"), Pairs(small_policy.batch()), CONFIG)
