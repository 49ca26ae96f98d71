# %% [markdown]
# # 08 · Optimizers: AdamW, in 8 bits, and in pages
#
# *20 minutes. Builds on notebook 02 (what training keeps in memory) and notebook 04 (blocks, scales, codebooks).*
#
# When all weights learn, the largest thing in memory is mostly neither the weights nor the activations: it is what the
# optimizer remembers. Adam keeps two numbers of 32 bits for each number that learns. This notebook shrinks them to a
# quarter, and then lends them the memory that they need only for a moment. Afterwards you can
#
# - write AdamW's step, and say what the correction of its start and the W in its name are for;
# - keep its moments in 8 bits, and say why zero must stay zero, and why a tiny $v$ must *not* become zero;
# - say what a page fault costs, and why paging changes no bit of the result;
# - read the bill of a method before it is paid, and judge "from 780 GB to 48".

# %%
import json
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from hypothesis import strategies as st

from minift.conformance import check
from minift.notebook import SMALL, attempt, figures
from minift.optim.adamw import AdamW, adamw_1
from minift.optim.adamw8bit import AdamW8bit, quantize_second
from minift.optim.paged import PagedAdamW
from minift.optim.pager import Pager
from minift.quant import blockwise
from minift.quant.blockwise import BlockwiseTensor
from minift.quant.codebooks import DYNAMIC, DYNAMIC_UNSIGNED, INT8
from minift.step import show
from minift.step.lessons import LESSONS
from minift.studies import spikes
from minift.train.memory import SIZES, bill

figures()
RED, GREEN, BLUE, GRAY = "#d65f5f", "#55a868", "#4878cf", "#bbbbbb"

# %% [markdown]
# ## AdamW
#
# $\theta$ is a parameter, $g$ its gradient, $t$ the step, counted from 1. Adam remembers a running mean of the gradient
# and one of its square, divides the first by the root of the second, and so moves every parameter by about the learning
# rate $\eta$, whatever the scale of its gradients:
#
# $$
# m' = \beta_1 m + (1 - \beta_1)\, g \qquad v' = \beta_2 v + (1 - \beta_2)\, g^2 \tag{8.1}
# $$
#
# $$
# \hat m = \frac{m'}{1 - \beta_1^t} \qquad \hat v = \frac{v'}{1 - \beta_2^t} \tag{8.2}
# $$
#
# $$
# \theta' = (1 - \eta\lambda)\,\theta - \eta\, \frac{\hat m}{\sqrt{\hat v} + \varepsilon} \tag{8.3}
# $$
#
# (8.2) corrects for the start at $m = v = 0$. The decay $\lambda$ stands apart from the gradient (that is the W):
# inside it, it would be divided by $\sqrt{\hat v}$ too, and weights with large gradients would hardly decay. Before you
# step through it: the gradients are 4, −0.5, 0.001 and 0. By how much does each parameter move in the first step?

# %% varies=true
show(LESSONS["adamw"](), height=420)

# %% [markdown]
# ### Exercise 8.1: one step
#
# The attempt is the Adam of many a first implementation: no (8.2), and the decay where L2 regularization has it. It
# trains. What `check` finds is that the first step is not what it should be, and that the moments know of the decay.


# %% exercise="8.1"
def my_adamw(theta, gradient, m, v, step, learning_rate, beta1, beta2, eps, weight_decay):
    gradient = gradient + weight_decay * theta
    m = beta1 * m + (1 - beta1) * gradient
    v = beta2 * v + (1 - beta2) * gradient * gradient
    theta = theta - learning_rate * m / (np.sqrt(v) + eps)
    return theta, m, v


# %%
with attempt("8.1"):
    check("adamw.adamw_1", my_adamw, examples=30 if SMALL else 100)

# %% [markdown]
# ## The bill
#
# Two moments of 4 bytes: 8 bytes for each number that learns. If everything learns, and weights and gradients are kept
# in 16 bits, that is two thirds of all memory before a single activation. Predict: what does LLaMA's largest model, 65
# billion parameters, need with AdamW, and what with moments of 8 bits?

