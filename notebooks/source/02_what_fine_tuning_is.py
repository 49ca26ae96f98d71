# %% [markdown]
# # 02 · What fine-tuning is, and what it costs
#
# *20 minutes. Builds on notebook 01: pullbacks, the loss, and where activations are.*
#
# Fine-tuning is training that does not begin at random numbers. That sentence has two halves, and this notebook
# measures both: what the better start is worth, and which numbers are let move from there, at what price in memory.
# Afterwards you can
#
# - say what a distribution shift is, and read from a learning curve what pretraining is worth beyond it;
# - tell features with a classifier, the output layer only, and everything apart by the gradients that are formed;
# - write AdamW's step and gradient clipping, with the mistakes that others have made in them;
# - draw up the memory bill of a method before it is paid, and judge "98 % cheaper".

# %%
import json
import math
import tracemalloc
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from minift.claims import lora as claims
from minift.conformance import check
from minift.data import module_docs, stdlib_docs
from minift.data.batches import batch_indices, pad
from minift.data.templates import encode_all
from minift.io import load_model, load_tokenizer
from minift.models import classifier, llama
from minift.nn.losses import cross_entropy
from minift.nn.weight import freeze, trainable
from minift.notebook import SMALL, attempt, figures
from minift.peft.lora import trainable_parameters
from minift.step import show
from minift.step.lessons import LESSONS
from minift.studies import shift
from minift.studies.two_texts import mixed
from minift.train import classify, memory, sft
from minift.train.engine import NUMPY
from minift.train.evaluate import held_out_loss
from minift.train.loop import Settings, fit
from minift.train.methods import prepare

figures()
config, params = load_model("tiny")
tokenizer = load_tokenizer("tiny")
drawn = {"examples": 15, "seconds": 4} if SMALL else {"examples": 60, "seconds": 20}  # what `check` draws and takes

# %% [markdown]
# ## The same descent from another place
#
# Training follows the gradient $g_t$ of the loss on a batch from one set of numbers $\theta$ to the next:
#
# $$
# \theta_{t+1} = \theta_t - \eta\, g_t \qquad
# \theta_0 = \begin{cases} \text{random} & \text{from scratch} \\
# \theta_{\text{pretrained}} & \text{fine-tuning} \end{cases} \tag{2.1}
# $$
#
# Nothing else differs. The pretrained numbers have seen another kind of text (the *old* distribution) than the one they
# are to learn (the *new* one): that is the distribution shift. Here is the built-in model on two sentences. It has read
# the documentation of Python, and no cookbook. Which is the new kind for it, and how can you tell?


# %% stated=true
def surprise(text):
    row = np.array(tokenizer.encode("<|im_start|>" + text))
    return sft.loss(params, pad([(row, row)]), config)[0]


print(f"{surprise('Return the name of the current thread.'):.2f} nats a token on a sentence of a manual")
print(f"{surprise('Cut the onions and fry them in butter.'):.2f} nats a token on a sentence of a cookbook")
print(f"{math.log(config.vocab_size):.2f} for a model that knows nothing")

# %% [markdown]
# On the cookbook it is worse than a model that knows nothing: it expects other words, and is sure of it.
#
# How much is a pretrained start worth on a new kind of text? `minift study shift` asks it as a learning curve. One
# small model reads a long reference first. Then it, and a copy with random numbers, both learn from $n$ entries of a
# dictionary, in the same order and with the same settings, and the loss is measured on entries that neither has seen.

# %% stated=true
study = json.loads(Path("../benchmarks/shift.json").read_text())
sizes, tuned, scratch = study["examples"], study["fine_tuned"], study["from_scratch"]
print(f"pretrained, not fine-tuned: {study['not_fine_tuned']:.3f} nats a token\n")
print("examples   fine-tuned   from scratch   worth from scratch")
for n, ours, theirs in zip(sizes, tuned, scratch, strict=True):
    worth = shift.worth(ours, sizes, scratch)
    needed = f"{worth:,} examples" if worth else f"more than {sizes[-1]:,}"
    print(f"{n:8,}   {ours:10.3f}   {theirs:12.3f}   {needed}")

# %%
figure, axes = plt.subplots()
axes.plot(sizes, scratch, marker="o", color="#d65f5f", label="from scratch")
axes.plot(sizes, tuned, marker="o", color="#4878cf", label="fine-tuned")
axes.axhline(study["not_fine_tuned"], color="#4878cf", linestyle="--", linewidth=1, label="pretrained, not fine-tuned")
axes.set(xscale="log", xlabel="examples of the new text", ylabel="test loss, nats a token")
axes.set_title("How many examples is pretraining worth?")
axes.set_xticks(sizes, [f"{n:,}" for n in sizes])
axes.minorticks_off()
axes.legend()
plt.show()

