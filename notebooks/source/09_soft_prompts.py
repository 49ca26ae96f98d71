# %% [markdown]
# # 09 · Soft prompts: prompt tuning, prefix tuning, P-tuning
#
# *20 minutes. Builds on notebook 01 (attention, the cache) and notebook 02 (what learns).*
#
# A prompt in words can make a model do another task, and no weight changes. A *soft* prompt is made of numbers that no
# word has, and they are found by gradient. Three methods do this, and their names are mixed up a lot.
#
# Afterwards you can
#
# - say of each where its numbers enter the model, what learns, and what is kept after training;
# - count what learns, for any model, without an afterthought for grouped key/value heads;
# - test an implementation with four equalities, which need no other library, and three of them no tolerance;
# - find the usual mistakes: positions, mask, lengths, the sum over the batch, the order of an LSTM's gates.

# %%
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from hypothesis import strategies as st

from minift.cli.common import batches_of, read_data
from minift.cli.finetune import PER_WIDTH
from minift.conformance import check
from minift.conformance.agreement import matrices
from minift.io import load_model, load_tokenizer
from minift.models import llama
from minift.models.layout import slots_and_positions
from minift.nn.attention import KVCache, causal_mask
from minift.nn.mlp import sigmoid
from minift.nn.weight import Frozen, freeze, trainable
from minift.notebook import SMALL, attempt, figures
from minift.peft import prefix_tuning, prompt_tuning, soft_prompt
from minift.step import show
from minift.step.lessons import LESSONS
from minift.train import sft
from minift.train.evaluate import held_out_loss
from minift.train.loop import Settings, fit
from minift.train.methods import prepare

figures()
config, base = load_model("tiny")
tokenizer = load_tokenizer("tiny")

# %% [markdown]
# ## One page on how the three differ
#
# Let a text of $T$ tokens enter the model as its embeddings, $h^0 = E[\text{tokens}]$, a matrix of $T$ rows of $d$
# numbers. $p$ is the number of *virtual tokens* that every text shall begin with.
#
# **Prompt tuning** (Lester et al. 2021) puts $p$ more rows before them. The rows learn; the model is frozen.
#
# $$
# h^0 = [\,P;\ E[\text{tokens}]\,] \qquad P\ (p, d)\ \text{learns} \tag{9.1}
# $$
#
# **P-tuning** (Liu et al. 2021) does the same, and lets a small network make the rows. The network reads no text, only
# a table of its own. When training ends it is run once, its output is kept, and it is dropped.
#
# $$
# P = \mathrm{encoder}(\mathcal E) \qquad \mathcal E\ (p, d)\ \text{and the encoder learn} \tag{9.2}
# $$
#
# **Prefix tuning** (Li & Liang 2021) puts nothing at the input. It puts $p$ more keys and values into the attention of
# *every* layer $l$, as if a text before had just been read and its cache were still there.
#
# $$
# \text{keys } [K_l;\, k], \quad \text{values } [V_l;\, v] \qquad K_l, V_l\ \text{learn} \tag{9.3}
# $$

# %%
RED, PINK, BLUE = "#d65f5f", "#f0c4c4", "#c9d7ee"
P_SHOWN, T_SHOWN, LAYERS_SHOWN = 3, 5, 4


def draw(axes, title, virtual, input_color, layer_color):
    for row in range(LAYERS_SHOWN + 1):
        for column in range(P_SHOWN + T_SHOWN):
            prompt = column < P_SHOWN
            color = (layer_color if row else input_color) if prompt else BLUE
            if color:
                axes.add_patch(plt.Rectangle((column + 0.08, row + 0.14), 0.84, 0.72, facecolor=color))
    axes.text(P_SHOWN / 2, -0.35, virtual, ha="center", va="top", fontsize=8)
    axes.text(P_SHOWN + T_SHOWN / 2, -0.35, "the text", ha="center", va="top", fontsize=8)
    axes.set(xlim=(0, P_SHOWN + T_SHOWN), ylim=(-1.6, LAYERS_SHOWN + 1), title=title, xticks=[], aspect="equal")
    axes.set_yticks(np.arange(LAYERS_SHOWN + 1) + 0.5, ["input", *(f"layer {i}" for i in range(LAYERS_SHOWN))])
    axes.grid(False)
    axes.tick_params(length=0, labelsize=8)
    for side in axes.spines.values():
        side.set_visible(False)


