"""What `reward`, `dpo`, `ppo` and `rlhf` share: the model that they begin with, the questions, and the result."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minift.cli.common import console, llama_only, load_with_adapter, put_on
from minift.data import comparisons, jsonl, topics
from minift.data.comparisons import Comparison
from minift.data.example import Example, Message
from minift.data.json_lines import read_lines, string
from minift.data.stdlib_docs import embedded
from minift.io import (
    Tokenizer,
    is_reward_model,
    load_adapter,
    load_model,
    load_reward_model,
    load_tokenizer,
    save_adapter,
)
from minift.models import llama
from minift.models.classifier import SCORE
from minift.nn.weight import Params, freeze
from minift.peft import lora, qlora
from minift.rlhf import reward_model, training
from minift.rlhf.actor_critic import VALUE
from minift.rlhf.pairs import Pairs
from minift.rlhf.rollouts import Prompt, Score, scored_by_function, scored_by_model
from minift.train import checkpoint
from minift.train.loop import Result, Settings, at_least

PER_WIDTH = 0.128  # peak learning rate in units of 1 / hidden_size: a fifth of what an adapter begins with


@dataclass(frozen=True)
class Start:
    """A model that answers questions already: the policy at its beginning, and the reference ever after."""

    model: str
    config: llama.Config
    tokenizer: Tokenizer
    bare: dict[str, Any]  # the base model
    params: dict[str, Any]  # the same with the adapter merged into it, frozen
    adapter: lora.Adapter | None
    digest: str  # of the adapter's weights: one that was trained anew is another beginning

    def policy(self, r: int, seed: int, four_bit: bool = False) -> dict[str, Any]:
        """The same with a fresh adapter, which does nothing yet. ValueError for 4 bits under a merged adapter."""
        if four_bit and self.adapter is not None:
            raise ValueError(
                "qlora with an adapter: what it was merged into is no longer a model of 4 bits; "
                "use --method lora, or merge it into a model folder first (minift merge) and begin with that"
            )
        attach = qlora.attach if four_bit else lora.attach
        return attach(self.params, "all-linear", r=r, lora_alpha=2 * r, rng=np.random.default_rng(seed))

    def save(self, folder: Path, params: Params) -> Path:
        """What was learned, together with the adapter that it began with: one adapter for the base model."""
        learned = lora.detach({name: w for name, w in params.items() if name != VALUE})[1]
        if self.adapter is not None:
            learned = dataclasses.replace(learned, over_nf4=self.adapter.over_nf4)
            learned = lora.mix([(self.adapter, 1.0), (learned, 1.0)])
        save_adapter(folder / "adapter", learned, self.base, overwrite=True)
        return folder / "adapter"

    @property
    def base(self) -> str:
        return os.path.abspath(self.model) if os.path.exists(self.model) else self.model


def start(model: str, adapter: Path | None) -> Start:
    """Load a model and the adapter on it, if one is named. Raises FormatError."""
    found, params = load_with_adapter(model, adapter)
    config = llama_only(found, model, "RLHF")
    tokenizer = load_tokenizer(model)
    if adapter is None:
        return Start(model, config, tokenizer, params, freeze(params), None, "")
    return Start(model, config, tokenizer, *_merged(params), digest(adapter))


def _merged(params: Params) -> tuple[dict[str, Any], dict[str, Any], lora.Adapter]:
    bare, adapter = lora.detach(params)
    return bare, lora.merge(params), adapter


def digest(folder: Path) -> str:
    """Of the weights in a folder: an adapter that was trained anew is another one."""
    sha256 = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        sha256.update(path.read_bytes())
    return sha256.hexdigest()[:16]


def identity(command: Any, start: Start, *texts: str) -> dict[str, Any]:
    """What must agree for a checkpoint to be this run's, beside the loop's settings: also the texts themselves."""
    elsewhere = {f.name for f in dataclasses.fields(Settings)} | {"out", "resume", "json", "whole"}
    elsewhere |= {"adapter", "comparisons", "reward"}  # as digests, wherever they lie
    said = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
    values = {n: str(v) if isinstance(v, Path) else v for n, v in dataclasses.asdict(command).items()}
    return {n: v for n, v in values.items() if n not in elsewhere} | {
        "digest_of_the_adapter": start.digest,
        "digest_of_the_data": said,
    }


def may_resume(folder: Path, resume: bool) -> bool:
    """Whether this part of a longer work had begun."""
    return resume and (folder / checkpoint.NAME).exists()


def stopped(result: Result) -> bool:
    """Says so where somebody stopped it."""
    if result.interrupted:
        console.print("stopped; the same command with --resume goes on")
    return result.interrupted


# --- questions and comparisons ----------------------------------------------------------------------------------------


def questions(source: str, held_out: int) -> tuple[list[Prompt], list[Prompt]]:
    """(to learn from, to measure on): of the built-in set; of a folder with train.jsonl and valid.jsonl, as
    `minift finetune` reads it; or of a JSONL file of {"prompt": …}, a tenth held out.

    ValueError where one of the two is empty."""
    if source == "stdlib":
        found = embedded()
        learn, measure = map(_asked, (found.train_pairs, found.held_out_pairs))
    elif source == "topics":
        learn, measure = topics.questions()
    elif Path(source).is_dir():
        learn, measure = map(_asked, jsonl.read_split(source))
    else:
        every = read_lines(source, lambda fields: (Message("user", string(fields, "prompt")),), '{"prompt"}')
        every = list(dict.fromkeys(every))
        order = np.random.default_rng(0).permutation(len(every))
        cut = max(1, len(every) // 10)
        learn, measure = [every[i] for i in order[cut:]], [every[i] for i in order[:cut]]
    if not learn or not measure:
        raise ValueError(f"{source}: needed at least two different questions")
    chosen = np.random.default_rng(0).permutation(len(measure))[:held_out]  # the same ones in every run
    return learn, [measure[i] for i in chosen]


def _asked(examples: Sequence[Example]) -> list[Prompt]:
    """The first question of each conversation."""
    first = ((next(i for i, m in enumerate(e.messages) if m.role == "user"), e) for e in examples if e.messages)
    return [example.messages[: i + 1] for i, example in first]


def read_comparisons(path: Path) -> list[Comparison]:
    """Those in a file; says how many are ties, which nothing is learned from."""
    found = comparisons.read(path)
    ties = sum(c.tie for c in found)
    console.print(f"{len(found):,} comparisons in {path}" + (f", {ties:,} of them ties, left out" if ties else ""))
    return found


def pairs_and_settings(
    name: str, command: Any, begin: Start, found: Sequence[Comparison]
) -> tuple[Pairs, Pairs, Settings]:
    """(pairs to learn from, pairs held out, the loop's settings): each is read once, unless steps are given."""
    at_least(1, batch_size=command.batch_size, r=command.r)
    parts = training.split(found, command.held_out, command.seed)
    learned, held_out = (training.as_pairs(part, begin.tokenizer) for part in parts)
    steps = -(-len(learned) // command.batch_size) if command.steps is None else command.steps
    console.print(f"{name}: {len(learned):,} comparisons to learn from, {len(held_out):,} held out")
    settings = Settings(
        steps=steps,
        learning_rate=command.learning_rate or PER_WIDTH / begin.config.hidden_size,
        seed=command.seed,
        eval_every=command.eval_every,
        save_every=command.save_every,
        warmup_steps=min(20, steps // 5),
    )
    return learned, held_out, settings


def texts(found: Sequence[Comparison]) -> list[str]:
    """All that the comparisons say, for a digest."""
    return [text for c in found for text in (c.question, c.chosen, c.rejected)]


# --- the reward -------------------------------------------------------------------------------------------------------


def load_reward(source: str, model: str) -> Score:
    """A reward model's adapter folder (for the same base model), a whole reward model, or FILE.py:FUNCTION.

    Raises FormatError for the folder, ValueError for a function that is not there."""
    path, _, name = source.rpartition(":")
    if path.endswith(".py"):
        return scored_by_function(_function(Path(path), name))
    if is_reward_model(source):
        config, params = load_reward_model(source)
        return scored_by_model(freeze(params), config, load_tokenizer(source))
    found, params = load_model(model)
    config = llama_only(found, model, "a reward model")
    headed = reward_model.with_head(params, np.random.default_rng(0))
    adapter = load_adapter(Path(source), headed)
    if SCORE not in adapter.arrays:
        raise ValueError(f"{source} is an adapter without a score head, needed one that `minift reward` has trained")
    return scored_by_model(lora.merge(put_on(headed, adapter)), config, load_tokenizer(model))


def reward_digest(source: str) -> str:
    """Of what `load_reward` loads: a run is not to go on with another reward."""
    path = Path(source.rpartition(":")[0])
    return path.read_text(encoding="utf-8") if path.suffix == ".py" else digest(Path(source))


def _function(path: Path, name: str) -> Callable[[str, str], float]:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.exists() or spec is None or spec.loader is None:
        raise ValueError(f"{path}: no such file, needed a Python file with a function {name}(prompt, answer)")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{path}: no function {name!r}, needed {name}(prompt, answer) -> float")
    return function
