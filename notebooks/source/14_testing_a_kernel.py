# %% [markdown]
# # 14 · Testing a kernel: properties, bounds, wrong kernels
#
# *20 minutes. Builds on the norms of notebook 01, the codes of notebook 05 and the kernels of notebook 13.*
#
# "It agrees with PyTorch to three digits" says little: many wrong kernels do. A test has to let every right
# implementation pass, and no wrong one. This notebook is about the second half. Afterwards you can
#
# - derive how far a right result may be from the exact one, and test with that instead of a number that made it green;
# - say why a gradient is never tested with ones, and test it with one inner product;
# - say where equality is the right test, and which inputs to ask about;
# - measure a test: with wrong versions, and with mutants.

# %%
import ast
import inspect

import matplotlib.pyplot as plt
import numpy as np
from hypothesis import strategies as st

from minift.conformance import bounds, check, matrices, strategies
from minift.conformance.gradients import check_vjp
from minift.conformance.implementations import bitsandbytes
from minift.conformance.operations import find
from minift.conformance.run import Attempt, hold_all
from minift.nn import losses, norms
from minift.notebook import SMALL, attempt, figures
from minift.quant import nf4

figures()
rng = np.random.default_rng(0)

# %% [markdown]
# ## How far off may it be?
#
# Every operation on floating-point numbers is the exact one and a rounding. With $u$, the *unit roundoff* (half the
# distance from 1 to the next number, $2^{-24}$ for float32),
#
# $$
# \mathrm{fl}(a \circ b) = (a \circ b)(1 + \delta), \qquad |\delta| \le u \tag{14.1}
# $$
#
# Of $n$ roundings in a row, the relative errors multiply, and Higham's lemma 3.1 collects them:
#
# $$
# \prod_{i=1}^{n} (1 + \delta_i) = 1 + \theta_n, \qquad |\theta_n| \le \gamma_n = \frac{n u}{1 - n u} \tag{14.2}
# $$
#
# In a dot product of length $n$ no term meets more than $n$ of them: one when it is formed, the others in sums. So, in
# whatever order it is summed,
#
# $$
# \bigl| \mathrm{fl}(x^\top y) - x^\top y \bigr| \le \gamma_n \, |x|^\top |y| \tag{14.3}
# $$
#
# Look at the right side: $|x|^\top |y|$, and not $|x^\top y|$. Where large terms cancel, a right result has *no*
# correct digit, and no relative tolerance is wide enough.
#
# ### Exercise 14.1: γ
#
# Write (14.2). `np.finfo(dtype).eps` is the distance from 1 to the next number.


# %% exercise="14.1"
def my_gamma(n, dtype):
    return n * float(np.finfo(dtype).eps)


# %%
lengths, types = st.integers(1, 2000), st.sampled_from([np.float16, np.float32, np.float64])
with attempt("14.1"):
    check(bounds.gamma, my_gamma, inputs={"n": lengths, "dtype": types})

# %% [markdown]
# ## Why `allclose` is not a test
#
# It demands $|a - b| \le \text{atol} + \text{rtol}\,|b|$, with two numbers that somebody chose. First: does it let what
# is right pass? Ten thousand dot products of length 1,000, summed in float32 one after the other, as a loop would:

# %% stated=true
x, y = rng.standard_normal((2, 10_000, 1000)).astype(np.float32)
found = np.cumsum(x * y, axis=1, dtype=np.float32)[:, -1]
exact = (x.astype(np.float64) * y).sum(axis=1)
allowed = bounds.gamma(1000, np.float32) * (np.abs(x).astype(np.float64) * np.abs(y)).sum(axis=1)
error = np.abs(found - exact)
rejected = ~np.isclose(found, exact)  # NumPy's own tolerances: rtol 1e-5, atol 1e-8
print(f"np.isclose rejects {rejected.sum()} of 10,000 right results")
print(
    f"the bound rejects {(error > allowed).sum()}; the worst error is {np.max(error / allowed):.1%} of what it allows"
)

# %%
figure, axes = plt.subplots(figsize=(7, 3.4))
cancelled = np.abs(exact) / (allowed / bounds.gamma(1000, np.float32))
axes.scatter(cancelled, error / np.abs(exact), s=3, color="#4878cf", label="right results")
line = np.array([1e-6, 1e-1])
axes.plot(line, bounds.gamma(1000, np.float32) / line, color="#55a868", label="the bound (14.3)")
axes.axhline(1e-5, color="#d65f5f", linestyle="--", label="rtol = 1e-5")
axes.set(xscale="log", yscale="log", xlim=(1e-6, 0.2), ylim=(1e-9, 30))
axes.set(
    xlabel="$|x^T y| \\;/\\; |x|^T |y|$: left is cancellation",
    ylabel="relative error",
    title="Dot products of length 1,000",
)
axes.legend(loc="upper right")
plt.show()

