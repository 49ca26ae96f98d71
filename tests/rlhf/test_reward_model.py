"""The reward model: losses number by number, orders that must not matter, and the last real token of each row."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import small_policy
import torch
import transformers
import wrong_reward_model
from small_policy import CONFIG

from minift.conformance import bounds
from minift.conformance.gradients import check_gradients, check_vjp
from minift.data.batches import Batch
from minift.models import llama
from minift.models.classifier import SCORE
from minift.nn.weight import trainable
from minift.peft import lora
from minift.rlhf import reward_model
from minift.rlhf.pairs import Pairs, pad_pairs
from minift.rlhf.reward_model import (
    accuracy,
    calibration,
    centering,
    normalization,
    pairwise_loss,
    preferred,
    ranking_loss_1,
    ranking_loss_2,
    score,
    with_head,
)
from nn import checks

# seed, pairs, scale of the rewards, margin, normalizer
CASES = [
    (1, 5, 1.0, False, None),
    (2, 4, 3.0, True, None),
    (3, 3, 200.0, False, 7.0),
    (4, 6, 0.1, True, 2.5),
    (5, 0, 1.0, False, None),
    (6, 1, 1.0, True, None),
]


def make(case, dtype=np.float64):
    seed, n, scale, has_margin, normalizer = case
    rng = np.random.default_rng(seed)
    chosen, rejected = (scale * rng.standard_normal((2, n))).astype(dtype)
    margin = rng.random(n).astype(dtype) if has_margin else None
    return chosen, rejected, margin, normalizer, rng


def softplus(x):
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def number_by_number(op, case):
    """Each pair's d is off by at most u (|r_w − r_l| + |d|), and −log σ is 1-Lipschitz; log, exp are within 8 u."""
    for dtype in checks.DTYPES:
        chosen, rejected, margin, normalizer, _ = make(case, dtype)
        u, n = bounds.unit_roundoff(dtype), normalizer or max(len(chosen), 1)
        found, vjp = op(chosen, rejected, margin, normalizer)
        dchosen, drejected, dmargin = vjp(dtype(0.7))
        assert dmargin is None
        assert found.dtype == dchosen.dtype == drejected.dtype == dtype
        exact, slack = 0.0, 0.0
        for i in range(len(chosen)):
            gap = float(chosen[i]) - float(rejected[i])
            d = gap - (float(margin[i]) if margin is not None else 0.0)
            off = u * (abs(gap) + abs(d))
            exact += softplus(-d) / n
            slack += (off + (8 + len(chosen)) * u * softplus(-d)) / n
            slope = -0.7 / n * math.exp(-softplus(d))
            tolerance = abs(slope) * (off + u * (12 + 9 * softplus(d))) * 1.01 + 2.0**-126
            for found_slope, sign in ((dchosen[i], 1), (drejected[i], -1)):
                assert abs(found_slope - sign * slope) <= tolerance, f"pair {i}: {found_slope}, needed {sign * slope}"
        assert abs(found - exact) <= 1.01 * slack + 1e-300


def gradients(op, case):
    chosen, rejected, margin, normalizer, rng = make(case)
    if len(chosen) and case[2] < 10:
        check_vjp(
            lambda w, l: (lambda y, v: (y, lambda dy: v(dy)[:2]))(*op(w, l, margin, normalizer)),
            chosen,
            rejected,
            rng=rng,
        )


def torch_agrees(op, case):
    chosen, rejected, margin, normalizer, _ = make(case)
    w, l = (torch.tensor(x, requires_grad=True) for x in (chosen, rejected))
    d = w - l - (0 if margin is None else torch.tensor(margin))
    loss = -torch.nn.functional.logsigmoid(d).sum() / (normalizer or max(len(chosen), 1))
    loss.backward()
    found, vjp = op(chosen, rejected, margin, normalizer)
    assert abs(found - loss.item()) <= 1e-14 * (1 + abs(loss.item()))
    for a, b in zip(vjp(1.0), (w.grad, l.grad), strict=False):
        assert np.abs(a - b.numpy()).max(initial=0) <= 1e-15


