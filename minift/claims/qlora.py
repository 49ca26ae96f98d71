"""What is said of QLoRA: the bits of double quantization, and a model of 65 billion parameters in 48 GB."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np

from minift.claims.claim import TEXTBOOK, Claim, depends, holds, rounded
from minift.claims.nf4 import PAPER
from minift.io import load_llama
from minift.models import llama
from minift.nn.weight import dense
from minift.peft import lora
from minift.quant import double_quant, nf4
from minift.quant.nf4 import NF4Tensor
from minift.train.memory import SIZES, bill

GUANACO = {"7B": 5, "13B": 10, "33B": 21, "65B": 41}  # GB, table 6


def four_bits() -> Claim:
    """NF4 stores a weight in 4 bits.

    The bytes of a real tensor of 2²⁰ weights: codes, and a scale for each block of 64."""
    plain, doubled = _tensors()
    on = (
        f"on the scales: {plain.bits_per_parameter:.3f} with them, {doubled.bits_per_parameter:.3f} if doubly quantized"
    )
    how = f"{plain.nbytes:,} bytes of a tensor of {plain.size:,} weights"
    return Claim("NF4 takes 4 bits a weight", TEXTBOOK, 4, plain.bits_per_parameter, depends(on), how)


def textbook_saving() -> Claim:
    """Double quantization saves 0.5 bits a weight.

    0.5 bits is what the scales cost *before*; what is saved is what they cost less afterwards."""
    plain, doubled = _tensors()
    found = plain.bits_per_parameter - doubled.bits_per_parameter
    how = f"{plain.bits_per_parameter:.4f} − {doubled.bits_per_parameter:.4f} bits, of a real tensor"
    return Claim("double quantization saves 0.5 bits a weight", TEXTBOOK, 0.5, found, rounded(0.5, found, 1), how)


def overhead() -> Claim:
    """With 32-bit scales and a block size of 64, scales add 32/64 = 0.5 bits a weight."""
    found = _tensors()[0].bits_per_parameter - 4
    return Claim("scales cost 0.5 bits a weight", PAPER, 0.5, found, rounded(0.5, found, 1), "32/64", "§3")


def overhead_left() -> Claim:
    """Double quantization reduces that to 8/64 + 32/(64·256) = 0.127 bits a weight.

    (And 32 bits a tensor for the mean of the scales, which the paper does not count.)"""
    found = _tensors()[1].bits_per_parameter - 4
    return Claim("… and 0.127 doubly quantized", PAPER, 0.127, found, rounded(0.127, found, 3), "8/64 + 32/16384", "§3")


def saving() -> Claim:
    """Double quantization saves 0.373 bits a weight."""
    plain, doubled = _tensors()
    found = plain.bits_per_parameter - doubled.bits_per_parameter
    how = f"0.5 − 0.127; {found / 0.5:.1%} of the overhead, {found / plain.bits_per_parameter:.1%} of everything"
    return Claim("… which saves 0.373 bits a weight", PAPER, 0.373, found, rounded(0.373, found, 3), how, "§3")


def saving_at_65b() -> Claim:
    """That is about 3 GB for a model of 65 billion parameters: its linear layers, counted, times the bits saved."""
    shapes = llama.shapes(SIZES["65B"])
    linear = sum(s[0] * s[1] for name, s in shapes.items() if len(s) == 2 and name.startswith("model.layers."))
    found = linear * (double_quant.overhead_bits(64, None) - double_quant.overhead_bits(64, 256)) / 8e9
    how = f"{linear:,} weights · 0.373 bits"
    return Claim("about 3 GB of a model of 65B", PAPER, 3.0, found, rounded(3, found, 1), how, "§1")


def full_65b() -> Claim:
    """Regular 16-bit fine-tuning of LLaMA 65B needs more than 780 GB.

    Weights and gradients of 16 bits, two moments of 32: 2 + 2 + 8 bytes a parameter, and activations on top."""
    found = sum(item.nbytes for item in _bill("full") if item.name != "activations") / 1e9
    how = f"{found / 12:.2f}·10⁹ parameters · 12 bytes, before activations"
    command = "minift memory --model 65B --method full"
    return Claim(
        "16-bit fine-tuning of 65B takes over 780 GB", PAPER, 780, found, holds(found > 780), how, "§1", command
    )


def qlora_65b() -> Claim:
    """QLoRA fine-tunes LLaMA 65B with less than 48 GB.

    4-bit weights and their constants, r = 64 on all linear layers as in the paper, adapters, gradients and moments in
    32 bits, 512 tokens with gradient checkpointing. 16-bit adapters or 8-bit moments would save some GB more."""
    items = _bill("qlora")
    found = sum(item.nbytes for item in items) / 1e9
    activations = sum(i.nbytes for i in items if i.name == "activations") / 1e9
    on = f"on the tokens: {found - activations:.1f} GB before activations, {found:.1f} with 512"
    how = ", ".join(f"{item.name} {item.nbytes / 1e9:.1f}" for item in items)
    command = "minift memory --model 65B --method qlora --r 64 --recompute"
    return Claim("QLoRA of 65B takes less than 48 GB", PAPER, 48, found, depends(on), how, "§1", command)


def guanaco(model: str) -> Claim:
    """Guanaco's memory in table 6: a 4-bit model with its adapter.

    Linear layers in 4.127 bits, embeddings and head in 16, an adapter of r = 64 in 16. The paper does not say what else
    it counts, and an eighth or more is missing."""
    total = sum(i.nbytes for i in _bill("qlora", model) if i.name in ("weights in 4 bits", "quantization constants"))
    shapes = llama.shapes(SIZES[model])
    linear = [s for name, s in shapes.items() if len(s) == 2 and name.startswith("model.layers.")]
    other = sum(int(np.prod(s)) for s in shapes.values()) - sum(d * k for d, k in linear)
    adapter = sum(lora.trainable_parameters(d, k, 64) for d, k in linear)
    found = (total + 2 * other + 2 * adapter) / 1e9
    claimed = GUANACO[model]
    how = f"{total / 1e9:.2f} in 4 bits + {2 * other / 1e9:.2f} embeddings and head + {2 * adapter / 1e9:.2f} adapter"
    on = f"on what is counted: weights and adapter are {found / claimed:.0%} of it"
    return Claim(f"Guanaco {model} takes {claimed} GB", PAPER, claimed, found, depends(on), how, "table 6")


def adapter_of_7b() -> Claim:
    """LoRA weights of 0.2 % of a 7B model take 26 MB: in 16 bits."""
    n = sum(int(np.prod(s)) for s in llama.shapes(SIZES["7B"]).values())
    found = 0.002 * n * 2 / 1e6
    how = f"0.002 · {n:,} · 2 bytes"
    return Claim("LoRA weights of a 7B model take 26 MB", PAPER, 26, found, rounded(26, found, 2), how, "§2")


def as_good_as_16_bits() -> Claim:
    """QLoRA matches 16-bit fine-tuning.

    What the built-in model can say of it: nothing. It was shipped in NF4, so quantizing it again changes no weight. A
    model that has never been in 4 bits is needed; SmolLM2's GGUF file, with its 16 values a block, is none either."""
    _, params = load_llama("tiny")
    weights = [dense(params[name]) for name in lora.targets(params, "all-linear")]
    lost = sum(float(np.sum((nf4.dequantize(nf4.quantize(w)) - w) ** 2)) for w in weights)
    norm = sum(float(np.sum(np.square(w))) for w in weights)
    normal = _normal_loss()
    found = f"{100 * np.sqrt(lost / norm):.2g} % lost"
    on = f"on weights that NF4 changes: of the built-in model's {found}, of normal ones {normal:.1f} %"
    command = "minift compare --model FOLDER --methods lora qlora"
    how = "norm of the quantization error over that of the weights"
    return Claim("QLoRA is as good as 16 bits", PAPER, "equal", found, depends(on), how, "§4", command)


