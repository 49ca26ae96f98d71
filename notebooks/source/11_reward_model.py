# %% [markdown]
# # 11 · The reward model, with you as the rater
#
# *20 minutes. Builds on notebooks 01 and 03.*
#
# What makes an answer good is hard to write down and easy to see. So people compare two answers, and a model learns to
# say what they would prefer. Afterwards you can
#
# - compare answers yourself, and say what your comparisons can and cannot tell;
# - derive the loss of a reward model from the Bradley–Terry model, in a form that never overflows;
# - train one, and judge its accuracy against the ceiling that the raters set;
# - find out what it has really learned, which is not always what you meant.

# %%
import json
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as of_numpy

from minift.conformance import check, matrices
from minift.data import topics
from minift.data.batches import pad
from minift.data.comparisons import as_text, read
from minift.io import load_model, load_tokenizer
from minift.nn import pooling
from minift.notebook import SMALL, attempt, figures, rate_in_notebook
from minift.rlhf import raters, reward_model, training
from minift.rlhf.rollouts import encoded
from minift.train.loop import Settings

figures()
rng = np.random.default_rng(0)

# %% [markdown]
# ## You are the rater
#
# The questions are "Write a docstring about … and …", the answers real first lines from the documentation of Python,
# one of them written for this question and two for others. Click on the better one. Each choice is saved as you make
# it. (Where a notebook is only shown, not run, there are no buttons: the first three answers are printed below.)

# %%
examples, _ = topics.topic_pairs()
order = np.random.default_rng(0).permutation(len(examples))


def candidates(index):
    """A question, and three answers: its own, and two of other questions."""
    others = np.random.default_rng([1, index]).integers(len(examples), size=2)
    return examples[index].messages[:-1], [examples[i].answer for i in (index, *others)]


mine = Path(tempfile.mkdtemp()) / "mine.jsonl"
question, answers = candidates(order[0])
panel = rate_in_notebook([pair for i in order[:5] for pair in raters.pairs(*candidates(i))], mine, name="me")

# %% stated=true
print(as_text(question))
for answer in answers:
    print(" -", answer)

# %% varies=true
found = read(mine) if mine.exists() and mine.stat().st_size else []
agreed, of = raters.agreement(found, raters.RubricRater(0))
print(f"you have compared {len(found)} pairs; a written rubric agrees with you in {agreed} of {of}")

# %% [markdown]
# Three things to notice. You said *which*, not *how much*: a choice carries at most one bit. You would not always
# choose the same again. And you may have preferred what is shorter, or sounds surer, and not what is true.
#
# ## From choices to numbers
#
# Let every answer have a reward $r$, and let the better one be preferred with a probability that depends only on the
# difference (Bradley & Terry 1952):
#
# $$
# P(y_w \succ y_l) = \sigma(r_w - r_l) = \frac{1}{1 + e^{-(r_w - r_l)}} \tag{11.1}
# $$
#
# The reward model makes what the raters said as probable as it can:
#
# $$
# \text{loss} = -\frac1P \sum \log \sigma(r_w - r_l) = \frac1P \sum \log\left(1 + e^{-d}\right), \qquad d = r_w - r_l
# \tag{11.2}
# $$
#
# Its slope is $-\sigma(-d)/P$: pairs in the right order pull little, pairs in the wrong order pull with almost full
# strength, and all together pull rewards apart without an end.

# %%
d = np.linspace(-6, 6, 200)
figure, (left, right) = plt.subplots(1, 2, figsize=(7, 2.8))
left.plot(d, np.logaddexp(0, -d))
left.set(title="loss of a pair, (11.2)", xlabel="d = reward of chosen − rejected")
right.plot(d, -reward_model.preferred(-d), color="#d65f5f")
right.set(title="its slope", xlabel="d")
plt.show()

# %% [markdown]
# ### Exercise 11.1: a loss that does not overflow
#
# What stands here is (11.2) as it is printed. It works for a while. Give it back with its pullback
# `vjp(dloss) -> dchosen, drejected, None`; `margin` is subtracted from $d$ where there is one, and the sum is divided
# by `normalizer`, or by the number of pairs.


# %% exercise="11.1"
def my_loss(chosen, rejected, margin=None, normalizer=None):
    d = chosen - rejected - (0 if margin is None else margin)
    n = max(len(d), 1) if normalizer is None else normalizer
    sigma = 1 / (1 + np.exp(-d))
    loss = -np.log(sigma).sum() / n

    def vjp(dloss):
        dd = (sigma - 1) * dloss / n
        return dd, -dd, None

    return loss, vjp


