# %% [markdown]
# # 12 · PPO, DPO and over-optimization
#
# *20 minutes. Builds on notebook 11, the reward model.*
#
# A reward says what an answer is worth. Now the model shall give better ones. Afterwards you can
#
# - say what is optimized, and why a leash belongs to it: the best policy under a leash is known in closed form;
# - derive PPO's clipped loss and its advantages, and DPO's loss, which needs neither a reward model nor a sample;
# - read a run: reward, KL, gold, and the point from which on the reward rises and the answers get worse.

# %%
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as of_numpy

from minift.conformance import check, matrices
from minift.data import topics
from minift.io import load_model, load_tokenizer
from minift.nn.weight import freeze
from minift.notebook import SMALL, attempt, figures
from minift.peft import lora
from minift.rlhf import advantages, dpo, ppo, training
from minift.rlhf.actor_critic import VALUE, with_value_head
from minift.rlhf.measure import best_of, measure
from minift.rlhf.rollouts import scored_by_function
from minift.train.loop import Settings

figures()

# %% [markdown]
# ## What is optimized
#
# $$
# \max_\pi \; \mathbb{E}_{y \sim \pi} \, r(y) - \beta \, \text{KL}(\pi, \pi_{\text{ref}}),
# \qquad \text{KL}(\pi, \pi_{\text{ref}}) = \mathbb{E}_{y \sim \pi} \log \frac{\pi(y)}{\pi_{\text{ref}}(y)} \tag{12.1}
# $$
#
# The second term is the leash: $\beta$ is what a nat of distance from the first policy costs. With five possible
# answers everything can be computed. The best policy is
#
# $$
# \pi^*(y) = \frac{1}{Z} \, \pi_{\text{ref}}(y) \, e^{r(y) / \beta} \tag{12.2}
# $$
#
# Take five answers, a reward that is gold and an error, and let the last answer be one that the reward model loves and
# nobody else. Before you look: what happens to gold as the leash gets longer?

# %%
reference = np.array([0.30, 0.25, 0.20, 0.20, 0.05])
gold = np.array([0.2, 0.5, 0.6, 0.1, 0.0])
reward = np.array([0.2, 0.5, 0.7, 0.1, 1.1])  # what the reward model says: the last one is its mistake

betas = np.geomspace(10, 0.05, 60)
tilted = reference * np.exp(reward / betas[:, None])
policies = tilted / tilted.sum(axis=1, keepdims=True)  # (12.2), a row for each β
kl = (policies * np.log(policies / reference)).sum(axis=1)

figure, (left, right) = plt.subplots(1, 2, figsize=(7, 3))
left.plot(kl, policies @ reward, label="reward")
left.plot(kl, policies @ gold, label="gold")
left.set(title="over-optimization in closed form", xlabel="KL, nats")
left.legend()
for answer, share in enumerate(policies.T):
    right.plot(kl, share, label=f"answer {answer + 1}")
right.set(title="the best policy at each KL", xlabel="KL, nats")
right.legend(fontsize=7)
plt.show()

# %% stated=true
best = (policies @ gold).argmax()
print(f"gold is highest at KL {kl[best]:.2f}: {(policies @ gold)[best]:.3f}; it began at {reference @ gold:.3f}")
print(
    f"at the end of the leash, KL {kl[-1]:.2f}: reward {(policies @ reward)[-1]:.3f}, gold {(policies @ gold)[-1]:.3f}"
)

# %% [markdown]
# Nothing has gone wrong in the optimization. It is *because* it succeeds that gold falls. A leash, or stopping in time,
# is not a technicality of PPO; it is the price of a reward that is only a model (Gao et al. 2022).
#
# ## How PPO gets there
#
# Of a language model there are too many answers to sum over, so one samples. What is known of a sampled token is by how
# much things went better than expected, its *advantage*. Values $V_t$ say what to expect, and
#
# $$
# \delta_t = r_t + \gamma V_{t+1} - V_t, \qquad \hat A_t = \delta_t + \gamma \lambda \hat A_{t+1} \tag{12.3}
# $$
#
# runs from the last token to the first (Schulman et al. 2015). Behind the last token $V$ is 0: the text is over.
#
# ### Exercise 12.1: advantages
#
# Rows have different lengths: `mask` says which tokens are real, and nothing may leak through the gap. `bootstrap` is
# the value of what comes after the last token of each row, where a text was only cut off. The attempt forgets two
# things.