CLAIMS: dict[str, Callable[[], Claim]] = {
    "four-bits": four_bits,
    "textbook-saving": textbook_saving,
    "overhead": overhead,
    "overhead-left": overhead_left,
    "saving": saving,
    "saving-at-65b": saving_at_65b,
    "full-65b": full_65b,
    "qlora-65b": qlora_65b,
    **{f"guanaco-{model.lower()}": partial(guanaco, model) for model in GUANACO},
    "adapter-of-7b": adapter_of_7b,
    "as-good-as-16-bits": as_good_as_16_bits,
}


@lru_cache(maxsize=1)
def _tensors() -> tuple[NF4Tensor, NF4Tensor]:
    """A tensor of 1,024 × 1,024 normal weights, plain and double-quantized."""
    plain = nf4.quantize(np.random.default_rng(0).standard_normal((1024, 1024), np.float32))
    return plain, double_quant.compress(plain)


def _normal_loss() -> float:
    x = np.random.default_rng(0).standard_normal((1024, 1024), np.float32)
    return 100 * float(np.linalg.norm(nf4.dequantize(_tensors()[0]) - x) / np.linalg.norm(x))


def _bill(method: Any, model: str = "65B") -> list[Any]:
    return bill(SIZES[model], method, r=64, weight_bits=16, recompute=True)
