# %% [markdown]
# # 01 · A small transformer, forward and back
#
# *20 minutes. Builds on linear algebra and a little Python; the other notebooks build on this one.*
#
# Fine-tuning changes the numbers of a network so that it predicts other text. To see what that costs, one has to know
# what is computed and, above all, what the way back needs. Here is a complete language model of a million numbers:
# every one of its operations, its loss, and its gradient. Afterwards you can
#
# - follow a sentence from tokens to logits to loss to gradient, and name each step;
# - write an operation *with its pullback*, and test a gradient so that the test can fail;
# - say where the activation memory of training is, and why generation needs none of it;
# - say what the key/value cache keeps, and generate text with it.

# %%
import gc
import math
import time
from dataclasses import is_dataclass

import matplotlib.pyplot as plt
import numpy as np

from minift.conformance import check
from minift.data.batches import pad
from minift.io import load_model, load_tokenizer
from minift.models import llama
from minift.nn.attention import KVCache, attention, causal_mask
from minift.nn.embedding import embedding
from minift.nn.linear import linear
from minift.nn.losses import IGNORE_INDEX, cross_entropy, log_softmax
from minift.nn.mlp import swiglu
from minift.nn.norms import rms_norm
from minift.nn.rope import frequencies, rope, rotations
from minift.notebook import SMALL, attempt, figures
from minift.step import show
from minift.step.lessons import LESSONS
from minift.train import memory, sft

figures()
config, params = load_model("tiny")
tokenizer = load_tokenizer("tiny")
drawn = {"examples": 15, "seconds": 4} if SMALL else {"examples": 60, "seconds": 20}  # what `check` draws and takes

# %% [markdown]
# The built-in model is a Llama: the architecture of LLaMA, SmolLM2 and most of their relatives, only smaller. Before
# you run the next cell, guess: which part of it holds most of its million numbers?

# %% stated=true
parts = {
    "embedding table": "embed_tokens",
    "attention": "self_attn",
    "feed-forward": "mlp",
    "gains of the norms": "norm",
}
for part, key in parts.items():
    size = sum(w.size for name, w in params.items() if key in name)
    print(f"{part:20s}{size:9,}")
print(f"{'together':20s}{sum(w.size for w in params.values()):9,}")
print(f"{config.num_hidden_layers} blocks, {config.hidden_size} features, {config.num_attention_heads} query heads,")
print(f"{config.num_key_value_heads} key/value heads, a vocabulary of {config.vocab_size:,}")

# %% [markdown]
# ## Tokens
#
# A model reads numbers. The tokenizer cuts a text into pieces of its vocabulary, frequent ones long and rare ones
# short, and `embedding` takes one row of a table for each:
#
# $$
# h^0_n = E[t_n] \tag{1.1}
# $$

# %% stated=true
text = "<|im_start|>math.isqrt: Return the integer part of the square root of the input."
tokens = np.array([tokenizer.encode(text)])
pieces = [tokenizer.decode([t]) for t in tokens[0]]
print(pieces)
print(tokens[0])
print(embedding(tokens, params[llama.EMBEDDING])[0].shape, "batch, tokens, features")

# %% [markdown]
# ## An operation returns its value and its pullback
#
# Training asks one question of every operation $y = f(x)$: if the loss changes by $\langle dy, \Delta y\rangle$ when
# $y$ changes, by how much does it change when $x$ does? The answer is a *pullback*: it takes the cotangent $dy$ to
# $dx$, and it is the transpose of the derivative $J$:
#
# $$
# \langle dy, J v \rangle = \langle \operatorname{vjp}(dy), v \rangle \qquad \text{for every } v \tag{1.2}
# $$
#
# In this library every operation has the form `y, vjp = op(...)`. The pullback is a closure: what it needs from the way
# forward, it keeps. And (1.2) is how to test one, as $Jv$ can be measured:
#
# $$
# J v \approx \frac{f(x + \varepsilon v) - f(x - \varepsilon v)}{2 \varepsilon} \tag{1.3}
# $$