def swapping_costs_the_difference(op, case):
    """L(w, l) − L(l, w) = −mean d; ln 2 at ties; the two gradients of a pair sum to exactly 0."""
    chosen, rejected, _, normalizer, _ = make(case)
    there, vjp = op(chosen, rejected, None, normalizer)
    back, _ = op(rejected, chosen, None, normalizer)
    n = normalizer or max(len(chosen), 1)
    slack = 8 * (len(chosen) + 4) * 2.0**-53 * (np.abs(chosen) + np.abs(rejected)).sum() / n
    assert abs(there - back + (chosen - rejected).sum() / n) <= slack + 1e-300
    dchosen, drejected, _ = vjp(1.0)
    checks.same_bits(dchosen + drejected, np.zeros_like(chosen), "the sum of both gradients")
    assert (dchosen <= 0).all()
    assert (dchosen >= -1 / n).all()
    tie, _ = op(np.full(4, 2.5), np.full(4, 2.5), None, None)
    assert tie == math.log(2)


def finite_wherever(op, case):
    """The naive form is infinite from d = −104 on in float32, and loses all digits at +20."""
    for dtype in checks.DTYPES:
        d = np.array([-1e4, -90, 90, 20], dtype)
        value, vjp = op(d, np.zeros(4, dtype), None, 1.0)
        assert abs(value - 10090) <= 1e-3
        with np.errstate(under="ignore"):
            assert np.isfinite(vjp(1.0)[0]).all()
        alone, _ = op(d[3:], np.zeros(1, dtype), None, None)
        assert abs(alone - math.log1p(math.exp(-20))) <= 1e-6 * math.exp(-20)


def micro_batches_add_up(op, case):
    chosen, rejected, margin, _, _ = make(case)
    n = float(max(len(chosen), 1))
    whole, vjp = op(chosen, rejected, margin)
    parts = [
        op(chosen[i : i + 2], rejected[i : i + 2], None if margin is None else margin[i : i + 2], n)
        for i in range(0, len(chosen), 2)
    ]
    assert abs(sum(value for value, _ in parts) - whole) <= 1e-14 * (1 + abs(whole))
    if parts:
        checks.same_bits(np.concatenate([part_vjp(1.0)[0] for _, part_vjp in parts]), vjp(1.0)[0], "dchosen")


PAIRWISE = (
    number_by_number,
    gradients,
    torch_agrees,
    swapping_costs_the_difference,
    finite_wherever,
    micro_batches_add_up,
)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("holds", PAIRWISE)
def test_pairwise_loss(holds, case):
    holds(pairwise_loss, case)


def test_pairwise_kill_matrix():
    checks.kill_matrix(PAIRWISE, wrong_reward_model.PAIRWISE, CASES)


# --- K-wise -----------------------------------------------------------------------------------------------------------

RANKINGS = [(1, 3, 4, False), (2, 2, 2, False), (3, 4, 5, True), (4, 1, 1, False), (5, 0, 3, False), (6, 2, 9, True)]


def ranking_case(case):
    seed, prompts, k, ties = case
    rng = np.random.default_rng(seed)
    ranks = np.argsort(rng.random((prompts, k)), axis=1)
    if ties:
        ranks = ranks // 2
        ranks[0] = 0  # a prompt about which nothing is known
    return rng.standard_normal((prompts, k)), ranks, rng


def ranking_number_by_number(op, case):
    """`itertools.combinations`: of a prompt with no ties, C(K, 2) pairs."""
    rewards, ranks, _ = ranking_case(case)
    for normalizer in (None, 3.5):
        total = 0.0
        for row, rank in zip(rewards.tolist(), ranks.tolist(), strict=True):
            pairs = [sorted(p, key=lambda i: rank[i]) for p in itertools.combinations(range(len(row)), 2)]
            pairs = [(i, j) for i, j in pairs if rank[i] != rank[j]]
            if not case[3]:
                assert len(pairs) == math.comb(len(row), 2)
            total += math.fsum(softplus(row[j] - row[i]) for i, j in pairs) / max(len(pairs), 1)
        exact = total / (normalizer or max(len(rewards), 1))
        assert abs(op(rewards, ranks, normalizer)[0] - exact) <= 1e-14 * (1 + exact)


