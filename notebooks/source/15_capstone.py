# %% [markdown]
# # 15 · Capstone: a model of your own, within a budget
#
# *20 minutes. Builds on notebooks 03 to 09; everything comes together here.*
#
# You have a model, a task, and so many bytes. This notebook goes the whole way once: it counts before it pays, puts the
# base in four bits, trains an adapter with 8-bit moments in pages, measures on text that nobody trained on, and hands
# the result on as a file that PEFT reads. The model is the small built-in one, so that a run takes a minute; the
# commands for a real one stand at the end, and do the same. Afterwards you can
#
# - write the memory bill of a method, and choose a rank by it;
# - write QLoRA's layer and its gradient yourself, and a better codebook than NF4's;
# - train, measure, merge, save and load, and say what each step costs and brings;
# - write greedy decoding, and say what a key/value cache is for.

# %%
import dataclasses
import json
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from hypothesis import strategies as st

from minift.cli.common import answer, batches_of
from minift.conformance import check, matrices
from minift.data import stdlib_docs
from minift.data.templates import encode_all
from minift.io import load_adapter, load_model, load_tokenizer, save_adapter
from minift.models import llama
from minift.nn.weight import trainable
from minift.notebook import SMALL, attempt, figures
from minift.optim import adamw8bit
from minift.peft import lora, merge, qlora
from minift.quant import blockwise, double_quant, nf4
from minift.step import show
from minift.step.lessons import LESSONS
from minift.train import memory, sft
from minift.train.evaluate import held_out_loss
from minift.train.loop import Settings, fit
from minift.train.methods import prepare

figures()
config, params = load_model("tiny")
tokenizer = load_tokenizer("tiny")

# %% [markdown]
# ## The bill
#
# A budget first: 4.5 MB for everything but activations, which depend on the text and are the same for all methods. For
# a model with $n_{\text{lin}}$ numbers in linear layers, $n_{\text{other}}$ in embeddings and norms, and an adapter of
# $n_A$ numbers, QLoRA needs
#
# $$
# \underbrace{\frac{4 + 0.127}{8} \, n_{\text{lin}}}_{\text{NF4, double-quantized}}
# + \underbrace{4 \, n_{\text{other}}}_{\text{32 bits}}
# + \underbrace{4 \, n_A}_{\text{adapter}} + \underbrace{4 \, n_A}_{\text{gradient}}
# + \underbrace{8 \, n_A}_{\text{two moments}} \text{ bytes}, \qquad
# n_A = \sum_{\text{layers}} r \,(d_{\text{in}} + d_{\text{out}}) \tag{15.1}
# $$
#
# The 0.127 are exactly $8/64 + 32/(64 \cdot 256)$ (notebook 06). *Before you run it:* the built-in model has a million
# numbers. What does it take to train all of them with AdamW?

# %% stated=true
BUDGET = 4_500_000
WAYS = {
    "full, AdamW": ("full", "adamw"),
    "LoRA, AdamW": ("lora", "adamw"),
    "QLoRA, AdamW": ("qlora", "adamw"),
    "QLoRA, 8 bits": ("qlora", "adamw8bit"),
    "QLoRA, 8 bits, paged": ("qlora", "paged-adamw8bit"),
}
R, PAGE_BUDGET = 32, 250_000
bills = {}
for name, (method, optimizer) in WAYS.items():
    items = memory.bill(config, method, r=R, optimizer=optimizer, page_budget=PAGE_BUDGET)
    bills[name] = {item.name: item.nbytes for item in items if item.name != "activations"}
    total = sum(bills[name].values())
    print(f"{name:22s} {total / 1e6:6.2f} MB{'' if total > BUDGET else '  within the budget'}")

# %%
parts = ["weights", "adapters", "gradients", "optimizer state"]
figure, axes = plt.subplots()
left = np.zeros(len(bills))
for part in parts:
    weights = ("weights", "weights in 4 bits", "quantization constants", "other weights")
    names = weights if part == "weights" else (part,)
    width = np.array([sum(bill.get(name, 0) for name in names) for bill in bills.values()]) / 1e6
    axes.barh(list(bills), width, left=left, label=part)
    left += width
axes.axvline(BUDGET / 1e6, color="black", linestyle="--", linewidth=0.9)
axes.annotate("the budget", (BUDGET / 1e6 + 0.1, 4.15), fontsize=8)
axes.invert_yaxis()
axes.set(xlabel="MB", title=f"Without activations, adapters of rank {R}")
axes.legend(loc="lower right")
plt.show()