# %% stated=true
rng = np.random.default_rng(0)
x, W, v, dy = (rng.standard_normal(shape) for shape in [(3, 4), (2, 4), (3, 4), (3, 2)])  # float64, for a test

y, vjp = linear(x, W)  # y = x Wᵀ
dx, dW, _ = vjp(dy)
Jv = (linear(x + 1e-5 * v, W)[0] - linear(x - 1e-5 * v, W)[0]) / 2e-5
print(f"⟨dy, J v⟩ = {np.vdot(dy, Jv):.6f}     ⟨vjp(dy), v⟩ = {np.vdot(dx, v):.6f}")

# %% [markdown]
# Why a *random* $dy$? Many tests take all ones, which asks for the gradient of the sum. For a softmax that sum is
# always one and its gradient zero: such a test passes for a pullback that returns zeros.
#
# ## RMSNorm
#
# Each token's features are divided by their root mean square, and multiplied by a gain $\gamma$ that is learned:
#
# $$
# y = \hat x\, \gamma \qquad \hat x = \frac{x}{\operatorname{rms}(x)} \qquad
# \operatorname{rms}(x) = \sqrt{\operatorname{mean}(x^2) + \epsilon} \tag{1.4}
# $$
#
# On the way back, remember that $x$ stands in it twice. With $\rho = 1/\operatorname{rms}(x)$,
# $d\rho = -\rho^3 \operatorname{mean}(x\,dx)$, so
#
# $$
# dx = \rho \left( d\hat x - \hat x \operatorname{mean}(d\hat x\, \hat x) \right) \qquad d\hat x = dy\, \gamma \qquad
# d\gamma = \sum_{\text{rows}} dy\, \hat x \tag{1.5}
# $$
#
# ### Exercise 1.1: RMSNorm and its pullback
#
# This attempt gives the right values. `check` holds it against everything that is known of `norms.rms_norm`. Which of
# its properties fail, and which pass in spite of the mistake?


# %% exercise="1.1"
def my_rms_norm(x, weight, eps):
    inv_rms = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
    x_hat = x * inv_rms
    y = x_hat * weight

    def vjp(dy):
        dx_hat = dy * weight
        dx = dx_hat * inv_rms
        dweight = (dy * x_hat).reshape(-1, x.shape[-1]).sum(axis=0)
        return dx, dweight

    return y, vjp


# %%
with attempt("1.1"):
    check("norms.rms_norm", my_rms_norm, dtypes=("float32", "float64"), **drawn)

# %% [markdown]
# ## Where a token stands
#
# Attention compares a query with keys by dot products, which know nothing of order. Rotary embeddings (RoPE) turn each
# pair of features by an angle that grows with the position $m$:
#
# $$
# y_1 = x_1 \cos\varphi - x_2 \sin\varphi \qquad y_2 = x_2 \cos\varphi + x_1 \sin\varphi \qquad
# \varphi_i = m\,\theta^{-2i/d} \tag{1.6}
# $$
#
# Turned by $m$ and $n$, a query and a key have a dot product that depends on $m - n$ only. The pullback of a rotation
# is the rotation back.

# %% stated=true
q, k = rng.standard_normal((2, 1, 1, 1, config.head_dim))
omega = frequencies(config.head_dim, config.rope_theta)


def turned(x, position):
    return rope(x, *rotations(np.array([[position]]), omega, np.float64))[0]


for m, n in [(3, 1), (103, 101), (100_003, 100_001), (3, 2)]:
    print(f"query at {m:7,}, key at {n:7,}: {np.vdot(turned(q, m), turned(k, n)):.6f}")

# %% [markdown]
# Which features make a pair? $x_1$ and $x_2$ in (1.6) are the first and the second *half* of a head, as in the files of
# Hugging Face. The paper pairs neighbors, and so do GGUF files. A model whose weights were made for one and that is run
# with the other writes nonsense, and no shape tells you.
#
# ### Exercise 1.2: the halves