# %% stated=true
METHODS = {
    "full, AdamW": {"method": "full"},
    "full, 8-bit AdamW": {"method": "full", "optimizer": "adamw8bit"},
    "full, 8 bits in pages": {"method": "full", "optimizer": "paged-adamw8bit"},
    "LoRA": {"method": "lora"},
    "QLoRA": {"method": "qlora"},
    "QLoRA, 8-bit AdamW": {"method": "qlora", "optimizer": "adamw8bit"},
}
bills = {
    name: bill(SIZES["65B"], r=64, weight_bits=16, recompute=True, seq_len=512, **what)
    for name, what in METHODS.items()
}
KINDS = {"weights": GRAY, "gradients": BLUE, "optimizer state": RED, "activations": GREEN}


def gigabytes(items):
    """By kind: whatever is not one of the other three are weights, adapters and constants."""
    sums = dict.fromkeys(KINDS, 0.0)
    for item in items:
        sums[item.name if item.name in KINDS else "weights"] += item.nbytes / 1e9
    return sums


print(f"{'65B, GB':23s}" + "".join(f"{kind:>17s}" for kind in KINDS) + "   without activations")
for name, items in bills.items():
    parts = gigabytes(items)
    without = sum(parts.values()) - parts["activations"]
    print(f"{name:23s}" + "".join(f"{part:17.1f}" for part in parts.values()) + f"{without:22.1f}")

# %%
figure, axes = plt.subplots()
start = np.zeros(len(bills))
for kind, color in KINDS.items():
    sizes = np.array([gigabytes(items)[kind] for items in bills.values()])
    axes.barh(list(bills), sizes, left=start, color=color, label=kind)
    start += sizes
for row, total in enumerate(start):
    axes.annotate(f"{total:,.0f} GB", (total + 8, row), va="center", fontsize=8)
axes.invert_yaxis()
axes.grid(axis="y", visible=False)
axes.set(title="Fine-tuning 65 billion parameters, 512 tokens at a time", xlabel="GB", xlim=(0, 900))
axes.legend(loc="lower right")
plt.show()

# %% [markdown]
# So 780 GB is right (783, before activations), and 8-bit moments alone save 390 of them. QLoRA's 48 depends on what is
# counted: 47.3 before activations, a little over 48 with 512 tokens at a time, and 42.5 if its moments have 8 bits,
# too. What it does to the weights is the subject of notebook 07; here it is the red part of a bar. In pages that part
# is hardly there any more. But bytes that are not on the device must lie elsewhere, and be brought when they are
# needed: the 1 MB that `minift memory` leaves them by default is nobody's choice for a model of this size.
#
# ## Eight bits a moment
#
# A moment is stored as notebook 04 stores weights: blocks of 256 numbers, one scale each (the largest magnitude), and
# for each number a byte, the code of the nearest entry of a table (Dettmers et al. 2022). The step itself is (8.1) to
# (8.3) in full precision:
#
# $$
# \tilde m = c_{q_m} a_m \quad \tilde v = c_{q_v} a_v \qquad
# \theta', m', v' = \mathrm{AdamW}(\theta, g, \tilde m, \tilde v) \qquad
# q'_m, a'_m = \mathrm{quantize}(m') \quad q'_v, a'_v = \mathrm{quantize}(v') \tag{8.4}
# $$
#
# Moments are not normally distributed: within a block their sizes differ by powers of ten. So the table is not NF4's,
# and not evenly spaced, but *dynamic*: some bits of the byte count the decimal places, the rest is a fraction.

# %%
figure, axes = plt.subplots()
x = np.logspace(-8, 0, 2000).astype(np.float32)
for name, table, color in (
    ("evenly spaced (INT8)", INT8, GRAY),
    ("dynamic", DYNAMIC, BLUE),
    ("unsigned", DYNAMIC_UNSIGNED, RED),
):
    q = blockwise.quantize(np.append(x, np.float32(1)), table, x.size + 1)
    error = np.abs(blockwise.dequantize(q)[:-1] - x) / x
    axes.plot(x[:1960:40], error.reshape(-1, 40).max(axis=1)[:49], color=color, label=name)  # the worst of 40 neighbors
