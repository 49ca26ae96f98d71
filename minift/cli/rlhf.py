"""`minift rlhf`: the whole circle, and the ways around it, in one table."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.table import Table

from minift.cli import dpo, ppo, reward
from minift.cli.common import console, emit
from minift.cli.finetune import Finetune
from minift.cli.policy import Start, digest, identity, may_resume, questions, start, stopped, texts
from minift.data import candidates, comparisons
from minift.data.candidates import Candidates
from minift.data.comparisons import Comparison
from minift.data.example import DataError
from minift.io import save_adapter
from minift.models import llama
from minift.nn.weight import Params, freeze
from minift.peft import lora
from minift.rlhf.measure import Measured, best_of, measure, standard_error
from minift.rlhf.raters import RubricRater, pairs, rate
from minift.rlhf.rollouts import AT_ONCE, Prompt, Score, sample, scored_by_model
from minift.train.loop import at_least


@dataclass
class Rlhf:
    """Learn from comparisons, all the way around: answers, ratings, a reward model, PPO; and DPO beside it.

    The fine-tuned model answers questions of the training side several times. A rater compares the answers: the written
    rubric of one-line docstrings, which disagrees with itself in a tenth of the pairs, as people do. A reward model
    learns from the comparisons, PPO optimizes the policy against it on a leash, DPO learns from the same comparisons
    directly, and best-of-n picks by the reward model among n answers. All are measured on held-out questions by the
    rubric without noise, which nothing has been trained on: gold.

    minift rlhf                               the built-in model, on two cores in some minutes
    minift rlhf --kl-coef 0.05 --rounds 40    a long leash: the reward model is pleased, and gold falls
    """

    model: str = "tiny"
    """tiny (built in), a Hugging Face folder of a Llama model, or a .gguf file."""
    adapter: Path | None = None
    """The fine-tuned model's adapter. Without one, tiny is fine-tuned first; another model is taken as it is."""
    method: Literal["lora", "qlora"] = "lora"
    """lora: adapters on the model as it is. qlora: over its weights in 4 bits."""
    data: str = "topics"
    """Where the questions come from: topics or stdlib (built in), a folder with train.jsonl and valid.jsonl, or a JSONL
    file of {"prompt": …}. The rubric judges questions "about one topic and another." and those that name a thing in
    backticks; of those, tiny names too little for any reward to hold on to."""
    out: Path = Path("runs/rlhf")
    """Where everything goes: answers, comparisons, the folders reward, ppo and dpo, the report picture."""
    sft_steps: int = 800
    """Steps of fine-tuning, where tiny has no adapter yet."""
    questions: int = 2000
    """At most so many questions whose answers are compared."""
    answers_each: int = 8
    """Answers to each; all pairs of them are compared, and ties left out."""
    comparisons: int = 9000
    """At most so many comparisons are used."""
    disagreement: float = 0.1
    """Share of the pairs on which the rater prefers the worse answer."""
    temperature: float = 0.7
    """The policy is softmax(logits / temperature)."""
    max_new_tokens: int = 32
    """Longest answer, in tokens."""
    reward_steps: int | None = None
    """Optimizer steps of the reward model; by default as many as read each comparison once."""
    dpo_steps: int | None = None
    """The same of DPO; 0 leaves it out."""
    rounds: int = 30
    """Rounds of PPO."""
    batch_size: int = 128
    """Answers a round."""
    kl_coef: float = 0.3
    """The leash of PPO. Try 0.05 to see the reward go on rising while gold falls."""
    best_of: int = 8
    """Answers that best-of-n picks from."""
    eval_questions: int = 400
    """Held-out questions that everything is measured on."""
    seed: int = 0
    """Decides everything that is drawn."""
    resume: bool = False
    """Go on where a run in --out was stopped."""
    json: bool = False
    """Print the results as one JSON object on the last line."""

    def run(self) -> int:
        started = time.perf_counter()
        at_least(2, answers_each=self.answers_each)
        at_least(1, questions=self.questions, best_of=self.best_of, comparisons=self.comparisons)
        adapter = self.adapter
        if adapter is None and self.model == "tiny":
            adapter = self.out / "sft" / "adapter"
            if not (self.resume and adapter.exists()) and (status := self._finetune()):
                return status
        begin = start(self.model, adapter)
        learn, held_out = questions(self.data, self.eval_questions)
        found = self._compare(begin, self._answer(begin, learn))

        command = self._command(reward.Reward, comparisons=Path(), adapter=None, steps=self.reward_steps)
        taught, pairs_held_out = reward.train(command, begin, found, **self._options("reward", command, begin, found))
        if stopped(taught):
            return 130
        save_adapter(self.out / "reward" / "adapter", lora.detach(taught.params)[1], begin.base, overwrite=True)
        of_reward = reward.judged(taught, pairs_held_out, begin)
        reward.show(of_reward)
        score = scored_by_model(lora.merge(taught.params), begin.config, begin.tokenizer)

        policies: dict[str, Measured] = {}
        if self.dpo_steps != 0:
            direct = self._command(dpo.Dpo, comparisons=Path(), adapter=None, steps=self.dpo_steps)
            result, _ = dpo.train(direct, begin, found, **self._options("dpo", direct, begin, found))
            if stopped(result):
                return 130
            begin.save(self.out / "dpo", result.params)
            policies["DPO"] = self._measure(result.params, held_out, score, begin)
        optimize = self._command(
            ppo.Ppo, reward="", adapter=None, rounds=self.rounds, batch_size=self.batch_size, kl_coef=self.kl_coef
        )
        resume, judge = may_resume(self.out / "ppo", self.resume), digest(self.out / "reward" / "adapter")
        trained = ppo.train(optimize, begin, score, learn, held_out, self.out / "ppo", resume, judge)
        if stopped(trained.result):
            return 130
        begin.save(self.out / "ppo", trained.result.params)
        policies = {"SFT": trained.before, **policies, "PPO": trained.after}
        policies[f"best of {self.best_of}"] = self._best_of(begin, held_out, score)
        others = {name: measured.record() for name, measured in policies.items() if name not in ("SFT", "PPO")}
        ppo.draw(trained.result.records, self.out / "report.png", f"PPO, KL coefficient {self.kl_coef:g}", others)
        ppo.save_samples(self.out / "samples.jsonl", held_out, trained.before, trained.after)
        summary = (
            of_reward
            | trained.summary()
            | {
                "comparisons": len(found),
                "noise_ceiling": 1 - self.disagreement,
                "policies": {name: _row(measured, trained.before) for name, measured in policies.items()},
                "seconds": round(time.perf_counter() - started, 1),
                "report": str(self.out / "report.png"),
            }
        )
        ppo.show(summary, held_out, trained)
        show(summary["policies"])
        emit(summary, self.json, self.out)
        return 0

    def _command(self, command: Any, **values: Any) -> Any:
        """A command with the settings that it shares with this one."""
        shared = {f.name for f in dataclasses.fields(command)} & {f.name for f in dataclasses.fields(self)}
        shared -= {"comparisons", "adapter", "out", "questions", "batch_size", "json"}
        return command(**{name: getattr(self, name) for name in shared} | values)

    def _options(self, part: str, command: Any, begin: Start, found: Sequence[Comparison]) -> dict[str, Any]:
        folder = self.out / part
        what = identity(command, begin, *texts(found))
        return {"folder": folder, "identity": what, "resume": may_resume(folder, self.resume)}

    def _finetune(self) -> int:
        folder = self.out / "sft"
        resume = may_resume(folder, self.resume)
        return Finetune(
            data=self.data, r=32, lora_alpha=64, steps=self.sft_steps, out=folder, seed=self.seed, resume=resume
        ).run()

    # --- answers and comparisons ---

    def _answer(self, begin: Start, learn: list[Prompt]) -> list[Candidates]:
        """Several answers to each of some questions: those in --out, and as many more as are missing.

        Questions are answered a batch at a time, each with a seed of its own, so that one can go on after any."""
        chosen = [learn[i] for i in np.random.default_rng(self.seed).permutation(len(learn))[: self.questions]]
        source = {name: getattr(self, name) for name in ("model", "temperature", "max_new_tokens", "seed")}
        source |= {"digest_of_the_adapter": begin.digest}
        if not self.resume:
            (self.out / "answers.jsonl").unlink(missing_ok=True)
        with candidates.journal(self.out / "answers.jsonl") as journal:
            for found, prompt in zip(journal.entries, chosen, strict=False):
                if (found.source, found.prompt, len(found.answers)) != (source, prompt, self.answers_each):
                    raise DataError(f"{journal.path}: answers of another run; start without --resume")
            ready, shown = llama.fuse(begin.params), time.monotonic()
            for first in range(len(journal.entries) // AT_ONCE * AT_ONCE, len(chosen), AT_ONCE):
                asked = chosen[first : first + AT_ONCE]
                said = self._sample(ready, asked * self.answers_each, begin, (self.seed, 1, first))
                for i in range(len(journal.entries) - first, len(asked)):
                    journal.append(Candidates(asked[i], said[i :: len(asked)], source))
                if time.monotonic() - shown > 10:
                    shown = time.monotonic()
                    console.print(f"{len(journal.entries):,} of {len(chosen):,} questions answered")
            return journal.entries[: len(chosen)]

    def _sample(self, ready: Params, asked: list[Prompt], begin: Start, seed: tuple[int, ...]) -> tuple[str, ...]:
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "temperature": self.temperature}
        return sample(ready, asked, begin.config, begin.tokenizer, seed=seed, **options).texts

    def _compare(self, begin: Start, answered: list[Candidates]) -> list[Comparison]:
        """What the rater says of all pairs, saved as TRL's preference file. Ties, which are most, are not kept."""
        rater = RubricRater(self.disagreement, self.seed)

        def decided(prompt, a, b):
            said = rater(prompt, a, b)
            return "skip" if said == "tie" else said

        path = self.out / "comparisons.jsonl"
        path.unlink(missing_ok=True)  # made again from the answers, in seconds
        shown = [pair for found in answered for pair in pairs(found.prompt, found.answers, self.seed)]
        order = np.random.default_rng([self.seed, 1]).permutation(len(shown))
        name = f"rubric, disagreement {self.disagreement:g}, seed {self.seed}"
        with comparisons.journal(path) as journal:
            for _ in rate((shown[i] for i in order), decided, name, journal):
                if len(journal.entries) == self.comparisons:
                    break
            found = journal.entries
        console.print(f"{len(found):,} comparisons of {len(shown):,} pairs, the others are ties or not needed: {path}")
        if not found:
            raise ValueError("every comparison was a tie: the model's answers never name the thing asked for")
        return found

    # --- what the policies are worth ---

    def _measure(self, params: Params, held_out: list[Prompt], score: Score, begin: Start) -> Measured:
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "temperature": self.temperature}
        seed = (self.seed, 0)
        return measure(params, lora.bare(params), held_out, score, begin.config, begin.tokenizer, seed=seed, **options)

    def _best_of(self, begin: Start, held_out: list[Prompt], score: Score) -> Measured:
        """The answer that the reward model likes best, of several that the first policy gives."""
        several = [self._again(begin, held_out, score, i) for i in range(self.best_of)]
        best, kl = best_of(np.stack([found.reward for found in several]))
        rows = range(len(held_out))

        def pick(field: str) -> Any:
            return [getattr(several[best[i]], field)[i] for i in rows]

        arrays = {f.name: np.array(pick(f.name)) for f in dataclasses.fields(Measured) if f.name != "texts"}
        return Measured(tuple(pick("texts")), **arrays | {"kl": np.full(len(held_out), kl)})

    def _again(self, begin: Start, held_out: list[Prompt], score: Score, number: int) -> Measured:
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "temperature": self.temperature}
        params, seed = freeze(begin.params), (self.seed, 2, number)
        return measure(params, params, held_out, score, begin.config, begin.tokenizer, seed=seed, **options)


def _row(measured: Measured, first: Measured) -> dict[str, float]:
    """What is known of a policy, and how much gold it has gained over the first one, question by question."""
    gain = measured.gold - first.gold
    return measured.record() | {"gain": float(gain.mean()), "gain_standard_error": standard_error(gain)}


def show(policies: dict[str, dict[str, float]]) -> None:
    """A line a policy."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    columns = {"gold": ".4f", "gain": "+.4f", "gain_standard_error": ".4f", "reward": "+.3f", "kl": ".2f"}
    columns |= {"distinct": ".0%", "names": ".1%", "length": ".1f"}
    for name in ("", *columns):
        table.add_column(name.replace("gain_standard_error", "± s.e."), justify="right" if name else "left")
    for name, row in policies.items():
        table.add_row(name, *(format(row[column], digits) for column, digits in columns.items()))
    console.print(table)