figure, (one, two, three) = plt.subplots(1, 3, figsize=(8.6, 3.1), sharey=True)
draw(one, "prompt tuning", "p rows learn", RED, PINK)
draw(two, "P-tuning", "a network learns", PINK, PINK)
two.add_patch(plt.Rectangle((0.08, -1.55), 2.84, 0.6, facecolor=RED))
two.text(1.5, -1.25, "encoder", ha="center", va="center", fontsize=8, color="white")
draw(three, "prefix tuning", "nothing here", None, RED)
handles = [plt.Rectangle((0, 0), 1, 1, facecolor=c) for c in (RED, PINK, BLUE)]
figure.legend(handles, ["learns", "computed from what learns", "the text's"], loc="outside lower center", ncols=3)
plt.show()

# %% [markdown]
# The picture says nearly all. In prompt tuning and P-tuning the virtual tokens go *through the model*: each layer sees
# of them what the layers below have made, and every weight is multiplied with $p$ more rows. In prefix tuning there are
# no such rows: each layer finds its own keys and values, and the feed-forward blocks have no more work than before.
#
# | | what learns | where it enters | kept after training |
# |---|---|---|---|
# | prompt tuning | $p$ embeddings | before layer 0 | $p\,d$ numbers |
# | P-tuning | a network that makes $p$ embeddings | before layer 0 | its output, $p\,d$ numbers |
# | prefix tuning | $p$ keys and values a layer (or a network that makes them) | in each attention | $2\,L\,p\,d_{kv}$ |
#
# So **prompt tuning and P-tuning compute the same function**, and differ in how they get there; **prefix tuning
# computes another one**. "P-tuning v2" (Liu et al. 2022) is prefix tuning again, whatever its name says.
#
# And none of the three is an adapter: there is no weight to merge, and $p$ positions of the context are spent for good.
#
# ## How many numbers
#
# The built-in model is 128 wide, has 4 layers, 4 query heads and 2 key/value heads of 32 numbers each. With 20 virtual
# tokens: how many numbers learn in each of the three? Which of the three is the largest file afterwards?

# %% stated=true
prepared = {}
for method in ("prompt", "p-tuning", "prefix"):
    params, _ = prepare(method, base, config, rng=np.random.default_rng(0), num_virtual_tokens=20)
    prepared[method] = params
    learns = sum(array.size for array in trainable(params).values())
    kept = soft_prompt.detach(params)[1].table.size
    print(f"{method:9s} {learns:7,} numbers learn, {kept:7,} are kept, of {1_000_576:,}: {learns / 1_000_576:.2%}")

# %% [markdown]
# P-tuning trains twenty times as many numbers as prompt tuning, and keeps the same 2,560. Prefix tuning keeps most.
#
# ### Exercise 9.1: count a prefix
#
# `counted` attaches a prefix to an empty model of the given sizes and adds up what learns. Write the formula. The
# attempt takes one vector of the model's width for each virtual token and layer, and forgets two things.


# %%
def counted(p, layers, query_heads, kv_heads, head_dim):
    d = query_heads * head_dim
    empty = {
        f"model.layers.{layer}.self_attn.{name}.weight": Frozen(np.zeros((heads * head_dim, d), np.float32))
        for layer in range(layers)
        for name, heads in (("q_proj", query_heads), ("k_proj", kv_heads), ("v_proj", kv_heads))
    }
    prefixed = prefix_tuning.attach(empty, p, rng=np.random.default_rng(0))
    return sum(array.size for array in trainable(prefixed).values())


# %% exercise="9.1"
def my_count(p, layers, query_heads, kv_heads, head_dim):
    return p * layers * query_heads * head_dim


# %%
sizes = {"p": st.integers(1, 30), "layers": st.integers(1, 6), "query_heads": st.sampled_from((4, 8))}
sizes |= {"kv_heads": st.sampled_from((1, 2, 4)), "head_dim": st.sampled_from((2, 8, 64))}
with attempt("9.1"):
    print(check(counted, my_count, inputs=sizes))

# %% [markdown]
# In the papers' sizes: five tokens for T5-XXL ($d$ = 4,096) are 20,480 numbers, and a hundred are less than 0.01 % of
# its 11 billion. Prefix tuning's "0.1 % of the parameters" depends on the length: with 10 tokens it is 0.14 % of GPT-2
# medium ($L$ = 24, $d$ = 1,024), and with the 200 that the paper takes for summaries 2.8 %.