# %% exercise="1.2"
def my_rope(x, cos, sin):
    cos, sin = cos[:, None], sin[:, None]  # (batch, 1, tokens, d/2): the same for every head

    def turn(x, sin):
        x1, x2 = x[..., 0::2], x[..., 1::2]
        return np.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)

    return turn(x, sin), lambda dy: turn(dy, -sin)


# %%
with attempt("1.2"):
    check("rope.rope", my_rope, **drawn)

# %% [markdown]
# ## Attention
#
# Every token takes a mean of the values of those it may see, weighted by how well their keys fit its query:
#
# $$
# y = P v \qquad P = \operatorname{softmax}\left(\frac{q k^\top}{\sqrt d} \text{ where visible, else } -\infty\right)
# \tag{1.7}
# $$
#
# $$
# dv = P^\top dy \qquad dP = dy\, v^\top \qquad dS = P \left(dP - \textstyle\sum_j P\, dP\right) \qquad
# dq = \frac{dS\, k}{\sqrt d} \qquad dk = \frac{dS^\top q}{\sqrt d} \tag{1.8}
# $$
#
# In a text, "visible" is what came before: `causal_mask`. And several query heads share a key/value head
# (*grouped-query attention*): of $H$ query heads and $G$ key/value heads, query head $h$ reads key/value head $\lfloor
# h / (H/G) \rfloor$. Here are two tokens, with numbers for which one can do it by hand.

# %% varies=true
show(LESSONS["attention"](), height=460)

# %% [markdown]
# ### Exercise 1.3: attention, with three mistakes
#
# All shapes are right and nothing is raised. Two of the mistakes are in the values and one is in the pullback.


# %% exercise="1.3"
def my_attention(q, k, v, visible):
    group = q.shape[1] // k.shape[1]
    scale = 1 / math.sqrt(q.shape[-1])
    keys, values = np.tile(k, (1, group, 1, 1)), np.tile(v, (1, group, 1, 1))  # one for each query head
    scores = q @ keys.swapaxes(-1, -2) * scale
    scores = np.where(visible[:, None], scores, q.dtype.type(-1e4))
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    p = e / e.sum(axis=-1, keepdims=True)

    def vjp(dy):
        def shared(x):  # heads that read the same keys add up what they say of them
            return x.reshape(*k.shape[:2], group, *x.shape[2:]).sum(axis=2)

        dp = dy @ values.swapaxes(-1, -2)
        dscores = p * (dp - np.sum(p * dp, axis=-1, keepdims=True))
        return dscores @ keys * scale, shared(dscores.swapaxes(-1, -2) @ q), shared(p.swapaxes(-1, -2) @ dy)

    return p @ values, vjp


# %%
with attempt("1.3"):
    check("attention.attention", my_attention, **drawn)

# %% [markdown]
# <details><summary>A hint for each</summary>
#
# 1. `np.tile` puts the heads 0, 1, 0, 1 beside each other. Which of them does query head 1 have to read?
# 2. −10,000 is far below most scores, not below all. And a token that sees nothing at all should get nothing: with
#    $-\infty$ everywhere, the maximum is $-\infty$ too, so take care of it, and of a sum that is 0.
# 3. The scale stands between $q$ *and* $k$ and the scores.
#
# </details>
#
# ## The whole network
#
# A block adds what attention says to a running sum $h$, and then what a feed-forward network says:
#
# $$
# h' = h + \operatorname{Attention}(\operatorname{RMSNorm}(h)) \qquad
# h'' = h' + \operatorname{MLP}(\operatorname{RMSNorm}(h')) \tag{1.9}
# $$
#
# $$
# \operatorname{MLP}(x) = \left(\operatorname{silu}(x W_g^\top)\; x W_u^\top\right) W_d^\top
# \qquad \operatorname{silu}(g) = g\, \sigma(g) \tag{1.10}
# $$
#
# (1.10) is SwiGLU. Behind the last block come a norm and the output matrix, which in this model is the embedding table
# once more (*tied* embeddings): a token is likely if its row resembles what the network ends with. That is all. Here it
# is with the library's operations, one after the other; the line with `one_hot` asks attention for its weights $P$ by
# giving it values from which they can be read off.