def ranking_gradients(op, case):
    rewards, ranks, rng = ranking_case(case)
    if rewards.size > 1:
        check_vjp(lambda r: op(r, ranks), rewards, rng=rng)
    drewards = op(rewards, ranks)[1](1.0)
    assert drewards.shape == rewards.shape
    assert np.abs(drewards.sum(axis=1)).max(initial=0) <= 1e-15, "a shift of all rewards of a prompt changes nothing"


def the_order_of_answers_does_not_matter(op, case):
    rewards, ranks, rng = ranking_case(case)
    order = rng.permutation(rewards.shape[1])
    (a, a_vjp), (b, b_vjp) = op(rewards, ranks), op(rewards[:, order], ranks[:, order])
    assert abs(a - b) <= 1e-14 * (1 + abs(a))
    assert np.abs(a_vjp(0.7)[:, order] - b_vjp(0.7)).max(initial=0) <= 1e-15


def two_answers_are_a_pair(op, case):
    chosen, rejected = np.random.default_rng(case[0]).standard_normal((2, 3))
    value, vjp = op(np.stack([rejected, chosen], axis=1), np.array([[1, 0]] * 3))
    expected, expected_vjp = pairwise_loss(chosen, rejected)
    assert abs(value - expected) <= 1e-15
    assert np.abs(vjp(0.7) - np.stack(expected_vjp(0.7)[1::-1], axis=1)).max() <= 1e-16


RANKING = (ranking_number_by_number, ranking_gradients, the_order_of_answers_does_not_matter, two_answers_are_a_pair)


@pytest.mark.parametrize("case", RANKINGS)
@pytest.mark.parametrize("op", [ranking_loss_1, ranking_loss_2])
@pytest.mark.parametrize("holds", RANKING)
def test_ranking_loss(holds, op, case):
    holds(op, case)


def test_ranking_kill_matrix():
    checks.kill_matrix(RANKING, wrong_reward_model.RANKING, RANKINGS)


def test_ranking_in_single_precision_is_single(rng):
    rewards, ranks = rng.standard_normal((2, 3), np.float32), np.array([[0, 1, 2], [2, 0, 1]])
    for op in (ranking_loss_1, ranking_loss_2):
        value, vjp = op(rewards, ranks)
        assert value.dtype == vjp(1.0).dtype == np.float32
        assert abs(value - op(rewards.astype(float), ranks)[0]) <= 1e-6


def test_centering(rng):
    chosen, rejected = rng.standard_normal((2, 4))
    value, _ = centering(chosen, rejected)
    assert abs(value - math.fsum((chosen + rejected) ** 2) / 4) <= 1e-14
    assert abs(centering(chosen, rejected, 2.0)[0] - 2 * value) <= 1e-14
    check_vjp(centering, chosen, rejected, rng=rng)
    checks.pure(centering, [chosen, rejected], rng.standard_normal())
    opposite, vjp = centering(chosen, -chosen)
    assert opposite == 0
    assert not np.any(vjp(1.0))


# --- the model --------------------------------------------------------------------------------------------------------


def model(kind, seed=1):
    """A reward model whose head learns beside whatever the trunk is."""
    rng = np.random.default_rng(seed)
    if kind != "lora":
        return small_policy.params(kind, seed) | {SCORE: rng.standard_normal((1, CONFIG.hidden_size))}
    bare = with_head(small_policy.params("full", seed), rng)
    attached = lora.attach(bare, ["q_proj", "down_proj"], r=2, lora_alpha=3, rng=rng, modules_to_save=["score"])
    return small_policy.move(attached)


