# %% [markdown]
# # 03 · LoRA: learn a difference of low rank
#
# *20 minutes. Builds on notebook 01 (a linear layer and its pullback) and notebook 02 (what full fine-tuning costs).*
#
# Fine-tuning takes a weight $W$ to $W' = W + \Delta W$. LoRA leaves $W$ as it is, and learns $\Delta W$ as the product
# of a tall matrix and a wide one. Afterwards you can
#
# - write the forward and the backward pass, and say why exactly one of the two factors starts at zero;
# - count what learns, and say where it stops to save anything;
# - tell the conventions of libraries apart: which factor is which, and what α is divided by;
# - merge an adapter, swap it, mix it with others, and say when merging loses something;
# - judge "98 % cheaper" and "10,000 times fewer".

# %%
import dataclasses

import matplotlib.pyplot as plt
import numpy as np
from hypothesis import strategies as st

from minift.claims import lora as claims
from minift.conformance import check, matrices
from minift.data import stdlib_docs
from minift.data.templates import encode_all
from minift.io import load_model, load_tokenizer
from minift.nn.dropout import dropout
from minift.nn.linear import rows
from minift.nn.weight import Frozen, dense
from minift.notebook import SMALL, attempt, figures
from minift.peft import batched, lora, merge
from minift.peft.lora import LoRA
from minift.quant import nf4
from minift.step import show
from minift.step.lessons import LESSONS
from minift.studies.two_texts import mixed, train
from minift.train.evaluate import held_out_loss

figures()
rng = np.random.default_rng(0)

# %% [markdown]
# ## W' = W + s B A
#
# $$
# W' = W + s\, B A \qquad s = \frac{\alpha}{r} \qquad A \in \mathbb{R}^{r \times \text{in}},\;
# B \in \mathbb{R}^{\text{out} \times r} \tag{3.1}
# $$
#
# The product of the two thin matrices has rank at most $r$, and $r$ is small: 1 to 64, for matrices of thousands of
# rows and columns. The rule of thumb says that $2 \cdot d \cdot r$ numbers learn instead of $d^2$. Exactly, they are
#
# $$
# r\,(d_\text{in} + d_\text{out}) \quad\text{instead of}\quad d_\text{in} \cdot d_\text{out} \tag{3.2}
# $$
#
# Before you run it: how many learn in a matrix of 4 rows and 3 columns with $r = 1$? And at which rank does a square
# matrix of 4,096 rows save nothing any more?

# %% stated=true
for d_out, d_in, r in ((4, 3, 1), (4096, 4096, 8), (4096, 4096, 2048), (11008, 4096, 8), (1024, 4096, 8)):
    learn, all_of_it = lora.trainable_parameters(d_out, d_in, r), d_out * d_in
    print(f"{d_out:6,} × {d_in:5,}, r = {r:5,}: {learn:10,} of {all_of_it:10,} learn, {learn / all_of_it:7.2%}")

# %%
figure, axes = plt.subplots()
ranks = np.array([1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096])
for d in (128, 1024, 4096):
    possible = ranks[ranks <= d]
    axes.plot(
        possible, 100 * lora.trainable_parameters(d, d, possible) / d**2, marker="o", markersize=3, label=f"{d:,}"
    )
axes.axhline(100, color="black", linewidth=0.8, linestyle="--")
axes.annotate("as many as the matrix has", (1, 118), fontsize=8)
axes.set(xscale="log", yscale="log", xlabel="rank r", ylabel="numbers that learn, %", title="Square matrices of d rows")
axes.set_xticks([1, 8, 64, 512, 4096], ["1", "8", "64", "512", "4,096"])
axes.set_yticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])
axes.minorticks_off()
axes.set_ylim(0.03, 400)
axes.legend(title="d", loc="lower right")
plt.show()

# %% [markdown]
# It saves nothing from $r = d_\text{in} d_\text{out} / (d_\text{in} + d_\text{out})$ on: half of $d$ for a square one.
#
# ### Exercise 3.1: how many learn?
#
# What stands here is the rule of thumb.


# %% exercise="3.1"
def my_count(d_out, d_in, r):
    return 2 * d_in * r