# %% [markdown]
# With a rank of 32, what learns is large beside so small a model: adapters, gradients and moments together outweigh the
# weights. At 65 billion parameters it is the other way round; the arithmetic is the same. (A rank of 8 would fit
# without 8-bit moments, and would not have them either: arrays with few numbers keep theirs in 32 bits, and at rank 8
# that is all of them.)

# %% stated=true
print(f"8 bits from {adamw8bit.MIN_8BIT_SIZE:,} numbers on")
for r in (8, R):
    of_rank = [memory.bill(config, "qlora", r=r, optimizer=optimizer) for optimizer in ("adamw", "adamw8bit")]
    plain, eight = (next(item.nbytes for item in items if item.name == "optimizer state") for items in of_rank)
    print(f"rank {r:2d}: moments of {plain:,.0f} bytes, with 8-bit AdamW {eight:,.0f}")

# %% [markdown]
# ### Exercise 15.1: write the bill
#
# Equation (15.1), for any Llama: `linear` are the shapes $(d_{\text{out}}, d_{\text{in}})$ of its linear layers,
# `other` is $n_{\text{other}}$. This bill was made by somebody who had seen only the headline.


# %% exercise="15.1"
def my_bytes(linear, other, r):
    n_linear = sum(d_out * d_in for d_out, d_in in linear)
    n_adapter = sum(r * (d_out + d_in) for d_out, d_in in linear)
    return n_linear * 4 / 8 + other * 4 + n_adapter * 4 + n_adapter * 8


# %%
def sized(layers, heads, ffn):
    sizes = {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads}
    return dataclasses.replace(config, hidden_size=32 * heads, intermediate_size=ffn, **sizes)


def bill(layers, heads, ffn, r):
    items = memory.bill(sized(layers, heads, ffn), "qlora", r=r)
    return float(sum(item.nbytes for item in items if item.name != "activations"))


def my_bill(layers, heads, ffn, r):
    shapes = llama.shapes(sized(layers, heads, ffn))
    linear = [shape for name, shape in shapes.items() if name.endswith("_proj.weight")]
    other = sum(int(np.prod(shape)) for name, shape in shapes.items() if not name.endswith("_proj.weight"))
    return my_bytes(linear, other, r)


with attempt("15.1"):
    few = st.integers(1, 4)
    check(bill, my_bill, inputs={"layers": few, "heads": few, "ffn": st.integers(8, 99), "r": few})

# %% [markdown]
# ## The base in four bits, the adapter on it
#
# $$
# y = x \,\mathrm{dequantize}(W)^\top + h B^\top, \qquad h = s\, x A^\top, \qquad s = \alpha / r \tag{15.2}
# $$
#
# $$
# d h = s\, dy\, B, \qquad dA = dh^\top x, \qquad dB = dy^\top h, \qquad dx = dy\, \mathrm{dequantize}(W) + dh\, A
# \tag{15.3}
# $$
#
# There is no $dW$. One function does it for all layers, and what comes out is as large as the bill says:

# %% stated=true
mine, _ = prepare("qlora", params, config, r=R, lora_alpha=2 * R, rng=np.random.default_rng(0))
learning = trainable(mine)
bases = [weight.base if isinstance(weight, lora.LoRA) else weight for weight in mine.values()]
in_memory = sum(base.nbytes for base in bases)
predicted = sum(
    bills["QLoRA, 8 bits"][name] for name in ("weights in 4 bits", "quantization constants", "other weights")
)
print(mine["model.layers.0.mlp.up_proj.weight"])
print(f"weights: {in_memory:,} bytes, predicted {predicted:,.0f}")
print(f"learns:  {sum(a.size for a in learning.values()):,} numbers in {len(learning)} arrays")

# %% [markdown]
# ### Exercise 15.2: QLoRA's layer
#
# Write (15.2) and (15.3). This attempt trains, and its loss even falls.


# %% exercise="15.2"
def my_layer(x, q, A, B, s):
    W = nf4.dequantize(q)
    h = x @ A.T
    y = x @ W.T + s * h @ B.T

    def vjp(dy):
        dh = dy @ B
        return dy @ W, dh.T @ x, dy.T @ h

    return y, vjp


# %%
def layer(x, W, A, B, dy, s):
    y, vjp = lora.forward(x, double_quant.compress(nf4.quantize(W)), A, B, s)
    dx, _, dA, dB = vjp(dy)
    return y, dx, dA, dB