# %% exercise="12.1"
def my_gae(rewards, values, mask, gamma, lam, bootstrap):
    result = np.zeros_like(rewards)
    carried = np.zeros_like(rewards[:, 0])
    following = np.zeros_like(carried) if bootstrap is None else bootstrap
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * following - values[:, t]
        carried = delta + gamma * lam * carried
        result[:, t] = np.where(mask[:, t], carried, 0)
        following = values[:, t]
    return result


# %%
with attempt("12.1"):
    check("advantages.gae_1", my_gae, examples=20 if SMALL else 100)

# %% [markdown]
# Several steps are made on one batch of answers, and after the first of them the policy is no longer the one that gave
# the answers. The ratio $\rho_t = \pi(y_t) / \pi_{\text{old}}(y_t)$ corrects for it, and the clip makes sure that it
# pays to move only so far:
#
# $$
# \text{loss} = -\frac1N \sum_t \min\left(\rho_t \hat A_t, \; \text{clip}(\rho_t, 1 - \varepsilon, 1 + \varepsilon)
# \hat A_t\right) \tag{12.4}
# $$

# %%
rho = np.linspace(0.5, 1.5, 200)
figure, axes = plt.subplots(1, 2, figsize=(7, 2.6), sharey=True)
for panel, sign in zip(axes, (1.0, -1.0), strict=True):
    token = np.ones((1, rho.size))
    each, _ = ppo.clipped_objective(np.log(rho)[None], 0 * token, sign * token, token > 0, 0.2)
    panel.plot(rho, -sign * rho, linestyle=":", color="gray", label="not clipped")
    panel.plot(rho, each[0], label="(12.4)")
    panel.set(title=f"advantage {sign:+.0f}", xlabel="ratio")
    panel.legend()
axes[0].set_ylabel("loss of a token")
plt.show()

# %% [markdown]
# It is a pessimist. What went well is not made ever likelier, and what went badly is not made ever less likely. But a
# token that went badly and has become *likelier* since (right panel, right end) is pulled back with full strength.
#
# ### Exercise 12.2: the clipped loss
#
# The attempt clips the ratio and leaves it at that. For which tokens is that wrong, and why would a policy never come
# back from a mistake with it?


# %% exercise="12.2"
def my_policy_loss(logp, old_logp, advantages, mask):
    rho = np.clip(np.exp(logp - old_logp), 0.8, 1.2)
    return -(rho * advantages * mask).sum() / max(mask.sum(), 1)


# %%
def policy_loss(logp, old_logp, advantages, mask):
    return ppo.policy_loss(logp, old_logp, advantages, mask, cliprange=0.2)[0]


tokens = {name: matrices(1, 2) for name in ("logp", "old_logp", "advantages")}
tokens["mask"] = of_numpy.arrays(np.bool_, (1, 2), elements=st.booleans()).map(lambda mask: mask | [[True, False]])
with attempt("12.2"):
    check(policy_loss, my_policy_loss, inputs=tokens)

# %% [markdown]
# ### What does a nat cost?
#
# The KL of (12.1) is estimated from the tokens that were sampled, in one of three ways (Schulman 2020). With
# $\ell = \log \pi_{\text{ref}} - \log \pi$ of a token,
#
# $$
# k_1 = -\ell \qquad k_2 = \tfrac12 \ell^2 \qquad k_3 = e^\ell - 1 - \ell \tag{12.5}
# $$

# %% stated=true
policy = policies[best]
drawn = np.random.default_rng(0).choice(5, size=100_000, p=policy)
logp, ref_logp = np.log(policy)[drawn], np.log(reference)[drawn]
print(f"exactly {kl[best]:.3f} nats")
for estimator in ("k1", "k2", "k3"):
    estimates, _ = advantages.kl_penalty(logp, ref_logp, estimator)
    print(f"{estimator}: {estimates.mean():.3f} on average, from {estimates.min():+.2f} to {estimates.max():+.2f}")