def reads_the_last_real_token(op, case):
    params, batch = model("full", case), small_policy.batch(seed=case)
    rewards, _ = op(params, batch, CONFIG)
    for b, length in enumerate(batch.lengths.tolist()):
        hidden, _ = llama.backbone(params, batch.tokens[b : b + 1, :length], CONFIG)
        exact = math.fsum((hidden[0, -1] * params[SCORE][0]).tolist())
        assert abs(rewards[b] - exact) <= 1e-12, f"row {b}: {rewards[b]}, needed {exact}"


def what_fills_a_row_up_does_not_matter(op, case):
    """Also not where it is the very token that the row ends with, as where padding is the end of text."""
    params, batch = model("full", case), small_policy.batch(seed=case)
    rewards, vjp = op(params, batch, CONFIG)
    dy = np.random.default_rng(case).standard_normal(len(batch))
    expected = vjp(dy)
    short = batch.lengths < batch.tokens.shape[1]
    assert short.any()
    ends = batch.tokens[np.arange(len(batch)), batch.lengths - 1]
    padding = np.arange(batch.tokens.shape[1]) >= batch.lengths[:, None]
    same_token = Batch(np.where(padding, ends[:, None], batch.tokens), batch.labels, batch.lengths)
    for other in (small_policy.other_padding(batch), same_token):
        found, other_vjp = op(params, other, CONFIG)
        checks.same_bits(found, rewards, "other padding")
        for name, gradient in other_vjp(dy).items():
            checks.same_bits(gradient, expected[name], name)
    assert np.abs(op(params, small_policy.wider(batch), CONFIG)[0] - rewards).max() <= 1e-13


def score_gradients(op, case):
    batch = small_policy.batch(seed=case)
    check_gradients(lambda p: op(p, batch, CONFIG), model("full", case), rng=np.random.default_rng(case))


SCORE_PROPERTIES = (reads_the_last_real_token, what_fills_a_row_up_does_not_matter, score_gradients)


@pytest.mark.parametrize("holds", SCORE_PROPERTIES)
def test_score(holds):
    for case in (3, 4):
        holds(score, case)


def test_score_kill_matrix():
    checks.kill_matrix(SCORE_PROPERTIES, wrong_reward_model.SCORES, [3])


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_score_over_an_adapter(kind):
    params, batch = model(kind), small_policy.batch()
    if kind == "lora":
        check_gradients(lambda p: score(p, batch, CONFIG), params, rng=np.random.default_rng(0))
    rewards, vjp = score(params, batch, CONFIG)
    assert set(vjp(np.ones_like(rewards))) == set(trainable(params))
    merged, _ = score(lora.merge(params), batch, CONFIG)
    assert np.abs(merged - rewards).max() <= (1e-12 if kind == "lora" else 1e-5) * (1 + np.abs(rewards).max())


def test_transformers_reads_the_same_scores():
    """`LlamaForSequenceClassification` with one label, which looks for the last token that is not padding."""
    params, batch, pad = model("full"), small_policy.batch(), CONFIG.vocab_size - 1
    real = np.arange(batch.tokens.shape[1]) < batch.lengths[:, None]
    tokens = np.where(real, batch.tokens % pad, pad)
    sizes = {n: v for n, v in dataclasses.asdict(CONFIG).items() if not n.startswith("rope")}
    network = transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(**sizes, num_labels=1, pad_token_id=pad, bos_token_id=None, eos_token_id=None)
    ).eval()
    state = {name: torch.tensor(w.astype(np.float32)) for name, w in params.items()}
    assert not network.load_state_dict(state, strict=True).unexpected_keys
    with torch.no_grad():
        theirs = network(torch.tensor(tokens), attention_mask=torch.tensor(real.astype(int))).logits[:, 0].numpy()
    ours, _ = score(params, Batch(tokens, batch.labels, batch.lengths), CONFIG)
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(ours).max()