# %%
with attempt("3.1"):
    size = st.integers(1, 4096)
    print(check(lora.trainable_parameters, my_count, inputs={"d_out": size, "d_in": size, "r": st.integers(1, 64)}))

# %% [markdown]
# It is right for attention in GPT-3, where all matrices are square, and wrong for most layers of newer models: those of
# an MLP are not square, and keys and values have fewer rows than queries.
#
# ## One step, by hand
#
# The forward pass never forms $BA$. It takes a detour through $r$ numbers:
#
# $$
# y = x W^\top + h B^\top \qquad h = s\, x A^\top \tag{3.3}
# $$
#
# The pullback takes $\partial L / \partial y$, here $dy$, back the same two ways. With $dh = s\, dy\, B$,
#
# $$
# dA = dh^\top x \qquad dB = dy^\top h \qquad dx = dy\, W + dh\, A \tag{3.4}
# $$
#
# There is no $dW$: $W$ is frozen, and the product $dy^\top x$ that full fine-tuning forms for it is not needed.
#
# Here is the real `lora.forward`, line by line, on a matrix of 12 numbers with $r = 1$ and $α = 2$. It asks before it
# shows. Two questions to begin with: what does the detour add to $y$ in the first step? Which of $A$ and $B$ can move?

# %% varies=true
show(LESSONS["lora"](), height=560)

# %% [markdown]
# The same in six lines, to compare with what you have worked out:

# %% stated=true
W = np.array([[1.0, 0, 2], [0, 1, 0], [1, 1, 0], [2, 0, 1]])  # (out, in) = (4, 3)
A, B, s = np.array([[1.0, 0, -1]]), np.zeros((4, 1)), lora.scaling(lora_alpha=2, r=1)
x, dy = np.array([[1.0, 2, 0]]), np.array([[1.0, 0, -1, 2]])

y, vjp = lora.forward(x, W, A, B, s)
_, dW, dA, dB = vjp(dy)
print("step 0   y =", y[0], "  the base gives", (x @ W.T)[0])
print("         dB =", dB[:, 0], "  dA =", dA[0], "  dW =", dW)

B = B - 0.5 * dB  # one step of gradient descent; A does not move, its gradient is zero
y, vjp = lora.forward(x, W, A, B, s)
print("step 1   y =", y[0], "  in one product", (x @ (W + s * B @ A).T)[0])
print("         dA =", vjp(dy)[2][0])
print("ΔW =")
print(s * B @ A + 0.0)
print("singular values of ΔW", np.round(np.linalg.svd(s * B @ A, compute_uv=False), 3))

# %% [markdown]
# Every row of ΔW is a multiple of $A$: one singular value, rank 1. Two ways to compute $y$, one result. While you
# train, the detour is the cheap one: $r\,(\text{in} + \text{out})$ multiplications a row, and no ΔW in memory. When you
# are done, the sum is: one matrix, no detour.
#
# ### Exercise 3.2: forward and backward
#
# This looks finished, trains, and its loss falls. It has three mistakes. `check` holds it against what is known of
# `lora.forward`: the base has no gradient, scales are exact, the pullback is the transpose of the derivative. (Dropout
# is on the detour only, and `dropout` gives a value and its pullback, as everything here does.)


# %% exercise="3.2"
def my_forward(x, W, A, B, scaling, p, dropout_key):
    x_tilde = dropout(x, p, dropout_key)[0] if p and dropout_key is not None else x
    h = x_tilde @ A.T
    y = x @ W.T + scaling * (h @ B.T)

    def vjp(dy):
        dh = dy @ B
        dA = rows(dh).T @ rows(x_tilde)
        dB = rows(dy).T @ rows(h)
        dx = dy @ W
        return dx, None, dA, dB

    return y, vjp


# %%
with attempt("3.2"):
    check("lora.forward", my_forward, examples=20 if SMALL else 100, dtypes=("float32", "float64"))