# %%
def weight(layer, name):
    return params[f"model.layers.{layer}.{name}.weight"]


def heads(x):  # (batch, tokens, heads · d) -> (batch, heads, tokens, d)
    return x.reshape(*x.shape[:2], -1, config.head_dim).swapaxes(1, 2)


def by_hand(tokens):
    n = tokens.shape[1]
    positions = np.arange(n)[None]
    cos, sin = rotations(positions, omega)
    visible = causal_mask(positions, n)
    one_hot = np.broadcast_to(
        np.eye(n, config.head_dim, dtype=np.float32), (1, config.num_key_value_heads, n, config.head_dim)
    )
    x, _ = embedding(tokens, params[llama.EMBEDDING])
    patterns = []
    for layer in range(config.num_hidden_layers):
        normed, _ = rms_norm(x, weight(layer, "input_layernorm"), config.rms_norm_eps)
        q, k, v = (heads(linear(normed, weight(layer, f"self_attn.{name}_proj"))[0]) for name in "qkv")
        q, k = rope(q, cos, sin)[0], rope(k, cos, sin)[0]
        context, _ = attention(q, k, v, visible)
        patterns.append(attention(q, k, one_hot, visible)[0][0, :, :, :n])  # P v with v = 1: P itself
        x = x + linear(context.swapaxes(1, 2).reshape(x.shape), weight(layer, "self_attn.o_proj"))[0]
        normed, _ = rms_norm(x, weight(layer, "post_attention_layernorm"), config.rms_norm_eps)
        gate, up = (linear(normed, weight(layer, f"mlp.{name}_proj"))[0] for name in ("gate", "up"))
        x = x + linear(swiglu(gate, up)[0], weight(layer, "mlp.down_proj"))[0]
    hidden, _ = rms_norm(x, params["model.norm.weight"], config.rms_norm_eps)
    return linear(hidden, params[llama.EMBEDDING])[0], patterns


# %% stated=true
logits, patterns = by_hand(tokens)
library, vjp = llama.forward(params, tokens, config)
print("logits", logits.shape, "the library's differ by at most", f"{np.abs(logits - library).max():.0e}")

# %% [markdown]
# What do heads look at? Two of the sixteen, on our sentence. A row is a token that looks, a column one that is seen.
# The head on the left looks a token or two back. The one on the right looks at the very beginning as long as the name
# lasts (the weights of a row sum to one, so a head to which nothing fits has to look somewhere), and behind the colon
# mostly at the colon, "Return" and "of". Nobody told them to.

# %%
figure, axes = plt.subplots(1, 2, figsize=(7.6, 4.2))
names = [piece.replace("<|im_start|>", "<start>").strip() or "␣" for piece in pieces]
for ax, (layer, head) in zip(axes, [(3, 3), (2, 0)], strict=True):
    ax.imshow(patterns[layer][head], cmap="Blues", vmin=0, vmax=1)
    ax.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    ax.set_yticks(range(len(names)), names, fontsize=7)
    ax.set(title=f"block {layer + 1} of 4, head {head + 1} of 4")
    ax.grid(False)
plt.show()

# %% [markdown]
# ## Loss
#
# The row of logits at position $n$ is a bet on token $n + 1$. The loss is the mean of how surprised the model is, in
# nats:
#
# $$
# \text{loss} = -\frac1N \sum_{n \text{ counts}} \log p_n[\text{label}_n] \qquad
# p = \operatorname{softmax}(\text{logits}) \tag{1.11}
# $$
#
# $$
# d\,\text{logits}_n = \frac{p_n - \operatorname{onehot}(\text{label}_n)}{N} \text{ where } n \text{ counts, else } 0
# \tag{1.12}
# $$
#
# A label of −100 does not count. (1.12) is the whole push of training: what was likely and wrong goes down, what was
# right goes up, and each row of the gradient sums to zero. Before you run it: a model that knows nothing gives every
# one of 2,048 tokens the same probability. What is its loss?

