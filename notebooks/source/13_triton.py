# %% [markdown]
# # 13 · From NumPy to Triton: the ladder of one kernel
#
# *20 minutes. Builds on notebook 05: two codes a byte, one scale a block. No GPU is needed, and none is used.*
#
# NumPy says what shall be computed. On a GPU one also says who computes it and which bytes are moved for it. A *kernel*
# is a function that says so, and Triton is a language for kernels inside Python. It has an interpreter, so that a
# kernel runs on any CPU: slowly, with `print` and a debugger. Afterwards you can
#
# - say what a program, a tile, a mask and a stride are, and write a kernel;
# - count what a kernel loads, stores and computes, and say what it can gain at best;
# - find three common mistakes: the ragged last tile, a stride taken for granted, offsets of 32 bits;
# - compile a kernel for a GPU that is not there, and say what that tells and what it does not.

# %%
import dataclasses
import inspect

import matplotlib.pyplot as plt
import numpy as np
import torch
import triton
import triton.language as tl
from hypothesis import strategies as st

from minift.conformance import check
from minift.notebook import SMALL, attempt, figures
from minift.quant import nf4 as reference
from minift_kernels import aot, backend
from minift_kernels.backend import Launch, power_of_two
from minift_kernels.nn import norms, norms_kernels
from minift_kernels.quant import nf4, nf4_kernels

figures()
rng = np.random.default_rng(0)


def interpreted(kernel):
    """`@triton.jit` decides what a kernel becomes when it is defined: here, one for the interpreter."""
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        return triton.jit(kernel)


# %% [markdown]
# ## A program and its tile
#
# A launch starts many *programs* of the same kernel. They know nothing of each other, and run in any order. Program $p$
# works on a *tile* of $T$ numbers at once; $T$ is a power of two and known when the kernel is compiled. There is no
# loop over the tile: `tl.arange(0, T)` is all its places $j$, and an operation on it is one on all of them.
#
# $$
# i = p\,T + j, \qquad j = 0 \dots T - 1, \qquad p = 0 \dots \lceil n / T \rceil - 1 \tag{13.1}
# $$
#
# If $T$ does not divide $n$, the last tile reaches beyond the end. There is no error for that: a load gives whatever
# lies behind, a store overwrites it. So every load and store has a *mask*, $i < n$, and a masked load says what it
# gives where nothing is loaded (`other`).
#
# A tensor is a pointer to its first number and a *stride* for each axis: how many numbers further the next one lies.
# Number $(r, c)$ of a matrix is found at
#
# $$
# r \, s_{\text{row}} + c \, s_{\text{column}} \tag{13.2}
# $$
#
# and $s_{\text{row}}$ is the number of columns only if the matrix lies there without gaps. A slice such as `wide[:,
# :5]` does not.
#
# The first kernel writes down who was where. Before you look at the picture: how many programs does a vector of 37
# numbers need with tiles of 16, and how many places of the last one are masked?


# %%
@interpreted
def who(out, n, TILE: tl.constexpr):
    program = tl.program_id(0)
    place = program * TILE + tl.arange(0, TILE)
    tl.store(out + place, program, mask=place < n)


@interpreted
def who_by_row(out, stride, n_columns, TILE: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, TILE)
    tl.store(out + row * stride + column, row, mask=column < n_columns)