# %% [markdown]
# <details><summary>A hint for each</summary>
#
# 1. $x$ takes two ways into $y$, so two contributions come back to it. Without the second, the layers *below* learn as
#    if the adapter were not there.
# 2. $s$ stands in front of $h$: what is multiplied by it on the way there is multiplied by it on the way back. With
#    $s = 1$ nobody notices; many tests have $\alpha = r$.
# 3. And so for the other factor. AdamW nearly hides both: it divides each gradient by its own size.
#
# </details>
#
# ## Why exactly one factor starts at zero
#
# Four ways to start. Which of them leave the model as it is? Which of these can learn?

# %% stated=true
x, W, dy = (rng.standard_normal(shape) for shape in ((5, 16), (12, 16), (5, 12)))
random_A, random_B = rng.standard_normal((2, 16)) / 4, rng.standard_normal((12, 2)) / 4
print(f"{'A':>8} {'B':>8}   change of y    |dA|    |dB|")
for A, B in ((random_A, 0 * random_B), (0 * random_A, random_B), (0 * random_A, 0 * random_B), (random_A, random_B)):
    y, vjp = lora.forward(x, W, A, B, 2.0)
    _, _, dA, dB = vjp(dy)
    names = ["random" if part.any() else "zero" for part in (A, B)]
    changed, of_A, of_B = (np.linalg.norm(part) for part in (y - x @ W.T, dA, dB))
    print(f"{names[0]:>8} {names[1]:>8} {changed:12.2f} {of_A:8.2f} {of_B:7.2f}")

# %% [markdown]
# With both at zero each gradient is a product with the other's zero, and nothing ever moves. With neither at zero you
# fine-tune a model that you have damaged first. Either of the first two will do; the paper, PEFT and this library set
# $B$ to zero. At the first step only $B$ learns, from the second on both do.
#
# ## Conventions
#
# Everybody writes "LoRA", and the formulas differ. Before you take numbers or a file from one library to another:
#
# | | the detour | shapes | starts at zero | scale |
# |---|---|---|---|---|
# | the paper | $B A x$ | $A$ (r, in), $B$ (out, r) | $B$; $A$ is Gaussian | $\alpha / r$ |
# | PEFT, this library | $B A x$ | the same | $B$; $A$ is uniform, ±1/√in | $\alpha / r$, or $\alpha/\sqrt r$ |
# | loralib, `Linear` | $B A x$ | the same | $B$, though the comment above it says $A$ | $\alpha / r$ |
# | loralib, `Embedding` | $B A x$ | the same | $A$, though the comment says $B$ | $\alpha / r$ |
# | LLMs-from-scratch | $x A B$ | $A$ (in, r), $B$ (r, out) | $B$ | first $\alpha$, later $\alpha / r$ |
# | mlx-lm | $x A B$ | transposed as well | $B$ | `scale`, which is $s$ itself |
#
# The scale is the mistake that costs most: $\alpha$ in place of $\alpha / r$ is an adapter $r$ times too strong, and no
# shape complains. The other way round, with $\alpha$ kept and $r$ doubled, $s$ halves: whoever compares ranks keeps
# $\alpha / r$ fixed, as the next section does.

# %% [markdown]
# ## How much rank does it need?
#
# The built-in model, of a million parameters, learns to answer questions about Python's library. Once everything
# learns, and then adapters of rank 1, 2, 4, … on all linear layers, with $s = 2$ for all. Same examples, same order.
# The paper's bet is that ΔW of full fine-tuning is of low rank anyhow. Is it?

# %%
STEPS = 3 if SMALL else 40
RANKS = (1, 8) if SMALL else (1, 2, 4, 8, 32)
config, params = load_model("tiny")
tokenizer, texts = load_tokenizer("tiny"), stdlib_docs.embedded()
examples = encode_all(texts.train_pairs[:: 60 if SMALL else 4], tokenizer, max_length=96).examples
held_out = encode_all(texts.held_out_pairs[:: 40 if SMALL else 8], tokenizer, max_length=96).examples


def tuned(r):
    start = params if r is None else lora.attach(params, r=r, lora_alpha=2 * r, rng=np.random.default_rng(0))
    rate = 1e-3 if r is None else 5e-3  # what `minift finetune` takes for each
    few = held_out[:1]  # measured before and after: the loss on all of them follows below
    return train(start, config, mixed(examples, 0), STEPS, rate, 0, few, STEPS, keep_best=False).params


