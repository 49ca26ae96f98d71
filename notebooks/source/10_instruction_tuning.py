# %% [markdown]
# # 10 · Instruction tuning: the same loss, on the answers only
#
# *20 minutes. Builds on notebook 01 (the loss and its labels) and notebook 02 (what learns).*
#
# A model that has read much text continues text. It does not answer: asked a question, it may well go on with another
# one. Instruction tuning shows it conversations, and counts the loss on the answers. Nothing about the network changes,
# and not even the loss; everything is in how text becomes tokens and labels, and that is where most mistakes are made.
# Afterwards you can
#
# - say what separates continued pretraining from supervised (instruction) tuning: the labels;
# - write the labels of a conversation, so that the model learns to answer *and to stop*;
# - pad and pack batches that give the same gradient, and divide by the right number under accumulation;
# - measure what a model forgets while it learns to answer.

# %%
import json
import math
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from matplotlib.colors import ListedColormap

from minift.conformance import check, matrices
from minift.data import jsonl, stdlib_docs
from minift.data.batches import Batch, pack, pad
from minift.data.example import Example, Message, pair
from minift.data.templates import encode_all, encode_example, encode_prompt, render
from minift.io import load_model, load_tokenizer
from minift.models import llama
from minift.models.layout import slots_and_positions
from minift.nn.attention import causal_mask
from minift.nn.losses import IGNORE_INDEX, cross_entropy
from minift.notebook import SMALL, attempt, figures
from minift.optim import schedules
from minift.step import show
from minift.step.lessons import LESSONS
from minift.studies.two_texts import mixed
from minift.train import sft
from minift.train.engine import NUMPY
from minift.train.evaluate import held_out_loss
from minift.train.loop import Settings, fit
from minift.train.methods import prepare

figures()
config, params = load_model("tiny")
tokenizer = load_tokenizer("tiny")
drawn = {"examples": 30, "seconds": 4} if SMALL else {"examples": 100, "seconds": 20}  # what `check` draws and takes

# %% [markdown]
# ## One loss, two kinds of labels
#
# $$
# \text{loss} = -\frac1N \sum_{t\,:\,\text{label}_{t+1} \text{ counts}} \log p(\text{label}_{t+1} \mid
# \text{token}_1 \ldots \text{token}_t) \tag{10.1}
# $$
#
# In **continued pretraining** every token counts: the model goes on to read, now about something else. In **supervised
# fine-tuning** the tokens of the question are read and not learned: their labels are −100, which counts for nothing.
# $N$ is the number of labels that count.
# Three positions, line by line, the second of which does not count: what is its gradient?

# %% varies=true
show(LESSONS["cross_entropy"](), height=460)

# %% [markdown]
# ## A conversation as text
#
# Training data comes in many forms. Three of them say the same here: a prompt with its completion, messages, and the
# form of Stanford's Alpaca, where an `input` may stand beside the instruction.

# %% stated=true
forms = [
    {"prompt": "2 + 2?", "completion": "4"},
    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]},
    {"instruction": "2 + 2?", "input": "", "output": "4"},
    {"instruction": "Add the numbers.", "input": "2, 2", "output": "4"},
]
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "mine.jsonl"
    path.write_text("".join(json.dumps(form) + "\n" for form in forms))
    examples = jsonl.read(path)
for example in examples:
    print(repr(render(example.messages)))

# %% [markdown]
# What turns messages into text is the model's *chat template*, a small program that comes with the model. This one is
# ChatML: every turn begins with `<|im_start|>` and a role, and ends with `<|im_end|>`. Another model has another
# template. To train or ask a model with somebody else's is a common mistake, and nothing raises an error.
#
# ## Which tokens are learned
#
# Those of the answer, and the mark that ends it. Before you run it: is the line break behind the last mark learned?

# %% stated=true
talk = (
    Message("user", "What does `len` do?"),
    Message("assistant", "Return the number of items."),
    Message("user", "And `abs`?"),
    Message("assistant", "Return the absolute value."),
)
tokens, labels = encode_example(Example(talk), tokenizer)
for learned in (False, True):
    shown = [
        tokenizer.decode([t]) for t, label in zip(tokens, labels, strict=True) if (label != IGNORE_INDEX) == learned
    ]
    print("learned  " if learned else "only read", " ".join(repr(piece)[1:-1].strip() for piece in shown))