# %% [markdown]
# The pretrained model is better *before* it has seen one entry than the other after thirty, and with a hundred entries
# it is better than the other with three thousand. But read the upper line to its end: it goes flat, and not because
# there is nothing left to learn. All runs had at most 200 steps, and a start from scratch is still learning when they
# end. What the figure says is what pretraining is worth *at this budget*. It is worth less the more text of the new
# kind there is, and with very much of it an old start can even be in the way (Hernandez and others, 2021, call it
# ossification).
#
# ## Which numbers move
#
# Split the numbers into those that learn and those that are frozen, $\theta = (\theta_L, \theta_F)$:
#
# $$
# \theta_{L,t+1} = \theta_{L,t} - \eta\, \frac{\partial\,\text{loss}}{\partial \theta_L} \qquad
# \theta_{F,t+1} = \theta_{F,t} \tag{2.2}
# $$
#
# Four classical choices, from the least to the most:
#
# - **features**: the network is run once over each text, and a classifier learns on what it says;
# - **head**: the output matrix learns, the network below it is frozen;
# - **the last block**, and nothing below it;
# - **everything**.
#
# ### Features and a classifier
#
# The hidden state behind the last token is a vector of 128 numbers. A linear classifier on such vectors is a network of
# one operation, and the language model is no part of its training at all:
#
# $$
# p = \operatorname{softmax}(x W^\top + b) \qquad x = \operatorname{hidden}_{\text{last}}(\text{text}) \tag{2.3}
# $$
#
# The task: of which module of the standard library is this docstring? Names are masked.

# %%
task = module_docs.embedded()
names = task.labels
print(f"{len(names)} modules, {len(task.train):,} docstrings to learn from, {len(task.held_out):,} held out")


def vectors(examples):
    texts = [np.array(tokenizer.encode(example.text), np.int32)[:48] for example in examples]
    found = classify.over_texts(
        lambda part: classifier.features(params, part.batch.tokens, part.lengths, config),
        texts,
    )
    return found, np.array([names.index(example.label) for example in examples])


some = slice(0, 64 if SMALL else None)
(known, known_labels), (unknown, unknown_labels) = vectors(task.train[some]), vectors(task.held_out[some])
scale = classify.scale_of(known)
train, test = (classify.FeatureSet(x / scale, y) for x, y in [(known, known_labels), (unknown, unknown_labels)])
result = fit(
    classify.on_features(config.hidden_size, len(names)),
    lambda weights, batch, normalizer, key: classify.feature_loss(weights, batch, normalizer),
    lambda step: [train.take(batch_indices(len(train), 128, 0, step - 1))],
    Settings(steps=10 if SMALL else 150, learning_rate=0.01),
)
right = classify.accuracy(classify.feature_logits(result.params, test.vectors)[0], test.labels)
most = np.bincount(train.labels).argmax()
print(f"right in {right:.0%} of cases; the most frequent module always: {np.mean(test.labels == most):.0%}")
print(f"{sum(w.size for w in result.params.values()):,} numbers learn")

# %% [markdown]
# Little, but more than nothing: a network of a million numbers that was made to continue texts has, without having been
# asked, learned something of what they are about. It costs one pass over the data, and then next to nothing. What it
# cannot do is change its mind about what is worth saying of a text. (`minift classify` does the same with MiniLM, a
# network that was made for such vectors.)
#
# ### What a backward pass forms
#
# When more learns, gradients have to be formed. Which, and what has to be kept for them? Before you run it, guess which
# of the four methods keeps the most memory between the way forward and the way back, and which the least. (LoRA, small
# matrices beside frozen ones, is the subject of notebook 03; it stands here to be compared.)


