# %% [markdown]
# # 04 · Quantization: k bits, blocks, outliers
#
# *20 minutes. Builds on notebook 01 (what a weight is and how it multiplies).*
#
# A weight of 32 bits is far more exact than it needs to be. With 4 bits it takes an eighth of the memory, and can have
# sixteen values. Afterwards you can
#
# - store numbers in k bits, and say how far off they can be;
# - choose who shares a scale (a tensor, a row, a block), and count what the scales cost;
# - say who pays for an outlier, and multiply with outlier columns kept apart, as LLM.int8 does;
# - say what a zero point is good for, and when it does harm;
# - choose between float16 and bfloat16.

# %%
import matplotlib.pyplot as plt
import numpy as np
from hypothesis import strategies as st

from minift.conformance import check, matrices
from minift.io import load_model
from minift.nn.weight import dense
from minift.notebook import SMALL, attempt, figures
from minift.quant import affine, blockwise, int8_vectorwise, nf4, sixteen
from minift.quant.codebooks import FP4, INT4, INT8, linear
from minift.studies import outliers, quantization
from minift.studies.formats import Format, linear_layers, share_on_a_grid

figures()
rng = np.random.default_rng(0)

# %% [markdown]
# ## k bits are a table
#
# A code of k bits is a place in a table $c$ of at most $2^k$ values between −1 and 1. One more number, the scale $a$,
# says how much 1 is:
#
# $$
# a = \max |x| \tag{4.1}
# $$
#
# $$
# q = \#\{\, i : x / a > m_i \,\} \qquad m_i = \tfrac12 (c_i + c_{i+1}) \tag{4.2}
# $$
#
# $$
# \hat x = c_q\, a \qquad |\hat x - x| \le a \cdot \tfrac12 \max_i (c_{i+1} - c_i) \tag{4.3}
# $$
#
# (4.2) counts midpoints, and so finds the nearest value. All that differs between the "data types" of the literature
# is the table. `INT4` spaces its values evenly, 15 of them, from −7/7 to 7/7: a sixteenth, −8/7, would have no
# counterpart. `FP4` is a floating-point number of sign, two bits of exponent and one of mantissa; as bitsandbytes has
# it, its zero has two codes. `nf4.CODE` has sixteen, and notebook 05 is about where they come from.

