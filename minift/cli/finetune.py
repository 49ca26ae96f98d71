"""`minift finetune`: the main job."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from minift.cli.common import (
    Device,
    answer,
    batches_of,
    check_page_budget,
    console,
    emit,
    engine_on,
    modules,
    peak_memory_bytes,
    read_data,
    warn_beyond,
)
from minift.cli.watch import Watcher, draw_losses
from minift.data.batches import Encoded
from minift.data.example import Example
from minift.io import load_model, load_tokenizer, refuse_to_destroy, save_adapter, save_model, save_prompt
from minift.models import Config, llama, module_of
from minift.nn.weight import Params, dense, trainable
from minift.optim.schedules import Schedule
from minift.peft import lora, soft_prompt
from minift.peft.p_tuning import Encoder
from minift.quant.sixteen import Dtype
from minift.train.engine import Optimizer
from minift.train.evaluate import held_out_loss
from minift.train.loop import Result, Settings, at_least, fit
from minift.train.methods import SOFT_PROMPTS, Method, prepare

# Peak learning rates in units of 1 / hidden_size: wider models want smaller steps. For 4,096 features this gives about
# what QLoRA (2e-4) and Alpaca (2e-5) used.
PER_WIDTH: dict[str, float] = {
    "full": 0.128,
    "head": 0.64,
    "lora": 0.64,
    "qlora": 0.64,
    "prompt": 6.4,
    "prefix": 6.4,
    "p-tuning": 0.64,
}
LINE = 120  # characters of an answer that are shown


@dataclass
class Finetune:
    """Fine-tune a model on questions and answers, and say what it cost and what it brought.

    With no settings at all, the built-in model learns what the functions of Python's standard library do. The loss
    counts the answers only. Ctrl-C leaves a checkpoint, and --resume goes on from it bit for bit.
    """

    method: Method = "lora"
    """full: every weight. head: the output matrix. lora: adapters W' = W + BA. qlora: the same over 4-bit weights.
    prompt: embeddings before the text. prefix: keys and values before it, in every layer. p-tuning: embeddings before
    the text that a network makes, which is dropped afterwards."""
    model: str = "tiny"
    """tiny (built in), a Hugging Face folder (Llama or GPT-2), or a .gguf file."""
    data: str = "stdlib"
    """stdlib or topics (built in), or a JSONL file or folder: prompt/completion, messages, Alpaca, or text. To go on
    with pretraining, every token learned: stdlib-text (the language reference), or a .txt file."""
    out: Path = Path("runs/finetune")
    """Where the adapter, metrics.jsonl, the loss curve and checkpoints go."""
    steps: int = 500
    """Optimizer steps."""
    batch_size: int = 16
    """Examples in one pass through the model."""
    gradient_accumulation_steps: int = 1
    """Passes a step; their gradients add up to exactly that of one large batch."""
    seq_len: int = 256
    """Longer examples are cut to this many tokens."""
    learning_rate: float | None = None
    """At its peak; by default 0.64 / hidden_size (5e-3 for tiny), a fifth of it for full, ten times as much for prompt
    and prefix."""
    schedule: Schedule = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_steps: int = 20
    """Steps over which the learning rate rises to its peak."""
    weight_decay: float = 0.01
    """Decoupled, on matrices only."""
    max_grad_norm: float = 1.0
    """Longer gradients are scaled down to this length."""
    optimizer: Optimizer = "adamw"
    """adamw: moments of 32 bits, 8 bytes a number. adamw8bit: 8 bits, 2.03 bytes (32 in arrays under 4,096 numbers).
    paged-adamw8bit: the same numbers in pages, of which --page-budget bytes stay in memory."""
    page_budget: int = 1_000_000
    """Bytes of moments that paged-adamw8bit keeps in memory; the rest is in a file without a name in --out, or, with
    torch, in the host's memory."""
    r: int = 8
    """Rank of the adapters."""
    lora_alpha: float = 16.0
    """The adapter is scaled by lora_alpha / r."""
    lora_dropout: float = 0.0
    """Share of an adapter's input that is dropped while training."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """Which layers get an adapter: names such as q_proj v_proj, all-linear, or a regular expression for whole paths,
    such as '.*layers\\.[01]\\..*_proj'."""
    num_virtual_tokens: int = 20
    """Length of a soft prompt: for prompt, prefix and p-tuning."""
    prompt_text: str | None = None
    """What prompt starts from, repeated or cut to its length; by default random embeddings."""
    encoder: Encoder = "MLP"
    """The network of p-tuning."""
    encoder_hidden_size: int | None = None
    """Its width, by default the model's. With a number, prefix too learns through a network of this width."""
    recompute: bool = False
    """Run each block again in the backward pass instead of keeping its activations: a third slower, far less memory."""
    dtype: Dtype = "float32"
    """How frozen weights are kept: 16 bits take half the memory. What learns, and all arithmetic, is float32."""
    device: Device = "cpu"
    """cpu: NumPy. cpu-torch: the same in PyTorch. cuda: the kernels of minift_kernels, frozen weights in bfloat16."""
    eval_examples: int = 400
    """Held-out examples that the loss is measured on."""
    eval_every: int = 100
    """Steps between measurements."""
    save_every: int = 100
    """Steps between checkpoints."""
    seed: int = 0
    """Decides the order of the data, the adapters' first values and dropout."""
    resume: bool = False
    """Go on from the checkpoint in --out."""
    json: bool = False
    """Print the results as one JSON object on the last line."""

    def run(self) -> int:
        started = time.perf_counter()
        at_least(1, batch_size=self.batch_size, gradient_accumulation_steps=self.gradient_accumulation_steps)
        at_least(1, eval_examples=self.eval_examples)
        at_least(2, seq_len=self.seq_len)
        check_page_budget(self.optimizer, self.page_budget)
        refuse_to_destroy(self._result, {"adapter_config.json", "config.json"})  # now, not after an hour of training
        if self.method in SOFT_PROMPTS:
            at_least(1, num_virtual_tokens=self.num_virtual_tokens)
        if self.dtype != "float32" and self.method == "full":
            raise ValueError(f"--method full --dtype {self.dtype}: all weights learn, which takes 32 bits; use float32")
        if self.dtype != "float32" and self.device != "cpu":
            raise ValueError(
                f"--device {self.device} --dtype {self.dtype}: torch keeps frozen weights in the device's own type "
                "(bfloat16 on cuda); use --dtype float32, or --device cpu"
            )
        engine = engine_on(self.device)
        config, params = load_model(self.model, dtype=self.dtype)
        settings = self._settings(config)
        warn_beyond(config, self.seq_len, "examples of --seq-len")
        tokenizer = load_tokenizer(self.model)
        data = read_data(self.data, tokenizer, self.seq_len, self.eval_examples)
        params, config = prepare(
            self.method,
            params,
            config,
            target_modules=modules(self.target_modules),
            r=self.r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            use_rslora=self.use_rslora,
            num_virtual_tokens=self.num_virtual_tokens,
            prompt_tokens=None if self.prompt_text is None else np.array(tokenizer.encode(self.prompt_text), np.int64),
            encoder=self.encoder,
            encoder_hidden_size=self.encoder_hidden_size,
            rng=np.random.default_rng(self.seed),
        )
        shapes = module_of(config).shapes(config)  # of head, with what it unties
        total = sum(math.prod(shape) for shape in shapes.values())
        learned = sum(array.size for array in trainable(params).values())
        console.print(
            Text(self.method, style="bold"),
            f"on {self.model}: {learned:,} of {total:,} parameters learn "
            f"({learned / total:.2%}); {len(data.train):,} examples, {len(data.held_out):,} held out",
        )
        questions = [asked for example in data.conversations if (asked := _to_the_last_answer(example))][:3]
        before = _answers(params, config, tokenizer, questions)

        def loss(params, batch, normalizer, key):
            return engine.loss(params, batch, config, normalizer, key if self.lora_dropout else None, self.recompute)

        with Watcher(self.steps) as watch:
            result = fit(
                params,
                loss,
                batches_of(data.train, self.batch_size, self.gradient_accumulation_steps, self.seed),
                settings,
                evaluate=lambda p: held_out_loss(p, data.held_out, config, self.batch_size, engine.value),
                folder=self.out,
                identity=self._identity(data.train),
                resume=self.resume,
                report=watch,
                engine=engine,
            )
        if result.interrupted:
            console.print(f"stopped after step {result.records[-1]['step']}; the same command with --resume goes on")
            return 130
        saved = self._save(result, config, tokenizer)
        draw_losses(result.records, self.out / "loss.png", f"{self.method} on {self.model}")
        after = _answers(result.params, config, tokenizer, questions)
        evaluations = result.losses()
        summary: dict[str, Any] = {
            "method": self.method,
            "model": self.model,
            "trainable_parameters": learned,
            "total_parameters": total,
            "weight_bytes": _weight_bytes(result.params),
            "trainable_bytes": sum(array.nbytes for array in trainable(result.params).values()),
            "optimizer": self.optimizer,
            "optimizer_bytes": result.optimizer_bytes,
            **result.paging,
            "eval_loss_before": evaluations[0][1],
            "eval_loss_after": evaluations[-1][1],
            "seconds": round(time.perf_counter() - started, 1),
            "peak_memory_bytes": peak_memory_bytes(),
            "adapter": str(saved),
            "loss_curve": str(self.out / "loss.png"),
        }
        _show(summary, questions, before, after)
        emit(summary, self.json, self.out)
        return 0

    def _settings(self, config: Config) -> Settings:
        return Settings(
            steps=self.steps,
            learning_rate=PER_WIDTH[self.method] / config.hidden_size
            if self.learning_rate is None
            else self.learning_rate,
            schedule=self.schedule,
            warmup_steps=self.warmup_steps,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            optimizer=self.optimizer,
            page_budget=self.page_budget,
            seed=self.seed,
            eval_every=self.eval_every,
            save_every=self.save_every,
        )

    def _identity(self, train: list[Encoded]) -> dict[str, Any]:
        """What must agree for a checkpoint to be this run's, beside the loop's own settings: also the text itself."""
        digest = hashlib.sha256(b"".join(tokens.tobytes() for tokens, _ in train)).hexdigest()[:16]
        elsewhere = {f.name for f in dataclasses.fields(Settings)} | {"out", "resume", "json"}
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in elsewhere} | {
            "target_modules": list(self.target_modules),
            "digest_of_the_data": digest,
        }

    @property
    def _result(self) -> Path:
        return self.out / ("model" if self.method in ("full", "head") else "adapter")

    def _save(self, result: Result, config: Config, tokenizer: Any) -> Path:
        """An adapter in PEFT's format where there is one, else the whole model as a Hugging Face folder."""
        base = os.path.abspath(self.model) if os.path.exists(self.model) else self.model
        if self.method in SOFT_PROMPTS:
            assert isinstance(config, llama.Config)
            save_prompt(self._result, soft_prompt.detach(result.params)[1], config, base, overwrite=True)
        elif self.method in ("lora", "qlora"):
            save_adapter(self._result, lora.detach(result.params)[1], base, overwrite=True)
        else:
            dense_params = {name: dense(weight) for name, weight in result.params.items()}
            save_model(self._result, config, dense_params, tokenizer, overwrite=True)
        return self._result


