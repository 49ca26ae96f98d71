"""The lessons, by name: worked examples of the reference with numbers small enough to check by hand."""

from __future__ import annotations

from collections.abc import Callable

from minift.step.lessons import nn, optim, peft, quant, rlhf
from minift.step.lessons.lesson import Lesson, Question, Scene

__all__ = ["LESSONS", "Lesson", "Question", "Scene"]

LESSONS: dict[str, Callable[[], Lesson]] = {
    "lora": peft.lora_lesson,
    "merge": peft.merge_lesson,
    "rms_norm": nn.rms_norm_lesson,
    "attention": nn.attention_lesson,
    "cross_entropy": nn.cross_entropy_lesson,
    "nf4": quant.nf4_lesson,
    "double_quant": quant.double_quant_lesson,
    "dequantize": quant.dequantize_lesson,
    "qlora": peft.qlora_lesson,
    "adamw": optim.adamw_lesson,
    "adamw8bit": optim.adamw8bit_lesson,
    "prefix": peft.prefix_lesson,
    "reward": rlhf.reward_lesson,
    "gae": rlhf.gae_lesson,
    "ppo": rlhf.ppo_lesson,
    "dpo": rlhf.dpo_lesson,
}
