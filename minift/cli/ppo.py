"""`minift ppo`: optimize a policy against a score, on a leash."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minift.cli.common import console, emit
from minift.cli.policy import PER_WIDTH, Start, identity, load_reward, questions, reward_digest, start, stopped
from minift.cli.watch import Watcher
from minift.data.comparisons import as_text
from minift.io import atomic_write, refuse_to_destroy
from minift.nn.weight import Params
from minift.peft import lora
from minift.rlhf import actor_critic, ppo, training
from minift.rlhf.measure import Measured, measure, standard_error
from minift.rlhf.rollouts import Prompt, Score
from minift.train.loop import Record, Result, Settings, at_least


@dataclass
class Ppo:
    """Answer, be judged, and do more of what was judged better than expected: PPO.

    Each round the policy answers questions of the training side; the score of an answer, less what each of its tokens
    pays for leading away from the model that it began as (the leash, --kl-coef), says by how much every token becomes
    likelier. On questions that are held out, the rubric without noise (gold) is measured beside the reward: where the
    reward rises and gold does not, the policy has learned to please the score and nothing else.

    minift ppo --reward runs/reward/adapter --adapter runs/finetune/adapter     a reward model of `minift reward`
    minift ppo --reward my.py:short --adapter runs/finetune/adapter             short(prompt, answer) -> float
    """

    reward: str
    """A folder that `minift reward` has written (adapter, or with --whole model), or FILE.py:FUNCTION for any
    f(prompt, answer) -> float."""
    model: str = "tiny"
    """tiny (built in), a Hugging Face folder of a Llama model, or a .gguf file."""
    adapter: Path | None = None
    """The adapter to begin with, such as runs/finetune/adapter: what it answers now is the reference."""
    questions: str = "stdlib"
    """stdlib or topics (built in), a folder with train.jsonl and valid.jsonl, or a JSONL file of {"prompt": …}."""
    out: Path = Path("runs/ppo")
    """Where the adapter, metrics.jsonl, the report picture, samples and checkpoints go."""
    rounds: int = 40
    """Rounds of answering and learning."""
    batch_size: int = 128
    """Answers a round."""
    max_new_tokens: int = 32
    """Longest answer, in tokens."""
    temperature: float = 1.0
    """The policy is softmax(logits / temperature), when it answers as when it learns."""
    method: Literal["lora", "qlora"] = "lora"
    """lora: an adapter on the model as it is. qlora: over its weights in 4 bits."""
    r: int = 8
    """Rank of the new adapter."""
    learning_rate: float | None = None
    """At its peak; by default 0.128 / hidden_size (1e-3 for tiny)."""
    num_ppo_epochs: int = 4
    """Passes over the answers of a round."""
    num_mini_batches: int = 1
    """Updates a pass."""
    kl_coef: float = 0.05
    """What a nat of KL costs, in units of the normalized reward. Smaller: a longer leash."""
    kl_target: float | None = None
    """Nats an answer that --kl-coef is steered towards; it changes by at most a fifth in --kl-horizon answers."""
    kl_horizon: float = 10_000
    """Answers that --kl-coef takes to follow --kl-target: fewer steer faster; at least a fifth of --batch-size."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """How the KL of a token is estimated; k1 is right on average, k3 is never negative."""
    cliprange: float = 0.2
    """How far a token's probability may move in a round, as a ratio, before it earns nothing more."""
    vf_coef: float = 0.1
    """Weight of the value loss."""
    cliprange_value: float | None = 0.2
    """How far a value may move in a round, in units of the reward; None does not clip."""
    entropy_coef: float = 0.0
    """Reward for staying undecided."""
    gamma: float = 1.0
    """What a reward is worth one token earlier; 1 does not discount."""
    lam: float = 0.95
    """GAE: 0 trusts the values, 1 the rewards."""
    normalize_rewards: bool = True
    """Shift and scale rewards so that the first policy's have mean 0 and variance 1; without, they are taken as is."""
    whiten_rewards: bool = False
    """Scale what the tokens of a round earn, KL and all, to variance 1; its mean stays."""
    whiten_advantages: bool = True
    """Scale the advantages of a round to mean 0 and variance 1."""
    missing_eos_penalty: float = 0.0
    """What an answer loses that was cut off at --max-new-tokens, in units of the normalized reward."""
    target_kl: float | None = None
    """Nats a token between the policy and the one that wrote the answers: an update that begins above them is the
    round's last."""
    eval_questions: int = 400
    """Held-out questions that reward and gold are measured on."""
    eval_every: int = 10
    """Rounds between measurements."""
    save_every: int = 1
    """Rounds between checkpoints."""
    seed: int = 0
    """Decides the order of the questions, the answers and the adapter's first values."""
    resume: bool = False
    """Go on from the checkpoint in --out."""
    json: bool = False
    """Print the results as one JSON object on the last line."""

    def run(self) -> int:
        started = time.perf_counter()
        refuse_to_destroy(self.out / "adapter", {"adapter_config.json"})
        begin, score = start(self.model, self.adapter), load_reward(self.reward, self.model)
        learn, held_out = questions(self.questions, self.eval_questions)
        judge = reward_digest(self.reward)
        trained = train(self, begin, score, learn, held_out, self.out, self.resume, judge)
        if stopped(trained.result):
            return 130
        summary = trained.summary() | {"seconds": round(time.perf_counter() - started, 1)}
        summary |= {"adapter": str(begin.save(self.out, trained.result.params)), "report": str(self.out / "report.png")}
        draw(trained.result.records, self.out / "report.png", "PPO")
        save_samples(self.out / "samples.jsonl", held_out, trained.before, trained.after)
        show(summary, held_out, trained)
        emit(summary, self.json, self.out)
        return 0

    @property
    def settings(self) -> ppo.Settings:
        """What PPO itself is told."""
        names = ppo.Settings.__dataclass_fields__.keys() & self.__dict__.keys()
        return ppo.Settings(**{name: getattr(self, name) for name in names})