# %% [markdown]
# So the tolerance is widened until nothing right is rejected any more, and at that moment it lets the wrong ones in.
# The bound moves with the numbers, and was there before the first run. It is a worst case; real errors are far below
# it, since roundings rarely all go one way. Where that makes it too weak, a sharper one is derived: summing by halves
# meets $\lceil \log_2 n \rceil$ roundings instead of $n$.
#
# `minift/conformance/ball.py` does the derivation for you: a `Ball` is a number and a radius, and every operation
# carries the radius along. An oracle written with Balls is the formula, its value and its bound at once.
#
# ## Ones as a cotangent
#
# Backward passes are tested wrongly even more often. The usual test calls `y.sum().backward()`: its cotangent is ones.
# For softmax, whose pullback is
#
# $$
# dx = p \odot \bigl(dy - \textstyle\sum_j p_j \, dy_j\bigr) \tag{14.4}
# $$
#
# think first: what is $dx$ for $dy = 1$?


# %% stated=true
def softmax(x, pullback="right"):
    p = np.exp(losses.log_softmax(x))

    def vjp(dy):
        dx = p * (dy - np.sum(p * dy, axis=-1, keepdims=True))
        return {
            "right": dx,
            "zero": 0 * dx,
            "turned around": -dx,
            "without the sum": p * dy,
            "a thousandth too long": 1.001 * dx,
        }[pullback]

    return p, vjp


PULLBACKS = ["right", "zero", "turned around", "without the sum", "a thousandth too long"]
x, dy = rng.standard_normal((2, 3, 5))
for name in PULLBACKS:
    _, vjp = softmax(x, name)
    print(f"{name:22s} ones: {np.abs(vjp(np.ones_like(x))).max():.4f}   random: {np.abs(vjp(dy)).max():.4f}")

# %% [markdown]
# Probabilities sum to one, whatever $x$ is, so the derivative of their sum is zero. With ones, three of the four wrong
# pullbacks are right, "zero" among them. The cure costs nothing: a *random* cotangent, and a random direction $v$. The
# pullback $J^\top$ is right if, for all of them,
#
# $$
# \langle dy,\, J v \rangle = \langle J^\top dy,\, v \rangle, \qquad
# J v \approx \frac{f(x + h v) - f(x - h v)}{2h} \tag{14.5}
# $$
#
# One number compares the whole Jacobian. In float64 the error of the right side is about $h^2$, and $10^{-16}/h$ for
# the rounding.
#
# ### Exercise 14.2: judge a pullback
#
# `my_verdict` says whether a pullback of softmax is right. It is held against the library's `check_vjp`, on the five
# from above. This one does what many tests do.


# %% exercise="14.2"
def my_verdict(pullback, seed):
    x = np.random.default_rng(seed).standard_normal((3, 5)).astype(np.float32)
    y, vjp = softmax(x, pullback)
    claimed, found, h = vjp(np.ones_like(y)), np.zeros_like(x), 1e-3
    for i in np.ndindex(x.shape):
        moved = x.copy()
        moved[i] += h
        found[i] = (softmax(moved)[0].sum() - y.sum()) / h
    return np.allclose(claimed, found, atol=1e-2)


# %%
def verdict(pullback, seed):
    rng = np.random.default_rng(seed)
    try:
        check_vjp(lambda x: softmax(x, pullback), rng.standard_normal((3, 5)), rng=rng)
    except AssertionError:
        return False
    return True


with attempt("14.2"):
    check(verdict, my_verdict, inputs={"pullback": st.sampled_from(PULLBACKS), "seed": st.integers(0, 99)})

# %% [markdown]
# ## Where equality is the test
#
# A code is right or wrong; there is no "nearly 7". Files in NF4 are read by other people's programs, so the codes have
# to be equal bit for bit. The test is simple, and everything depends on what it is asked about. NF4 multiplies by $1/a$
# (notebook 05). Somebody divides by $a$ instead. On random weights:


# %% stated=true
def codes_of(scaled):
    return np.searchsorted(nf4.MIDPOINTS, scaled, side="left")  # midpoints strictly below


blocks = rng.standard_normal((1 << 14, 64)).astype(np.float32)
a = np.abs(blocks).max(axis=1, keepdims=True)
differ = codes_of(blocks * (1 / a)) != codes_of(blocks / a)
print(f"{differ.sum()} of {blocks.size:,} random weights get another code")

aimed = np.array(strategies.reciprocal_matters(tuple(nf4.MIDPOINTS.tolist())), np.float32)
a, w = aimed.T
print(f"{(codes_of(w * (1 / a)) != codes_of(w / a)).sum()} of {w.size} aimed ones")
ties = nf4.MIDPOINTS
nearest = np.abs(ties[:, None] - nf4.CODE).argmin(axis=-1)
print(f"argmin |w - c| differs for {(nearest != codes_of(ties)).sum()} of {ties.size} ties")

# %% [markdown]
# A million random numbers see nothing, two dozen aimed ones see it at once. So inputs are *aimed at trouble*:
# midpoints between two codes and their neighbors, blocks of zeros, one outlier, subnormal numbers, a last block that is
# short, sizes around a power of two, views with NaN in their gaps.
#
# ## The smallest counterexample
#
# A failing tensor of a thousand numbers tells nobody anything. Hypothesis *shrinks*: it leaves out and simplifies while
# the property still fails. A softmax without the shift, in float32; before you run it: for which whole number does it
# break first, and what comes out?


# %% stated=true
def probabilities(x):
    return np.exp(losses.log_softmax(x))


def unshifted(x):
    e = np.exp(x)
    return e / e.sum(axis=-1, keepdims=True)


try:
    check(probabilities, unshifted, inputs={"x": matrices(1, 1, largest=1000)})
except AssertionError as error:
    print(str(error).splitlines()[-1].strip())
print(f"log of the largest float32: {np.log(float(np.finfo(np.float32).max)):.2f}")

# %% [markdown]
# The counterexample explains the mistake: 89 is the first whole number above 88.72.
#
# ## Wrong versions
#
# How good is a test? Give it something wrong. Here are eight versions of RMSNorm, each with one mistake, and the right
# one. `tests/wrong_kernels` has such versions of the kernels, and the tests demand that each of them is rejected.


# %%
def rms_norm(wrong=None):
    def f(x, weight, eps):
        n = max(x.shape[-1] - (wrong == "n − 1"), 1)
        if wrong == "reads memory in order":
            x = x.ravel(order="K").reshape(x.shape)
        square = np.sum(x * x, axis=-1, keepdims=True) / x.dtype.type(n)
        root = np.sqrt(square + (0 if wrong in ("ε forgotten", "ε outside the root") else eps))
        inv_rms = 1 / (root + eps if wrong == "ε outside the root" else root)
        if wrong == "the first row's ρ":
            inv_rms = np.broadcast_to(inv_rms[:1], inv_rms.shape)
        x_hat = x * inv_rms
        if wrong == "16 bits on the way":
            x_hat = x_hat.astype(np.float16).astype(x.dtype)
        y = x_hat * weight
        if wrong == "changes x":
            x *= inv_rms

        def vjp(dy):
            dx_hat = dy * weight
            projected = dy if wrong == "dx without γ" else dx_hat
            dx = inv_rms * (dx_hat - x_hat * np.mean(projected * x_hat, axis=-1, keepdims=True))
            return dx, np.sum((dy * x_hat).reshape(-1, x.shape[-1]), axis=0)

        return y, vjp

    return f


WRONG = [
    *("ε forgotten", "ε outside the root", "n − 1", "the first row's ρ", "16 bits on the way"),
    *("dx without γ", "reads memory in order", "changes x"),
]
operation = find("norms.rms_norm")


def close(rtol, atol):
    """What many test files do: N(0, 1), a weight of ones, a usual width, ones as the cotangent."""

    def test(f):
        x, weight = np.random.default_rng(0).standard_normal((8, 4096)).astype(np.float32), np.ones(4096, np.float32)
        (y, vjp), (needed, needed_vjp) = f(x.copy(), weight, 1e-6), norms.rms_norm(x, weight, 1e-6)
        found = (y, *vjp(np.ones_like(y)))
        return all(
            np.allclose(a, b, rtol, atol) for a, b in zip(found, (needed, *needed_vjp(np.ones_like(y))), strict=True)
        )

    return test