def my_results(x, W, A, B, dy, s):
    y, vjp = my_layer(x, double_quant.compress(nf4.quantize(W)), A, B, s)
    return y, *vjp(dy)


shapes = {"x": (2, 3), "W": (4, 3), "A": (1, 3), "B": (4, 1), "dy": (2, 4)}
with attempt("15.2"):
    check(
        layer,
        my_results,
        inputs={name: matrices(*shape) for name, shape in shapes.items()} | {"s": st.sampled_from([1.0, 0.5, 2.0])},
    )

# %% [markdown]
# The library's own, line by line, forward and backward:

# %% varies=true
show(LESSONS["qlora"](), height=420)

# %% [markdown]
# ### Exercise 15.3: a better table
#
# NF4's sixteen numbers are quantiles of the normal distribution. For the *squared* error there are better ones: each
# value should be the mean of the numbers that are rounded to it. That is Lloyd's algorithm (1957), and `lloyd` is three
# lines. A table must have an exact 0, −1 and 1 (why?): those in `keep` stay where they are. This attempt has taken a
# look at the textbook, and runs Lloyd's algorithm on normal numbers.


# %%
def lloyd(numbers, start, rounds=60, keep=()):
    code = np.array(start, np.float64)
    free = ~np.isin(code, keep)
    for _ in range(rounds):
        nearest = np.searchsorted((code[1:] + code[:-1]) / 2, numbers)
        mean = np.bincount(nearest, numbers, code.size) / np.maximum(np.bincount(nearest, minlength=code.size), 1)
        code[free] = mean[free]
    return code


def squared_error(table, seed):
    w = np.random.default_rng(seed).standard_normal(1 << 15).astype(np.float32)
    return float(np.mean((blockwise.dequantize(blockwise.quantize(w, table, 64)) - w) ** 2))


# %% exercise="15.3"
def my_table():
    numbers = np.random.default_rng(1).standard_normal(1 << 16)
    table = lloyd(numbers, 2.7 * nf4.CODE)
    return table / np.abs(table).max()


# %%
table = np.sort(my_table()).astype(np.float32)


def is_good(seed):
    return "good"


def judged(seed):
    if table.size != 16:
        return f"{table.size} values"
    if missing := [value for value in (-1.0, 0.0, 1.0) if value not in table]:
        return f"{missing[0]:g} becomes {table[np.abs(table - missing[0]).argmin()]:.3f}"
    worse = squared_error(table, seed) / squared_error(nf4.CODE, seed) - 1
    return "good" if worse < -0.03 else f"squared error {worse:+.1%} against NF4's, needed -3.0%"


with attempt("15.3"):
    check(is_good, judged, inputs={"seed": st.integers(100, 999)}, examples=10)

# %% stated=true
w = np.random.default_rng(7).standard_normal((1 << 11, 64)).astype(np.float32)
scaled = (w / np.abs(w).max(axis=1, keepdims=True)).ravel()
for name, code in {"NF4": nf4.CODE, "Lloyd": lloyd(scaled, nf4.CODE, keep=(-1, 0, 1)).astype(np.float32)}.items():
    x_hat = blockwise.dequantize(blockwise.quantize(w, code, 64))
    print(
        f"{name:6s} mean squared error {np.mean((x_hat - w) ** 2):.5f}   mean |error| {np.mean(np.abs(x_hat - w)):.4f}"
    )

# %% [markdown]
# By the squared error the new table is better; by the mean magnitude of the error it is worse. Which of the two a
# language model feels is a question for a held-out loss, not for an argument: `minift study data-types`.
#
# ## Training
#
# The task: "What does `math.isqrt` do?", as Python's standard library answers it of itself. What is held out appears in
# no training text. 8-bit AdamW keeps its moments in pages, of which 250 kB stay in memory and the rest in a file.

# %%
STEPS, BATCH = (3, 4) if SMALL else (80, 16)
docs = stdlib_docs.embedded()
order = np.random.default_rng(0).permutation(len(docs.train_pairs))[: 64 if SMALL else 2000]
train = encode_all([docs.train_pairs[i] for i in order], tokenizer, max_length=128).examples
order = np.random.default_rng(0).permutation(len(docs.held_out_pairs))[: 16 if SMALL else 200]
asked = [docs.held_out_pairs[i] for i in order]
held_out = encode_all(asked, tokenizer, max_length=128).examples
batches = batches_of(train, BATCH, 1, seed=0)