@dataclass
class Trained:
    """A policy before and after, on the same held-out questions."""

    result: Result
    before: Measured
    after: Measured

    def summary(self) -> dict[str, Any]:
        """What a command reports; the standard error is that of the gain in gold, question by question."""
        before, after = self.before.record(), self.after.record()
        names = ("gold", "reward", "distinct", "names", "length")
        found = {f"{name}_{when}": r[name] for name in names for when, r in (("before", before), ("after", after))}
        return found | {
            "gold_standard_error": standard_error(self.after.gold - self.before.gold),
            "kl": after["kl"],
        }


def train(
    command: Ppo,
    begin: Start,
    score: Score,
    learn: list[Prompt],
    held_out: list[Prompt],
    out: Path,
    resume: bool,
    judge: str,
) -> Trained:
    """The training itself, with what it is measured by; `judge` is a digest of what scores."""
    at_least(1, batch_size=command.batch_size, max_new_tokens=command.max_new_tokens, r=command.r)
    settings = Settings(
        steps=command.rounds,
        learning_rate=command.learning_rate or PER_WIDTH / begin.config.hidden_size,
        schedule="constant",
        warmup_steps=0,
        weight_decay=0.0,
        seed=command.seed,
        eval_every=command.eval_every,
        save_every=command.save_every,
    )

    def measured(params: Params) -> Measured:
        policy = {name: weight for name, weight in params.items() if name != actor_critic.VALUE}
        options: dict[str, Any] = {"max_new_tokens": command.max_new_tokens, "temperature": command.temperature}
        seed = (command.seed, 0)  # round 0: no round's own answers
        return measure(policy, lora.bare(policy), held_out, score, begin.config, begin.tokenizer, seed=seed, **options)

    params = actor_critic.with_value_head(begin.policy(command.r, command.seed, command.method == "qlora"))
    with PpoWatcher(command.rounds) as watch:
        result = training.train_ppo(
            params,
            learn,
            score,
            begin.config,
            begin.tokenizer,
            settings,
            command.settings,
            evaluate=lambda step, params: {"held_out": True} | measured(params).record(),
            batch_size=command.batch_size,
            max_new_tokens=command.max_new_tokens,
            normalize_rewards=command.normalize_rewards,
            folder=out,
            identity=identity(command, begin, judge, *(as_text(prompt) for prompt in (*learn, *held_out))),
            resume=resume,
            report=watch,
        )
    return Trained(result, measured(params), measured(result.params))