# %%
with attempt("11.1"):
    check("reward_model.pairwise_loss", my_loss, examples=20 if SMALL else 100)

# %% [markdown]
# ### One answer, one reward
#
# The reward is read off the last token of the answer, the only one that has seen all of it:
#
# $$
# r(x, y) = w \cdot \text{hidden}_{n-1} \tag{11.3}
# $$
#
# Rows of a batch have different lengths, and behind the shorter ones there is padding. Reading the last *column* is a
# mistake that trains without an error: it even learns something, as padding comes after the text.
#
# ### Exercise 11.2: which token?


# %% exercise="11.2"
def my_last_token(x, lengths):
    return x[:, -1]


# %%
def last_token(x, lengths):
    return pooling.last_token(x, lengths)[0]


rows = {"x": matrices(2, 3, 1), "lengths": of_numpy.arrays(np.int64, 2, elements=st.integers(1, 3))}
with attempt("11.2"):
    check(last_token, my_last_token, inputs=rows)

# %% [markdown]
# ### More than two answers
#
# InstructGPT's raters put K answers in order, which is K (K − 1) / 2 comparisons at once. They are not independent, so
# they share the weight of *one* question:
#
# $$
# \text{loss} = \frac1N \sum_{\text{questions}} \frac{1}{\text{pairs}} \sum_{y_i \text{ better than } y_j}
# -\log \sigma(r_i - r_j) \tag{11.4}
# $$
#
# ### Exercise 11.3: a ranking
#
# `ranks` says the place of each answer, the smaller the better; two with the same rank are a tie, which says nothing.
# A question that is all ties adds nothing, and still counts among the N. The attempt takes the mean over all pairs of
# all questions. When is that something else?


# %% exercise="11.3"
def my_ranking_loss(rewards, ranks):
    losses = [
        np.logaddexp(0, -(row[i] - row[j]))
        for row, rank in zip(rewards, ranks, strict=True)
        for i in range(len(row))
        for j in range(len(row))
        if rank[i] < rank[j]
    ]
    return np.float32(np.mean(losses) if losses else 0)


# %%
def ranking_loss(rewards, ranks):
    return reward_model.ranking_loss_2(rewards, ranks)[0]


questions = {"rewards": matrices(2, 3), "ranks": of_numpy.arrays(np.int64, (2, 3), elements=st.integers(0, 2))}
with attempt("11.3"):
    check(ranking_loss, my_ranking_loss, inputs=questions)

# %% [markdown]
# ## A reward model learns a taste
#
# Five clicks teach nothing. So a function shall be the rater, one with a simple taste, so that we know what there is to
# learn: *it prefers the shorter answer*. Like a person it is not sure of itself: in a tenth of the pairs it says the
# opposite. Whoever has understood it completely agrees with it in 90 % of the cases, and nobody in more. That is the
# ceiling.

# %%
prefers_shorter = raters.FunctionRater(lambda question, answer: -len(answer))
EXCHANGED = {"first": "second", "second": "first", "tie": "tie"}


def rater(question, a, b):
    choice = prefers_shorter(question, a, b)
    return EXCHANGED[choice] if raters.coin(0, question, a, b) < 0.1 else choice


compared = [
    raters.comparison(pair, rater(as_text(pair.prompt), pair.left, pair.right), "shorter")
    for index in order[: 60 if SMALL else 900]
    for pair in raters.pairs(*candidates(index))
]
learned, held_out = training.split(compared, 0.2)
print(f"{len(learned):,} comparisons to learn from, {len(held_out)} held out, of other questions")

# %% [markdown]
# The model is the built-in one with its output matrix taken away and one row in its place; LoRA learns below it.