trained = {r: tuned(r) for r in (None, *RANKS)}
losses = {r: held_out_loss(p, held_out, config) for r, p in trained.items()}
print(f"before: {held_out_loss(params, held_out, config):.2f} nats a token on questions that nobody has trained on")
for r, loss in losses.items():
    print(f"{'everything learns' if r is None else f'r = {r}':>18}: {loss:.2f}")

# %%
NAME = "model.layers.1.self_attn.q_proj.weight"


def singular_values(learned, name=NAME):
    return np.linalg.svd(dense(learned[name]).astype(np.float64) - dense(params[name]), compute_uv=False)


figure, (left, right) = plt.subplots(1, 2, figsize=(7, 3.4), width_ratios=(3, 2))
full = singular_values(trained[None])
assert full[-1] > 1e-5 * full[0]  # full rank
left.semilogy(np.arange(1, 129), full / full[0], color="black", label="full")
for r in RANKS:
    values = singular_values(trained[r])[:r]
    left.semilogy(np.arange(1, r + 1), values / values[0], marker="o", markersize=3, linewidth=1, label=f"r = {r}")
left.set(xscale="log", xlabel="number", ylabel="singular value ÷ the largest", title="ΔW of one q_proj")
left.set_ylim(1e-3, 1.5)
left.set_xticks([1, 2, 4, 8, 32, 128], [1, 2, 4, 8, 32, 128])
left.minorticks_off()
left.legend(fontsize=8, loc="lower left")
right.plot(RANKS, [losses[r] for r in RANKS], marker="o")
right.axhline(losses[None], color="black", linestyle="--", linewidth=0.8)
right.annotate("full", (RANKS[0], losses[None]), xytext=(0, -10), textcoords="offset points", fontsize=8)
right.set(xscale="log", xlabel="rank r", ylabel="held-out loss", title="What rank buys")
right.set_xticks(RANKS, RANKS)
right.minorticks_off()
right.margins(y=0.2)
plt.show()

# %%
noise = np.linalg.svd(rng.standard_normal((128, 128)), compute_uv=False)
print("share of ‖ΔW‖² in the first 8 of 128 directions")
print(f"  noise of the same shape       {np.sum(noise[:8] ** 2) / np.sum(noise**2):.0%}")
print(f"  ΔW of full fine-tuning        {np.sum(full[:8] ** 2) / np.sum(full**2):.0%}")

# %% [markdown]
# Full fine-tuning gives a ΔW of full rank: none of its 128 singular values is zero. But the first few directions hold
# much more of it than they would of noise, and few directions are what it takes: rank 1 already brings most of the
# gain, each doubling brings less, and soon nothing. An adapter of rank $r$ has $r$ directions, and not one more; of 32
# it uses the last ones little.
#
# ## Merging
#
# When training is over, (3.1) may be carried out once: `lora.merge`. The model is then a plain one again, with as many
# products as before and no latency; equal to the adapted one but for rounding.

# %% stated=true
adapted = lora.attach(params, r=8, lora_alpha=16, rng=np.random.default_rng(1))
adapted = {
    name: w.with_arrays({lora.A_NAME: w.A, lora.B_NAME: 0.01 * rng.standard_normal(w.B.shape, np.float32)})
    if isinstance(w, LoRA)
    else w
    for name, w in adapted.items()
}
whole, (base, adapter) = lora.merge(adapted), lora.detach(adapted)
W, layer = dense(params[NAME]), adapted[NAME]
by_hand = W + 16 / 8 * layer.B @ layer.A
back = lora.unmerge(whole, adapter)[NAME].dense()
print("merged as by hand      ", np.allclose(whole[NAME].dense(), by_hand, rtol=0, atol=1e-6))
print("the base is still there", base[NAME].dense() is dense(params[NAME]))
print("unmerged, the same bits", np.array_equal(back, W), f"but off by no more than {np.abs(back - W).max():.0e}")

# %% [markdown]
# ### Exercise 3.3: merge with the right scale
#
# `merged` is the library's; yours gets the arrays and α.


# %%
def merged(W, A, B, lora_alpha):
    return LoRA(Frozen(W), A, B, lora_alpha).dense()