# %% stated=true
labels = tokens[:, 1:]
loss, loss_vjp = cross_entropy(library[:, :-1], labels)
surprise = -np.take_along_axis(log_softmax(library[:, :-1]), labels[..., None], axis=-1)[0, :, 0]
fresh, _ = llama.forward(llama.initialize(config, np.random.default_rng(0)), tokens, config)
print(f"the built-in model   {loss:.2f} nats a token, {math.exp(loss):7,.0f} tokens to hesitate between")
print(f"fresh random numbers {cross_entropy(fresh[:, :-1], labels)[0]:.1f}")
print(f"knows nothing        {math.log(config.vocab_size):.2f}, log {config.vocab_size:,}")

# %%
figure, axes = plt.subplots()
axes.bar(range(1, len(names)), surprise)
axes.axhline(math.log(config.vocab_size), color="gray", linewidth=0.8, linestyle=":")
axes.annotate("log 2,048: knows nothing", (len(names) - 0.6, 7.75), color="gray", fontsize=8, ha="right")
axes.set(title="Surprise at each token, given those before it", ylabel="nats")
axes.set_xticks(range(1, len(names)), names[1:], rotation=90, fontsize=8)
axes.grid(axis="x", visible=False)
plt.show()

# %% [markdown]
# A name holds surprises ("q"), a docstring begins with "Return" after a colon, and "the" follows "of". "input" was
# not to be foreseen. A mean over tokens hides all of this: most of a loss comes from a few tokens.
#
# ### Exercise 1.4: cross-entropy
#
# The formula as one would write it down. It fails in two ways, one of which you may not see for weeks. `normalizer` is
# $N$, or None for the number of labels that count; a label outside of the vocabulary is an error (`ValueError`).


# %% exercise="1.4"
def my_cross_entropy(logits, labels, normalizer):
    counts = labels != IGNORE_INDEX
    target = np.where(counts, labels, 0)[..., None]
    if ((target < 0) | (target >= logits.shape[-1])).any():
        raise ValueError(f"labels: needed 0 to {logits.shape[-1] - 1} or {IGNORE_INDEX}")
    n = logits.dtype.type(labels.size if normalizer is None else normalizer)
    p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    loss = -np.where(counts, np.log(np.take_along_axis(p, target, axis=-1)[..., 0]), 0).sum() / n

    def vjp(dloss):
        one_hot = np.arange(logits.shape[-1]) == target
        return np.where(counts[..., None], (p - one_hot) * (logits.dtype.type(dloss) / n), 0)

    return loss, vjp


# %%
with attempt("1.4"):
    check("losses.cross_entropy", my_cross_entropy, **drawn)

# %% [markdown]
# ## Gradient
#
# The way back calls the pullbacks in reverse: from the loss to the logits to every number that learns. The test of
# (1.3) works for the network as a whole: a step of ε along a random direction in the space of all its numbers, in
# float64.

# %% stated=true
exact = {name: w.astype(np.float64) for name, w in params.items()}
direction = {name: rng.standard_normal(w.shape) for name, w in exact.items()}


def loss_of(weights):
    logits, vjp = llama.forward(weights, tokens, config)
    value, loss_vjp = cross_entropy(logits[:, :-1], labels)
    return value, lambda: vjp(np.pad(loss_vjp(1.0), ((0, 0), (0, 1), (0, 0))))  # the last position predicts nothing


def along(step):
    return loss_of({name: w + step * direction[name] for name, w in exact.items()})[0]


gradient = loss_of(exact)[1]()
slope = sum(np.vdot(g, direction[name]) for name, g in gradient.items())
print(f"⟨gradient, direction⟩   {slope:.6f}")
print(f"central difference      {(along(1e-6) - along(-1e-6)) / 2e-6:.6f}")
print(f"{sum(g.size for g in gradient.values()):,} derivatives in one pass back")

