"""What a language model loses when its linear layers are stored in fewer bits.      (Dettmers et al. 2023, table 2)

Each data type replaces the matrices of the blocks, as in QLoRA; embeddings, norms and head stay in float32. Measured is
the mean cross-entropy of held-out text in nats a token, and its exponential, the perplexity. All data types read the same
rows, so a loss is compared row by row, and the spread of the n differences says how sure their mean is:

    increase = mean_n(loss_n − loss_n in float32) ± std_n(…) / √n                                       (1)

**Which model.** The built-in one is stored in NF4 with double quantization: NF4 gives it back, and every other data type
is measured on NF4's grid. So beside it a model of the same sizes is trained here from nothing, in float32, for about a
minute. SmolLM2's GGUF file lies on a grid of affine int4 in blocks of 32, which gives that back. Only a model that was
published in 16 or 32 bits (`--model FOLDER`) answers the question about itself; the study marks the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minift.data import stdlib_docs
from minift.data.batches import batch_indices, chunks, pad
from minift.io import Tokenizer, load_model, load_tokenizer
from minift.models import llama
from minift.nn.weight import Frozen, Params, dense
from minift.studies.formats import DQ, Format, is_linear, linear_layers, round_trip, share_on_a_grid
from minift.studies.held_out import held_out_rows
from minift.train.engine import NUMPY
from minift.train.loop import Settings, fit

Record = dict[str, Any]
FORMATS = [
    Format("float32"),
    Format("bfloat16"),
    Format("int8", "row"),
    Format("int8", 64),
    Format("int4", "row"),
    Format("int4", 64),
    Format("affine int4", 128),
    Format("affine int4", 32),
    Format("fp4", 64),
    Format("fp4" + DQ, 64),
    Format("nf4", "row"),
    Format("nf4", 256),
    Format("nf4", 64),
    Format("nf4" + DQ, 64),
]
TRAINED = "trained here"
STEPS, BATCH, LENGTH = 300, 16, 128  # of the model that is trained here
WORK = 1_500_000_000  # parameters times tokens that a data type is measured with, in at most ROWS rows
ROWS = 96


def run(model: str, seed: int, say: Callable[[str], None], formats: Sequence[Format] = FORMATS) -> list[Record]:
    """Every data type in `model`; with the built-in one, also in a model of its sizes that is trained here."""
    config, params = load_model(model)
    tokenizer = load_tokenizer(model)
    models = {Path(model).name: params}
    if model == "tiny":
        models[TRAINED] = trained(config, tokenizer, seed, say)
    length = min(2 * LENGTH, config.max_position_embeddings)
    size = sum(math.prod(shape) for shape in llama.shapes(config).values())
    count = min(max(WORK // (size * length), 2), ROWS)
    texts = held_out_rows(tokenizer, length, count)
    records = []
    for name, weights in models.items():
        if (share := share_on_a_grid(linear_layers(weights))) > 0.5:
            say(
                f"{name}: {share:.0%} of its blocks of 32 hold no more than 16 values: it was in 4 bits before, a data "
                "type with that grid loses nothing, and others are measured on it"
            )
            name = f"{name}, on a 4-bit grid"
        records += in_every_format(name, weights, config, texts, formats, say)
    return records


def in_every_format(
    name: str,
    params: Params,
    config: llama.Config,
    texts: Sequence[np.ndarray],
    formats: Sequence[Format],
    say: Callable,
) -> list[Record]:
    """One record a data type, in this order; the first of them is what the others are compared with."""
    records: list[Record] = []
    base = np.zeros(len(texts))
    for how in formats:
        rounded, bits = in_format(params, how)
        losses = row_losses(rounded, config, texts)
        base = base if records else losses
        increase = losses - base
        records.append(
            {
                "model": name,
                "data_type": how.data_type,
                "scale": how.scale,
                "bits_per_parameter": bits,
                "loss": float(losses.mean()),
                "perplexity": math.exp(losses.mean()),
                "increase": float(increase.mean()),
                "standard_error": float(increase.std(ddof=1) / math.sqrt(len(texts))),
                "tokens": len(texts) * (len(texts[0]) - 1),
            }
        )
        say(f"{name}: {how}: loss {losses.mean():.4f}")
    return records


def in_format(params: Params, how: Format) -> tuple[dict[str, Any], float]:
    """The model with its linear layers as this data type has them, and their bits a parameter."""
    rounded: dict[str, Any] = {}
    bits = count = 0.0
    for name, w in params.items():
        array = dense(w)
        if is_linear(name):
            array, each = round_trip(array, how)
            bits, count = bits + each * array.size, count + array.size
        rounded[name] = Frozen(array)
    return rounded, bits / count


def row_losses(params: Params, config: llama.Config, texts: Sequence[np.ndarray]) -> np.ndarray:
    """Mean cross-entropy of each row, in nats a token."""
    batches = (pad(chunks(row, len(row))) for row in texts)
    return np.array(
        [NUMPY.value(params, batch, config, len(row) - 1) for batch, row in zip(batches, texts, strict=True)]
    )


def trained(
    config: llama.Config, tokenizer: Tokenizer, seed: int, say: Callable[[str], None], steps: int = STEPS
) -> dict[str, Any]:
    """A model of these sizes trained from nothing, in float32, on the language reference and the docstrings."""
    found = stdlib_docs.embedded()
    texts = [example.everything for example in (*found.train_text, *found.train_pairs)]
    rng = np.random.default_rng(seed)
    text = "\n\n".join(texts[i] for i in rng.permutation(len(texts)))
    rows = chunks(tokenizer.encode(text), LENGTH)
    say(f"training a model of {config.num_hidden_layers} layers on {len(rows) * LENGTH:,} tokens, {steps} steps")

    def batches(step):
        return [pad([rows[i] for i in batch_indices(len(rows), BATCH, seed, step - 1)])]

    def loss(params, batch, normalizer, key):
        return NUMPY.loss(params, batch, config, normalizer)

    def report(record):
        if record["step"] and record["step"] % 50 == 0:
            say(f"step {record['step']}: training loss {record['loss']:.3f}")

    settings = Settings(steps=steps, learning_rate=4e-3, warmup_steps=max(steps // 20, 1), weight_decay=0.1, seed=seed)
    return fit(llama.initialize(config, rng), loss, batches, settings, report=report).params


def rows(records: Sequence[Record]) -> list[Record]:
    """All of them, without what is the same in each."""
    return [{key: value for key, value in r.items() if key != "tokens"} for r in records]


def draw(records: Sequence[Record], path: Path) -> None:
    """The increase of the loss over float32 and its standard error, one panel a model, as a PNG."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(r["model"] for r in records))
    figure = Figure(figsize=(6 * len(models), 5), layout="constrained")
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        found = [r for r in records if r["model"] == model][::-1]
        names = [str(Format(r["data_type"], r["scale"])) for r in found]
        errors = [r["standard_error"] for r in found]
        axes.barh(names, [r["increase"] for r in found], xerr=errors, color="C0", ecolor="0.3")
        axes.set(xlabel="held-out loss, more than in float32 (nats a token)", title=model)
        axes.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=130)