def test_recomputation_changes_no_bit():
    params, batch = model("lora"), small_policy.batch()
    (a, a_vjp), (b, b_vjp) = (score(params, batch, CONFIG, recompute=r) for r in (False, True))
    checks.same_bits(b, a, "rewards")
    for name, gradient in a_vjp(a).items():
        checks.same_bits(b_vjp(a)[name], gradient, name)


@pytest.mark.parametrize("n", [0, 1])
def test_of_one_or_none(n):
    """One prompt is not halved, and a batch without any has loss 0."""
    ranked, ranks = np.array([[1.0, 3.0]])[:n], np.array([[0, 1]])[:n]
    for ranking in (ranking_loss_1, ranking_loss_2):
        assert ranking(ranked, ranks)[0] == pytest.approx(n * softplus(2.0), rel=1e-15)
    assert centering(np.ones(1)[:n], np.ones(1)[:n])[0] == 4 * n
    batch = small_policy.batch(rows=1)
    one = Batch(batch.tokens[:, :1], batch.labels[:, :1], np.array([1]))
    assert np.isfinite(score(model("full"), one, CONFIG)[0]).all()


def test_rows_that_cannot_be_scored_are_refused():
    batch = small_policy.batch()
    with pytest.raises(ValueError, match=r"^a packed row holds several texts, needed one a row: use `pad`$"):
        score(model("full"), Batch(batch.tokens, batch.labels, batch.lengths, np.zeros_like(batch.tokens)), CONFIG)
    with pytest.raises(ValueError, match=r"^row 2 has no token, so there is nothing to score$"):
        empty = np.where(np.arange(len(batch)) == 2, 0, batch.lengths)
        score(model("full"), Batch(batch.tokens, batch.labels, empty), CONFIG)


def test_with_head_takes_the_place_of_the_output_matrix(rng):
    params = small_policy.params("full") | {llama.HEAD: np.ones((23, 8))}
    headed = with_head(params, rng)
    assert set(headed) == set(params) - {llama.HEAD} | {SCORE}
    drawn = np.concatenate([with_head(params, rng)[SCORE] for _ in range(4000)])
    assert abs(drawn.std() * 3 - 1) <= 0.02  # 1 / √(8 + 1); 32,000 numbers
    assert abs(drawn.mean()) <= 0.01


def encoded(rng, n):
    tokens = rng.integers(0, CONFIG.vocab_size, n)
    return tokens, np.where(np.arange(n) < 2, -100, tokens)


def pairs_of(rng, n=3, **options):
    return pad_pairs([encoded(rng, 4 + i) for i in range(n)], [encoded(rng, 6 - i) for i in range(n)], **options)


def test_the_loss_of_a_model(rng):
    pairs, params = pairs_of(rng, margin=rng.random(3)), model("lora")
    for center, normalizer in ((0.0, None), (0.3, None), (0.3, 7.0)):
        value, _ = reward_model.loss(params, pairs, CONFIG, normalizer, center=center)
        total = 0.0
        for i in range(3):
            w, l = (
                score(params, Batch(t[None, :n], t[None, :n], np.array([n])), CONFIG)[0][0]
                for t, n in zip(
                    pairs.batch.tokens[2 * i : 2 * i + 2], pairs.batch.lengths[2 * i : 2 * i + 2], strict=True
                )
            )
            total += softplus(-(w - l - pairs.margin[i])) + center * (w + l) ** 2
        assert abs(value - total / (normalizer or 3)) <= 1e-12
        check_gradients(
            lambda p, c=center, n=normalizer: reward_model.loss(p, pairs, CONFIG, n, center=c), params, rng=rng
        )