# %%
config, params = load_model("tiny")
tokenizer = load_tokenizer("tiny")
to_learn, to_measure = (training.as_pairs(part, tokenizer) for part in (learned, held_out))
settings = Settings(steps=len(to_learn) // 32, learning_rate=3e-3, warmup_steps=10, eval_every=10)
result = training.train_reward_model(
    training.with_score_head(params, None, np.random.default_rng(0), r=8), to_learn, to_measure, config, settings
)
chosen, rejected = training.scores_of(result.params, to_measure, config)
print(f"held-out loss {result.losses()[0][1]:.2f} → {result.losses()[-1][1]:.2f}; a coin has {np.log(2):.2f}")
print(f"it agrees with {reward_model.accuracy(chosen, rejected):.0%} of the held-out comparisons")

# %% [markdown]
# Is it as sure as it should be? Of the pairs of which it is 80 % sure, 80 % should be right: equation (11.1) makes the
# reward model a probability, and that can be looked at.

# %%
expected, observed, counted = zip(*reward_model.calibration(chosen, rejected, bins=5), strict=True)
figure, (left, right) = plt.subplots(1, 2, figsize=(7, 3))
left.plot([0.5, 1], [0.5, 1], color="gray", linestyle=":")
left.scatter(expected, observed, s=[2 * n for n in counted])
left.set(
    title="calibration", xlabel="how sure it is", ylabel="how often raters agree", xlim=(0.5, 1.02), ylim=(0.3, 1.05)
)
lengths = [len(c.chosen) for c in held_out] + [len(c.rejected) for c in held_out]
right.scatter(lengths, [*chosen, *rejected], s=4, alpha=0.5)
right.set(title="what it has learned", xlabel="letters in the answer", ylabel="reward")
plt.show()

# %% [markdown]
# On the right is the taste of the rater, as the model has understood it. Nobody told it about letters. Now ask it about
# answers that no rater has ever seen:

# %%
strange = ["Return a file object.", "A.", ".", "Return a file object. " * 4, answers[0]]
batch = pad([encoded(question, answer, tokenizer) for answer in strange])
for reward, answer in sorted(zip(reward_model.score(result.params, batch, config)[0], strange, strict=True))[::-1]:
    print(f"{reward:+.2f}  {answer}")

# %% [markdown]
# It likes nonsense, as long as it is short: among real docstrings there was never a reason not to. A policy that is
# optimized against this reward may well find that out. That is *over-optimization*, and notebook 12 measures
# it.
#
# ### The zero drifts
#
# (11.2) sees only differences: adding 1,000 to all rewards changes nothing. So their zero means nothing either, unless
# something holds it, such as a small penalty on $(r_w + r_l)^2$, or a normalization afterwards.

# %% stated=true
a, b = np.array([0.5, 2.0]), np.array([0.0, 2.5])
for shift in (0, 1000):
    loss, center = (f(a + shift, b + shift)[0] for f in (reward_model.pairwise_loss, reward_model.centering))
    print(f"{shift:5,} more for all: loss {loss:.6f}, centering {center:,.2f}")

# %% [markdown]
# ## The real thing
#
# `minift rlhf` lets a written rubric compare answers of the built-in model itself, nine thousand pairs, with the same
# noise. The rubric asks whether an answer is about the thing asked. That is hard for a model of a million parameters:

# %% stated=true
runs = json.loads(Path("../benchmarks/rlhf.json").read_text())["runs"]
for run in runs:
    n, accuracy = run["held_out"], run["reward_accuracy"]
    error = (accuracy * (1 - accuracy) / n) ** 0.5
    print(f"seed {run['seed']}: agrees with {accuracy:.1%} ± {error:.1%} of {n} held-out comparisons, of at most 90 %")

# %% [markdown]
# Little better than a coin, and yet enough to improve the policy: what counts is the average over thousands of answers.
#
# ## What to look at
#
# - Accuracy against the *ceiling*, never against 100 %. Two raters who err in a tenth of the cases each agree with each
#   other in 82 % of them.
# - Whether what is held out are other *questions*, and not only other pairs of the same ones.
# - Length, first: plot reward against it. It is the easiest thing to learn, in this notebook on purpose.
# - Calibration. A model that is 95 % sure and right in 80 % will be believed by PPO all the same.
#
# ## Sources
#
# - R. Bradley, M. Terry: *Rank analysis of incomplete block designs*, Biometrika 39, 1952.
# - N. Stiennon and others: *Learning to summarize from human feedback*, 2020,
#   [arXiv 2009.01325](https://arxiv.org/abs/2009.01325).
# - L. Ouyang and others: *Training language models to follow instructions with human feedback*, 2022,
#   [arXiv 2203.02155](https://arxiv.org/abs/2203.02155).
# - `minift/rlhf/reward_model.py`, `minift/rlhf/raters.py`; `minift step reward`, `minift rate`, `minift reward --help`.
