# %% [markdown]
# # 06 · Double quantization: scales of scales
#
# *15 minutes. Builds on notebook 05: NF4, its blocks of 64 and their scales.*
#
# NF4 takes four bits a weight, and its scales half a bit more. QLoRA quantizes the scales too. Afterwards you can
#
# - compress scales, and say why their mean is taken off first;
# - decode them, and from them the weights, to the bit;
# - count what is saved: 4.5 bits become 4.127, and that is not "half a bit" less;
# - find the trap in which a block comes back with the opposite sign;
# - read a 4-bit matrix out of a file, and say what other libraries mean by the same words.

# %%
import json

import matplotlib.pyplot as plt
import numpy as np
from hypothesis import strategies as st

from minift.claims import qlora as claims
from minift.conformance import check
from minift.io import bitsandbytes4
from minift.notebook import SMALL, attempt, figures
from minift.quant import blockwise, double_quant, nf4
from minift.quant.codebooks import DYNAMIC, INT8, read_only
from minift.step import show
from minift.step.lessons import LESSONS

figures()
rng = np.random.default_rng(0)

# %% [markdown]
# ## What scales look like
#
# 256 blocks of 64 normal weights have 256 scales, each the largest magnitude of its block. Before you run it: are any
# of them near zero?

# %% stated=true
weights = rng.standard_normal((256, 64)).astype(np.float32)
q = nf4.quantize(weights)
scales = q.absmax
mean = np.float32(scales.mean(dtype=np.float64))
print(f"{scales.size} scales: mean {mean:.4f}, from {scales.min() - mean:+.2f} to {scales.max() - mean:+.2f} around it")

# %% [markdown]
# The largest of 64 numbers is never small. All scales are positive, and much alike. So what is left when their mean is
# taken off is small, and has both signs, which suits a signed table of 8 bits:
#
# $$
# \bar a = \mathrm{mean}(a) \tag{6.1}
# $$
#
# $$
# s = \text{codes of } a - \bar a \text{ in blocks of 256, each with a scale of its own, } a_2 \tag{6.2}
# $$
#
# $$
# \hat a = \mathrm{fl}\big(\mathrm{fl}(c_s\, a_2) + \bar a\big) \tag{6.3}
# $$
#
# The table $c$ is the *dynamic* map: a sign, a decimal exponent, and the bits that are left for a fraction. It was made
# for optimizers (notebook 08), whose numbers go over many powers of ten. fl is rounding to float32, which happens
# twice. What does one lose without (6.1)?

# %% stated=true
print("                 largest error   mean error   codes in use")
for what, offset in (("mean taken off", mean), ("as they are", np.float32(0))):
    coded = blockwise.quantize(scales - offset, DYNAMIC, 256)
    error = np.abs(blockwise.dequantize(coded) + offset - scales)
    print(f"{what:>15} {error.max():14.4f} {error.mean():12.4f} {np.unique(coded.codes).size:14d}")

# %%
figure, (above, below) = plt.subplots(2, 1, figsize=(7, 4.2), sharex=True, height_ratios=(3, 1))
above.hist(scales, bins=30, alpha=0.6)
above.axvline(mean, color="black", linewidth=0.8, linestyle="--")
above.annotate("mean", (mean + 0.03, 20.5), fontsize=8)
above.set(ylabel="blocks", title="The scales of 256 blocks of N(0, 1), and the values that 8 bits can have")
second = np.abs(scales - mean).max()
assert (DYNAMIC < 0).sum() == 127 and np.diff(DYNAMIC).max() / 2 < 0.00704
for height, (values, color) in enumerate(((DYNAMIC * scales.max(), "#d65f5f"), (DYNAMIC * second + mean, "#55a868"))):
    inside = values[(values > 1.0) & (values < 4.3)]
    below.plot(inside, np.full(inside.size, height), "|", color=color, markersize=12)
below.set(yticks=(0, 1), xlabel="scale", ylim=(-0.6, 1.6))
below.set_yticklabels(["as they are", "mean off"])
below.grid(visible=False)
plt.show()