def holds(prop):
    def test(f):
        trial = Attempt(f, operation, prop)
        return all(trial(case) is None for case in operation.fixed if case.dtype in ("float32", "float64"))

    return test


tests = {"allclose 1e-2": close(1e-2, 1e-2), "allclose 1e-5": close(1e-5, 1e-5)}
tests |= {
    prop.__name__.replace("_", " ").removesuffix(" of the derivative"): holds(prop) for prop in operation.properties
}
caught = np.array([[not test(rms_norm(wrong)) for test in tests.values()] for wrong in [None, *WRONG]])

# %% stated=true
for wrong, row in zip(["right", *WRONG], caught, strict=True):
    print(f"{wrong:22s}", " ".join("x" if found else "." for found in row))
for name, column in zip(tests, caught.T, strict=True):
    print(f"{column.sum()} of {len(WRONG)} rejected: {name}")

# %%
figure, axes = plt.subplots(figsize=(7, 4.2))
axes.imshow(caught, cmap="Reds", vmin=0, vmax=1.4, aspect="auto")
axes.set_xticks(range(len(tests)), tests, rotation=28, ha="right", fontsize=8)
axes.set_yticks(range(len(WRONG) + 1), ["right", *WRONG], fontsize=8)
axes.set_xticks(np.arange(len(tests) + 1) - 0.5, minor=True)
axes.set_yticks(np.arange(len(WRONG) + 2) - 0.5, minor=True)
axes.grid(visible=False)
axes.grid(which="minor", color="white", linewidth=2, alpha=1)
axes.tick_params(which="both", length=0)
axes.set_title("Who rejects what")
plt.show()

# %% [markdown]
# The wide tolerance rejects one of eight, the narrow one three. It is not the tolerance alone that is to blame: with a
# weight of ones, nobody can forget γ visibly; with numbers near 1, ε does not matter; a contiguous tensor has no
# strides to get wrong. The properties use rows as small as $\sqrt\varepsilon$, gains that are not one, means far from
# zero, and views. Look along the row of "ε forgotten" as well: the gradient check is content, since the pullback is
# right *for the wrong function*. It never says what is computed. And "reads memory in order" is seen by one property
# alone: each is there for something that the others let through.
#
# ## Mutants
#
# Wrong versions are what somebody thought of. *Mutation testing* lets a program think: it changes one operator in the
# source, runs the tests, and asks whether they noticed. Whatever survives is either harmless or a gap in the tests.

# %% stated=true
SWAP = {ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Add: ast.Sub, ast.Sub: ast.Add}
source = inspect.getsource(norms.rms_norm)


def mutants():
    for number in range(sum(isinstance(node, ast.BinOp | ast.AugAssign) for node in ast.walk(ast.parse(source)))):
        tree = ast.parse(source)
        node = [node for node in ast.walk(tree) if isinstance(node, ast.BinOp | ast.AugAssign)][number]
        if type(node.op) in SWAP:
            before, node.op = ast.unparse(node), SWAP[type(node.op)]()
            scope = dict(vars(norms))
            exec(compile(tree, "mutant", "exec"), scope)
            yield before, ast.unparse(node), scope["rms_norm"]


def killed(f, test):
    try:
        return not test(f)
    except Exception:
        return True


suite = [test for name, test in tests.items() if "allclose" not in name]
for before, after, mutant in mutants():
    by_allclose = killed(mutant, tests["allclose 1e-2"])
    by_properties = any(killed(mutant, test) for test in suite)
    print(f"{before:46s} -> {after:46s} {'x' if by_allclose else '.'} {'x' if by_properties else '.'}")

# %% [markdown]
# The left column is `allclose 1e-2`, the right one all properties together: three of nine mutants live on in the one,
# none in the other. `make mutation` does this to `minift/quant` and `minift/peft`, with many more kinds of changes, and
# prints what survives.
#
# ## Somebody else's code
#
# A property knows nothing of who wrote the function. `minift conformance` holds bitsandbytes, torchao and PEFT against
# the same ones. If bitsandbytes is installed here, this is its 8-bit quantizer on the CPU:

# %% varies=true
found = [
    result
    for result in hold_all(bitsandbytes.implementations(), [find("blockwise.quantize")], 0, 20.0)
    if result.passed is not None or result.reason
]
for result in found:
    verdict_of = {True: "holds", False: "fails", None: result.reason}[result.passed]
    print(f"{result.property.replace('_', ' '):45s} {verdict_of}")
    if result.passed is False and result.property == "zero_is_exactly_zero":
        print("    ", result.counterexample)