print(f"{np.count_nonzero(labels != IGNORE_INDEX)} of {labels.size} tokens are learned")

# %% [markdown]
# It is not: whoever generates stops at the mark, and never gets there. But the mark itself has to be learned. A model
# that was never told where an answer ends goes on, and asks itself the next question.
#
# ### Exercise 10.1: the labels of a conversation
#
# `turns` are the user's and the assistant's, one after the other. This attempt has a mistake at each end of an answer.


# %%
def labels_of(turns):
    roles = ("user", "assistant") * len(turns)
    messages = tuple(Message(role, turn) for role, turn in zip(roles, turns, strict=False))
    return encode_example(Example(messages), tokenizer)[1]


# %% exercise="10.1"
def my_labels(turns):
    labels = []
    for number, turn in enumerate(turns):
        role = "assistant" if number % 2 else "user"
        header, body, end = (tokenizer.encode(text) for text in (f"<|im_start|>{role}\n", turn, "<|im_end|>\n"))
        if role == "assistant":
            labels += header + body + [IGNORE_INDEX] * len(end)
        else:
            labels += [IGNORE_INDEX] * len(header + body + end)
    return np.array(labels)


# %%
some_turns = st.integers(1, 2).flatmap(
    lambda n: st.lists(st.sampled_from(["Yes.", "No.", "four"]), min_size=2 * n, max_size=2 * n)
)
with attempt("10.1"):
    check(labels_of, my_labels, inputs={"turns": some_turns}, **drawn)

# %% [markdown]
# (To encode a text in pieces, as here, works for these words only. Byte pairs may merge across a border, so the library
# encodes the whole conversation once and then asks which tokens lie within an answer: `templates.encode_example`.)
#
# ## A batch is a rectangle
#
# Conversations are of different lengths. *Padding* gives each a row of its own and fills it up. *Packing* puts several
# into a row. Then tokens must not see the conversation before theirs, and positions start again with each:
#
# $$
# \text{token } i \text{ sees } j \iff j \le i \text{ and segment}_j = \text{segment}_i \qquad
# \text{position}_i = i - \text{start of segment}_i \tag{10.2}
# $$

# %% stated=true
qa = [
    pair("What does `len` do?", "Return the number of items in a container."),
    pair("What does `abs` do?", "Return the absolute value of the argument."),
    pair("What does `chr` do?", "Return a string of one character."),
    pair("What is the `math` module for?", "Mathematical functions, such as roots, powers, and logarithms of numbers."),
    pair("What does `sum` do?", "Add up the numbers of a list."),
    pair("Is `None` a number?", "No."),
    pair("And `0`?", "Yes."),
]
encoded = encode_all(qa, tokenizer).examples
padded, packed = pad(encoded), pack(encoded, length=76)
careless = Batch(packed.tokens, packed.labels, packed.lengths, segments=None)
for name, batch in {"padded": padded, "packed": packed, "packed, segments forgotten": careless}.items():
    value, _ = sft.loss(params, batch, config)
    rows, width = batch.tokens.shape
    print(f"{name:27s}{rows} × {width}, {1 - batch.lengths.sum() / batch.tokens.size:4.0%} padding, loss {value:.4f}")

one, other = (sft.loss(params, batch, config)[1](1.0) for batch in (padded, packed))
length, apart = (
    math.sqrt(sum(np.vdot(g, g) for g in found)) for found in (one.values(), (one[n] - other[n] for n in one))
)
assert apart < 1e-4 * length  # the same gradient, but for rounding