# %% stated=true
row = np.random.default_rng(0).integers(0, config.vocab_size, (4, 128))
batch = pad([(tokens, tokens) for tokens in row])
rng = np.random.default_rng(0)
ways = {
    "head": prepare("head", params, config, rng=rng),
    "last block": (freeze(params) | {n: w for n, w in params.items() if n.startswith("model.layers.3.")}, config),
    "lora": prepare("lora", params, config, rng=rng),
    "full": (params, config),
}
print("             learns   gradients   moments   kept for the way back")
for name, (weights, sizes_of) in ways.items():
    tracemalloc.start()
    value, vjp = sft.loss(weights, batch, sizes_of)
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    gradients = vjp(1.0)
    assert gradients.keys() == trainable(weights).keys()
    learned, formed = (sum(a.size for a in found.values()) for found in (trainable(weights), gradients))
    print(f"{name:10s}{learned:9,}   {4 * formed / 1e6:6.1f} MB {8 * learned / 1e6:6.1f} MB   {kept / 1e6:6.1f} MB")

# %% [markdown]
# Two rules explain the table. *A gradient is formed for what learns, and for nothing else*: so gradients and the
# optimizer's two moments shrink with the number that learns. But *the way back has to reach the lowest thing that
# learns*: head and last block keep little, since nobody walks back below them, while LoRA, with a thirteenth of the
# numbers, keeps almost as much as full fine-tuning, because its adapters sit in every block. Activations do not care
# how much learns, only how deep.
#
# ### Exercise 2.1: the gradient of the head alone
#
# In the built-in model the output matrix and the input table are one and the same (tied). To train the output layer
# only, the two must come apart: the table stays, the matrix learns. Here is a model whose output matrix has twenty
# numbers, and an attempt that takes its gradient from the whole model. Why is it wrong?

# %%
small_config = llama.Config(
    vocab_size=5,
    hidden_size=4,
    intermediate_size=4,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=4,
    tie_word_embeddings=True,
)
small = llama.initialize(small_config, np.random.default_rng(0), std=0.5)


def head_gradient(tokens):
    weights, untied = prepare("head", small, small_config, rng=np.random.default_rng(0))
    _, vjp = sft.loss(weights, pad([(tokens, tokens)]), untied)
    (gradient,) = vjp(1.0).values()  # nothing else learns
    return gradient


# %% exercise="2.1"
def my_head_gradient(tokens):
    logits, vjp = llama.forward(small, tokens[None], small_config)
    _, loss_vjp = cross_entropy(logits[:, :-1], tokens[None, 1:])
    dlogits = np.pad(loss_vjp(1.0), ((0, 0), (0, 1), (0, 0)))  # the last position predicts nothing
    return vjp(dlogits)[llama.EMBEDDING]


# %%
texts = st.integers(2, 5).flatmap(lambda n: arrays(np.int64, n, elements=st.integers(0, 4)))
with attempt("2.1"):
    check(head_gradient, my_head_gradient, inputs={"tokens": texts}, **drawn)

# %% [markdown]
# <details><summary>A hint</summary>
#
# A table that is used twice gets the sum of two gradients. `llama.backbone(small, tokens[None], small_config)` gives
# the hidden states, `linear(hidden, matrix)` of `minift.nn.linear` the logits, and its pullback `dx, dweight, dbias`.
# You need not walk back through the network at all.
#
# </details>
#
# ### Learning, with each of them
#
# The built-in model on questions and answers about Python's functions, as many steps each. The rates are those that
# `minift finetune` would take; the last block takes that of everything. How far does each of them get?