axes.set(xscale="log", yscale="log", ylim=(3e-3, 3), title="What a byte loses of a number")
axes.set(xlabel="size of the number, as a part of its block's largest", ylabel="relative error")
axes.legend(loc="lower left")
plt.show()

# %% stated=true
print("smallest positive entries:", *(f"{table[table > 0][0]:.3g}" for table in (INT8, DYNAMIC, DYNAMIC_UNSIGNED)))

# %% [markdown]
# An error of 1 means that the number has become zero. In evenly spaced steps everything below a 254th of its block's
# largest is lost; the dynamic tables keep a digit of what is a hundred thousand times smaller.
#
# ### Zero, and nearly zero
#
# Two things about zero decide whether this works.
#
# **What is zero must stay zero.** A row of the embeddings whose token does not occur has a gradient of zero, and
# nothing but the decay may move it. If zero is not exactly in the table, or is rounded to a neighbor, then $\hat m$ is
# a small number divided by a small one, and the parameter drifts. Half of these 4,096 parameters have no gradient in
# twenty steps. How many of that half move?


# %% stated=true
def without_gradients(table_m, table_v, steps=20, learning_rate=1e-3):
    """How far parameters move whose gradient is always zero, in η, beside others in the same blocks."""
    asleep = np.arange(4096) % 2 == 1
    rng = np.random.default_rng(0)
    theta, m, v = np.ones(4096, np.float32), np.zeros(4096, np.float32), np.zeros(4096, np.float32)
    for t in range(1, steps + 1):
        g = np.where(asleep, 0, rng.standard_normal(4096)).astype(np.float32)
        theta, m, v = adamw_1(theta, g, m, v, t, learning_rate)
        m, v = (blockwise.dequantize(blockwise.quantize(x, table)) for x, table in ((m, table_m), (v, table_v)))
    return np.abs(theta[asleep] - 1) / learning_rate


for name, tables in {
    "with zero": (DYNAMIC, DYNAMIC_UNSIGNED),
    "without zero": (DYNAMIC[DYNAMIC != 0], DYNAMIC_UNSIGNED[1:]),
}.items():
    moved = without_gradients(*tables)
    print(f"tables {name:12s} {np.count_nonzero(moved):5,} of {moved.size:,} move, by up to {moved.max():.3f} η")

# %% [markdown]
# It is little, but always to the same side, and it never ends. And it is no theory: bitsandbytes 0.50.2, on a CPU, does
# not map 0 to 0 (`minift conformance --impl bitsandbytes --op blockwise.quantize` finds it), and its 8-bit AdamW moves
# what has no gradient. A test of minift holds that fact.
#
# **What is not zero must not become zero**, in $v$. Gradients enter $m$ as $g$, and $v$ as $g^2$: a parameter whose
# gradients are a ten-thousandth of its block's largest has $v$ at 10⁻⁸, and the smallest entry of the table is 3.25e-7.
# Rounded to the nearest it is 0, while its $m$ is not, and the next step divides by $\varepsilon$ alone. Hence
#
# $$
# q_v = \max(1, \text{nearest code}) \quad\text{where } v > 0 \tag{8.5}
# $$
#
# Here are a hundred steps on one block whose 256 gradients differ in scale by up to 10⁴. What is shown is how far each
# parameter moves in a step, in units of $\eta$: it should never be much more than 1.


# %%
def nearest(table):
    return lambda v: blockwise.quantize(v, table, 256)


def steps_taken(close_m, close_v, steps=100, learning_rate=1e-3):
    """|Δθ| / η of every step, (steps, 256): the moments are closed after each step, and opened before the next."""
    rng = np.random.default_rng(0)
    scales = np.logspace(0, -4, 256).astype(np.float32)
    theta, m, v = np.zeros((3, 256), np.float32)
    taken = []
    for t in range(1, steps + 1):
        g = scales * rng.standard_normal(256).astype(np.float32)
        after, m, v = adamw_1(theta, g, m, v, t, learning_rate)
        taken.append(np.abs(after - theta) / learning_rate)
        theta, m, v = after, close_m(m), close_v(v)
    return np.array(taken)