# %%
figure, axes = plt.subplots(2, 1, figsize=(7, 4), height_ratios=[7, 3])
for ax, (name, batch) in zip(axes, {"padded": padded, "packed": packed}.items(), strict=True):
    filled = np.arange(batch.tokens.shape[1]) < batch.lengths[:, None]
    kind = np.where(batch.labels != IGNORE_INDEX, 2, np.where(filled, 1, 0))
    ax.pcolormesh(kind[::-1], cmap=ListedColormap(["white", "#c3d0ec", "#d65f5f"]), vmin=0, vmax=2, edgecolors="white")
    if batch.segments is not None:
        for row, column in zip(*np.nonzero(np.diff(batch.segments, axis=1) > 0), strict=True):
            ax.vlines(column + 1, len(kind) - 1 - row, len(kind) - row, color="black")  # a conversation begins
    ax.set(title=f"{name}: read (pale), learned (red), padding (white)", yticks=[])
    ax.grid(False)
axes[1].set(xlabel="token")
plt.show()

# %% [markdown]
# Padded and packed give the same loss and the same gradient; packing only wastes less. Without the segments the loss is
# another one, and here a lower one: every conversation but the first of a row has been shown what a conversation looks
# like. When the model is used it will not be.
#
# ### Exercise 10.2: who sees whom in a packed row
#
# Equation (10.2). `segments` has the number of each token's conversation, in order. Return what is visible, a boolean
# array `(batch, tokens, tokens)`, and the positions `(batch, tokens)`. The attempt is what one gets by concatenating
# texts and changing nothing else.


# %%
def packed_layout(segments):
    slots, positions = slots_and_positions(np.zeros(len(segments), np.int64), segments.shape[1], segments)
    return causal_mask(slots, segments.shape[1], segments), positions


# %% exercise="10.2"
def my_packed_layout(segments):
    batch, tokens = segments.shape
    visible = np.tril(np.ones((batch, tokens, tokens), bool))
    positions = np.broadcast_to(np.arange(tokens), (batch, tokens))
    return visible, positions


# %%
borders = st.integers(1, 6).flatmap(lambda n: arrays(np.int64, (1, n), elements=st.integers(0, 1)))
with attempt("10.2"):
    check(packed_layout, my_packed_layout, inputs={"segments": borders.map(lambda new: new.cumsum(axis=1))}, **drawn)

# %% [markdown]
# ## Divide by the number in the whole batch
#
# If a batch does not fit into memory, it is read in pieces (micro-batches $B_1 \ldots B_K$) whose gradients are added
# up: gradient accumulation. With $N_k$ labels in piece $k$, the gradient of the one large batch is
#
# $$
# g = \frac{1}{\sum_k N_k} \sum_k \sum_{t \in B_k} \nabla \ell_t
# \qquad\text{and not}\qquad \frac1K \sum_k \frac{1}{N_k} \sum_{t \in B_k} \nabla \ell_t \tag{10.3}
# $$
#
# Where all labels count and all rows are full, the two are the same, so that it went unnoticed for years. In
# instruction tuning an answer may have two tokens or two hundred. Two conversations, one a piece:

# %% stated=true
short, long = pad(encoded[5:6]), pad(encoded[3:4])
parts = [(batch.count, float(sft.loss(params, batch, config)[0])) for batch in (short, long)]
whole = sum(count * loss for count, loss in parts) / sum(count for count, _ in parts)
for name, (count, loss) in zip(("short", "long"), parts, strict=True):
    print(f"{name:6s}{count:3d} labels, loss {loss:.3f}")
print(f"mean of the two means  {np.mean([loss for _, loss in parts]):.3f}: a token of the short one counts", end=" ")
print(f"{parts[1][0] / parts[0][0]:.0f} times as much")
print(f"mean of all labels     {whole:.3f}")

# %% [markdown]
# ### Exercise 10.3: accumulate
#
# The loss of six positions and its gradient, in two pieces, cut anywhere. `cross_entropy` takes a `normalizer`.


# %%
def whole_batch(logits, labels, cut):
    loss, vjp = cross_entropy(logits, labels)
    return loss, vjp(1.0)


# %% exercise="10.3"
def my_accumulation(logits, labels, cut):
    total, gradients = 0.0, []
    for part in (slice(None, cut), slice(cut, None)):
        loss, vjp = cross_entropy(logits[part], labels[part])
        total += loss / 2
        gradients.append(vjp(0.5))
    return total, np.concatenate(gradients)