# %% [markdown]
# $k_1$ is right on average and negative for many tokens; $k_3$ is right and never negative; $k_2$ is a little off, and
# the only one whose *gradient* is right.

# %% [markdown]
# ## PPO on a small model, with a foolish reward
#
# The reward counts how often an answer says "the". The built-in model, as it was pre-trained, says it sometimes. Two
# runs, with a short leash and a long one.

# %%
config, params = load_model("tiny")
tokenizer = load_tokenizer("tiny")
questions, _ = topics.questions()
score = scored_by_function(lambda question, answer: answer.lower().split().count("the"))
first_policy = freeze(params)


def optimize(beta):
    """Held-out records, and the answers of the last policy."""
    policy = lora.attach(params, "all-linear", r=8, lora_alpha=16, rng=np.random.default_rng(0))
    seen = []

    def evaluate(step, current):
        policy = {name: weight for name, weight in current.items() if name != VALUE}
        options = {"max_new_tokens": 16, "temperature": 0.7}
        seen.append(measure(policy, first_policy, questions[:48], score, config, tokenizer, **options))
        return seen[-1].record()

    result = training.train_ppo(
        with_value_head(policy),
        questions,
        score,
        config,
        tokenizer,
        Settings(steps=2 if SMALL else 15, learning_rate=3e-3, warmup_steps=2, eval_every=3),
        ppo.Settings(kl_coef=beta, num_ppo_epochs=2, temperature=0.7),
        evaluate=evaluate,
        batch_size=16 if SMALL else 64,
        max_new_tokens=16,
    )
    return [record for record in result.records if "distinct" in record and "gold" in record], seen[-1].texts


runs = {"short leash, β = 0.3": optimize(0.3), "long leash, β = 0.02": optimize(0.02)}

# %%
figure, axes = plt.subplots()
for name, (records, _) in runs.items():
    axes.plot([r["kl"] for r in records], [r["reward"] for r in records], marker="o", label=name)
axes.set(title="reward against KL, every three rounds", xlabel="KL to the first policy, nats an answer", ylabel='"the"')
axes.legend()
plt.show()
for name, (_, texts) in runs.items():
    print(name)
    for text in texts[:3]:
        print("   ", " ".join(text.split()))

# %% [markdown]
# With the long leash the reward is far higher, and the answers are ruins. The leash on its own says nothing about what
# is good; it says: do not go where you have never been.
#
# ## DPO: no reward model, no samples
#
# (12.2), solved for the reward, says that any policy is the best one for *some* reward:
#
# $$
# r(y) = \beta \log \frac{\pi(y)}{\pi_{\text{ref}}(y)} + \text{const} \tag{12.6}
# $$
#
# The constant is the same for all answers to a question, so in the loss of notebook 11, which sees only differences, it
# cancels:
#
# $$
# \text{loss} = -\log \sigma\left(\beta \left[ \log \frac{\pi(y_w)}{\pi_{\text{ref}}(y_w)} -
# \log \frac{\pi(y_l)}{\pi_{\text{ref}}(y_l)} \right]\right) \tag{12.7}
# $$
#
# ### Exercise 12.3: DPO
#
# Value and pullback, `vjp(dloss) -> dchosen, drejected, None, None`. With `label_smoothing` ε the loss is
# $-(1 - ε) \log σ(βh) - ε \log σ(-βh)$; `loss_type` "ipo" asks for $(h - 1/2β)^2$. All are divided by the number of
# pairs, or by `normalizer`. The attempt leaves out the reference. What would it do to an answer that was likely before?


# %% exercise="12.3"
def my_dpo(chosen, rejected, ref_chosen, ref_rejected, beta, label_smoothing, loss_type, normalizer):
    h = chosen - rejected
    n = max(len(h), 1) if normalizer is None else normalizer
    sigma = np.exp(-np.logaddexp(0, -beta * h))

    def vjp(dloss):
        dh = -beta * (1 - sigma) * dloss / n
        return dh, -dh, None, None

    return np.logaddexp(0, -beta * h).sum() / n, vjp


# %%
with attempt("12.3"):
    check("dpo.preference_loss", my_dpo, examples=20 if SMALL else 100)

# %% [markdown]
# At the start the policy is the reference: $h = 0$, and the loss is $\ln 2$ whatever the data.