def opened(close):
    return lambda moment: blockwise.dequantize(close(moment))


WAYS = {
    "32 bits": (lambda m: m, lambda v: v),
    "8 bits, evenly spaced": (opened(nearest(INT8)), opened(nearest(INT8))),
    "8 bits, dynamic, nearest": (opened(nearest(DYNAMIC)), opened(nearest(DYNAMIC_UNSIGNED))),
    "8 bits, dynamic, (8.5)": (opened(nearest(DYNAMIC)), opened(quantize_second)),
}
taken = {name: steps_taken(*close) for name, close in WAYS.items()}

# %% stated=true
for name, found in taken.items():
    print(f"{name:25s} longest step {found.max():8,.1f} η   smallest 16, typically {np.median(found[:, -16:]):.2f} η")

# %%
figure, axes = plt.subplots()
scales = np.logspace(0, -4, 256)
for (name, found), color in zip(taken.items(), ("black", GRAY, RED, BLUE), strict=True):
    axes.plot(scales, found.max(axis=0), "--" if color == "black" else "-", color=color, label=name, linewidth=1.2)
axes.set(xscale="log", yscale="log", xlabel="scale of the gradients, as a part of the block's largest")
axes.set(ylabel="longest step, in η", title="What becomes of parameters with small gradients")
axes.set_ylim(0.3, 1e6)
axes.invert_xaxis()
axes.legend(ncols=2, loc="upper center")
plt.show()

# %% [markdown]
# Evenly spaced codes fail for gradients of a tenth of the largest. Below a 254th nothing explodes, since $m$ becomes
# zero as well as $v$; but such a parameter remembers nothing, and each step is little more than the sign of its newest
# gradient. The dynamic tables reach a hundred times further down, and fail in the same way unless (8.5) holds. What
# that costs is in the last column: parameters far below their block's largest move less than they should, because
# $\sqrt v$ is taken for too much. That is harmless; a step of thousands of $\eta$ is not.
#
# ### Exercise 8.2: a step of 8-bit AdamW
#
# `m_codes` are indices into `DYNAMIC`, `v_codes` into `DYNAMIC_UNSIGNED`. `opened_moment` gives the numbers that codes
# stand for, and `adamw_1` is the step of exercise 8.1. The attempt has three mistakes: about the order of
# things, about zero, and about gradients that nobody expects.


# %%
def opened_moment(codes, absmax, table, theta, block_size):
    return blockwise.dequantize(BlockwiseTensor(codes, absmax, table, theta.shape, block_size), theta.dtype)


# %% exercise="8.2"
def my_adamw8bit(
    theta,
    gradient,
    m_codes,
    m_absmax,
    v_codes,
    v_absmax,
    block_size,
    step,
    learning_rate,
    beta1,
    beta2,
    eps,
    weight_decay,
):
    m = opened_moment(m_codes, m_absmax, DYNAMIC, theta, block_size)
    v = opened_moment(v_codes, v_absmax, DYNAMIC_UNSIGNED, theta, block_size)
    m, v = beta1 * m + (1 - beta1) * gradient, beta2 * v + (1 - beta2) * gradient * gradient
    q_m = blockwise.quantize(m, DYNAMIC, block_size)
    q_v = blockwise.quantize(v, DYNAMIC_UNSIGNED, block_size)
    m, v = blockwise.dequantize(q_m, theta.dtype), blockwise.dequantize(q_v, theta.dtype)
    m_hat, v_hat = m / (1 - beta1**step), v / (1 - beta2**step)
    theta = (1 - learning_rate * weight_decay) * theta - learning_rate * m_hat / (np.sqrt(v_hat) + eps)
    return theta, q_m.codes, q_m.absmax, q_v.codes, q_v.absmax