# %% exercise="3.3"
def my_merge(W, A, B, lora_alpha):
    return W + lora_alpha * B @ A


# %%
with attempt("3.3"):
    for r in (1, 2, 4):
        arrays = {"W": matrices(2, 3), "A": matrices(r, 3), "B": matrices(2, r)}
        report = check(merged, my_merge, inputs=arrays | {"lora_alpha": st.sampled_from((1.0, 8.0, 16.0))})
    print(report)

# %% [markdown]
# With $r = 1$ the first attempt passes. A test with one rank, or with $\alpha = r$, proves nothing about the scale.
#
# ### Into four bits
#
# An adapter of QLoRA (notebook 07) was trained over $W_q$, which is $W$ rounded to 4 bits, and has learned to mend that
# too. Three models may be called "merged": $W_q + sBA$, dense again; $W + sBA$ over the original weights; and the first
# one rounded to 4 bits once more. `merge.merge_error` measures how far each is from what was trained, in units of what
# the adapter does: at 1 one might as well throw it away. How much is lost, if the adapter adds 10 % to the weights?

# %% stated=true
original = {NAME: rng.standard_normal((256, 256)).astype(np.float32)}
q = nf4.quantize(original[NAME])
sizes, lost = [0.02, 0.05, 0.1, 0.2, 0.5, 1.0], {"dequantized": [], "original": [], "requantized": []}
for share in sizes:
    A, B = (rng.standard_normal(shape).astype(np.float32) for shape in ((8, 256), (256, 8)))
    B *= np.float32(share * np.linalg.norm(q.dense()) / np.linalg.norm(B @ A))
    over_4_bits = {NAME: LoRA(q, A, B, lora_alpha=8)}
    lost["dequantized"].append(merge.merge_error(merge.merge_dequantized(over_4_bits), over_4_bits))
    lost["original"].append(merge.merge_error(merge.merge_original(over_4_bits, original), over_4_bits))
    lost["requantized"].append(merge.merge_error(merge.merge_requantized(over_4_bits), over_4_bits))
print("the adapter adds   dequantized   original   requantized")
for i, share in enumerate(sizes):
    print(f"{share:16.0%}" + "".join(f"{lost[way][i]:13.2f}" for way in lost))

# %%
figure, axes = plt.subplots()
for way, values in lost.items():
    axes.plot([100 * share for share in sizes], values, marker="o", label=way)
axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
axes.annotate("no better than without an adapter", (22, 1.06), fontsize=8)
axes.set(xscale="log", ylim=(-0.1, 2.2), ylabel="error ÷ the adapter's own effect")
axes.set(xlabel="‖s B A‖ ÷ ‖W‖, %", title="Merging an adapter that was trained over NF4")
axes.set_xticks([100 * share for share in sizes], [f"{100 * share:g}" for share in sizes])
axes.minorticks_off()
axes.legend()
plt.show()

# %% [markdown]
# Only the dense one is what was trained. NF4 moves a weight in steps, and what adds less than half a step is lost; an
# adapter that adds little is lost as a whole. To serve in 4 bits, keep the adapter beside the base.

# %% [markdown]
# ## Many adapters on one base
#
# An adapter is a value. `detach` takes it off, `insert` puts it on, or another one, and no weight is copied. `mix` adds
# several up by concatenating ranks,
#
# $$
# [\,c_1 s_1 B_1 \;\cdots\; c_n s_n B_n\,] \begin{bmatrix} A_1 \\ \vdots \\ A_n \end{bmatrix} = \sum_i c_i s_i B_i A_i
# \tag{3.5}
# $$
#
# which is exact. Before you run it: what comes out if one averages the $A$s and the $B$s instead?


# %% stated=true
def random_adapter(r):
    fresh = lora.detach(lora.attach(params, r=r, lora_alpha=2 * r, rng=rng))[1]
    arrays = {name: 0.01 * rng.standard_normal(a.shape, np.float32) for name, a in fresh.arrays.items()}
    return dataclasses.replace(fresh, arrays=arrays)


def delta(adapter):
    return lora.insert(base, adapter)[NAME].delta()