# %% [markdown]
# Without the mean, 127 codes stand for negative scales, of which there are none, and most of the others for scales near
# zero, where there are none either.
#
# Here is the real function on eight scales in blocks of four. One of them is tiny: watch what becomes of it.

# %% varies=true
show(LESSONS["double_quant"](), height=560)

# %% [markdown]
# ## What it saves
#
# With blocks of $B = 64$ weights and $B_2 = 256$ scales, the overhead in bits a weight
#
# $$
# \frac{32}{B} \quad\text{becomes}\quad \frac{8}{B} + \frac{32}{B\,B_2} \tag{6.4}
# $$
#
# and 32 bits a tensor for $\bar a$. A matrix of 4,096 × 4,096 weights, counted in bytes:

# %% stated=true
matrix = nf4.quantize(rng.standard_normal((4096, 4096), np.float32))
small = double_quant.compress(matrix)
print(f"codes    {matrix.codes.nbytes:9,} bytes")
print(f"scales   {matrix.absmax.nbytes:9,} bytes in float32, {small.absmax.nbytes:,} doubly quantized")
print(f"together {matrix.bits_per_parameter:.3f} bits a weight, and {small.bits_per_parameter:.3f}")
for claim in (claims.textbook_saving(), claims.saving(), claims.saving_at_65b()):
    print(f"{claim.claim}: {claim.found:.4g}, {claim.verdict}")

# %% [markdown]
# Half a bit is what scales cost *before*. An eighth of a bit they cost still, so what is saved is 0.373 bits, which is
# three quarters of the overhead and a twelfth of everything.
#
# ### Exercise 6.1: the overhead
#
# Equation (6.4), for any sizes of blocks. How many weights share one $a_2$?


# %% exercise="6.1"
def my_overhead(block_size, nested_block_size):
    return 8 / block_size + 32 / nested_block_size


# %%
with attempt("6.1"):
    sizes = st.sampled_from((32, 64, 128, 256))
    print(check(double_quant.overhead_bits, my_overhead, inputs={"block_size": sizes, "nested_block_size": sizes}))

# %% [markdown]
# ### Is it worth it?
#
# There is a simpler way to spend less on scales: larger blocks. 256 weights a block with float32 scales are 4.125 bits,
# about as many as doubly quantized blocks of 64. Which loses less?

# %% stated=true
sample = rng.standard_normal((1024, 1024)).astype(np.float32)
curves = {"float32 scales": [], "doubly quantized": []}
for block_size in (32, 64, 128, 256, 512):
    plain = nf4.quantize(sample, block_size)
    for what, tensor in zip(curves, (plain, double_quant.compress(plain)), strict=True):
        error = np.linalg.norm(nf4.dequantize(tensor) - sample) / np.linalg.norm(sample)
        curves[what].append((tensor.bits_per_parameter, error))
        print(f"blocks of {block_size:3d}, {what:>16}: {tensor.bits_per_parameter:.3f} bits, error {error:.4f}")

# %%
figure, axes = plt.subplots()
for what, points in curves.items():
    bits, errors = zip(*points, strict=True)
    axes.plot(bits, errors, marker="o", label=what)
    for size, x, y in zip((32, 64, 128, 256, 512), bits, errors, strict=True):
        side = (6, 2) if what == "float32 scales" else (-6, -10)
        horizontal = "left" if what == "float32 scales" else "right"
        axes.annotate(size, (x, y), side, textcoords="offset points", fontsize=8, ha=horizontal)
axes.set(xlabel="bits a weight, scales included", ylabel="relative error", title="NF4 on N(0, 1), by size of the block")
axes.margins(0.08)
axes.legend()
plt.show()