# %%
six = arrays(np.int64, 6, elements=st.sampled_from([IGNORE_INDEX, 0, 1, 2]))
with attempt("10.3"):
    inputs = {"logits": matrices(6, 3), "labels": six, "cut": st.integers(1, 5)}
    check(whole_batch, my_accumulation, inputs=inputs, **drawn)

# %% [markdown]
# ## The learning rate
#
# Fine-tuning starts at numbers that are good already, and AdamW's first steps are as long as any, while its moments
# still know nothing. So the rate rises first, and then falls along half a cosine. With $w$ steps of warm-up, $T$ steps
# in all:
#
# $$
# \eta_t = \eta_{\max} \cdot \begin{cases} t / w & t \le w \\
# \tfrac12 \left(1 + \cos \pi \frac{t - w}{T - w}\right) & t > w \end{cases} \qquad t = 1 \ldots T \tag{10.4}
# $$
#
# ### Exercise 10.4: warm-up and cosine
#
# The attempt wastes one step, and jumps at another. Which?


# %% exercise="10.4"
def my_rate(step, peak, total_steps, warmup_steps):
    if step <= warmup_steps:
        return peak * (step - 1) / warmup_steps
    return peak * 0.5 * (1 + math.cos(math.pi * step / total_steps))


# %%
with attempt("10.4"):
    inputs = {
        "step": st.integers(1, 20),
        "peak": st.sampled_from([1.0, 0.004]),
        "total_steps": st.just(20),
        "warmup_steps": st.integers(0, 10),
    }
    check(schedules.learning_rate, my_rate, inputs=inputs, **drawn)

# %%
figure, axes = plt.subplots(figsize=(7, 2.6))
for warmup in (0, 10):
    rates = [schedules.learning_rate(t, 1.0, 100, warmup) for t in range(1, 101)]
    axes.plot(range(1, 101), rates, label=f"{warmup} steps of warm-up")
axes.set(title="Learning rate, as a part of its peak", xlabel="step")
axes.legend()
plt.show()

# %% [markdown]
# ## Does it answer, and what does it forget?
#
# The built-in model has read the reference of Python's language, and docstrings as entries of a dictionary. It has
# never seen a conversation. Now it learns from questions and answers, in four ways: everything learns; a LoRA of rank 8
# learns (notebook 03); everything learns, and 4 rows of the old text stand beside the 16 of the new in each step
# (*replay*); everything learns, with the labels of continued pretraining, so that the questions count too. Two losses
# are measured along the way: on held-out answers, and on held-out text of the old kind, which nothing in (10.1) asks
# the model to remember.