# %% stated=true
print(f"T5-XXL, 5 tokens    {prompt_tuning.trainable_parameters(5, 4096):,}")
print(f"T5-XXL, 100 tokens  {prompt_tuning.trainable_parameters(100, 4096) / 11e9:.4%} of the parameters")
for p in (10, 200):
    print(f"GPT-2 medium, prefix of {p:3d}: {prefix_tuning.trainable_parameters(p, 24, 1024) / 354.92e6:.2%}")

# %% [markdown]
# ## Four equalities that need no other library
#
# A soft prompt is easy to get nearly right: with positions off by $p$ there is still something to learn, and no
# error is raised. But there are cases in which the answer is known, because the model itself gives it.
#
# **1. A prompt copied from the embeddings of typed tokens is the typed tokens.** To the bit: the same numbers go the
# same way.

# %% stated=true
typed = np.array(tokenizer.encode("Answer as a docstring does, in one sentence. "), np.int64)
text = np.array(tokenizer.encode("What does math.isqrt do?"), np.int64)[None]
p = len(typed)
as_text, _ = llama.backbone(base, np.concatenate([typed[None], text], axis=1), config)
as_prompt, _ = llama.backbone(prompt_tuning.attach(base, p, tokens=typed), text, config)
print(f"{p} tokens typed, {text.shape[1]} behind them")
print(f"hidden states that differ: {np.count_nonzero(as_prompt != as_text[:, p:])} of {as_prompt.size:,}")

# %% [markdown]
# (The hidden states are the text's: those of the virtual tokens are cut off, because virtual tokens predict nothing and
# have no labels.)
#
# **2. A prefix copied from the cache that a real text has left is that text.** Up to rounding, since the text before
# was computed in a pass of its own.

# %% stated=true
precise = {name: weight.astype(np.float64) for name, weight in base.items()}
whole, _ = llama.forward(precise, np.concatenate([typed[None], text], axis=1), config)


def prefix_of(inputs):
    """The keys and values that these tokens, or embeddings, leave in the cache, as a table that can learn."""
    heads, length = config.num_key_value_heads, inputs.shape[1]
    cache = KVCache(config.num_hidden_layers, 1, heads, length, config.head_dim, np.float64)
    llama.backbone(precise, inputs, config, cache=cache)
    return prefix_tuning.table(np.stack([cache.keys[:, 0], cache.values[:, 0]], axis=1))


copied = freeze(precise) | {prefix_tuning.TABLE: prefix_of(typed[None])}
behind, _ = llama.forward(copied, text, config)
difference = np.abs(behind - whole[:, p:]).max()
print("logits agree to 1e-10:", bool(difference < 1e-10))

# %% [markdown]
# The same cell shows why every soft prompt at the input is *some* prefix: run it, keep the cache. Hardly any prefix is
# a soft prompt at the input, since its layers need not agree with each other.

# %% stated=true
table = prompt_tuning.attach(base, p, rng=np.random.default_rng(0))[prompt_tuning.TABLE].astype(np.float64)
soft, _ = llama.forward(freeze(precise) | {prompt_tuning.TABLE: table}, text, config)
same, _ = llama.forward(freeze(precise) | {prefix_tuning.TABLE: prefix_of(table[None])}, text, config)
print("a drawn prompt, and the prefix that it leaves, agree to 1e-10:", bool(np.abs(soft - same).max() < 1e-10))
print(f"numbers: {table.size:,} in the prompt, {prefix_of(table[None]).size:,} in the prefix")

# %% [markdown]
# **3. A folded encoder is the encoder.** **4. A prompt of length zero is no prompt.** Both to the bit. But what of a
# *prefix of zeros*: is that nothing, too? Predict before you run it.

# %% stated=true
with_network = prepared["p-tuning"]
folded = soft_prompt.fold(with_network)
found, _ = llama.backbone(with_network, text, config)
again, _ = llama.backbone(folded, text, config)
print(f"folded: {np.count_nonzero(found != again)} hidden states differ; it is now {soft_prompt.kind(folded)}")

