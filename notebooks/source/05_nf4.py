# %% [markdown]
# # 05 · NF4: sixteen numbers from the normal distribution
#
# *15 minutes. Builds on notebook 04: blocks, scales, codebooks.*
#
# Four bits tell sixteen numbers apart. Notebook 04 spaced them evenly. QLoRA places them where the weights are, and
# calls the result a *data type*: the 4-bit NormalFloat, NF4. Afterwards you can
#
# - derive the sixteen numbers, and say why they are not symmetric;
# - take a weight to four bits and back, by hand and in NumPy;
# - say which mistakes are made in it, and let `check` find them;
# - judge the claim that NF4 is "information-theoretically optimal".

# %%
from statistics import NormalDist

import matplotlib.pyplot as plt
import numpy as np
from hypothesis import strategies as st

from minift.conformance import check
from minift.notebook import attempt, figures
from minift.quant import blockwise, nf4
from minift.quant.codebooks import INT4
from minift.step import show, step

figures()
rng = np.random.default_rng(0)

# %% [markdown]
# ## Where the sixteen numbers come from
#
# Trained weights are, roughly, normally distributed with mean 0. If each code shall be used equally often, its value
# must sit at a *quantile* of the normal distribution. With $\Phi^{-1}$, the inverse of the distribution function,
#
# $$
# v_i = \Phi^{-1}(p_i) \quad\text{for } p_i \text{ evenly spaced from } \delta \text{ to } \tfrac12,
# \qquad c = \frac{v}{\max v} \tag{5.1}
# $$
#
# $\Phi^{-1}(1)$ is infinite, so the quantiles stop short of 1, at
#
# $$
# \delta = \tfrac12 \left( \left(1 - \tfrac1{30}\right) + \left(1 - \tfrac1{32}\right) \right) = 0.9677083 \tag{5.2}
# $$
#
# and because padding and pruned weights are exactly 0, one of the sixteen has to be exactly 0. That leaves fifteen, an
# odd number: eight positive values (nine points from $\delta$ to ½, without the ½) and seven negative ones (eight
# points, without the ½).

# %% stated=true
for code, value in enumerate(nf4.CODE):
    print(f"{code:2d}  {code:04b}  {value:+.4f}")

# %%
x = np.linspace(-2.6, 2.6, 400)
density = np.exp(-x * x / 2) / np.sqrt(2 * np.pi)
largest = NormalDist().inv_cdf(nf4.OFFSET)  # what the code 1.0 stands for, in standard deviations

figure, axes = plt.subplots()
axes.fill_between(x, density, alpha=0.15)
axes.plot(x, density)
for value in nf4.CODE * largest:
    axes.vlines(value, 0, NormalDist().pdf(value), color="#d65f5f" if value else "black", linewidth=1.2)
axes.plot(INT4 * largest, np.full(INT4.size, -0.02), "|", color="gray", markersize=9)
axes.annotate("INT4: evenly spaced", (-2.55, -0.028), color="gray", fontsize=8)
axes.set(title="NF4: levels are close where weights are many", xlabel="weight, standard deviations", yticks=[])
plt.show()

# %% [markdown]
# Most of the levels stand where the curve is high. The price is paid at the ends: the gap between neighbors grows from
# 0.0796 beside zero to 0.3038 at the left end.

# %% stated=true
gaps = np.diff(nf4.CODE)
print(
    f"smallest gap {gaps.min():.4f}, beside zero; largest {gaps.max():.4f}, between {nf4.CODE[0]} and {nf4.CODE[1]:.4f}"
)

# %% [markdown]
# ### Exercise 5.1: the table
#
# Write (5.1). `offset` is δ. `NormalDist().inv_cdf(p)` is $\Phi^{-1}$, and `np.linspace` spaces points evenly. What
# stands here is the first attempt of many: sixteen quantiles, evenly spaced on both sides at once.


# %% exercise="5.1"
def my_quantiles(offset):
    points = np.linspace(1 - offset, offset, 16)
    values = np.array([NormalDist().inv_cdf(p) for p in points])
    return values / values.max()


# %%
with attempt("5.1"):
    print(check(nf4.normal_quantiles, my_quantiles, inputs={"offset": st.floats(0.9, 0.99)}))