one, two, three = random_adapter(8), random_adapter(4), random_adapter(8)
both = lora.mix([(one, 0.5), (two, 0.5)])
for each in (one, two, both):
    print(each)
wanted = 0.5 * delta(one) + 0.5 * delta(two)
print(f"mixed: off by {np.linalg.norm(delta(both) - wanted) / np.linalg.norm(wanted):.0e} of ΔW, which is rounding")

averages = {name: (a + three.arrays[name]) / 2 for name, a in one.arrays.items()}  # possible where ranks are equal
wanted = 0.5 * delta(one) + 0.5 * delta(three)
averaged = delta(dataclasses.replace(one, arrays=averages))
print(f"averaged factors: off by {np.linalg.norm(averaged - wanted) / np.linalg.norm(wanted):.0%}")

# %% [markdown]
# $(B_1 + B_2)(A_1 + A_2)$ has cross terms $B_1 A_2$ that no adapter has learned. And one batch can hold the requests of
# many users, each with an adapter of its own, or none: the base product is shared, the detours are not.

# %% stated=true
layers = [lora.insert(base, chosen)[NAME] for chosen in (one, two)]
users = batched.stack([(layer.A, layer.B, layer.scaling) for layer in layers])
print(users)
requests, whose = rng.standard_normal((4, 128)).astype(np.float32), np.array([0, 1, -1, 0])  # −1: the base alone
y, _ = batched.forward(requests, base[NAME], users, whose)
for row, user in enumerate(whose):
    alone = base[NAME] if user < 0 else layers[user]
    same = np.allclose(y[row], alone.linear(requests[row : row + 1])[0][0], rtol=1e-4, atol=1e-4)
    print(f"row {row}: adapter {user:2d}, the same as alone: {same}")

# %% [markdown]
# ## "98 % cheaper", "10,000 times fewer"
#
# `minift claims` computes again what papers and textbooks print. Of LoRA:

# %% stated=true
for claim in (
    claims.cost_in_parameters(),
    claims.cost_in_memory(),
    claims.cost_in_arithmetic(),
    claims.ten_thousand_times_fewer(),
    claims.checkpoint_size(),
    claims.training_memory(),
    claims.speed(),
):
    print(f"{claim.claim}\n    claimed {claim.claimed:g}, found {claim.found:,.5g}: {claim.verdict}")

# %% [markdown]
# So far fewer numbers *learn*, by a factor of thousands, and with them shrink gradients, the optimizer's moments, and
# the file you send to somebody. The weights still have to be there (not even an adapter of size zero saves more than
# 83 % of memory with 16-bit weights), and every token still goes through all of them forward and back: what is left out
# is the gradient of $W$, a third of the arithmetic. Whoever wants the weights smaller reads on in notebook 04.
#
# ## What to look at
#
# - The loss at step 0 equals the base model's, to the bit. If not, a factor that should be zero is not.
# - $|dA|$ is zero at the first step and only then; $|dB|$ never is.
# - When you change $r$: what became of $\alpha / r$?
# - A merged model against the adapted one, on real inputs: a few units in the last place, and not the base's answer.
# - Whether the adapter was trained over 4-bit weights. Nothing in its file's shapes tells.
#
# ## Sources
#
# - E. Hu, Y. Shen, P. Wallis, Z. Allen-Zhu, Y. Li, S. Wang, L. Wang, W. Chen: *LoRA: Low-Rank Adaptation of Large
#   Language Models*, 2021, [arXiv 2106.09685](https://arxiv.org/abs/2106.09685).
# - D. Kalajdzievski: *A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA*, 2023,
#   [arXiv 2312.03732](https://arxiv.org/abs/2312.03732).
# - L. Chen, Z. Ye, Y. Wu, D. Zhuo, L. Ceze, A. Krishnamurthy: *Punica: Multi-Tenant LoRA Serving*, 2023,
#   [arXiv 2310.18547](https://arxiv.org/abs/2310.18547).
# - `minift/peft/lora.py`, `merge.py`, `batched.py`; `kernels/minift_kernels/peft/lora.py`; `minift step lora`,
#   `minift step merge`; `minift merge`; `minift claims --only cost-in-memory cost-in-arithmetic`.