# %%
with attempt("8.2"):
    check("adamw8bit.adamw8bit_1", my_adamw8bit, examples=10 if SMALL else 60)

# %% [markdown]
# <details><summary>A hint for each</summary>
#
# 1. $\theta$ must not see the codes of its own step: the first one would have a scale then, and should have none.
# 2. Equation (8.5). `v > 0` is what counts, not the code.
# 3. A gradient that is NaN, infinite, or so large that its square is, would destroy its block in silence: `raise
#    ValueError`. (The library draws the line at 1e19.)
#
# </details>
#
# ### What it saves, and what it costs
#
# Codes of both moments, and two scales of 4 bytes for every 256 numbers: $2 + 8/256$ bytes. Small arrays stay in 32
# bits: with fewer than 4,096 numbers there is little to save.

# %% stated=true
theta = {"w": np.zeros((1024, 1024), np.float32)}
for optimizer in (AdamW(), AdamW8bit()):
    optimizer.update(theta, {"w": np.ones((1024, 1024), np.float32)}, 1e-3)
    print(f"{type(optimizer).__name__:10s} {optimizer.nbytes / theta['w'].size:.5f} bytes a parameter")

compared = json.loads(Path("../benchmarks/compare_tiny.json").read_text())
print(f"\n{compared['command']}: the built-in model, all weights, mean of 3 seeds")
for row in compared["rows"]:
    if row["method"].startswith("full"):
        spread = (row["eval_loss_highest"] - row["eval_loss_lowest"]) / 2
        megabytes = row["optimizer_resident_bytes"] / 1e6
        print(f"{row['method']:22s} {megabytes:5.2f} MB resident   held-out loss {row['eval_loss']:.3f} ± {spread:.3f}")

# %% [markdown]
# The loss after sixty steps differs by a thousandth, a fifth of what the seeds make.
#
# ## Pages
#
# The optimizer's state is used once a step, after the backward pass. The activations of a long sequence need their
# memory *before* that. Together they may not fit, though each does. So the state is cut into pages (Dettmers et al.
# 2023): a budget of bytes may be resident, the rest waits in slower memory.
#
# - A **page fault**: a page is asked for and is not there. It is copied in, after room has been made.
# - An **eviction**: the page that has not been used for the longest time is copied out ("least recently used").
#
# No number depends on where a page lies. Ten steps with a budget of about a third of the state, and without
# pages:

# %% stated=true
start = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
with tempfile.TemporaryDirectory() as folder:
    paged = PagedAdamW(AdamW8bit(weight_decay=0.1), Pager(50_000, Path(folder)))
    results = []
    for optimizer in (AdamW8bit(weight_decay=0.1), paged):
        theta = {"w": start.copy()}
        for step in range(10):
            gradient = np.random.default_rng(step).standard_normal((256, 256)).astype(np.float32)
            optimizer.update(theta, {"w": gradient}, 1e-2)
        results.append(theta["w"].view(np.uint8))
    print(paged.pager)
print("bytes of the parameters that differ:", np.count_nonzero(results[0] != results[1]))

# %% [markdown]
# And here is what pages are for. Sixty steps on short sequences, every fifteenth on a long one (activations are
# counted, not formed; pages, evictions and faults are real). Before you look: with paging, when do faults occur?

# %%
records = spikes.resident_bytes(spikes.lengths_with_spikes(steps=60), AdamW8bit())

figure, (above, below) = plt.subplots(2, 1, figsize=(7, 4.2), sharex=True, height_ratios=(3, 1))
at = [record["step"] + (0.0 if record["phase"] == "update" else -0.5) for record in records]
activations, resident, state = (
    np.array([record[key] for record in records]) / 1e6 for key in ("activation_bytes", "resident_bytes", "state_bytes")
)
above.fill_between(at, activations, step="post", color="#dddddd", label="activations")
above.step(at, activations + state.max(), where="post", color=RED, linewidth=1, label="without paging")
above.step(at, activations + resident, where="post", color=BLUE, label="with paging")
above.axhline(records[0]["device_bytes"] / 1e6, color="black", linestyle="--", linewidth=1, label="the device")
above.set(ylabel="MB resident", ylim=(0, 4.3), title="A long sequence among short ones")
above.legend(loc="upper center", ncols=4, fontsize=8)
updates = [record for record in records if record["phase"] == "update"]
below.bar([r["step"] for r in updates], np.diff([0, *(r["page_faults"] for r in updates)]), color=BLUE)
below.set(xlabel="step", ylabel="page faults")
plt.show()