# %% stated=true
same = np.array([-12.5, -40.0])
loss, vjp = dpo.preference_loss(same, same - 3, same, same - 3, beta=0.1)
print(f"loss {loss:.4f}; gradient of the chosen answers {vjp(1.0)[0]}")

# %% [markdown]
# There is a third way, without any training: give $n$ answers, and take the one that scores highest. It costs $n$ times
# as much at every question, and its KL is at most $\log n - (n - 1)/n$:

# %% stated=true
for n in (1, 4, 8, 64):
    print(f"best of {n:2d}: {best_of(np.zeros((n, 1)))[1]:.2f} nats")

# %% [markdown]
# ## The whole circle, measured
#
# `minift rlhf` taught the built-in model to write docstrings about two topics, and measured everything by a rubric
# that nothing was trained on: gold. Three seeds:

# %% stated=true
measured = json.loads(Path("../benchmarks/rlhf.json").read_text())
print(measured["command"], "·", measured["machine"].partition(",")[0])
for name in ("SFT", "DPO", "PPO", "best of 8"):
    of = [run["policies"][name] for run in measured["runs"]]
    gained = np.array([run["gain"] for run in of])
    spread = gained.std(ddof=1) / len(of) ** 0.5
    mean = {key: np.mean([run[key] for run in of]) for key in ("gold", "kl", "names")}
    row = f"{name:10s} gold {mean['gold']:.3f}, KL {mean['kl']:.1f} nats, names a topic {mean['names']:.0%}"
    print(row + ("" if name == "SFT" else f", gained {gained.mean():+.3f} ± {spread:.3f}"))

# %% [markdown]
# All three are better than what they began with; best of 8 most, and it is the one that pays at every answer. And with
# a long leash, the same picture as in the toy at the top of this page:

# %%
weak = measured["weak_leash"]["ppo_on_held_out_questions"]
figure, axes = plt.subplots()
along = [record["kl"] for record in weak]
errors = [record["gold_standard_error"] for record in weak]
axes.errorbar(
    along, [r["gold"] for r in weak], yerr=errors, marker="o", capsize=3, color="#55a868", label="gold (left)"
)
axes.set(
    title=measured["weak_leash"]["command"], xlabel="KL to the first policy, nats an answer", ylabel="gold", ylim=0
)
other = axes.twinx()
other.plot(along, [r["reward"] for r in weak], marker="s", linestyle="--", color="#d65f5f", label="reward (right)")
other.spines["right"].set_visible(True)
other.grid(False)
axes.legend(loc="lower center")
other.legend(loc="lower right")
plt.show()

# %% stated=true
for record in weak:
    print("round {step:2d}: reward {reward:+.2f}, gold {gold:.3f}, distinct answers {distinct:.0%}".format(**record))

# %% [markdown]
# ## What to look at
#
# - The reward must rise. That it rises says nothing about the answers: *read them*.
# - KL, in nats an answer. Above some point gold falls; nobody but gold, or a person, can tell where it is.
# - The first ratio of every round is 1, to the bit, if all answers are in one minibatch. If not, something is computed
#   differently while sampling and while training (dropout, temperature, padding).
# - The share of distinct answers. When it falls, the policy has found its sentence.
#
# ## Sources
#
# - J. Schulman and others: *Proximal Policy Optimization Algorithms*, 2017, [arXiv 1707.06347](https://arxiv.org/abs/1707.06347);
#   *High-Dimensional Continuous Control Using Generalized Advantage Estimation*, 2015,
#   [arXiv 1506.02438](https://arxiv.org/abs/1506.02438).
# - R. Rafailov and others: *Direct Preference Optimization*, 2023, [arXiv 2305.18290](https://arxiv.org/abs/2305.18290).
# - L. Gao, J. Schulman, J. Hilton: *Scaling Laws for Reward Model Overoptimization*, 2022,
#   [arXiv 2210.10760](https://arxiv.org/abs/2210.10760).
# - `minift/rlhf/ppo.py`, `advantages.py`, `dpo.py`; `minift step gae`, `minift step ppo`, `minift step dpo`;
#   `minift ppo --help` has a switch for every detail.