# %% [markdown]
# On a CPU its version 0.50.2 does not map 0 to 0 in 8 bits. That sounds harmless. It means that a parameter whose
# gradient is always exactly zero moves, because the optimizer's moments are kept in those codes (notebook 08).
#
# ## All of it at once
#
# ### Exercise 14.3: cross-entropy
#
# With $N$ labels that count (the others are −100), or a given normalizer $N$,
#
# $$
# \text{loss} = -\frac1N \sum_n \log p_n[\text{label}_n], \qquad
# d\text{logits}_n = d\text{loss}\,\frac{p_n - \text{onehot}(\text{label}_n)}{N} \tag{14.6}
# $$
#
# This one gives the right loss and the right gradient for small logits, all labels counting and `dloss` = 1, so that
# the usual test passes. It has five mistakes. Two of their kind have been reported against a production library: a
# gradient that is wrong unless the cotangent is the same everywhere, and one that overwrites what others still need
# ([Liger-Kernel 968](https://github.com/linkedin/Liger-Kernel/issues/968),
# [272](https://github.com/linkedin/Liger-Kernel/issues/272)).


# %% exercise="14.3"
def my_cross_entropy(logits, labels, normalizer):
    counts = labels != -100
    target = np.where(counts, labels, 0)
    n = logits.dtype.type(counts.sum() if normalizer is None else normalizer)
    e = np.exp(logits)
    p = e / e.sum(axis=-1, keepdims=True)
    nll = -np.log(np.take_along_axis(p, target[..., None], axis=-1))[..., 0]
    loss = np.where(counts, nll, 0).sum() / n

    def vjp(dloss):
        dlogits = p
        at_label = np.take_along_axis(dlogits, target[..., None], axis=-1)
        np.put_along_axis(dlogits, target[..., None], at_label - 1, axis=-1)
        dlogits[~counts] = 0
        return dlogits / n

    return loss, vjp


# %%
logits, labels = rng.standard_normal((4, 6)), np.array([1, 5, 0, 2])
(mine, my_vjp), (needed, needed_vjp) = my_cross_entropy(logits, labels, None), losses.cross_entropy(logits, labels)
print("the usual test:", np.allclose(mine, needed) and np.allclose(my_vjp(1.0), needed_vjp(1.0)))
with attempt("14.3"):
    check("losses.cross_entropy", my_cross_entropy, examples=20 if SMALL else 100)

# %% [markdown]
# <details><summary>A hint for each</summary>
#
# 1. $e^{89}$ is infinite in float32. And $\log p$ of a very unlikely label is $\log 0$: use $\log \sum e -
#    x_{\text{label}}$.
# 2. The loss is one part of a larger one: the cotangent that comes in is not 1.
# 3. A pullback that is called twice must give the same twice. What does `dlogits = p` share?
# 4. If nothing counts, $N$ is zero. The loss is then 0, and so is the gradient.
# 5. A label outside of the vocabulary: `take_along_axis` counts −1 from the end, and is content.
#
# </details>
#
# ## What to look at
#
# - Where a tolerance comes from. If nobody can say, it came from a run that failed.
# - The inputs, before the tolerance. Neutral ones (weights of one, α = r, a cotangent of ones, a normalizer that is the
#   batch) switch off the term that is wrong.
# - Whether the oracle shares code with what is tested. "Merge, then unmerge" gives back the weights although both are
#   wrong, if they are wrong in the same way.
# - What a test has ever rejected.
#
# ## Sources
#
# - N. Higham: *Accuracy and Stability of Numerical Algorithms*, 2nd edition, SIAM 2002, chapter 3.
# - P. Blanchard, D. Higham, N. Higham: *Accurately computing the log-sum-exp and softmax functions*, 2021,
#   [doi 10.1093/imanum/draa038](https://doi.org/10.1093/imanum/draa038).
# - D. MacIver and others: *Hypothesis: a new approach to property-based testing*, 2019,
#   [doi 10.21105/joss.01891](https://doi.org/10.21105/joss.01891).
# - `minift/conformance/bounds.py`, `ball.py`, `gradients.py`, `operations/`; `tests/wrong_kernels`;
#   `tests/mutation.py`; `minift conformance --list --op norms.rms_norm`, `minift conformance --impl my_module.py`,
#   `make mutation`.