# %% [markdown]
# The paper prints another formula (its equation 4), $q_i = \tfrac12\left(\Phi^{-1}\left(\tfrac{i}{17}\right) +
# \Phi^{-1}\left(\tfrac{i+1}{17}\right)\right)$. For $i = 0$ it is infinite, and it does not give the published table.
# What the authors' program does is (5.1).

# %% [markdown]
# ## From a weight to four bits
#
# A block of weights shares one scale, its largest magnitude. Each weight is divided by it and gets the nearest value of
# the table, by comparing it with the fifteen midpoints $m_i$ between neighbors:
#
# $$
# a = \max_{\text{block}} |w| \qquad q = \#\{\, i : w / a > m_i \,\} \tag{5.3}
# $$
#
# $$
# \hat w = c_q \cdot a \tag{5.4}
# $$
#
# Two codes share a byte: the first one in the *high* four bits. Here is the real function, line by line, on eight
# weights. Before you go on, predict: which codes do −1.20 and 0.00 get?

# %% varies=true
block = np.array([0.12, -0.34, 0.56, -1.20, 0.90, 0.00, -0.05, 0.31], np.float32)
recording = step(nf4.quantize, block, 64, into=("_scale", "_encode", "pack"))
show(recording, height=420)

# %% stated=true
q = nf4.quantize(block)
codes = nf4.unpack(q.codes, block.size)
print("scale  ", q.absmax[0])
print("codes  ", codes)
print("bytes  ", q.codes.tobytes().hex(" "))
print("weights", np.round(nf4.dequantize(q), 4))
print(
    "error  ",
    np.round(np.abs(nf4.dequantize(q) - block).max(), 4),
    "at most; allowed",
    np.round(gaps.max() / 2 * 1.2, 4),
)

# %% [markdown]
# −0.05 has become an exact 0: divided by 1.2 it is −0.0417, and the midpoint to its left is −0.0455.
#
# ### Exercise 5.2: break it, and mend it
#
# This quantizer looks right, and gives the right bytes for the block above. It has five mistakes, some of which have
# been made in published code. `check` holds it against everything that is known of `nf4.quantize`, and prints the
# *smallest* inputs that fail. Mend what one of them shows, run it again, and go on until nothing is left.


# %% exercise="5.2"
def my_quantize(w, block_size):
    blocks = w.reshape(-1)  # one after the other, in row-major order
    n = blocks.size
    padded = np.append(blocks, np.zeros(-n % block_size, w.dtype)).reshape(-1, block_size).astype(np.float32)
    absmax = np.abs(padded).max(axis=1, initial=0)
    scaled = padded / absmax[:, None]
    codes = np.abs(scaled[..., None] - nf4.CODE).argmin(axis=-1).astype(np.uint8).reshape(-1)[:n]
    if n % 2:
        codes = np.append(codes, np.uint8(0))
    return codes[0::2] << 4 | codes[1::2], absmax


# %%
print(my_quantize(block, 64)[0].tobytes().hex(" "))
with attempt("5.2"):
    check("nf4.quantize", my_quantize)

# %% [markdown]
# <details><summary>A hint for each</summary>
#
# 1. What is 0/0? A block of zeros has no largest magnitude to divide by.
# 2. Whatever fills the last byte decodes to a number: let it be the code of 0.
# 3. Between two levels there is a number that is equally far from both, and the rule (5.3) says which one it gets.
# 4. A quotient and a product with $1/a$ are rounded differently, and may end on different sides of a midpoint:
#    bitsandbytes multiplies, in float32, and files in its format were made so. Where $a$ is tiny, $1/a$ is
#    infinite: it takes $1/\max(a, 10^{-38})$.
# 5. NaN has no nearest value. Say so, instead of choosing one: `raise ValueError(...)`.
#
# </details>
#
# ### Exercise 5.3: and back
#
# Bytes and scales to weights, equation (5.4). A block may begin in one row of the matrix and end in the next.


# %% exercise="5.3"
def my_dequantize(codes, absmax, shape, block_size):
    values = nf4.CODE[np.stack([codes & 15, codes >> 4], axis=1).reshape(-1)]
    return (values * np.repeat(absmax, block_size)[: values.size]).reshape(shape)