def tuned(method, learning_rate, **options):
    """Trained, with its record and what it cost."""
    start, sizes = prepare(method, params, config, rng=np.random.default_rng(0), **options)
    settings = Settings(STEPS, learning_rate, warmup_steps=2 if SMALL else 8, eval_every=STEPS, save_every=10**6)
    if method == "qlora":
        settings = dataclasses.replace(settings, optimizer="paged-adamw8bit", page_budget=PAGE_BUDGET)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = fit(
            start,
            lambda p, batch, normalizer, key: sft.loss(p, batch, sizes, normalizer),
            batches,
            settings,
            evaluate=lambda p: held_out_loss(p, held_out, sizes),
            folder=Path(folder),
        )
    return result, time.perf_counter() - began


runs = {
    "QLoRA": tuned("qlora", 5e-3, r=R, lora_alpha=2 * R),
    "soft prompt": tuned("prompt", 5e-2, num_virtual_tokens=20),
    "full": tuned("full", 1e-3),
}
for name, (result, _) in runs.items():
    (_, before), (_, after) = result.losses()
    print(f"{name:12s} held-out loss {before:.2f} -> {after:.2f} nats a token")

# %%
figure, axes = plt.subplots()
for name, (result, _) in runs.items():
    losses = np.array([record["loss"] for record in result.records if "loss" in record])
    smooth = [losses[max(0, i - 9) : i + 1].mean() for i in range(len(losses))]
    axes.plot(range(1, len(losses) + 1), smooth, label=name)
axes.set(xlabel="step", ylabel="nats a token", title="Training loss, mean of the last ten steps")
axes.legend()
plt.show()

# %% [markdown]
# What it cost and what it brought. QLoRA comes close to full fine-tuning with a quarter of its memory. A soft prompt of
# twenty tokens is the cheapest by far in bytes that learn, and brings the least; it needs every activation all the
# same, since the gradient has to walk back to the first layer.

# %%
print(f"{'':12s} {'learns':>10s} {'optimizer':>12s} {'of it in memory':>16s} {'held-out loss':>14s}")
for name, (result, _) in runs.items():
    learned = sum(array.size for array in trainable(result.params).values())
    resident = result.paging.get("peak_resident_bytes", result.optimizer_bytes)
    after = result.losses()[-1][1]
    print(f"{name:12s} {learned:10,d} {result.optimizer_bytes:12,d} {resident:16,d} {after:14.2f}")

# %% varies=true
for name, (_, seconds) in runs.items():
    print(f"{name:12s} {seconds:.0f} s")
print("QLoRA's pages:", json.dumps(runs["QLoRA"][0].paging))

# %% [markdown]
# ## What does it say?
#
# A loss is a mean over tokens that were given. An answer is what comes when the model reads its own words. *Greedy*
# decoding takes the likeliest token each time:
#
# $$
# t_{n+1} = \arg\max_t \; p(t \mid t_1 \dots t_n) \tag{15.4}
# $$
#
# ### Exercise 15.4: greedy decoding
#
# `llama.forward(params, tokens, config)` gives `logits, vjp`; tokens are (batch, tokens), logits (batch, tokens,
# vocab). The library reads the prompt once, and then one token at a time. So does this one; it has forgotten something,
# and its text shows it.


# %% exercise="15.4"
def my_generate(params, tokens, config, new):
    text, last = tokens, tokens
    for _ in range(new):
        logits, _ = llama.forward(params, last, config)
        last = logits[:, -1].argmax(axis=-1)[:, None]
        text = np.concatenate([text, last], axis=1)
    return text


# %%
prompts = st.lists(st.integers(3, 200), min_size=1, max_size=4)


def generate(tokens, new):
    return llama.generate(params, np.array([tokens]), config, new)


def my_tokens(tokens, new):
    return my_generate(params, np.array([tokens]), config, new)


with attempt("15.4"):
    check(generate, my_tokens, inputs={"tokens": prompts, "new": st.integers(1, 4)}, examples=20)

# %% [markdown]
# Before and after, on questions that were held out:

# %% varies=true
trained = runs["QLoRA"][0].params
for example in asked[:3]:
    question, wanted = (message.content for message in example.messages[-2:])
    print(question)
    for label, model in (("before", params), ("after", trained)):
        text = "".join(answer(llama.fuse(model), config, tokenizer, example.messages[:-1], 4 if SMALL else 24))
        print(f"   {label:8s}", " ".join(text.split())[:90])
    print(f"   {'wanted':8s}", wanted)