# %% [markdown]
# Central differences would need two forward passes for *each* of the million numbers. The way back has two products
# where the way forward has one ($dx$ and $dW$ beside $y$), and gives them all. That makes training possible, and its
# price is memory.
#
# ## The closure is the activation memory
#
# A pullback needs numbers from the way forward: $x$ and $W$ of a product, $\hat x$ of a norm, $P$ of attention. As long
# as `vjp` is alive, they are. So what training keeps can be counted by walking through the closures:


# %%
def owner(array):
    while isinstance(array.base, np.ndarray):  # a view keeps the whole array
        array = array.base
    return array


def kept(pullback):
    """Bytes of the arrays that a pullback holds on to, beside the weights."""
    weights, arrays, seen, todo = {id(owner(w)) for w in params.values()}, {}, set(), [pullback]
    while todo:
        thing = todo.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, np.ndarray):
            if id(owner(thing)) not in weights:
                arrays[id(owner(thing))] = owner(thing).nbytes
        elif isinstance(thing, dict):
            todo += thing.values()
        elif isinstance(thing, list | tuple):
            todo += thing
        else:
            todo += [x for cell in getattr(thing, "__closure__", None) or () for x in gc.get_referents(cell)]
            todo += vars(thing).values() if is_dataclass(thing) else ()
    return sum(arrays.values())


def row_of(length):
    row = rng.integers(0, config.vocab_size, length)
    return pad([(row, row)])


# %% stated=true
weights = sum(w.nbytes for w in params.values())
lengths = [64, 128, 256, 512]
held = {
    name: [kept(sft.loss(params, row_of(n), config, recompute=recompute)[1]) for n in lengths]
    for name, recompute in [("all activations", False), ("recompute", True)]
}
print(f"weights {weights / 1e6:.1f} MB")
for n, everything, little in zip(lengths, *held.values(), strict=True):
    highest = 4 * memory.activations(config, 1, n)
    print(
        f"{n:4d} tokens: the pullback keeps {everything / 1e6:5.1f} MB, {little / 1e6:4.1f} MB if it computes again; "
        f"at its highest a step has {highest / 1e6:5.1f} MB"
    )

# %%
figure, axes = plt.subplots()
for name, sizes in held.items():
    axes.plot(lengths, np.array(sizes) / 1e6, marker="o", label=name)
axes.axhline(weights / 1e6, color="black", linewidth=0.8, linestyle="--", label="the weights")
axes.set(title="What the pullback of one text keeps", xlabel="tokens", ylabel="MB", ylim=(0, None))
axes.set_xticks(lengths, lengths)
axes.legend()
plt.show()

# %% [markdown]
# (One megabyte of the upper line is the gradient of the output matrix, which is formed along with the loss.) One text
# of 512 tokens takes several times the memory of the model itself, and a batch of sixteen nearly sixteen times that.
# *Recomputation* (gradient checkpointing) keeps the input of each block only, and runs the block once more on the way
# back. `minift memory` and notebook 02 draw up the whole bill.
#
# ## Generating: the cache
#
# To generate is to choose a token, append it, and ask again. Nobody asks for a gradient, so no pullback stays. But the
# keys and values of the tokens so far are needed at every step, and they never change, because nobody looks ahead:
#
# $$
# \text{bytes of the cache} = 2 \cdot L \cdot G \cdot d \cdot \text{tokens} \cdot \text{bytes of a number} \tag{1.13}
# $$
#
# for $L$ blocks and $G$ key/value heads of $d$ numbers. A query is used once and forgotten, so there is no query cache;
# that is why sharing key/value heads pays.