@dataclass
class PpoWatcher(Watcher):
    """Progress in rounds: what was measured on held-out questions, and between the measurements the rounds."""

    def __call__(self, record: Record) -> None:
        if "held_out" in record:
            console.print(
                f"round {record['step']:>4}  held out: "
                f"gold {record['gold']:.4f} ± {record['gold_standard_error']:.4f}  "
                f"reward {record['reward']:+.3f}  KL {record['kl']:.2f}  distinct {record['distinct']:.0%}  "
                f"names it {record['names']:.1%}"
            )
            return
        text = (
            f"reward {record['reward']:+.3f}  KL {record['kl']:.2f}  entropy {record['entropy']:.2f}  "
            f"clipped {record['clipfrac']:.0%}  {record['length']:.0f} tokens  distinct {record['distinct']:.0%}"
        )
        self.show(record["step"], text, "round")


# --- what comes out ---------------------------------------------------------------------------------------------------


def draw(records: Sequence[Record], path: Path, title: str, others: Mapping[str, Record] | None = None) -> None:
    """Reward and gold on held-out questions against KL, over the rounds, as a PNG; and where `others` have come to."""
    from matplotlib.figure import Figure

    found = [record for record in records if "held_out" in record]
    kl, steps = [r["kl"] for r in found], [r["step"] for r in found]
    figure = Figure(figsize=(10, 4), layout="constrained")
    against_kl, shares = figure.subplots(1, 2)
    gold = against_kl.errorbar(
        kl, [r["gold"] for r in found], yerr=[r["gold_standard_error"] for r in found], fmt="o-", color="C2", capsize=3
    )
    for r in found:
        against_kl.annotate(str(r["step"]), (r["kl"], r["gold"]), fontsize=7, xytext=(3, 3), textcoords="offset points")
    against_kl.set(xlabel="KL to the first policy (nats an answer)", ylabel="gold", title=title)
    for number, (name, r) in enumerate((others or {}).items()):
        against_kl.errorbar(
            r["kl"], r["gold"], r["gold_standard_error"], fmt="v^<>"[number % 4], color="0.5", capsize=3
        )
        against_kl.annotate(name, (r["kl"], r["gold"]), fontsize=7, xytext=(4, -8), textcoords="offset points")
    other = against_kl.twinx()
    (reward,) = other.plot(kl, [r["reward"] for r in found], "s--", color="C3")
    other.set_ylabel("reward")
    labels = ["gold: the rubric without noise (left)", "reward (right)"]
    against_kl.legend([gold, reward], labels, loc="lower center", bbox_to_anchor=(0.5, -0.32), ncols=2)
    for name, label in (
        ("distinct", "distinct answers"),
        ("names", "name the thing asked"),
        ("ended", "came to an end"),
    ):
        shares.plot(steps, [r[name] for r in found], "o-", label=label)
    shares.set(xlabel="round", ylabel="share of held-out answers", ylim=(-0.03, 1.03))
    for axes in (against_kl, shares):
        axes.grid(alpha=0.3)
    shares.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def save_samples(path: Path, prompts: Sequence[Prompt], before: Measured, after: Measured) -> None:
    """A JSONL file of questions with the answers before and after, and the gold of each."""
    lines = (
        {"prompt": as_text(prompt), "before": b, "after": a, "gold_before": float(gb), "gold_after": float(ga)}
        for prompt, b, a, gb, ga in zip(prompts, before.texts, after.texts, before.gold, after.gold, strict=True)
    )
    atomic_write(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())


def show(summary: dict[str, Any], prompts: Sequence[Prompt], trained: Trained) -> None:
    """The table, and a few answers before and after."""
    for name, digits in (("gold", 4), ("reward", 3), ("names", 3), ("distinct", 3), ("length", 1)):
        console.print(f"{name:<10}{summary[f'{name}_before']:>10.{digits}f} → {summary[f'{name}_after']:.{digits}f}")
    error = summary["gold_standard_error"]
    console.print(f"gold rose by {summary['gold_after'] - summary['gold_before']:+.4f}, standard error {error:.4f}")
    console.print(f"KL        {summary['kl']:.2f} nats an answer;  {summary['seconds']:.0f} s")
    for prompt, before, after in list(zip(prompts, trained.before.texts, trained.after.texts, strict=True))[:5]:
        console.print(f"\n{as_text(prompt)}", style="bold")
        console.print(f"  before      {' '.join(before.split())}")
        console.print(f"  after       {' '.join(after.split())}")