plain, _ = llama.backbone(base, text, config)
for name, attach in (("prompt", prompt_tuning.attach), ("prefix", prefix_tuning.attach)):
    empty, _ = llama.backbone(attach(base, 0, rng=np.random.default_rng(0)), text, config)
    print(f"{name} of length 0: {np.count_nonzero(empty != plain)} differ")

zeros, _ = llama.backbone(freeze(base) | {prefix_tuning.TABLE: np.zeros((20, 512), np.float32)}, text, config)
print(f"a prefix of 20 zeros: {np.count_nonzero(zeros != plain):,} of {plain.size:,} differ")

# %% [markdown]
# A zero key has the score 0, and $e^0 = 1$: it takes its share of the attention, and hands out a value of zero.
#
# ### Exercise 9.2: put it before the text, and bring its gradient back
#
# `prompt` is (p, d), `x` (batch, tokens, d), `lengths` counts the real tokens of each row, and `dy` is the cotangent of
# what the blocks get. Return what they get, the lengths that they get, and the cotangents of `x` and of `prompt`. The
# attempt below trains. It trains the wrong thing.


# %%
def prepended(prompt, x, lengths, dy):
    params = {prompt_tuning.TABLE: prompt}
    y, lengths, _, vjp = soft_prompt.prepend(params, x, 1, 1, lengths=lengths)
    dx, _, ((_, dprompt),) = vjp(dy, None)
    return y, lengths, dx, dprompt


# %% exercise="9.2"
def my_prepend(prompt, x, lengths, dy):
    p = len(prompt)
    y = np.concatenate([np.broadcast_to(prompt, (len(x), *prompt.shape)), x], axis=1)
    dx, dprompt = dy[:, p:], dy[:, :p].mean(axis=0)
    return y, lengths, dx, dprompt


# %%
batch = {"prompt": matrices(2, 3), "x": matrices(2, 4, 3), "lengths": st.just(np.array([4, 1]))}
with attempt("9.2"):
    print(check(prepended, my_prepend, inputs=batch | {"dy": matrices(2, 6, 3)}))

# %% [markdown]
# <details><summary>A hint for each</summary>
#
# 1. Row 1 has one real token. How many of what the blocks get must not be taken for padding?
# 2. Every text begins with the same numbers. Used twice, they get two cotangents. (The mean over the batch is in the
#    loss already.)
#
# </details>
#
# ### Exercise 9.3: where the text stands behind a prefix
#
# A prefix is in the keys, and in no query. So the rows of the mask are the text's tokens, and its columns are more than
# that. Write the positions of the text, and who may look at whom. With `np.tril` alone, each token of the text sees as
# much of the prefix as it would have seen of the text.


# %%
def layout(p, tokens):
    slots, positions = slots_and_positions(np.array([p]), tokens)
    return positions[0], causal_mask(slots, p + tokens)[0]


# %% exercise="9.3"
def my_layout(p, tokens):
    positions = np.arange(tokens)
    visible = np.tril(np.ones((tokens, p + tokens), bool))
    return positions, visible


# %%
with attempt("9.3"):
    print(check(layout, my_layout, inputs={"p": st.integers(0, 5), "tokens": st.integers(1, 5)}))

# %% [markdown]
# Here is a prefix of one token, line by line: how the table becomes keys and values, who sees it, and what the
# attention makes of it, forward and backward.

# %% varies=true
show(LESSONS["prefix"](), height=420)

# %% [markdown]
# ## The network of P-tuning
#
# Words of a prompt depend on each other; rows of a table that learn alone do not. So the paper makes the rows with a
# recurrent network that runs over them in both directions, an LSTM (Hochreiter & Schmidhuber 1997). One step of it,
# with the memory $c$ and the output $h$:
#
# $$
# a = x W_{ih}^\top + b_{ih} + h W_{hh}^\top + b_{hh} \qquad (i, f, g, o) = \text{the four quarters of } a \tag{9.4}
# $$
#
# $$
# c' = \sigma(f)\, c + \sigma(i) \tanh(g) \qquad h' = \sigma(o) \tanh(c') \tag{9.5}
# $$
#
# $$
# \dot c = \dot c' + \dot h'\, o\, (1 - \tanh^2 c') \qquad \dot c_{\text{before}} = \dot c\, f \tag{9.6}
# $$
#
# In (9.6) a dot marks a cotangent and the gates are meant after their $\sigma$. The memory is *added to*, not
# overwritten: that is why its gradient survives many steps. (`p_tuning` has this network and a plain MLP, PEFT's
# default, which the training below takes, too.)
#
# ### Exercise 9.4: an LSTM with its gradient
#
# The attempt has two mistakes. One is about reading other people's weights: $i, f, g, o$ is the order of PyTorch, cuDNN
# and Keras, and some libraries have another. The other is in the pullback: what is said of `h` by the *next* step?