def _answers(params: Params, config: Config, tokenizer: Any, questions: list[Example]) -> list[str]:
    ready = module_of(config).fuse(params)
    texts = ("".join(answer(ready, config, tokenizer, q.messages[:-1], max_new_tokens=40)) for q in questions)
    return [_line(text) for text in texts]


def _to_the_last_answer(example: Example) -> Example | None:
    """A conversation up to and with its last answer; None where that answers nothing."""
    last = max(i for i, message in enumerate(example.messages) if message.role == "assistant")
    return Example(example.messages[: last + 1]) if last else None


def _line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= LINE else line[:LINE] + " …"


def _weight_bytes(params: Params) -> int:
    """The model as it lies in memory, without what an adapter adds."""
    return sum((w.base if isinstance(w, lora.LoRA) else w).nbytes for w in soft_prompt.bare(params).values())


def _show(summary: dict[str, Any], questions: list[Example], before: list[str], after: list[str]) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    share = summary["trainable_parameters"] / summary["total_parameters"]
    table.add_row("trainable", f"{summary['trainable_parameters']:,} of {summary['total_parameters']:,} ({share:.2%})")
    for name, key in (("weights", "weight"), ("what learns", "trainable"), ("optimizer state", "optimizer")):
        table.add_row(name, f"{summary[f'{key}_bytes'] / 1e6:,.2f} MB")
    if "page_faults" in summary:
        resident, budget = (summary[key] / 1e6 for key in ("peak_resident_bytes", "budget_bytes"))
        faults = f"{summary['page_faults']:,} page faults, {summary['evictions']:,} evictions"
        table.add_row("… of it in memory", f"at most {resident:,.2f} of {budget:,.2f} MB; {faults}")
    table.add_row("peak memory", f"{summary['peak_memory_bytes'] / 1e6:,.0f} MB")
    table.add_row("held-out loss", f"{summary['eval_loss_before']:.3f} → {summary['eval_loss_after']:.3f} nats a token")
    table.add_row("time", f"{summary['seconds']:.0f} s")
    table.add_row("loss curve", summary["loss_curve"])
    table.add_row("saved", summary["adapter"])
    console.print(table)
    for question, old, new in zip(questions, before, after, strict=True):
        asked, wanted = (_line(message.content) for message in question.messages[-2:])
        console.print(f"\n{asked}", style="bold")
        for label, text in (("before", old), ("after", new), ("the answer", wanted)):
            console.print(f"  {label:<12}{text}")