# %% [markdown]
# For the same bits, small blocks with coarse scales beat large blocks with exact ones. What 8 bits do to a scale is a
# small part of what 4 bits do to the weights.
#
# ## The trap
#
# (6.3) adds a *rounded* difference to the mean. Take a block that is nearly dead, its scale far below the mean, among
# others of which one is large. Then the difference is about $-\bar a$, and if it is rounded down by more than the
# scale, the sum is negative. How often does that happen, if one takes the nearest code, as bitsandbytes does?

# %% stated=true
negative, example = 0, None
for seed in range(100):
    drawn = np.random.default_rng(seed).standard_normal((256, 64)).astype(np.float32)
    drawn[100] *= 0.001  # nearly dead
    drawn[7] *= 20  # large
    four_bits = nf4.quantize(drawn)
    offset = np.float32(four_bits.absmax.mean(dtype=np.float64))
    nearest = blockwise.dequantize(blockwise.quantize(four_bits.absmax - offset, DYNAMIC, 256)) + offset
    if nearest[100] < 0:
        negative += 1
        example = example or (four_bits, drawn, nearest)
print(f"nearest code: the dead block's scale comes back negative in {negative} of 100 matrices")

four_bits, drawn, nearest = example
safe = double_quant.compress(four_bits)
print(f"one of them: its scale was {four_bits.absmax[100]:.4f}")
signs = nf4.unpack(four_bits.codes, drawn.size)[6400:6464]
for what, scale in (("nearest code", nearest[100]), ("compress", safe.scales()[100])):
    correlation = np.corrcoef(nf4.CODE[signs] * scale, drawn[100])[0, 1]
    print(f"{what:>13}: decodes to {scale:+.4f}, correlation of the block with its weights {correlation:+.3f}")

# %% [markdown]
# The scale is far off either way: between two values of the map there is nothing. But with the nearest one all weights
# of the block have changed their sign. They are small, so no mean error shows it. `compress` takes the smallest code
# that does not come back negative. It is the only place where its codes are others than bitsandbytes', and decoding
# clamps nothing, so that existing files keep their meaning.
#
# ### Exercise 6.2: compress
#
# (6.1) and (6.2), as one writes them down, and about what bitsandbytes does. There are four cases that this attempt
# does not think of.


# %% exercise="6.2"
def my_compress(scales, block_size):
    offset = scales.mean()
    nearest = blockwise.quantize(scales - offset, DYNAMIC, block_size)
    return nearest.codes, nearest.absmax, offset


# %%
with attempt("6.2"):
    check("double_quant.compress", my_compress, examples=30 if SMALL else 100)

# %% [markdown]
# <details><summary>Hints</summary>
#
# 1. The mean of no scales is no number.
# 2. A float32 sum of a hundred large scales may be infinite, though their mean is not. Sum in float64.
# 3. Scales are magnitudes. What is negative, infinite or NaN was never one, and is refused.
# 4. Which entries of the table decode to less than zero in a block? They are the first few. How many are they, in the
#    very arithmetic of (6.3)? No code may be less than that count.
#
# </details>
#
# ## Back to weights
#
# The whole way, line by line, for two blocks of which the second is twice the first: bytes to scales, scales and
# nibbles to weights. Both blocks have the same codes. Why?

# %% varies=true
show(LESSONS["dequantize"](), height=560)

# %% [markdown]
# ### Exercise 6.3: decode
#
# This attempt is *more* exact than (6.3), and safer. Both are mistakes here: a file's weights are what they have always
# been, to the bit, and a GPU that multiplies and adds with one rounding gives other ones.


# %% exercise="6.3"
def my_decode(codes, absmax, offset, block_size):
    nested = np.repeat(absmax.astype(np.float64), block_size)[: codes.size]
    scales = DYNAMIC[codes] * nested + offset
    return np.maximum(scales, 0).astype(np.float32)


# %%
with attempt("6.3"):
    check("double_quant.decode", my_decode, examples=30 if SMALL else 100)

# %% [markdown]
# ## What a file holds
#
# A matrix that bitsandbytes has quantized twice is six tensors in a file of safetensors, under these names. The
# offset is in the JSON, and the 256 values of the table come along: a file may have others in the last bits.

