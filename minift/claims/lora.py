"""What is said of LoRA: how little learns, what that saves, and that a merged adapter costs nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np

from minift.claims.claim import TEXTBOOK, Claim, depends, holds, near, rounded
from minift.io import load_llama
from minift.models import llama
from minift.nn.weight import Frozen, Params, trainable
from minift.peft import lora
from minift.peft.lora import LoRA
from minift.train.memory import LORA_PAPER, SIZES, bill, lora_paper

PAPER = "LoRA (Hu et al. 2021, arXiv 2106.09685)"
GPT3, LAYERS, WIDTH = 175_255.8e6, 96, 12288  # parameters, layers and d of GPT-3, as table 4 counts them
TOKENS = np.array([[3, 1, 4, 1, 5, 9, 2, 6]])


def square_matrix() -> Claim:
    """Instead of the d² numbers of a matrix, 2·d·r learn.

    A is r × d, B is d × r: 2·d·r. Counted on a real adapter: q_proj of the built-in model (d = 128), with r = 8."""
    d, r = 128, 8
    found = _adapter_on({"q_proj.weight": np.zeros((d, d), np.float32)}, r)
    how = f"d = {d}, r = {r}: 2·{d}·{r} = {2 * d * r:,} of {d * d:,}, {found / d**2:.1%}"
    return Claim("2·d·r numbers learn instead of d²", TEXTBOOK, 2 * d * r, found, holds(found == 2 * d * r), how)


def rectangular_matrix() -> Claim:
    """For a matrix of d × k, (d + k)·r numbers learn.

    A is r × k, B is d × r. Counted on all linear layers of the built-in model, of which most are not square."""
    config, params = load_llama("tiny")
    expected = sum(8 * (d + k) for d, k in (params[name].shape for name in lora.targets(params, "all-linear")))
    found = _adapter_on(params, 8)
    how = f"{7 * config.num_hidden_layers} linear layers of the built-in model, r = 8, added up"
    return Claim("(d + k)·r numbers learn instead of d·k", TEXTBOOK, expected, found, holds(found == expected), how)


def cost_in_parameters() -> Claim:
    """LoRA cuts the cost of fine-tuning by up to 98 %, if the cost is how many numbers learn.

    1 − 2·(2·L·d·r) / N for GPT-3, W_q and W_v, r = 4."""
    found = 100 * (1 - _gpt3(4) / GPT3)
    how = f"trainable parameters of GPT-3, r = 4: 1 − {_gpt3(4):,} / {GPT3:,.0f}; more than 98 % is saved"
    claim = "cost −98 %, as trainable parameters"
    return Claim(claim, TEXTBOOK, 98.0, found, holds(found >= 98), how, command="minift memory --model lora-paper")


def cost_in_memory() -> Claim:
    """LoRA cuts the cost of fine-tuning by up to 98 %, if the cost is memory.

    In 16 bits with Adam, full fine-tuning keeps 2 + 2 + 8 bytes a parameter. LoRA keeps the weights: 2 of these 12
    bytes, so not even an adapter of size zero saves more than 10/12 = 83 %. With activations it is less."""
    full, adapted = (_without_activations("65B", method) for method in ("full", "lora"))
    found = 100 * (1 - adapted / full)
    how = f"LLaMA 65B, 16 bits, r = 8: 1 − {adapted / 1e9:,.0f} / {full / 1e9:,.0f} GB, before activations"
    command = "minift memory --model 65B --method lora"
    return Claim("cost −98 %, as memory", TEXTBOOK, 98.0, found, holds(found >= 98), how, command=command)


def cost_in_arithmetic() -> Claim:
    """LoRA cuts the cost of fine-tuning by up to 98 %, if the cost is computation.

    A token costs 2 operations a weight forward, 2 for the gradient of the input and 2 for that of the weight. LoRA
    leaves out the last third, and adds all three for the adapter: 1 − (4 N + 6 a) / (6 N) < 1/3."""
    shapes = llama.shapes(SIZES["7B"])
    weights = [s for n, s in shapes.items() if len(s) == 2 and n != llama.EMBEDDING]
    n = sum(d * k for d, k in weights)
    a = sum(8 * (d + k) for d, k in weights[:-1])  # all but the head
    found = 100 * (1 - (4 * n + 6 * a) / (6 * n))
    how = f"operations a token of LLaMA 7B, r = 8: 1 − (4·{n / 1e9:.2f} + 6·{a / 1e9:.2f}) / (6·{n / 1e9:.2f}) · 10⁹"
    claim = "cost −98 %, as arithmetic"
    return Claim(claim, TEXTBOOK, 98.0, found, holds(found >= 98), how, command="minift compare --methods full lora")


def ten_thousand_times_fewer() -> Claim:
    """LoRA reduces the number of trainable parameters by 10,000 times, of GPT-3.

    N / (2·L·2·d·r), with adapters on W_q and W_v of every layer."""
    fewer = {r: GPT3 / _gpt3(r) for r in (1, 4, 8)}
    on = ", ".join(f"{times:,.0f}× at r = {r}" for r, times in fewer.items())
    how = f"175,255.8M / (2·{LAYERS}·2·{WIDTH:,}·r)"
    command = "minift memory --model lora-paper"
    claim = "10,000 times fewer trainable parameters"
    return Claim(claim, PAPER, 10_000, fewer[4], depends(f"on r: {on}"), how, "abstract", command)


def checkpoint_size() -> Claim:
    """With r = 4 and only W_q and W_v, the checkpoint is reduced from 350 GB to 35 MB.

    16 bits a number: 2·(2·L·2·d·r) bytes."""
    found = 2 * _gpt3(4) / 1e6
    full = 2 * GPT3 / 1e9
    how = f"{_gpt3(4):,} numbers of 2 bytes, {found / 1.048576:.1f} MiB; the whole model: {full:.1f} GB"
    return Claim("a checkpoint of 35 MB instead of 350 GB", PAPER, 35.0, found, rounded(35, found, 2), how, "§4.2")


def training_memory() -> Claim:
    """On GPT-3 175B, memory in training is reduced from 1.2 TB to 350 GB.

    Adam keeps two moments of 32 bits, and there are weights and gradients of 16: 12 bytes a parameter, 2.1 TB. The
    paper's 1.2 TB are fewer than the 8 bytes of the moments alone would need."""
    found = 12 * GPT3 / 1e12
    on = f"on bytes a parameter: {1.2e12 / GPT3:.1f} in the paper, 12 with 16-bit weights and 32-bit moments"
    return Claim("full fine-tuning of GPT-3 takes 1.2 TB", PAPER, 1.2, found, depends(on), "12·175.26e9 bytes", "§4.2")