def test_pairs_come_apart_and_add_up(rng):
    pairs = pairs_of(rng, margin=rng.random(3), reference=rng.standard_normal((3, 2)))
    assert (len(pairs), pairs.count, len(pairs.lengths)) == (3, 3, 6)
    params = model("lora")
    whole, vjp = reward_model.loss(params, pairs, CONFIG)
    expected = vjp(1.0)
    parts = [pairs.take(np.array(i)) for i in ([2], [0, 1])]
    parts = [part.cut(int(part.lengths.max())) for part in parts]
    checks.same_bits(parts[0].margin, pairs.margin[2:], "margin")
    checks.same_bits(parts[1].reference, pairs.reference[:2], "reference")
    results = [reward_model.loss(params, part, CONFIG, 3.0) for part in parts]
    assert abs(sum(value for value, _ in results) - whole) <= 1e-13
    first, second = (part_vjp(1.0) for _, part_vjp in results)
    for name, gradient in expected.items():
        assert np.abs(first[name] + second[name] - gradient).max() <= 1e-12
    with pytest.raises(ValueError, match=r"^1 chosen and 0 rejected answers: needed one of each for every pair$"):
        pad_pairs([encoded(rng, 3)], [])
    with pytest.raises(ValueError, match=r"^a batch of 1 rows, needed two for each pair$"):
        Pairs(pairs.batch.take(np.array([0])))


# --- what a reward is worth -------------------------------------------------------------------------------------------


def test_normalization(rng):
    scores = 3 * rng.standard_normal(200) + 5
    gain, bias = normalization(scores)
    assert abs(np.mean(gain * scores + bias)) <= 1e-13
    assert abs(np.var(gain * scores + bias) - 1) <= 1e-13
    gain, bias = normalization(scores / 100)
    assert abs(np.var(gain * scores / 100 + bias) - 1) <= 1e-13
    gain, bias = normalization(scores, scale=False)
    assert gain == 1
    assert abs(np.mean(scores + bias)) <= 1e-13
    assert normalization(np.full(3, 2.0), scale=False) == (1.0, -2.0)
    with pytest.raises(ValueError, match=r"^all 3 scores are 2: no gain gives them variance 1$"):
        normalization(np.full(3, 2.0))
    with pytest.raises(ValueError, match=r"^no scores to normalize by: needed some, of demonstrations or samples$"):
        normalization(np.zeros(0))


def test_accuracy_counts_ties_as_wrong():
    assert accuracy(np.array([1.0, 2, 3, 0]), np.array([0.0, 2, 2, -1])) == 0.75


def test_calibration():
    """Pairs drawn from the model itself agree with it as often as it expects; by hand for three."""
    assert calibration(np.array([0.0, 2.0, 0.0]), np.array([0.0, 0.0, 2.0]), bins=2) == [
        (0.5, 0.5, 1),
        (float(preferred(np.array([2.0]))[0]), 0.5, 2),
    ]
    rng = np.random.default_rng(0)
    a, b = 2 * rng.standard_normal((2, 40_000))
    first = rng.random(40_000) < preferred(a - b)
    table = calibration(np.where(first, a, b), np.where(first, b, a))
    assert len(table) == 5
    assert sum(pairs for _, _, pairs in table) == 40_000
    for i, (expected, observed, pairs) in enumerate(table):
        assert 0.5 + 0.1 * i <= expected <= 0.6 + 0.1 * i
        assert abs(expected - observed) <= 4 * math.sqrt(expected * (1 - expected) / pairs)
    assert calibration(np.array([50.0]), np.array([0.0]), bins=3) == [(1.0, 1.0, 1)]
    assert calibration(np.array([50.0, 3.0]), np.zeros(2)) == [(float((1 + preferred(np.array([3.0]))[0]) / 2), 1.0, 2)]
    near = np.array([math.log(p / (1 - p)) for p in (0.5998, 0.6003)])  # on both sides of a border
    assert [pairs for _, _, pairs in calibration(near, np.zeros(2))] == [1, 1]
    assert calibration(near, np.zeros(2), bins=1)[0][1:] == (1.0, 2)
    with pytest.raises(ValueError, match=r"^bins is 0, needed at least 1$"):
        calibration(a, b, bins=0)