# %% stated=true
for name, table in (("INT4", INT4), ("FP4", FP4), ("NF4", nf4.CODE), ("INT8", INT8)):
    gaps = np.diff(table)
    print(f"{name}: {table.size:3d} values, zero is one: {0 in table}, gaps from {gaps.min():.4f} to {gaps.max():.4f}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(7, 3.4), width_ratios=(3, 2))
ramp = np.linspace(-1, 1, 2001, dtype=np.float32)
for name, table in (("INT4", INT4), ("NF4", nf4.CODE)):
    left.plot(ramp, blockwise.dequantize(blockwise.quantize(ramp, table, ramp.size)), label=name, linewidth=1.2)
left.plot(ramp, ramp, color="black", linewidth=0.6)
left.set(xlabel="weight ÷ scale", ylabel="what comes back", title="Four bits are a staircase")
left.legend()

normal = rng.standard_normal((512, 512)).astype(np.float32)
bits = np.arange(2, 9)
by_bits = [blockwise.round_trip_error(normal, linear(int(k)), 64) for k in bits]
right.semilogy(bits, by_bits, marker="o")
right.set(xlabel="bits", title="Mean |error|, N(0, 1)")
right.set_yticks([0.3, 0.1, 0.03, 0.01], ["0.3", "0.1", "0.03", "0.01"])
right.minorticks_off()
plt.show()

# %% stated=true
for k, error, before in zip(bits[1:], by_bits[1:], by_bits[:-1], strict=True):
    print(f"{k} bits: {2**k - 1:3d} values, mean |error| {error:.4f}, {before / error:.2f} times less")

# %% [markdown]
# Each bit halves the gaps, and with them the error. (With few bits it is more: one of the $2^k$ codes is not used, so
# gaps go 1, 1/3, 1/7, …)
#
# ## Blocks
#
# One scale may serve a whole tensor, a row, or a block of consecutive weights. Let one number be an outlier, twenty
# times as large as the others. By (4.1) it sets the scale, by (4.3) all who share the scale pay. Before you run it: by
# how much does the mean error of 4,096 numbers grow, with one scale for all of them, and with one for each 64?

# %% stated=true
numbers = rng.standard_normal(4096).astype(np.float32)
spoiled = numbers.copy()
spoiled[1000] = 20
for size in (4096, 64):
    plain, bad = (blockwise.round_trip_error(x, nf4.CODE, size) for x in (numbers, spoiled))
    print(f"one scale for {size:5,}: mean |error| {plain:.3f}, with the outlier {bad:.3f}, {bad / plain:.1f} times")

# %%
figure, axes = plt.subplots()
window = slice(800, 1200)
for size in (4096, 64):
    x_hat = blockwise.dequantize(blockwise.quantize(spoiled, nf4.CODE, size))
    label = "one scale for all 4,096" if size == 4096 else "one for each 64"
    axes.plot(np.arange(4096)[window], np.abs(x_hat - spoiled)[window], ".", markersize=5, label=label)
axes.axvspan(960, 1024, alpha=0.12)
axes.annotate("the outlier's block", (962, 1.08), fontsize=8)
axes.set(xlabel="number", ylabel="|error|", title="Who pays for one outlier (at 1,000, of size 20)", ylim=(-0.03, 1.4))
axes.legend(loc="upper left", ncols=2)
plt.show()

# %% [markdown]
# With blocks, 63 numbers pay. Small blocks are not free, though: each has a scale of 32 bits, so with $B$ numbers a
# scale a weight takes
#
# $$
# k + \frac{32}{B} \text{ bits} \tag{4.4}
# $$
#
# ### Exercise 4.1: a quantizer for any table
#
# Blocks are of consecutive numbers in row-major order, whatever the shape; the last one may be short. This first
# attempt has three mistakes. (The two lines that look strange are right: 1/a is computed once a block, in float32, and
# never of 0, and what is not finite is refused.)


# %% exercise="4.1"
def my_quantize(x, code, block_size):
    if not np.isfinite(x).all():
        raise ValueError("x: NaN or infinity, which no code stands for")
    flat = x.reshape(-1).astype(np.float32)
    blocks = flat[: flat.size // block_size * block_size].reshape(-1, block_size)
    absmax = blocks.max(axis=1, initial=0)
    scaled = blocks * (1 / np.maximum(absmax, np.float32(1e-38)))[:, None]
    midpoints = (code[:-1] + code[1:]) / 2
    codes = np.searchsorted(midpoints, scaled, side="right")
    return codes.reshape(-1).astype(np.uint8), absmax


# %%
with attempt("4.1"):
    check("blockwise.quantize", my_quantize, examples=30 if SMALL else 100)

# %% [markdown]
# <details><summary>A hint for each</summary>
#
# 1. How many blocks do 65 numbers make? What fills the last one up must not become its scale.
# 2. The largest number of [−3, 1] is 1. The largest *magnitude* is wanted.
# 3. `np.searchsorted(m, x, side="left")` counts the midpoints below x; `"right"` counts those that equal it, too.
#
# </details>
#
# ## Which table, which block?
#
# Relative errors, $\lVert \hat W - W \rVert / \lVert W \rVert$, of a normal matrix; of the same with one column in 200
# twenty times as large; and of a table of embeddings that was really trained, the built-in model's.

# %%
config, params = load_model("tiny")
kinds = {
    "normal": {"W": normal},
    "with outliers": {"W": quantization.with_outliers(normal, np.random.default_rng(1))},
    "trained": {"W": dense(params["model.embed_tokens.weight"])},
}
assert share_on_a_grid(kinds["trained"]) == 0 and share_on_a_grid(linear_layers(params)) == 1

# %% stated=true
print("                       bits" + "".join(f"{kind:>15}" for kind in kinds))
for how in [Format("int8", "row"), *(Format(t, 64) for t in ("int8", "int4", "fp4", "nf4", "affine int4"))]:
    found = [quantization.measured(kind, weights, how) for kind, weights in kinds.items()]
    errors = "".join(f"{record['relative_error']:15.3f}" for record in found)
    print(f"{how!s:22} {found[0]['bits_per_parameter']:.2f}{errors}")

# %%
figure, axes = plt.subplots(1, 3, figsize=(7, 3.6), sharey=True)
scales = ("tensor", "row", 256, 128, 64, 32)
for panel, (kind, weights) in zip(axes, kinds.items(), strict=True):
    for data_type in ("int8", "fp4", "int4", "nf4"):
        found = [quantization.measured(kind, weights, Format(data_type, per)) for per in scales]
        panel.semilogy([record["relative_error"] for record in found], marker="o", markersize=3, label=data_type)
    panel.set_title(kind)
    panel.set_xticks(range(len(scales)), scales, rotation=60)
    panel.set_yticks([0.01, 0.03, 0.1, 0.3], ["0.01", "0.03", "0.1", "0.3"])
    panel.minorticks_off()
axes[0].set_ylabel("relative error")
axes[1].set_xlabel("who shares a scale")
axes[0].legend(fontsize=8, ncols=2)
plt.show()

# %% [markdown]
# Three things to read off. In blocks of 64, 8 bits lose less than a tenth of what 4 bits lose. Of the three tables of 4
# bits NF4 is the best there on all three matrices (affine int4 takes half a bit more), and int4 beats this FP4 on
# normal and on trained weights; another type of that name, E2M1, is a little better than int4. And where there are
# outliers, who shares a scale matters more than the table.
#
# **A trap in studies like this one.** The linear layers of the built-in model are stored in NF4: on these NF4 would
# lose nothing, which says nothing about NF4. The same goes for SmolLM2's GGUF file and affine int4. `share_on_a_grid`,
# above, finds such weights. `minift study quantization` takes MiniLM, which was published in float32, and its file says
# what came out:

# %% stated=true
found = quantization.__doc__
print(found[found.index("**What was found**") :].strip())

# %% [markdown]
# ## A place to begin
#
# Evenly spaced values around zero are wasted where all numbers have one sign. *Affine* codes have a second number, the
# least one $m$ (other libraries keep it as an integer, the zero point $z = -\mathrm{round}(m/s)$):
#
# $$
# s = \frac{\max x - m}{2^k - 1} \qquad q = \mathrm{round}\Big(\frac{x - m}{s}\Big) \qquad \hat x = q s + m \tag{4.5}
# $$

# %% stated=true
both_ends = spoiled.copy()
both_ends[2000] = -20
cases = {"both signs": numbers, "positive": np.abs(numbers), "outlier 20": spoiled, "outliers ±20": both_ends}
for what, x in cases.items():
    for size in (64, 4096):
        symmetric = np.linalg.norm(blockwise.dequantize(blockwise.quantize(x, INT4, size)) - x)
        shifted = np.linalg.norm(affine.dequantize(affine.quantize(x, 4, size)) - x)
        print(f"{what:>16}, one scale for {size:5,}: error of affine int4 is {shifted / symmetric:.2f} of int4's")
x_hat = affine.dequantize(affine.quantize(np.array([-0.3, 0, 1.0], np.float32), 4, 3))
print("0.0 between −0.3 and 1.0 comes back as", x_hat[1])

# %% [markdown]
# All sixteen codes are used, and none where no numbers are. The price: a second scale, and zero has no code of its own.
# With outliers at both ends zero falls between two steps, and thousands of small numbers move to the one or the other;
# int4 makes them zero, and loses less. An integer zero point, usual in other libraries, keeps zero exact.
#
# ### Exercise 4.2: affine codes
#
# What comes back from k bits, with one scale for the whole vector. Here the result even looks *better* than the
# library's.


# %%
def affine_round_trip(x, bits):
    return affine.dequantize(affine.quantize(x, bits, x.size))


# %% exercise="4.2"
def my_affine_round_trip(x, bits):
    least = x.min()
    step = np.float32((x.max() - least) / 2**bits)  # stored, so rounded to float32
    codes = np.rint((x - np.float64(least)) / step)
    return codes * step + least


# %%
with attempt("4.2"):
    print(check(affine_round_trip, my_affine_round_trip, inputs={"x": matrices(3), "bits": st.integers(2, 8)}))

# %% [markdown]
# <details><summary>Hints</summary>
#
# 1. $2^k$ values have $2^k - 1$ gaps. What is the largest of your codes, and does it fit k bits?
# 2. If all numbers are equal, the step is 0. They should come back as they were.
#
# </details>
#
# ## Outliers in activations: LLM.int8
#
# If both factors of a product are integers, the product is one of integers: exact, and fast on hardware that has it. A
# scale a row of either factors out of the sum:
#
# $$
# y_{io} \approx \frac{a_i\, b_o}{127^2} \sum_j q_{ij}\, p_{oj} \qquad a_i = \max_j |x_{ij}|,\; b_o = \max_j |w_{oj}|
# \tag{4.6}
# $$
#
# A scale for each 64 numbers would not: "block-wise", below, is decoded and multiplied in float32. But in large models
# the same few features are large in *every* token, columns of $x$ that spoil all rows. LLM.int8 takes the columns $O$
# that reach $\tau = 6$ out of the sum and multiplies them as they are:
#
# $$
# y_{io} \approx \frac{a_i\, b_o}{127^2} \sum_{j \notin O} q_{ij}\, p_{oj} + \sum_{j \in O} x_{ij}\, \hat w_{oj}
# \tag{4.7}
# $$
#
# Planted here: 4 of 512 columns of $x$, 1 to 100 times as large as the rest. Which of the four curves stays flat?

# %% stated=true
x, w = (rng.standard_normal((n, 512)).astype(np.float32) for n in (128, 192))
planted = rng.choice(512, 4, replace=False)
records = []
for times in outliers.TIMES:
    factor = np.ones(512, np.float32)
    factor[planted] = times
    records.append(outliers.measured(x * factor, w))
print("times  columns ≥ 6  " + "".join(f"{scheme:>13}" for scheme in outliers.SCHEMES))
for times, record in zip(outliers.TIMES, records, strict=True):
    errors = "".join(f"{record[scheme]:13.3f}" for scheme in outliers.SCHEMES)
    print(f"{times:5d}{record['outlier_columns']:12.1%}  {errors}")

# %%
figure, axes = plt.subplots()
for scheme in outliers.SCHEMES:
    axes.loglog(outliers.TIMES, [record[scheme] for record in records], marker="o", markersize=4, label=scheme)
axes.set(xlabel="4 of 512 columns of x, so many times as large", ylabel="relative error of x Wᵀ")
axes.set_title("Both factors in 8 bits")
axes.set_xticks(outliers.TIMES, outliers.TIMES)
axes.set_yticks([0.01, 0.03, 0.1], ["0.01", "0.03", "0.1"])
axes.minorticks_off()
axes.legend()
plt.show()

# %% [markdown]
# Where many columns are large, keeping them apart is no longer cheap. In small models they may be many:
# `minift study outliers` looks at every layer of one.
#
# ### Exercise 4.3: the product
#
# `int8_vectorwise.quantize_rows` gives the codes (those of outlier columns are 0), the scales, and which columns are
# outliers. What is left is (4.7). $W$ exists in 8 bits only: its outlier part is $\hat w = p\, b / 127$.


# %%
def int8_product(x, W, threshold):
    return int8_vectorwise.forward(x, int8_vectorwise.quantize(W), threshold)[0]


# %% exercise="4.3"
def my_int8_product(x, W, threshold):
    q, a, O = int8_vectorwise.quantize_rows(x, threshold)
    p, b, _ = int8_vectorwise.quantize_rows(W)
    y = np.outer(a, b) / 127**2 * (q @ p.T)
    return y + x[:, O] @ W[:, O].T


# %%
with attempt("4.3"):
    threshold = st.sampled_from((0.0, 6.0))  # 0: no columns apart
    inputs = {"x": matrices(2, 3, largest=9), "W": matrices(2, 3), "threshold": threshold}
    print(check(int8_product, my_int8_product, inputs=inputs))

# %% [markdown]
# <details><summary>Hints</summary>
#
# 1. What is the type of `q @ p.T`, and what is 127 · 127 in it?
# 2. Which $W$ does the library use for the columns apart?
#
# </details>
#
# ## 16 bits: range or digits
#
# Between 4 and 32 bits lie two types without any scales. float16 has 5 bits of exponent and 10 of fraction, bfloat16 8
# and 7: the one runs out of range, the other out of digits.

# %% stated=true
print("                    float16        bfloat16")
for number in (1 / 3, 1e-8, 3e-5, 60000.0, 70000.0):
    kept = []
    for dtype in ("float16", "bfloat16"):
        try:
            kept.append(f"{sixteen.round_to(np.array([number], np.float32), dtype).dense()[0]:.6g}")
        except ValueError:
            kept.append("refused")
    print(f"{number:12.6g} {kept[0]:>14} {kept[1]:>15}")
weight, update = np.array([0.1], np.float32), np.float32(1e-4)
for dtype in ("float16", "bfloat16"):
    stored = sixteen.round_to(weight, dtype).dense()
    moved = sixteen.round_to(stored + update, dtype).dense()
    print(f"{dtype}: an update of 0.0001 moves the weight 0.1 by {moved[0] - stored[0]:.6f}")

# %% [markdown]
# So 16 bits are for what is *frozen*. What learns stays in float32: an update of AdamW is about as large as the
# learning rate, and bfloat16 rounds it away. Large activations overflow in float16 and not in bfloat16, which is why
# large models compute in the latter.
#
# ## What to look at
#
# - The largest number of a block against its typical one. That ratio decides, before any choice of table.
# - Bits *with* scales: blocks of 64 are 4.5 bits, not 4. Notebook 06 gets them down to 4.13.
# - Whether the weights you measure have been in 4 bits before.
# - Whether zero comes back as zero: padding, pruned weights, a ReLU's output.
# - Errors of weights are not errors of answers. `minift study data-types` measures the loss of a model.
#
# ## Sources
#
# - T. Dettmers, M. Lewis, Y. Belkada, L. Zettlemoyer: *LLM.int8(): 8-bit Matrix Multiplication for Transformers at
#   Scale*, 2022, [arXiv 2208.07339](https://arxiv.org/abs/2208.07339).
# - T. Dettmers, M. Lewis, S. Shleifer, L. Zettlemoyer: *8-bit Optimizers via Block-wise Quantization*, 2022,
#   [arXiv 2110.02861](https://arxiv.org/abs/2110.02861).
# - P. Micikevicius et al.: *Mixed Precision Training*, 2018, [arXiv 1710.03740](https://arxiv.org/abs/1710.03740).
# - `minift/quant/blockwise.py`, `codebooks.py`, `affine.py`, `int8_vectorwise.py`, `sixteen.py`;
#   `minift study quantization`, `minift study outliers`, `minift study data-types`;
#   `minift conformance --list --op blockwise.quantize`.
