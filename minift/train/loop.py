"""One training loop that every method uses.

It sees arrays, gradients and a loss, and knows nothing of models, adapters or quantization: what learns is whatever
`trainable(params)` lists. Everything that could differ from run to run is a pure function of (seed, step), so a run
that is killed and resumed ends in the same bits as one that was not.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, get_args

import numpy as np

from minift.io.atomic import atomic_write
from minift.io.errors import FormatError
from minift.nn.dropout import fold_in
from minift.nn.weight import Arrays, Params, replace, trainable
from minift.optim.adamw8bit import zero_moments
from minift.optim.schedules import Schedule, learning_rate
from minift.train import checkpoint
from minift.train.allocator import keep_freed_memory
from minift.train.engine import NUMPY, Engine, Optimizer

METRICS = "metrics.jsonl"


class Counted(Protocol):
    """What the loop asks of a batch: of text (`data.batches.Batch`), of comparisons or of rollouts (`rlhf`)."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row."""

    @property
    def count(self) -> int:
        """What the summed loss of a step is divided by, added up over its micro-batches."""


Loss = Callable[[Params, Any, float, int], tuple[np.floating, Callable]]
Record = dict[str, Any]
Update = Callable[[Loss, Sequence[Counted], int], Record]  # one step of the optimizer: its loss, rate, gradient's norm


def at_least(least: int, **values: float) -> None:
    """ValueError with the name of the first value that is less, NaN or infinite."""
    for name, value in values.items():
        if not least <= value < math.inf:
            raise ValueError(f"{name} is {value}, needed {least} or more")


@dataclass(frozen=True)
class Settings:
    """What the loop itself can be told. ValueError for a number out of range."""

    steps: int = 300
    learning_rate: float = 1e-3
    schedule: Schedule = "cosine"
    warmup_steps: int = 20
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    optimizer: Optimizer = "adamw"
    page_budget: int = 1_000_000  # bytes of paged moments that stay in memory; where they are changes no bit
    seed: int = 0
    eval_every: int = 100
    save_every: int = 100
    keep_best: bool = False  # end with the parameters of the lowest held-out loss instead of the last ones

    def __post_init__(self):
        at_least(0, steps=self.steps, warmup_steps=self.warmup_steps, seed=self.seed)
        at_least(1, eval_every=self.eval_every, save_every=self.save_every, page_budget=self.page_budget)
        at_least(0, learning_rate=self.learning_rate, weight_decay=self.weight_decay)
        if not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm is {self.max_grad_norm}, needed a positive number")
        if self.optimizer not in get_args(Optimizer):
            raise ValueError(f"optimizer is {self.optimizer!r}, needed one of {get_args(Optimizer)}")


@dataclass
class Result:
    """A trained model, the loop's records (what `metrics.jsonl` holds), and whether someone stopped it early."""

    params: dict[str, Any]
    records: list[Record]
    optimizer_bytes: int
    interrupted: bool = False
    paging: dict[str, int] = field(default_factory=dict)  # what it cost to keep moments in pages, where they are

    def losses(self, key: str = "eval_loss") -> list[tuple[int, float]]:
        return [(record["step"], record[key]) for record in self.records if key in record]