# %% stated=true
(row,) = spikes.rows(records)
assert np.diff([0, *(r["page_faults"] for r in updates)]).tolist() == [16] + [
    13 * (r["step"] % 15 == 0) for r in updates[1:]
]
print("\n".join(f"{name.replace('_', ' '):22s} {value:9,}" for name, value in row.items()))

# %% [markdown]
# Without pages this run ends at step 15, out of memory: 3.4 MB are needed, and there are 3. With them it goes on: each
# long sequence evicts 13 of the 16 pages, and the step after it brings back those, and no others.
#
# ### Exercise 8.3: who has to go?
#
# `counted` asks the library's pager, with room for `room` pages, for one page after the other, and counts faults and
# evictions. Do it without a pager. The attempt throws out the page that *came* first.


# %%
def counted(room, accesses):
    with tempfile.TemporaryDirectory() as folder:
        pager = Pager(room, Path(folder))
        pages = [pager.add(np.zeros(1, np.uint8)) for _ in range(6)]
        for number in accesses:
            with pager.page(pages[number]):
                pass
        return pager.faults, pager.evictions


# %% exercise="8.3"
def my_count(room, accesses):
    resident, faults, evictions = [], 0, 0
    for number in accesses:
        if number not in resident:
            faults += 1
            if len(resident) == room:
                resident.pop(0)
                evictions += 1
            resident.append(number)
    return faults, evictions


# %%
with attempt("8.3"):
    print(
        check(
            counted, my_count, inputs={"room": st.integers(1, 4), "accesses": st.lists(st.integers(0, 5), max_size=12)}
        )
    )

# %% [markdown]
# "Least recently used" has a worst case, and an optimizer is just that: a step walks through all pages in the same
# order. Predict the faults of five walks through six pages, with room for six, and with room for five.

# %% stated=true
for room in (6, 5, 3):
    faults, evictions = counted(room, [*range(6)] * 5)
    print(f"room for {room}: {faults} faults, {evictions} evictions in 30 accesses")

# %% [markdown]
# One page too few, and every access faults, just as with half of the room. Pages are for spikes; a state that never
# fits is copied in and out whole in every step.
#
# ## What to look at
#
# - `optimizer_bytes` in the summary of a run, and how large a part of the peak it is. With adapters it is small: 8 bits
#   save a LoRA nothing worth having.
# - Parameters without gradients, in a test of your own: after a hundred steps without decay they must have the same
#   bits.
# - The longest step, in units of $\eta$. If it is far above 1, look for a second moment that was rounded to zero.
# - Page faults in steps that are not behind a long sequence: then the budget is too small for the state, and the run
#   waits for copies.
#
# ## Sources
#
# - I. Loshchilov, F. Hutter: *Decoupled Weight Decay Regularization*, 2019,
#   [arXiv 1711.05101](https://arxiv.org/abs/1711.05101).
# - T. Dettmers, M. Lewis, S. Shleifer, L. Zettlemoyer: *8-bit Optimizers via Block-wise Quantization*, 2022,
#   [arXiv 2110.02861](https://arxiv.org/abs/2110.02861).
# - T. Dettmers et al.: *QLoRA*, 2023, [arXiv 2305.14314](https://arxiv.org/abs/2305.14314), section 3: paged
#   optimizers.
# - `minift/optim/adamw.py`, `adamw8bit.py`, `paged.py`, `pager.py`, `minift/studies/spikes.py`; `minift step
#   adamw8bit`; `minift study spikes`; `minift memory --model 65B --method full --optimizer adamw8bit`; `minift finetune
#   --method full --optimizer paged-adamw8bit`.