# %%
with attempt("5.3"):
    check("nf4.dequantize", my_dequantize)

# %% [markdown]
# ## How good is it?
#
# The error of a block of normal numbers, by size of the block, for NF4 and for sixteen evenly spaced values. In larger
# blocks the largest number is larger, and all others pay for it.

# %% stated=true
normal = rng.standard_normal(1 << 18).astype(np.float32)
sizes = [32, 64, 128, 256, 512, 1024, 4096]
errors = {
    name: [blockwise.round_trip_error(normal, table, size) for size in sizes]
    for name, table in {"NF4": nf4.CODE, "INT4": INT4}.items()
}
for size, ours, even in zip(sizes, *errors.values(), strict=True):
    print(f"block {size:5d}   NF4 {ours:.4f}   INT4 {even:.4f}   {even / ours:.2f} times as much")

# %%
figure, axes = plt.subplots()
for name, values in errors.items():
    axes.plot(sizes, values, marker="o", label=name)
axes.axhline(0.072798, color="gray", linewidth=0.8, linestyle=":")
axes.annotate("bitsandbytes' published 0.0728 for blocks of 64", (150, 0.0695), color="gray", fontsize=8)
axes.set(xscale="log", xlabel="block size", ylabel="mean |error|", title="Error on N(0, 1)", ylim=(0.05, None))
axes.set_xticks(sizes, sizes)
axes.minorticks_off()
axes.legend()
plt.show()

# %% [markdown]
# ### Is it optimal?
#
# The paper calls NF4 "information-theoretically optimal" for normal weights: each code is used equally often, so that
# four bits carry four bits. But it is not the weights that are looked up. It is the weights *divided by the largest of
# their block*, and those are not normal: every block has a ±1 in it, and the larger the block, the closer to zero are
# the others.

# %% stated=true
for size in (64, 1024):
    q = nf4.quantize(normal, size)
    share = np.bincount(nf4.unpack(q.codes, normal.size), minlength=16) / normal.size
    entropy = -(share * np.log2(share)).sum()
    print(
        f"block {size:4d}: a code is used in {share.min():.1%} to {share.max():.1%} of cases; {entropy:.2f} of 4 bits"
    )

# %%
figure, axes = plt.subplots()
q = nf4.quantize(normal, 64)
share = np.bincount(nf4.unpack(q.codes, normal.size), minlength=16) / normal.size
axes.bar(range(16), share)
axes.axhline(1 / 16, color="black", linewidth=0.8, linestyle="--", label="equally often")
axes.set(title="How often each code is used: N(0, 1), blocks of 64", xlabel="code", xticks=range(16))
axes.yaxis.set_major_formatter("{x:.0%}")
axes.legend()
plt.show()

# %% [markdown]
# So the claim holds for the table, and only roughly for its use. It is a good data type, not an optimal one
# (Yoshida 2023 works out what would be). `minift claims` has this and 62 other claims, each computed again.
#
# ## What to look at
#
# - Whether zero is exact. A table without it moves every pruned weight and all padding.
# - The largest number of a block, and who pays for it: that is the story of the outliers in notebook 04.
# - $\text{NF4}(-w) \ne -\text{NF4}(w)$ for most weights: the table is not symmetric, and the error has a mean.
# - 4 bits are not all: a float32 scale for 64 weights is half a bit more. Notebook 06 shrinks it.
#
# ## Sources
#
# - T. Dettmers, A. Pagnoni, A. Holtzman, L. Zettlemoyer: *QLoRA: Efficient Finetuning of Quantized LLMs*, 2023,
#   [arXiv 2305.14314](https://arxiv.org/abs/2305.14314), section 3.
# - D. Yoshida: *NF4 Isn't Information Theoretically Optimal (and that's Good)*, 2023,
#   [arXiv 2306.06965](https://arxiv.org/abs/2306.06965).
# - `minift/quant/nf4.py`, `kernels/minift_kernels/quant/nf4.py`; `minift step nf4`;
#   `minift conformance --list --op nf4.quantize`.