def fit(
    params: Params,
    loss: Loss,
    batches: Callable[[int], Sequence[Counted]],
    settings: Settings,
    *,
    evaluate: Callable[[Params], float] | None = None,
    folder: Path | None = None,
    identity: dict[str, Any] | None = None,
    resume: bool = False,
    report: Callable[[Record], None] = lambda record: None,
    engine: Engine = NUMPY,
) -> Result:
    """Train what learns in `params` on batches that are known beforehand: `run` with one update a step.

    loss(params, batch, normalizer, dropout_key) -> value, vjp     with vjp(1.0) -> {name: gradient}
    batches(step)     the micro-batches of step 1, 2, …: a pure function; their gradients add up to that of one batch
    evaluate(params)  held-out loss, before the first step, every `eval_every` steps and after the last
    """

    def advance(step: int, current: Params, records: Sequence[Record], update: Update) -> Record:
        started = time.perf_counter()
        micro_batches = batches(step)
        record = update(loss, micro_batches, fold_in(settings.seed, step))
        tokens = sum(int(batch.lengths.sum()) for batch in micro_batches)
        speed = tokens / (time.perf_counter() - started)
        return record | {"tokens": tokens, "tokens_per_second": round(speed, 1)}

    def measure(step: int, current: Params) -> Record:
        return {} if evaluate is None else {"eval_loss": evaluate(current)}

    return run(
        params,
        advance,
        settings,
        evaluate=measure,
        folder=folder,
        identity=identity,
        resume=resume,
        report=report,
        engine=engine,
    )


def run(
    params: Params,
    advance: Callable[[int, Params, Sequence[Record], Update], Record],
    settings: Settings,
    *,
    evaluate: Callable[[int, Params], Record] = lambda step, params: {},
    folder: Path | None = None,
    identity: dict[str, Any] | None = None,
    resume: bool = False,
    report: Callable[[Record], None] = lambda record: None,
    engine: Engine = NUMPY,
) -> Result:
    """Train what learns in `params`, a step at a time; the arrays that were passed in are not changed.

    advance(step, params, records, update)    does the work of step 1, 2, …: calls `update(loss, micro_batches, key)`
                      once or more often, and returns what is to be recorded. `params` are the current ones, also after
                      an update. What it does must follow from them, the step and the records so far
    evaluate(step, params)    what to record before the first step, every `eval_every` steps and after the last; of the
                      best, as `keep_best` means it, "eval_loss" is the lowest
    folder            where checkpoints and `metrics.jsonl` go; Ctrl-C, or a polite kill, leaves a checkpoint there
    engine            what computes; a loss and `evaluate` get its parameters, files and the result are NumPy's
    identity          what the run is (model, data, method); a checkpoint of another identity is not resumed

    FormatError where there is nothing to resume, or no record of it; ValueError where a loss or gradient is not finite
    or nothing learns.
    """
    keep_freed_memory()
    arrays = checkpoint.copy(trainable(params))
    if not arrays:
        raise ValueError("nothing learns in these parameters: attach an adapter, or thaw what should be trained")
    elsewhere = ("save_every", "page_budget")  # no number depends on these
    identity = (identity or {}) | {k: v for k, v in asdict(settings).items() if k not in elsewhere}
    state: dict[str, Any] = {"weight_decay": settings.weight_decay}
    done, records, best, best_loss = 0, [], Arrays(), math.inf
    if folder is not None and not resume:
        (folder / checkpoint.NAME).unlink(missing_ok=True)  # of an earlier run, whose records are overwritten too
    if folder is not None and resume:
        eight = settings.optimizer != "adamw"
        moments = {name: zero_moments(a) for name, a in arrays.items()} if eight else None
        saved = checkpoint.load(folder, identity, arrays, moments)
        done, arrays, best = saved.step, saved.parameters, saved.best
        best_loss = math.inf if saved.best_loss is None else saved.best_loss
        updates = saved.step if saved.updates is None else saved.updates
        state |= {"step": updates, "m": engine.send(saved.m), "v": engine.send(saved.v)}
        records = _read_records(folder / METRICS, saved.step)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    optimizer = engine.optimizer(settings.optimizer, settings.page_budget, folder, **state)
    current = engine.place(replace(params, arrays))
    arrays = engine.trainable(current)  # AdamW writes into these, so `current` follows by itself

    def save() -> None:
        if folder is not None:
            parameters, m, v = (engine.fetch(part) for part in (arrays, optimizer.m, optimizer.v))
            best_or_none = best_loss if math.isfinite(best_loss) else None
            updates = None if optimizer.step == done else optimizer.step
            kept = checkpoint.Checkpoint(done, identity, parameters, m, v, best, best_or_none, updates)
            checkpoint.save(folder, kept)

    with _Log(folder, records, report) as log, stop_signals() as stopped:

        def evaluated(step: int) -> None:
            nonlocal best, best_loss
            measured = evaluate(step, current)
            if not measured:
                return
            log({"step": step} | measured)
            if settings.keep_best and (value := measured["eval_loss"]) < best_loss:
                best, best_loss = checkpoint.copy(engine.fetch(arrays)), value

        if not records:
            evaluated(0)
        while done < settings.steps and not stopped():
            step = done + 1
            eta = learning_rate(step, settings.learning_rate, settings.steps, settings.warmup_steps, settings.schedule)

            def update(loss: Loss, micro_batches: Sequence[Counted], key: int, step=step, eta=eta) -> Record:
                value, gradients = _accumulate(current, loss, micro_batches, key)
                if not math.isfinite(value):
                    raise ValueError(f"step {step}: the loss is {value}: lower the learning rate")
                gradients, norm = engine.clip_by_global_norm(gradients, settings.max_grad_norm)
                optimizer.update(arrays, gradients, eta)
                return {"loss": value, "learning_rate": eta, "grad_norm": norm}

            log({"step": step} | advance(step, current, log.records, update))
            done = step
            if step == settings.steps or step % settings.eval_every == 0:
                evaluated(step)
            if step % settings.save_every == 0:
                save()
        interrupted = done < settings.steps
        save()
    learned = best if settings.keep_best and best and not interrupted else engine.fetch(arrays)
    paging = optimizer.pager.counts if hasattr(optimizer, "pager") else {}
    return Result(replace(params, learned), log.records, optimizer.nbytes, interrupted, paging)