def speed() -> Claim:
    """Training speeds up by 25 %: 32.5 tokens a second became 43.1.

    The paper's two figures against each other, and against what leaving out a third of the arithmetic could bring."""
    found = 100 * (1 - 32.5 / 43.1)
    how = f"time a token: 1 − 32.5 / 43.1, which is {43.1 / 32.5 - 1:.0%} more tokens a second; a third is the most"
    return Claim("a speedup of 25 %", PAPER, 25.0, found, rounded(25, found, 2), how, "§4.2 and its footnote")


def table_count(model: str) -> Claim:
    """The trainable parameters that tables 2 to 4 print, by the paper's own formula 2·L·2·d·r for W_q and W_v."""
    _, layers, d, r, printed = LORA_PAPER[model]
    found = next(row["lora_parameters"] for row in lora_paper() if row["model"] == model) / 1e6
    claimed = printed / 1e6
    digits = len(f"{claimed:g}".replace(".", "").lstrip("0"))
    how = f"2·{layers}·2·{d:,}·{r}"
    claim, command = f"{model}: {claimed:g}M numbers learn", f"minift memory --model '{model}'"
    return Claim(claim, PAPER, claimed, found, rounded(claimed, found, digits), how, "tables 2 to 4", command)


def starts_as_the_base() -> Claim:
    """B is zero, so ΔW = BA is zero at the beginning of training.

    The logits of the built-in model with a fresh adapter and without one are compared bit for bit. And B must move
    first: A's gradient is exactly zero, B's is not."""
    config, params = load_llama("tiny")
    fresh = lora.attach(params, rng=np.random.default_rng(0))
    plain, _ = llama.forward(params, TOKENS, config)
    adapted, vjp = llama.forward(fresh, TOKENS, config)
    gradients = vjp(np.random.default_rng(1).standard_normal(adapted.shape).astype(np.float32))
    of_a, of_b = (_largest(gradients, name) for name in ("lora_A", "lora_B"))
    found = float(np.abs(plain - adapted).max())
    how = f"largest difference of logits; largest gradient of A is {of_a:g}, of B {of_b:.3g}"
    true = np.array_equal(plain, adapted) and of_a == 0 < of_b
    return Claim("a fresh adapter changes nothing", PAPER, 0.0, found, holds(bool(true)), how, "§4.1")


def rank_of_the_update() -> Claim:
    """ΔW = BA has rank at most r.

    In float64, on all layers of an adapter whose B is not zero."""
    config, trained = _adapted()
    found = max(np.linalg.matrix_rank(_exact(w)) for w in trained.values() if isinstance(w, LoRA))
    how = f"largest rank among {7 * config.num_hidden_layers} layers, r = 8, by singular values in float64"
    return Claim("ΔW has rank at most r", PAPER, 8, int(found), holds(bool(found <= 8)), how, "§4.1")


def rank_after_merging() -> Claim:
    """W' − W has rank r, also when W' = W + BA has been stored.

    Every element of W' is rounded to float32, by up to u |W'|; these roundings have no structure. By the singular
    values of the stored W' − W above the noise of float64."""
    _, trained = _adapted()
    layer = next(w for w in trained.values() if isinstance(w, LoRA))
    merged = layer.dense().astype(np.float64) - np.asarray(layer.base.dense(), np.float64)
    values = np.linalg.svd(merged, compute_uv=False)
    found = int(np.linalg.matrix_rank(merged))
    on = f"on rounding: singular value 9 is {values[8] / values[0]:.0e} of the first, not 0"
    return Claim("a merged W' − W has rank r", PAPER, 8, found, depends(on), "stored in float32, r = 8", "§4.1")