# %% stated=true
tiny_cache = KVCache(config.num_hidden_layers, 1, config.num_key_value_heads, 1, config.head_dim)
seven = memory.SIZES["7B"]
size = 2 * seven.num_hidden_layers * seven.num_key_value_heads * seven.head_dim * 2
print(f"built-in model      {tiny_cache.nbytes:9,} bytes a token, {config.num_key_value_heads} of 4 heads")
print(f"LLaMA 7B, 16 bits   {size:9,} bytes a token, {size * 2048 / 1e9:.2f} GB for 2,048 tokens")


# %% varies=true
def without_a_cache(prompt, new):
    row = prompt
    for _ in range(new):
        logits, _ = llama.forward(params, row, config)
        row = np.concatenate([row, logits[:, -1:].argmax(axis=-1)], axis=1)
    return row


prompt, new = np.array([tokenizer.encode("The following")]), 8 if SMALL else 100
started = time.perf_counter()
slow = without_a_cache(prompt, new)
between = time.perf_counter()
fast = llama.generate(params, prompt, config, max_new_tokens=new)
ended = time.perf_counter()
same = int((slow == fast).sum())
print(f"{new} tokens, the whole text again for each: {between - started:.2f} s")
print(f"{new} tokens with the cache: {ended - between:.2f} s")
print(f"{same} of {slow.size} tokens are the same")

# %% [markdown]
# The model at work, first with the likeliest token each time, then with samples from its distribution:

# %%
stop = {tokenizer.eos_token_id}
for start in ("<|im_start|>math.sqrt: Return the", "<|im_start|>The `if` statement"):
    out = llama.generate(params, np.array([tokenizer.encode(start)]), config, max_new_tokens=32, stop_tokens=stop)
    print(tokenizer.decode(out[0], skip_special_tokens=True), "\n")

# %% varies=true
start = np.array([tokenizer.encode("<|im_start|>math.sqrt: Return the")])
for temperature in (0.5, 1.0):
    out = llama.generate(
        params,
        np.repeat(start, 2, axis=0),
        config,
        max_new_tokens=24,
        temperature=temperature,
        rng=np.random.default_rng(1),
        stop_tokens=stop,
    )
    for row in out:
        print(f"temperature {temperature}: {tokenizer.decode(row, skip_special_tokens=True)}")

# %% [markdown]
# It writes sentences that look like docstrings, and knows nothing. Teaching it something is what the other notebooks
# are about.
#
# ## What to look at
#
# - The loss at the first step: near $\log V$ for fresh numbers. Far above it something is wrong before training began.
# - Losses are comparable for one tokenizer only: fewer, longer tokens have a higher loss each.
# - A gradient check in float32 cannot tell a wrong pullback from rounding. Use float64, random cotangents, and settings
#   that are not neutral: with a gain of 1 nobody sees that γ was forgotten.
# - Which heads share, which features pair, where the scale stands: mistakes that keep all shapes and still train.
# - Memory that grows with the batch and the length is activations; memory that does not is weights, gradients, and the
#   optimizer.
#
# ## Sources
#
# - A. Vaswani and others: *Attention Is All You Need*, 2017, [arXiv 1706.03762](https://arxiv.org/abs/1706.03762).
# - H. Touvron and others: *LLaMA*, 2023, [arXiv 2302.13971](https://arxiv.org/abs/2302.13971).
# - B. Zhang, R. Sennrich: *Root Mean Square Layer Normalization*, 2019,
#   [arXiv 1910.07467](https://arxiv.org/abs/1910.07467).
# - J. Su and others: *RoFormer* (rotary positions), 2021, [arXiv 2104.09864](https://arxiv.org/abs/2104.09864).
# - N. Shazeer: *GLU Variants Improve Transformer*, 2020, [arXiv 2002.05202](https://arxiv.org/abs/2002.05202).
# - J. Ainslie and others: *GQA*, 2023, [arXiv 2305.13245](https://arxiv.org/abs/2305.13245).
# - `minift/nn/`, `minift/models/llama.py`, `minift/models/generation.py`; `minift step rms_norm`,
#   `minift step attention`, `minift step cross_entropy`; `minift generate`; `minift memory --model tiny --method full`.