# %% exercise="9.4"
def my_lstm(x, W_ih, W_hh, b_ih, b_hh):
    h, c = np.zeros((2, len(x), W_hh.shape[1]), x.dtype)
    steps = []
    for t in range(x.shape[1]):
        i, f, o, g = np.split(x[:, t] @ W_ih.T + b_ih + h @ W_hh.T + b_hh, 4, axis=-1)
        i, f, g, o = sigmoid(i), sigmoid(f), np.tanh(g), sigmoid(o)
        h_before, c_before = h, c
        c = f * c + i * g
        h = o * np.tanh(c)
        steps.append((i, f, g, o, h_before, c_before, c, h))
    y = np.stack([step[-1] for step in steps], axis=1) if steps else np.zeros((*x.shape[:2], W_hh.shape[1]), x.dtype)

    def vjp(dy):
        dx, dW_ih, dW_hh, db = np.zeros_like(x), np.zeros_like(W_ih), np.zeros_like(W_hh), np.zeros_like(b_ih)
        dc = np.zeros((len(x), W_hh.shape[1]), x.dtype)
        for t in reversed(range(x.shape[1])):
            i, f, g, o, h_before, c_before, c, _ = steps[t]
            dh = dy[:, t]
            dc = dc + dh * o * (1 - np.tanh(c) ** 2)
            di, df, dg = dc * g * i * (1 - i), dc * c_before * f * (1 - f), dc * i * (1 - g * g)
            do = dh * np.tanh(c) * o * (1 - o)
            da = np.concatenate([di, df, do, dg], axis=-1)
            dx[:, t] = da @ W_ih
            dW_ih += da.T @ x[:, t]
            dW_hh += da.T @ h_before
            db += da.sum(axis=0)
            dc = dc * f
        return dx, dW_ih, dW_hh, db, db.copy()

    return y, vjp


# %%
with attempt("9.4"):
    check("lstm.lstm", my_lstm, examples=20 if SMALL else 100)

# %% [markdown]
# ## A short training
#
# Questions about Python's standard library, as in `minift finetune`: forty steps of eight examples, twenty virtual
# tokens, and for each method the learning rate that `minift finetune` would give it. That of prompt and prefix tuning
# is ten times LoRA's: their numbers enter at the scale of activations, and they are few.

# %%
STEPS, EVERY = (4, 2) if SMALL else (40, 10)
data = read_data("stdlib", tokenizer, seq_len=256, eval_examples=16 if SMALL else 32)
curves = {}
for method, params in prepared.items():

    def loss(p, batch, normalizer, key):
        return sft.loss(p, batch, config, normalizer)

    rate = PER_WIDTH[method] / config.hidden_size
    result = fit(
        params,
        loss,
        batches_of(data.train, 8, 1, seed=0),
        Settings(steps=STEPS, learning_rate=rate, eval_every=EVERY),
        evaluate=lambda p: held_out_loss(p, data.held_out, config),
    )
    curves[method] = result.losses()
    print(f"{method:9s} learning rate {rate:.3f}   held-out {curves[method][0][1]:.2f} → {curves[method][-1][1]:.2f}")

# %%
figure, axes = plt.subplots()
for method, points in curves.items():
    axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=method)
axes.set(title="Three soft prompts on one task", xlabel="step", ylabel="held-out loss, nats a token")
axes.legend()
plt.show()

# %% [markdown]
# One seed and 32 held-out examples show the shape of a curve, not who is best. The fair comparison gives every
# method the same batches and three seeds; it was run by `minift compare`, and its rows lie in
# `benchmarks/compare_tiny.json`. ± is half the distance from the lowest to the highest loss.