# %% [markdown]
# It has learned what an answer looks like. What `isqrt` does, a million parameters cannot know of a function that they
# have never seen; the held-out loss counts the first and hardly the second. Look at the texts, always.
#
# ## Hand it on
#
# Three ways to merge, and what each loses, in units of the adapter's own contribution (`minift.peft.merge`). The
# built-in model is itself stored in NF4, so quantizing it loses next to nothing, and the first two agree. With another
# model, choose what was trained: the dequantized weights. The third is four bits again, and forgets every change that
# is smaller than half a gap between two codes.

# %%
for name, merged in {
    "dequantized": merge.merge_dequantized(trained),
    "original": merge.merge_original(trained, params),
    "requantized": merge.merge_requantized(trained),
}.items():
    error, loss = merge.merge_error(merged, trained), held_out_loss(merged, held_out, config)
    print(f"{name:12s} error {error:.3f}   held-out loss {loss:.2f}")

# %% [markdown]
# And the file. It is PEFT's format: `PeftModel.from_pretrained` reads it, and so does `minift chat --adapter`.

# %%
with tempfile.TemporaryDirectory() as folder:
    _, adapter = lora.detach(trained)
    save_adapter(Path(folder) / "adapter", adapter, "tiny")
    print({path.name: path.stat().st_size for path in sorted((Path(folder) / "adapter").iterdir())})
    again = lora.insert(qlora.quantize(params), load_adapter(Path(folder) / "adapter", params))
    tokens = np.array([[5, 17, 42]])
    same = np.array_equal(llama.forward(again, tokens, config)[0], llama.forward(trained, tokens, config)[0])
    print("the same logits, bit for bit:", same)

# %% [markdown]
# ## What to do next
#
# The same on SmolLM2, a real model of 135 million parameters, on a laptop (`MODEL` is the file of the README's "A real
# model"):
#
# ```
# minift memory   --model $MODEL --method qlora --weight-bits 32 --optimizer paged-adamw8bit
# minift finetune --model $MODEL --method qlora --optimizer paged-adamw8bit --steps 60 --batch-size 8 --eval-examples 64
# minift chat     --model $MODEL --adapter runs/finetune/adapter
# minift merge    --help
# minift compare  --model $MODEL --methods lora qlora --seeds 0 --steps 20 --batch-size 4
# ```
#
# Then your own data: `--data mine.jsonl`, a line an example (`{"prompt": …, "completion": …}`). Then what people like
# better: `minift rate`, and `minift dpo runs/rate/comparisons.jsonl --adapter runs/finetune/adapter` (notebook 12).
# Then your own quantizer, optimizer or kernel: `minift conformance --impl my_module.py`.
#
# ## What to look at
#
# - The bill before the run, and the measured peak after it. If they differ by more than activations can explain,
#   something is kept that should not be.
# - Held-out loss *and* texts. And the base model's answers beside them: some of what looks learned was there before.
# - The same budget for all that are compared: steps, examples, seeds. One seed is an anecdote; `minift compare` takes
#   three.
# - What is saved. An adapter belongs to the base that it was trained on, and QLoRA's to the quantized one.
#
# ## Sources
#
# - T. Dettmers and others: *QLoRA: Efficient Finetuning of Quantized LLMs*, 2023,
#   [arXiv 2305.14314](https://arxiv.org/abs/2305.14314).
# - E. Hu and others: *LoRA: Low-Rank Adaptation of Large Language Models*, 2021,
#   [arXiv 2106.09685](https://arxiv.org/abs/2106.09685).
# - T. Dettmers and others: *8-bit Optimizers via Block-wise Quantization*, 2021,
#   [arXiv 2110.02861](https://arxiv.org/abs/2110.02861).
# - B. Lester and others: *The Power of Scale for Parameter-Efficient Prompt Tuning*, 2021,
#   [arXiv 2104.08691](https://arxiv.org/abs/2104.08691).
# - S. Lloyd: *Least squares quantization in PCM*, 1957, IEEE Transactions on Information Theory 28 (1982).
# - `minift/train/memory.py`, `minift/train/methods.py`, `minift/peft/merge.py`; `minift memory`, `minift finetune`,
#   `minift compare`, `minift study data-types`.