vector = torch.full((37,), -1, dtype=torch.int32)
Launch(who, (-(-37 // 16),), (vector, 37), {"TILE": 16}).run(vector.device)  # the kernel, its grid, what it is given
wide = torch.full((3, 7), -1, dtype=torch.int32)
Launch(who_by_row, (3,), (wide, wide.stride(0), 5), {"TILE": 8}).run(wide.device)

# %%
figure, (above, below) = plt.subplots(2, 1, figsize=(7, 4.2))
colors = ["#4878cf", "#d65f5f", "#55a868"]


def draw(axes, owners, tiles, title, width):
    for place, owner in enumerate(owners):
        color = colors[owner] if owner >= 0 else "white"
        axes.add_patch(plt.Rectangle((place, 0), 1, 1, facecolor=color, edgecolor="white" if owner >= 0 else "gray"))
    for program, (start, inside, size) in enumerate(tiles):
        level = -0.4 - 0.6 * program
        axes.plot([start + 0.1, start + inside - 0.1], [level, level], color=colors[program], linewidth=4)
        axes.plot([start + inside, start + size - 0.1], [level, level], color=colors[program], linewidth=1.5, ls=":")
        axes.annotate(f"program {program}", (start + 0.1, level - 0.42), color=colors[program], fontsize=9)
    axes.set(xlim=(-0.2, width + 0.2), ylim=(-2.2, 1.1), title=title)
    axes.set_axis_off()


draw(above, vector.tolist(), [(0, 16, 16), (16, 16, 16), (32, 5, 16)], "37 numbers, tiles of 16 (dotted: masked)", 48)
draw(below, wide.reshape(-1).tolist(), [(7 * row, 5, 8) for row in range(3)], "rows of 5, stride 7, tiles of 8", 24)
plt.show()

# %% [markdown]
# In the lower picture each row is followed by a gap of two numbers that belong to somebody else. The programs leave
# them alone for two reasons: the row begins at $r\,s_{\text{row}}$, with $s_{\text{row}} = 7$, and the mask ends it
# after five.
#
# ### Exercise 13.1: RMSNorm, a row a program
#
# $$
# y = \hat x \, \gamma, \qquad \hat x = x \, \rho, \qquad \rho = \bigl(\text{mean}(x^2) + \varepsilon\bigr)^{-1/2}
# \tag{13.3}
# $$
#
# A program takes one row of $d$ numbers and keeps it in registers: it reads $x$ once and writes $y$ once. `BLOCK` is
# $d$, rounded up to a power of two. This kernel is right for the rows that it is tried on, and has three mistakes.
# `rows(x)` has made a matrix of $x$ whose columns are neighbors, $s_{\text{column}} = 1$; its rows may be apart. The
# output is filled with NaN first: what is not written shows.


# %% exercise="13.1"
@interpreted
def my_norm_kernel(y, x, weight, x_stride, n_features, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    feature = tl.arange(0, BLOCK)
    inside = feature < n_features
    values = tl.load(x + row * n_features + feature, mask=inside, other=0)
    rho = 1 / tl.sqrt(tl.sum(values * values, axis=0) / BLOCK + eps)
    result = values * rho * tl.load(weight + feature, mask=inside, other=0)
    tl.store(y + row * n_features + feature, result.to(y.dtype.element_ty), mask=inside)


# %%
def launch_my_norm(x, weight, eps):
    matrix = backend.rows(x)
    y = torch.full(matrix.shape, torch.nan, dtype=x.dtype)
    arguments = (y, matrix, weight.contiguous(), matrix.stride(0), x.shape[-1], eps)
    Launch(my_norm_kernel, (len(matrix),), arguments, {"BLOCK": power_of_two(x.shape[-1])}).run(x.device)
    return y.reshape(x.shape)


class MyNorm(torch.autograd.Function):
    """Your kernel forward; the gradient is PyTorch's, of the plain formula."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.eps = eps
        ctx.save_for_backward(x, weight)
        return launch_my_norm(x, weight, eps)

    @staticmethod
    def backward(ctx, dy):
        with torch.enable_grad():
            x, weight = (tensor.detach().requires_grad_() for tensor in ctx.saved_tensors)
            y = norms.rms_norm(x, weight, ctx.eps, backend="torch")
        return *torch.autograd.grad(y, (x, weight), dy), None


def my_rms_norm(x, weight, eps):
    return MyNorm.apply(x, weight, eps)


x = torch.tensor([[1.0, 2.0, -3.0, 4.0], [0.5, 0.5, 0.5, -0.5]])
print(my_rms_norm(x, torch.ones(4), 1e-6) - norms.rms_norm(x, torch.ones(4), 1e-6, backend="torch"))
with attempt("13.1"):
    both = ("float32", "float16")
    check("norms.rms_norm", my_rms_norm, torch=True, dtypes=both, examples=10 if SMALL else 50)

# %% [markdown]
# <details><summary>A hint for each</summary>
#
# 1. What lies beyond the row was loaded as 0. A sum does not notice it; a mean does.
# 2. How far is it from one row to the next? The library passes it in. It is not always the width.
# 3. In float16 nothing is larger than 65,504, and squares soon are. All kernels here load 16 bits, compute in float32,
#    and round once at the end: `.to(tl.float32)`.
#
# </details>
#
# ## What a GPU is short of
#
# NF4 to numbers is one product a weight, $\hat w_i = \mathrm{fl}(c_{q_i} a)$ (notebook 05). A GPU can do that product
# in no time worth mentioning. What takes time is the bytes. A weight in blocks of 64 costs, written in 16 bits,
#
# $$
# \underbrace{\tfrac{4}{8}}_{\text{code}} + \underbrace{\tfrac{4}{64}}_{\text{scale}} + \underbrace{2}_{\text{written}}
# = 2.5625 \text{ bytes}, \qquad
# \tfrac48 + \tfrac1{64} + \tfrac4{64 \cdot 256} + 2 = 2.5159 \text{ with double quantization} \tag{13.4}
# $$
#
# The memory of an H100 moves $3.35 \cdot 10^{12}$ bytes a second (its data sheet says so; nothing here is measured). So
# no kernel, however clever, is faster than this:

# %% stated=true
weights = 4096 * 14336
for name, nbytes in (("float32 scales", 4 / 8 + 4 / 64 + 2), ("double-quantized", 4 / 8 + 1 / 64 + 4 / 64 / 256 + 2)):
    moved = weights * nbytes
    print(f"{name:17s} {nbytes:.4f} bytes a weight, {moved / 1e6:.1f} MB, at least {moved / 3.35e12 * 1e6:.1f} µs")

# %% [markdown]
# A good kernel takes little longer than that. It gets in the way of its bytes in two manners: it moves them in small
# pieces (a lane can load and store 16 bytes at once), or it needs so many instructions that they take longer than the
# bytes. Both can be counted without a GPU.
#
# ## The ladder
#
# `kernels/minift_kernels/quant/nf4_kernels.py` keeps eight kernels, from the first that comes to mind to the one that
# is launched. The first is the formula as it is written, one lane a weight:

# %%
print(inspect.getsource(nf4_kernels.dequantize_1.fn))

# %% [markdown]
# | step | idea | predicted |
# |---|---|---|
# | 1 | one lane a weight | three loads a weight: byte, table, scale |
# | 2 | one lane a byte, two weights out | fewer loads, but a store takes every *second* place: 2 bytes instead of 16 |
# | 3 | both nibbles side by side (`join`), then one store | step 2's few loads, step 1's wide stores |
# | 4 | a scale once a block | the loads of scales shrink |
# | 5 | the table in registers: a tree of selections | no load for the table, 15 selections a weight: too many |
# | 6 | the table in shared memory (`gather`) | about step 4 |
# | 7 | larger tiles: several loads on their way | a little faster than 4, where that one waits |
# | 8 | double-quantized scales decoded on the way | fewer bytes, (13.4), and no launch of its own for the scales |
#
# Predictions are cheap, so they are held against what the compiler makes of each step. Triton can compile for a GPU
# that is not there. *Before you run it:* which step has the fewest loads, and why is it not the one that is launched?

# %% stated=true
counted = []
for step in range(1, 9):
    launch = nf4.meta_launch(weights, torch.float16, step=step)  # on tensors that have a size and no memory
    compiled = aot.compile_launch(launch, "sm_90")
    lane = launch.options["TILE"] // (32 * launch.options["num_warps"])  # weights that one lane decodes
    loads, stores, selections = compiled.widths("load"), compiled.widths("store"), compiled.count("selp")
    counted.append([len(loads) / lane, len(stores) / lane, selections / lane])
    print(
        f"step {step}: of a weight {len(loads) / lane:.3f} loads, {len(stores) / lane:.3f} stores of {max(stores):3d} "
        f"bits, {selections / lane:4.1f} selections; {compiled.registers} registers, {compiled.spilled} spilled"
    )

# %%
figure, axes = plt.subplots(1, 2, width_ratios=(2, 1))
places, table = np.arange(1, 9), np.array(counted)
axes[0].bar(places - 0.2, table[:, 0], 0.4, label="loads")
axes[0].bar(places + 0.2, table[:, 1], 0.4, label="stores")
axes[0].set(xlabel="step", title="Loads and stores of a weight", xticks=places)
axes[0].legend()
axes[1].bar(places, table[:, 2], color="#55a868")
axes[1].set(xlabel="step", title="Selections of a weight", xticks=places)
plt.show()

# %% [markdown]
# - Step 1 loads 2.5 times a weight, not 3: the assembler saw that two neighbors read one byte.
# - Step 2 stores once a weight, 16 bits at a time. Steps 1 and 3 store eight weights, 128 bits, at once.
# - Step 5 has the fewest loads and 15 selections a weight. An H100 selects 64 times a clock on each of 132
#   multiprocessors; at 1.7 GHz that alone takes longer than all the bytes:

# %% stated=true
print(f"{15 * weights / (64 * 132 * 1.7e9) * 1e6:.0f} µs for the selections of step 5")

# %% [markdown]
# **No figure of a GPU stands here.** What is counted is what the machine code contains. How long it waits for its bytes
# only a measurement says: `kernels/benchmarks/nf4.py`, on a GPU. What can be known here is that all eight are *right*.
# The interpreter runs the same file, and every step must give the reference's bits, also for an odd number of weights
# that fills no tile:

# %% stated=true
w = rng.standard_normal((7, 333)).astype(np.float32)
q = reference.quantize(w)
codes, absmax = torch.from_numpy(q.codes), torch.from_numpy(q.absmax)
for step in range(1, 9):
    out = torch.full(q.shape, torch.nan, dtype=torch.float16)
    nf4.dequantize_launch(out, codes, (absmax, None, None, None), 64, 0, "interpreter", step).run(out.device)
    same = np.array_equal(out.numpy(), reference.dequantize(q, np.float16))
    print(f"step {step}: {'the same bits' if same else 'other bits'} for {q.size:,} weights")

# %% [markdown]
# ### Exercise 13.2: two weights a byte
#
# Step 2, by somebody who was in a hurry. `at` are places of *bytes*; byte $b$ holds weights $2b$ and $2b + 1$. There
# are three mistakes.


# %% exercise="13.2"
@interpreted
def my_dequantize_kernel(out, codes, absmax, table, n, n_bytes, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * (TILE // 2) + tl.arange(0, TILE // 2)
    byte = tl.load(codes + at, mask=at < n_bytes, other=0)
    scale = tl.load(absmax + at // BLOCK_SIZE, mask=at < n_bytes, other=0)
    tl.store(out + 2 * at, tl.load(table + (byte & 15)) * scale, mask=2 * at + 1 < n)
    tl.store(out + 2 * at + 1, tl.load(table + (byte >> 4)) * scale, mask=2 * at + 1 < n)


# %%
def my_dequantize(codes, absmax, shape, block_size):
    out = torch.full(shape, torch.nan)
    arguments = (
        out,
        codes.contiguous(),
        absmax.contiguous(),
        torch.from_numpy(reference.CODE),
        out.numel(),
        len(codes),
    )
    options = {"BLOCK_SIZE": block_size, "TILE": 256}
    Launch(my_dequantize_kernel, (-(-out.numel() // 256),), arguments, options).run(out.device)
    return out


with attempt("13.2"):
    check("nf4.dequantize", my_dequantize, torch=True, examples=10 if SMALL else 50)

# %% [markdown]
# ## What the interpreter does not show
#
# It is NumPy underneath, one program after the other. Four things are therefore different from a GPU:
#
# - **Races.** Two programs that write to one place always come in the same order here.
# - **Outside of a tensor.** A store beyond the end raises nothing and overwrites what lies there.
# - **One rounding instead of two.** A compiler turns a product and a sum into a fused multiply-add. For the scales of
#   double quantization, $a = \mathrm{fl}(\mathrm{fl}(c_s a_2) + \bar a)$, that gives other last bits than in every file
#   there is; NumPy fuses nothing, so no test in the interpreter can see it. The compiled code shows it:

# %% stated=true
launch = nf4.meta_launch(weights, torch.float16, nested_block_size=256)
for fusion in (False, True):
    again = dataclasses.replace(launch, options=launch.options | {"enable_fp_fusion": fusion})
    print(f"enable_fp_fusion={fusion}: {aot.compile_launch(again, 'sm_90').count('fma')} fused multiply-adds")

# %% [markdown]
# - **bfloat16 is wrong.** The interpreter of this version cuts off the lower 16 bits instead of rounding:


# %% stated=true
@interpreted
def to_bfloat16(y, x, n, TILE: tl.constexpr):
    i = tl.arange(0, TILE)
    tl.store(y + i, tl.load(x + i, mask=i < n, other=0).to(tl.bfloat16), mask=i < n)


numbers = torch.from_numpy(rng.standard_normal(10_000).astype(np.float32))
found = torch.empty(10_000, dtype=torch.bfloat16)
Launch(to_bfloat16, (1,), (found, numbers, 10_000), {"TILE": 16384}).run(found.device)
cut = (numbers.view(torch.int32) & -(1 << 16)).view(torch.float32)
print(f"as PyTorch rounds: {(found == numbers.bfloat16()).double().mean():.0%} of the numbers")
print(f"as if cut off:     {(found.float() == cut).double().mean():.0%}")

# %% [markdown]
# So the twins refuse it, and say what to do. Every function of `minift_kernels` takes a `backend`:

# %% stated=true
x, gain = torch.from_numpy(rng.standard_normal((2, 6)).astype(np.float32)), torch.ones(6)
print(
    (norms.rms_norm(x, gain, backend="torch") - norms.rms_norm(x, gain, backend="interpreter")).abs().max().item()
    < 1e-6
)
for backend_name, given in (("interpreter", x.bfloat16()), ("triton", x)):
    try:
        norms.rms_norm(given, gain, backend=backend_name)
    except ValueError as error:
        print(error)

# %% [markdown]
# `"interpreter"` and `"triton"` are one file, loaded twice, since `@triton.jit` looks at a setting when it is called.
# (The environment variable TRITON_INTERPRET would turn Triton's own library into interpreted functions for good, and
# then nothing could be compiled in this process.)

# %%
print(inspect.getsource(backend.load))

# %% [markdown]
# What the interpreter *does* show is arithmetic in 32 bits. A Python number below 2³¹ arrives as a 32-bit integer, and
# so does `tl.program_id`. Their product wraps around, silently, and the kernel reads and writes elsewhere.
#
# ### Exercise 13.3: where a tile begins
#
# Program 1,500,000 with tiles of 4,096 begins at weight 6,144,000,000. No such tensor is needed to test it: a *probe*
# launches the helper alone. This attempt converts to 64 bits, and is wrong all the same.


# %% exercise="13.3"
@interpreted
def my_first_of_tile(program, TILE: tl.constexpr):
    return (program * TILE).to(tl.int64)


# %%
library_first_of_tile = backend.load("minift_kernels.quant.nf4_kernels", "interpreter").first_of_tile


@interpreted
def library_probe(out, program, TILE: tl.constexpr):
    tl.store(out, library_first_of_tile(program, TILE))


@interpreted
def my_probe(out, program, TILE: tl.constexpr):
    tl.store(out, my_first_of_tile(program, TILE))


def place(probe, program, tile):
    out = torch.zeros(1, dtype=torch.int64)
    Launch(probe, (1,), (out, program), {"TILE": tile}).run(out.device)
    return out.item()


def first_of_tile(program, tile):
    return place(library_probe, program, tile)


def my_first(program, tile):
    return place(my_probe, program, tile)


inputs = {"program": st.integers(0, 2**31 - 1), "tile": st.sampled_from([256, 4096])}
print(my_first(1_500_000, 4096), "of", 1_500_000 * 4096)
with attempt("13.3"):
    check(first_of_tile, my_first, inputs=inputs)

# %% [markdown]
# ## Registers
#
# A lane has at most 255 registers. A row that is kept in registers is shared by all lanes of a program, 32 of them in a
# *warp*, so a lane holds
#
# $$
# \frac{\text{BLOCK}}{32 \cdot \text{warps}} \tag{13.5}
# $$
#
# of its numbers. Too few warps, and registers are *spilled*: put aside in memory, which is what they were to avoid. Too
# many, and a sum has to go around all of them. For rows of 8,192 numbers, the library's RMSNorm:

# %% stated=true
x = torch.empty(2048, 8192, dtype=torch.float16, device="meta")
of_row, gain = torch.empty(2048, device="meta"), torch.empty(8192, dtype=torch.float16, device="meta")
launch = norms.forward_launch(x, of_row, of_row, x, gain, None, 1e-5, "triton")
warps, registers, spilled = [1, 2, 4, 8, 16, 32], [], []
for n in warps:
    found = aot.compile_launch(dataclasses.replace(launch, options=launch.options | {"num_warps": n}), "sm_90")
    registers.append(found.registers)
    spilled.append(found.spilled)
    print(
        f"warps {n:2d}, {8192 // (32 * n):3d} numbers a lane: {found.registers:3d} registers, {found.spilled} spilled"
    )
print("the library takes", norms_kernels.warps(8192), "warps")

# %%
figure, axes = plt.subplots()
axes.bar(range(len(warps)), registers, label="registers of a lane")
axes.bar(range(len(warps)), spilled, bottom=registers, color="#d65f5f", label="stores of spilled registers")
axes.axhline(255, color="black", linewidth=0.8, linestyle="--")
axes.annotate("255: there are no more", (3.9, 262), fontsize=8)
axes.set(title="RMSNorm, rows of 8,192, on an H100 that is not there", xlabel="warps", ylabel="registers")
axes.set_xticks(range(len(warps)), warps)
axes.legend(loc="center right")
plt.show()

# %% [markdown]
# `python kernels/benchmarks/compiled.py --only norms --target sm_90` prints this for all kernels of a family, and for
# other GPUs. The tests hold the flagships to "spills nothing".
#
# ## What to look at
#
# - Bytes first. If a kernel moves what it must, once, in 16-byte words, the arithmetic is rarely worth a thought.
# - The last tile, and a tensor that is a slice of another one. Most wrong kernels are right for round sizes.
# - A prediction written down *before* the measurement. A gain that nobody can explain is a reason to look for a
#   mistake.
# - "Runs in the interpreter" means: the formula is right. "Compiles without spills" means: nothing obvious is in its
#   way. "Fast" means that somebody measured it.
#
# ## Sources
#
# - P. Tillet, H. T. Kung, D. Cox: *Triton: an intermediate language and compiler for tiled neural network
#   computations*, MAPL 2019, [doi 10.1145/3315508.3329973](https://doi.org/10.1145/3315508.3329973).
# - B. Zhang, R. Sennrich: *Root Mean Square Layer Normalization*, 2019,
#   [arXiv 1910.07467](https://arxiv.org/abs/1910.07467).
# - T. Dettmers and others: *QLoRA*, 2023, [arXiv 2305.14314](https://arxiv.org/abs/2305.14314).
# - `kernels/minift_kernels/quant/nf4_kernels.py` and `nf4_matmul_kernels.py` (the second ladder),
#   `kernels/minift_kernels/backend.py`, `kernels/minift_kernels/aot.py`; `kernels/benchmarks/compiled.py`; `make gpu`.