# %%
found = stdlib_docs.embedded()
order = np.random.default_rng(0).permutation(len(found.held_out_pairs))[: 16 if SMALL else 100]
questions = encode_all(found.train_pairs[: 64 if SMALL else None], tokenizer, max_length=96).examples
held_out = encode_all([found.held_out_pairs[i] for i in order], tokenizer, max_length=96).examples
steps = 3 if SMALL else 60
curves = {}
for name, rate in {"head": 5e-3, "last block": 1e-3, "lora": 5e-3, "full": 1e-3}.items():
    weights, sizes_of = ways[name]
    run = fit(
        weights,
        lambda p, batch, normalizer, key, sizes_of=sizes_of: NUMPY.loss(p, batch, sizes_of, normalizer),
        mixed(questions, seed=0),
        Settings(steps=steps, learning_rate=rate, warmup_steps=6, eval_every=max(steps // 4, 1)),
        evaluate=lambda p, sizes_of=sizes_of: held_out_loss(p, held_out, sizes_of, 32),
    )
    curves[name] = run.losses()
    print(f"{name:10s} {curves[name][0][1]:.2f} → {curves[name][-1][1]:.2f} nats a token on held-out answers")
assert SMALL or curves["head"][-1][1] > max(curves[name][-1][1] for name in ("lora", "full"))

# %%
figure, axes = plt.subplots()
for name, curve in curves.items():
    axes.plot(*zip(*curve, strict=True), marker="o", label=name)
axes.set(title="Held-out loss, as many steps each", xlabel="step", ylabel="nats a token")
axes.legend()
plt.show()

# %% [markdown]
# The head alone goes least far: it can say other words, and not think of other things.
#
# ## The step
#
# (2.1) is not what is used. AdamW keeps two moving means for every number that learns, of its gradient and of the
# gradient's square, and divides one by the root of the other, so that the length of a step does not depend on the scale
# of the gradient:
#
# $$
# m' = \beta_1 m + (1 - \beta_1)\, g \qquad v' = \beta_2 v + (1 - \beta_2)\, g^2 \qquad
# \hat m = \frac{m'}{1 - \beta_1^t} \qquad \hat v = \frac{v'}{1 - \beta_2^t} \tag{2.4}
# $$
#
# $$
# \theta' = (1 - \eta \lambda)\, \theta - \eta\, \frac{\hat m}{\sqrt{\hat v} + \epsilon} \tag{2.5}
# $$
#
# The last term decays weights toward zero, by $\eta\lambda$ of themselves each step. Adam before it added
# $\lambda\theta$ to the gradient (L2 regularization), as one does with plain gradient descent. Here are four
# parameters that all stand at 1, line by line. Which of them moves the least?

# %% varies=true
show(LESSONS["adamw"](), height=460)

# %% [markdown]
# ### Exercise 2.2: AdamW
#
# Here is Adam with L2. What becomes of the decay of a weight that has large gradients?


# %% exercise="2.2"
def my_adamw(theta, gradient, m, v, step, learning_rate, beta1, beta2, eps, weight_decay):
    gradient = gradient + weight_decay * theta
    m = beta1 * m + (1 - beta1) * gradient
    v = beta2 * v + (1 - beta2) * gradient**2
    m_hat, v_hat = m / (1 - beta1**step), v / (1 - beta2**step)
    return theta - learning_rate * m_hat / (np.sqrt(v_hat) + eps), m, v


# %%
with attempt("2.2"):
    check("adamw.adamw_1", my_adamw, **drawn)

# %% [markdown]
# Before the step, gradients that are too long are cut to a common length:
#
# $$
# g' = g \cdot \min\left(1, \frac{c}{\lVert g \rVert}\right) \qquad
# \lVert g \rVert^2 = \sum_{\text{arrays}} \sum g^2 \tag{2.6}
# $$
#
# ### Exercise 2.3: clipping
#
# `gradients` is a dictionary of arrays. The function returns what becomes of them, and the length *before*. What does
# this attempt do to the direction of the step? And what should happen to a gradient that holds a NaN, which no factor
# makes shorter? (A ValueError that names it: `"… first in g1: lower the learning rate"`.)


# %% exercise="2.3"
def my_clip(gradients, max_norm):
    clipped, total = {}, 0.0
    for name, g in gradients.items():
        norm = math.sqrt(float(np.vdot(g, g)))
        total = max(total, norm)
        clipped[name] = g * g.dtype.type(min(1, max_norm / (norm + 1e-6)))
    return clipped, total


# %%
with attempt("2.3"):
    check("adamw.clip_by_global_norm", my_clip, **drawn)

# %% [markdown]
# ## The bill
#
# For $N$ numbers of which $n$ learn, with weights of $b$ bytes, AdamW's two moments in 32 bits, and adapters ($a$ = 1
# if there are any, else 0) that are kept and trained in 32 bits too:
#
# $$
# \text{bytes} = \underbrace{b N + 4 a n}_{\text{weights}} +
# \underbrace{(4 a + b (1 - a))\, n}_{\text{gradients}} + \underbrace{8\, n}_{\text{moments}} + \text{activations}
# \tag{2.7}
# $$
#
# `minift memory` adds it up. LLaMA 7B, 16-bit weights, one text of 512 tokens:

# %% stated=true
bills = {m: memory.bill(memory.SIZES["7B"], m, weight_bits=16) for m in ("full", "head", "lora", "qlora")}
for method, items in bills.items():
    total = sum(item.nbytes for item in items)
    activations = items[-1].nbytes
    print(f"{method:6s}{total / 1e9:6.1f} GB, {(total - activations) / 1e9:5.1f} without activations")

# %%
groups = {
    "weights": ("weights", "weights in 4 bits", "quantization constants", "other weights", "adapters"),
    "gradients": ("gradients",),
    "moments": ("optimizer state",),
    "activations": ("activations",),
}
figure, axes = plt.subplots()
left = np.zeros(len(bills))
for group, members in groups.items():
    widths = [sum(i.nbytes for i in items if i.name in members) / 1e9 for items in bills.values()]
    axes.barh(list(bills), widths, left=left, label=group)
    left += widths
axes.invert_yaxis()
axes.set(title="What training LLaMA 7B needs", xlabel="GB")
axes.grid(axis="y", visible=False)
axes.legend(loc="lower right")
plt.show()

# %% [markdown]
# Of full fine-tuning's memory most is moments, and they are gone as soon as little learns. What LoRA leaves is the
# frozen weights, and for them no choice of what learns helps: they have to be made smaller (notebooks 04 to 07). The
# bill takes activations to be the same for all four; of the head alone they are far less, as you have seen.
#
# ### Exercise 2.4: draw it up
#
# Equation (2.7) without activations, for 16-bit weights. The attempt says what many believe of a backward pass.


# %%
def counts(method, size, r):
    """All numbers of the model, and those that learn."""
    shapes = llama.shapes(memory.SIZES[size])
    matrices = [s for n, s in shapes.items() if n.endswith("_proj.weight")]
    total = sum(math.prod(shape) for shape in shapes.values())
    adapters = sum(trainable_parameters(*shape, r) for shape in matrices)
    return total, {"full": total, "head": math.prod(shapes[llama.HEAD]), "lora": adapters}[method]


def bill_of(method, size, r):
    items = memory.bill(memory.SIZES[size], method, r=r, weight_bits=16)
    return sum(item.nbytes for item in items if item.name != "activations")


# %% exercise="2.4"
def my_bill(method, size, r):
    total, learned = counts(method, size, r)
    return 2 * total + 2 * total + 8 * learned  # weights, gradients, moments


# %%
drawn_bills = {
    "method": st.sampled_from(["full", "head", "lora"]),
    "size": st.sampled_from(list(memory.SIZES)),
    "r": st.integers(1, 64),
}
with attempt("2.4"):
    check(bill_of, my_bill, inputs=drawn_bills, examples=20)

# %% [markdown]
# ### "Up to 98 % cheaper"
#
# Now the sentence that one reads of LoRA can be judged. Cheaper in what? `minift claims` computes three readings of it:

# %% stated=true
for claim in (claims.cost_in_parameters(), claims.cost_in_memory(), claims.cost_in_arithmetic()):
    print(f"{claim.claim}: {claim.found:.1f} %, {claim.verdict}\n    {claim.how}")

# %% [markdown]
# It is true of the numbers that learn, and so of the file that is saved. It is false of memory, since the frozen
# weights are still there. And it is false of computation: the way forward and the way back through the activations
# stay, only the gradients of the frozen matrices fall away, at most a third.
#
# ## What to look at
#
# - The held-out loss before the first step: it should be that of the model you started from. If it is not, something
#   was changed that should have been frozen, or the data is not what the model has read.
# - "Trainable parameters" in a log: a number of a gradient and of moments, not of memory. The weights and activations
#   are not in it.
# - Batch and length, if memory is short: activations grow with both, nothing else does. Recomputation (notebook 01) is
#   the lever that costs time instead of quality.
# - Tied embeddings, whenever "only the head" or "only the embeddings" should learn.
# - A gradient norm that is logged *before* clipping says whether the rate is too high. After clipping it says nothing.
#
# ## Sources
#
# - D. Hernandez, J. Kaplan, T. Henighan, S. McCandlish: *Scaling Laws for Transfer*, 2021,
#   [arXiv 2102.01293](https://arxiv.org/abs/2102.01293).
# - I. Loshchilov, F. Hutter: *Decoupled Weight Decay Regularization*, 2017,
#   [arXiv 1711.05101](https://arxiv.org/abs/1711.05101).
# - R. Pascanu, T. Mikolov, Y. Bengio: *On the difficulty of training recurrent neural networks*, 2013,
#   [arXiv 1211.5063](https://arxiv.org/abs/1211.5063).
# - E. Hu and others: *LoRA*, 2021, [arXiv 2106.09685](https://arxiv.org/abs/2106.09685).
# - `minift/train/methods.py`, `minift/train/memory.py`, `minift/train/classify.py`, `minift/optim/adamw.py`;
#   `minift study shift`, `minift finetune --method head`, `minift classify --method features`,
#   `minift memory --model 7B --method full`, `minift compare`, `minift claims`.