# %% stated=true
compared = json.loads(Path("../benchmarks/compare_tiny.json").read_text())
print(compared["command"], "·", compared["machine"], end="\n\n")
rows = {row["method"]: row for row in compared["rows"]}
for method in ("nothing", "prompt", "prefix", "p-tuning", "lora", "full"):
    row = rows[method]
    spread = (row["eval_loss_highest"] - row["eval_loss_lowest"]) / 2
    print(f"{method:9s} {row['trainable_parameters']:9,} learn   {row['eval_loss']:.3f} ± {spread:.3f}")

# %%
figure, axes = plt.subplots()
for method in ("prompt", "prefix", "p-tuning", "lora", "head", "full"):
    row = rows[method]
    around = [[row["eval_loss"] - row["eval_loss_lowest"]], [row["eval_loss_highest"] - row["eval_loss"]]]
    axes.errorbar(row["trainable_parameters"], row["eval_loss"], around, fmt="o", capsize=4)
    axes.annotate(
        method, (row["trainable_parameters"], row["eval_loss"]), (0, 9), textcoords="offset points", ha="center"
    )
axes.axhline(rows["nothing"]["eval_loss"], color="gray", linestyle="--", linewidth=0.8)
axes.annotate("the model as it is", (2e3, rows["nothing"]["eval_loss"] - 0.12), color="gray", fontsize=8)
axes.set(xscale="log", xlim=(1.5e3, 2.5e6), xlabel="numbers that learn", ylabel="held-out loss, nats a token")
axes.set(title="60 steps of 16 examples, 3 seeds", ylim=(3.5, 5.15))
plt.show()

# %% [markdown]
# With 2,560 numbers the loss falls from 5.04 to 4.14 nats: prompt tuning gets two thirds of what LoRA gets with thirty
# times as many. Prefix tuning is not better here though it has four times the numbers (4.128 ± 0.009 against 4.138
# ± 0.033: no difference that the seeds would not make). And P-tuning, whose result is a table of the same size, ends
# behind both: a network between the gradient and the table is a way to train, and on this task not a good one. None of
# this says what holds for large models, where Lester et al. find prompt tuning as good as tuning everything.
#
# ## What to look at
#
# - **How large are the rows at the start?** PEFT draws prompts from $N(0, 1)$. The built-in model's own embeddings have
#   a standard deviation of 0.09, so such a prompt is eleven times as long as its words. `prompt_tuning.attach` draws
#   at the model's scale, or copies the embeddings of a text, which the paper finds best but for its largest models.

# %% stated=true
words = prompt_tuning.embeddings(base)
print(f"standard deviation of the built-in model's embeddings: {words.std():.2f}")

# %% [markdown]
# - **The learning rate.** minift takes ten times LoRA's for a prompt or a prefix. Try LoRA's own: change `rate` above.
# - **What fails in silence**: positions that begin at 0 behind a prefix, lengths that do not count the prompt, labels
#   for virtual tokens. None of them raises an error. Ask the equalities of the loss and of generation as well, and each
#   of them shows.
# - **The context is shorter** by $p$, for good; and the cost in inference is $p$ more rows in every layer for a prompt
#   (the first time; then they lie in the cache), and $p$ more keys in every attention for all three.
# - **Saving.** What has to be kept is a table. If a checkpoint holds an encoder, it has not been folded.
#
# ## Sources
#
# - B. Lester, R. Al-Rfou, N. Constant: *The Power of Scale for Parameter-Efficient Prompt Tuning*, 2021,
#   [arXiv 2104.08691](https://arxiv.org/abs/2104.08691).
# - X. L. Li, P. Liang: *Prefix-Tuning: Optimizing Continuous Prompts for Generation*, 2021,
#   [arXiv 2101.00190](https://arxiv.org/abs/2101.00190).
# - X. Liu et al.: *GPT Understands, Too* (P-tuning), 2021, [arXiv 2103.10385](https://arxiv.org/abs/2103.10385);
#   *P-Tuning v2*, 2022, [arXiv 2110.07602](https://arxiv.org/abs/2110.07602).
# - S. Hochreiter, J. Schmidhuber: *Long Short-Term Memory*, Neural Computation 9 (8), 1997.
# - `minift/peft/soft_prompt.py` and its neighbors `prompt_tuning`, `prefix_tuning`, `p_tuning`; `minift/nn/lstm.py`;
#   `minift step prefix`; `minift finetune --method prompt --prompt-text "Answer in one sentence:"`; `minift claims`.