# %%
found = stdlib_docs.embedded()
order = np.random.default_rng(0).permutation(len(found.held_out_pairs))[: 16 if SMALL else 100]
questions = encode_all(found.train_pairs[: 64 if SMALL else None], tokenizer, max_length=96).examples
answers = encode_all([found.held_out_pairs[i] for i in order], tokenizer, max_length=96).examples
old = encode_all(found.train_text[: 8 if SMALL else None], tokenizer, max_length=96).examples
old_held_out = encode_all(found.held_out_text, tokenizer, max_length=96).examples[: 8 if SMALL else 100]
steps = 2 if SMALL else 80
all_labels = [(tokens, tokens) for tokens, _ in questions]
ways = {
    "full": ("full", 1e-3, questions, 0),
    "LoRA, r = 8": ("lora", 5e-3, questions, 0),
    "full, with replay": ("full", 1e-3, questions, 4),
    "full, all labels": ("full", 1e-3, all_labels, 0),
}
paths, trained = {}, {}
for name, (method, rate, new, old_rows) in ways.items():
    path = paths[name] = []

    def both(weights, path=path):
        path.append([held_out_loss(weights, rows, config, 32) for rows in (answers, old_held_out)])
        return path[-1][0]

    trained[name] = fit(
        prepare(method, params, config, rng=np.random.default_rng(0))[0],
        lambda p, batch, normalizer, key: NUMPY.loss(p, batch, config, normalizer),
        mixed(new, 0, old, old_rows),
        Settings(steps=steps, learning_rate=rate, warmup_steps=8, eval_every=max(steps // 4, 1)),
        evaluate=both,
    ).params
    (new_before, old_before), (new_after, old_after) = path[0], path[-1]
    print(f"{name:18s} answers {new_before:.2f} → {new_after:.2f}   old text {old_before:.2f} → {old_after:.2f}")
forgotten = {name: path[-1][1] - path[0][1] for name, path in paths.items()}
assert SMALL or forgotten["full, with replay"] < forgotten["LoRA, r = 8"] < forgotten["full"]

# %%
figure, axes = plt.subplots(figsize=(7, 3.8))
for name, path in paths.items():
    axes.plot(*zip(*path, strict=True), marker="o", label=name)
axes.plot(*paths["full"][0], "o", color="black", label="before")
axes.invert_xaxis()
axes.set(title="Learned to the right, forgotten upward", xlabel="loss on answers", ylabel="loss on the old text")
axes.legend()
plt.show()

# %% [markdown]
# Here replay forgets least, for a quarter more rows a step, and LoRA forgets less than full fine-tuning and learns a
# little less. With all labels, a part of every step goes into the questions, which nobody will ask it to write. But
# this is a short run with one seed: look at it as a picture of the trade, and not as a ranking. "LoRA learns less and
# forgets less" (Biderman and others, 2024) describes points on such a plane, and a rate that is too low has the same
# effect: whoever learns nothing forgets nothing. `minift study forgetting` draws it over three seeds, for two ranks.
#
# And what does it answer? The same three questions, before and after:


# %% varies=true
def reply(weights, question):
    prompt = encode_prompt((Message("user", question),), tokenizer)[None]
    stop = {tokenizer.eos_token_id}
    out = llama.generate(llama.fuse(weights), prompt, config, max_new_tokens=24, stop_tokens=stop)
    text = " ".join(tokenizer.decode(out[0, prompt.size :]).split())
    return text if len(text) < 90 else text[:60] + " …"


for question in ("What does `math.sqrt` do?", "What is the `random` module for?", "What does `list.append` do?"):
    print(question)
    print("    before  ", reply(params, question))
    print("    after   ", reply(trained["full"], question))

# %% [markdown]
# Before, it takes a question for a heading of the reference, and underlines it. After eighty steps it has learned the
# *form*: one sentence of the right kind, and then the mark. What it says is wrong: how to answer is learned far sooner
# than what is true, and a million numbers cannot hold what the functions of a library do.
#
# ## What to look at
#
# - A sample of the batch, decoded, with the learned tokens marked, before every first run. It takes a minute, and finds
#   a wrong template, a missing end mark, and answers that were cut off.
# - How many examples were truncated, or dropped because nothing of their answer was left.
# - The held-out loss on answers, and beside it a loss on what should not be forgotten.
# - Two runs with different accumulation and the same whole batch: the losses of the first steps must agree.
# - Whether answers end. A model that does not stop was not taught to, or is not stopped: the mark must be learned *and*
#   be a stop token.
#
# ## Sources
#
# - J. Wei and others: *Finetuned Language Models Are Zero-Shot Learners*, 2021,
#   [arXiv 2109.01652](https://arxiv.org/abs/2109.01652).
# - L. Ouyang and others: *Training language models to follow instructions with human feedback*, 2022,
#   [arXiv 2203.02155](https://arxiv.org/abs/2203.02155).
# - M. Krell and others: *Efficient Sequence Packing without Cross-contamination*, 2021,
#   [arXiv 2107.02027](https://arxiv.org/abs/2107.02027).
# - D. Biderman and others: *LoRA Learns Less and Forgets Less*, 2024,
#   [arXiv 2405.09673](https://arxiv.org/abs/2405.09673).
# - M. McCloskey, N. Cohen: *Catastrophic Interference in Connectionist Networks*, 1989.
# - The mean of means in a widely used trainer: [transformers issue
#   34191](https://github.com/huggingface/transformers/issues/34191).
# - `minift/data/templates.py`, `minift/data/batches.py`, `minift/train/sft.py`, `minift/optim/schedules.py`;
#   `minift finetune`, `minift finetune --data stdlib-text` (continued pretraining), `minift chat`,
#   `minift study forgetting`.