# %% stated=true
name = "model.layers.0.self_attn.q_proj.weight"
stored = double_quant.compress(nf4.quantize(sample))
packed = bitsandbytes4.pack_tensor(name, stored, "bfloat16")
for key, array in packed.items():
    print(f"{key.removeprefix('model.layers.0.self_attn.'):44} {array.dtype!s:8} {array.shape}")
print(json.dumps(json.loads(packed[f"{name}.{bitsandbytes4.STATE}"].tobytes()), indent=1))
again = bitsandbytes4.unpack_tensor(name, packed)
print("read again, the same weights:", np.array_equal(again.dense(), stored.dense()))

# %% [markdown]
# ## It is not one thing
#
# Three programs and papers say "double quantization":
#
# | | table of 8 bits | mean taken off | |
# |---|---|---|---|
# | the paper (QLoRA, section 3) | "FP8" | yes | blocks of 256 |
# | bitsandbytes and its files; this library | signed dynamic map | yes | the same, on request |
# | torchao | evenly spaced, −128 … 127 | yes | the same, always; its NF4 table has 4 decimals |
#
# Do they differ in what counts? The same scales with each kind of table (for FP8 this is E4M3: a sign, 4 bits of
# exponent and 3 of mantissa):

# %% stated=true
exponents, fractions = np.meshgrid(np.arange(16), np.arange(8), indexing="ij")
e4m3 = np.where(exponents == 0, fractions / 4, (1 + fractions / 8) * 2.0**exponents).ravel()[:-1] / 448 * 2.0**-7
e4m3 = read_only(np.unique([e4m3, -e4m3]))
for what, table in (("dynamic map", DYNAMIC), ("evenly spaced", INT8), ("E4M3", e4m3)):
    decoded = blockwise.dequantize(blockwise.quantize(scales - mean, table, 256)) + mean
    w_hat = nf4.CODE[nf4.unpack(q.codes, weights.size)].reshape(256, 64) * decoded[:, None]
    lost = np.linalg.norm(w_hat - weights) / np.linalg.norm(weights)
    largest = np.abs(decoded - scales).max()
    print(f"{what:>13}: {table.size} values, a scale is off by at most {largest:.4f}; the weights by {lost:.5f}")
print(f"float32 scales: {np.linalg.norm(nf4.dequantize(q) - weights) / np.linalg.norm(weights):.5f}")

# %% [markdown]
# Evenly spaced codes are the best of the three for scales that are spread so little. But in the weights the difference
# is in the fourth digit. What does matter is that a file is decoded by the rule it was made with: the three have
# different bytes.
#
# ## What to look at
#
# - The smallest scale against the largest difference from the mean: below 0.00704 of that lies the trap, half of the
#   widest gap of the map.
# - Any scale that is negative after decoding: in files of others there may be some.
# - Groups: with fewer than 257 scales there is only one, and mistakes with the second one do not show.
# - Codes of a block of zeros. Its scale may decode to something else than 0, which does no harm as long as all its
#   weights have the code of 0.
# - The 4.127 bits of a matrix are not those of a model: embeddings and head stay in 16 bits or more.
#
# ## Sources
#
# - T. Dettmers, A. Pagnoni, A. Holtzman, L. Zettlemoyer: *QLoRA: Efficient Finetuning of Quantized LLMs*, 2023,
#   [arXiv 2305.14314](https://arxiv.org/abs/2305.14314), section 3.
# - T. Dettmers, M. Lewis, S. Shleifer, L. Zettlemoyer: *8-bit Optimizers via Block-wise Quantization*, 2022,
#   [arXiv 2110.02861](https://arxiv.org/abs/2110.02861), for the dynamic map.
# - `minift/quant/double_quant.py`, `codebooks.py`, `minift/io/bitsandbytes4.py`;
#   `kernels/minift_kernels/quant/double_quant.py`; `minift step double_quant`, `minift step dequantize`;
#   `minift claims --only textbook-saving saving saving-at-65b`; `minift quantize`.