def merging_adds_no_latency() -> Claim:
    """Deployed as W = W₀ + BA, the model has no additional latency.

    The matrix products of a forward pass, counted as NumPy carries them out: base, with adapters, merged."""
    config, trained = _adapted()
    base, adapted, merged = (_products(p, config) for p in (lora.bare(trained), trained, lora.merge(trained)))
    how = f"products with weights in one pass: {base} of the base, {adapted} with adapters, {merged} when merged"
    return Claim("merging adds no latency", PAPER, base, merged, holds(merged == base < adapted), how, "§4.1")


def merging_changes_nothing() -> Claim:
    """(W₀ + BA) x = W₀ x + BA x, as numbers: the merged model's logits against those with the adapter beside it.

    Equal as reals; in float32 both are rounded at other places."""
    config, trained = _adapted()
    beside, _ = llama.forward(trained, TOKENS, config)
    inside, _ = llama.forward(lora.merge(trained), TOKENS, config)
    found = float(np.linalg.norm(beside - inside) / np.linalg.norm(beside))
    verdict = holds(found == 0) if found == 0 or found > 1e-4 else near(1, 1 + found)
    how = "relative difference of the logits in float32, whose unit of rounding is 6e-8"
    return Claim("a merged model is the same model", PAPER, 0.0, found, verdict, how, "§4.1, eq. 3", "minift merge")


CLAIMS: dict[str, Callable[[], Claim]] = {
    "square-matrix": square_matrix,
    "rectangular-matrix": rectangular_matrix,
    "cost-in-parameters": cost_in_parameters,
    "cost-in-memory": cost_in_memory,
    "cost-in-arithmetic": cost_in_arithmetic,
    "ten-thousand-times-fewer": ten_thousand_times_fewer,
    "checkpoint-size": checkpoint_size,
    "training-memory": training_memory,
    "speed": speed,
    **{f"count-{model.lower().replace(' (r=8)', '-r8')}": partial(table_count, model) for model in LORA_PAPER},
    "starts-as-the-base": starts_as_the_base,
    "rank-of-the-update": rank_of_the_update,
    "rank-after-merging": rank_after_merging,
    "merging-adds-no-latency": merging_adds_no_latency,
    "merging-changes-nothing": merging_changes_nothing,
}


class _Counted(np.ndarray):
    """An array that counts the matrix products it takes part in; what comes out of it is plain again."""

    products = 0

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        _Counted.products += ufunc is np.matmul
        return getattr(ufunc, method)(*(np.asarray(x) for x in inputs), **kwargs)


def _products(params: Params, config: llama.Config) -> int:
    counted: dict[str, Any] = {}
    for name, w in params.items():
        if isinstance(w, LoRA):
            base = Frozen(w.base.dense().view(_Counted))
            counted[name] = LoRA(base, w.A.view(_Counted), w.B.view(_Counted), w.lora_alpha)
        else:
            counted[name] = Frozen(np.asarray(w.dense() if isinstance(w, Frozen) else w).view(_Counted))
    _Counted.products = 0
    llama.forward(counted, TOKENS, config)
    return _Counted.products


@lru_cache(maxsize=1)
def _adapted() -> tuple[llama.Config, dict[str, Any]]:
    """The built-in model with an adapter of r = 8 whose B is a tenth of the size of A instead of zero."""
    config, params = load_llama("tiny")
    rng = np.random.default_rng(0)
    fresh = lora.attach(params, rng=rng)
    filled = {
        name: w.with_arrays(w.arrays() | {lora.B_NAME: (0.01 * rng.standard_normal(w.B.shape)).astype(np.float32)})
        if isinstance(w, LoRA)
        else w
        for name, w in fresh.items()
    }
    return config, filled


def _exact(w: LoRA) -> np.ndarray:
    return w.scaling * (w.B.astype(np.float64) @ w.A.astype(np.float64))


def _largest(gradients: dict[str, np.ndarray], part: str) -> float:
    return max(float(np.abs(g).max()) for name, g in gradients.items() if part in name)


def _adapter_on(params: Params, r: int) -> int:
    """Numbers that learn, counted on a real adapter."""
    return sum(a.size for a in trainable(lora.attach(params, r=r, rng=np.random.default_rng(0))).values())


def _gpt3(r: int) -> int:
    """Adapters on W_q and W_v of all layers."""
    return 2 * LAYERS * lora.trainable_parameters(WIDTH, WIDTH, r)


def _without_activations(model: str, method: Any) -> float:
    items = bill(SIZES[model], method, r=8, weight_bits=16)
    return sum(item.nbytes for item in items if item.name != "activations")