def _accumulate(params: Params, loss: Loss, micro_batches: Sequence[Counted], key: int) -> tuple[float, Arrays]:
    """Loss and gradient of one large batch, a piece at a time; each piece is divided by the count of the whole."""
    labels = sum(batch.count for batch in micro_batches)
    total, gradients = 0.0, Arrays()
    for index, batch in enumerate(micro_batches):
        value, vjp = loss(params, batch, float(max(labels, 1)), fold_in(key, index))
        total += float(value)
        for name, gradient in vjp(1.0).items():
            gradients[name] = gradients[name] + gradient if name in gradients else gradient
    return total, gradients


@dataclass
class _Log:
    """Each record goes to memory, to whoever watches, and to a line of `metrics.jsonl` at once."""

    folder: Path | None
    records: list[Record]
    report: Callable[[Record], None]
    _file: Any = field(default=None, init=False)

    def __enter__(self):
        if self.folder is not None:
            before = "".join(map(_line, self.records))
            atomic_write(self.folder / METRICS, before.encode())  # without what lies behind the checkpoint
            self._file = open(self.folder / METRICS, "a", encoding="utf-8")
        return self

    def __call__(self, record: Record) -> None:
        self.records.append(record)
        if self._file is not None:
            self._file.write(_line(record))
            self._file.flush()
        self.report(record)

    def __exit__(self, *_):
        if self._file is not None:
            self._file.close()


def _line(record: Record) -> str:
    return json.dumps(record) + "\n"


def _read_records(path: Path, step: int) -> list[Record]:
    """What was recorded up to this step; a last line that was cut off by a kill is left out.

    FormatError where it does not reach that step: a file that was removed, or begun again by another run."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if record["step"] <= step:
            records.append(record)
    if (records[-1]["step"] if records else 0) < step:
        found = f"nothing after step {records[-1]['step']}" if records else "no records"
        needed = f"those up to step {step}, where the checkpoint stands; put them back, or start without --resume"
        raise FormatError(path, "", found, needed)
    return records


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and a polite kill ask the loop to stop after this step; a second Ctrl-C stops at once."""
    asked = threading.Event()

    def ask(number, frame):
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
