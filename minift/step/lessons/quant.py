"""NF4, double quantization and back, on one block of eight numbers."""

from __future__ import annotations

import numpy as np

from minift.quant import blockwise, double_quant, nf4
from minift.quant.codebooks import INT4
from minift.step.lessons.lesson import Lesson, Question, Scene
from minift.step.recorder import step

BLOCK = np.array([0.12, -0.34, 0.56, -1.20, 0.90, 0.00, -0.05, 0.31], np.float32)


def nf4_lesson() -> Lesson:
    quantized = step(nf4.quantize, BLOCK, 64, into=("_scale", "_encode", "pack"))
    codes = nf4.unpack(quantized.value.codes, 8)
    nf4_error = blockwise.round_trip_error(BLOCK, nf4.CODE, 64)
    return Lesson(
        "nf4",
        "NF4: sixteen values from the normal distribution, two in a byte",
        "Eight weights, one block: [0.12, −0.34, 0.56, −1.20, 0.90, 0.00, −0.05, 0.31].",
        (
            Scene(
                "Where the sixteen numbers come from",
                "Quantiles of N(0, 1): if weights are normal, each code is used about equally often.",
                step(nf4.normal_quantiles, depth=0),
                (
                    Question(
                        "values =",
                        "How many of the sixteen are negative?",
                        lambda r: int((r.value < 0).sum()),
                        "Eight are positive, seven negative, and one is exactly zero: the table is not symmetric.",
                    ),
                    Question(
                        "return read_only",
                        "Are the gaps between neighbors widest in the middle or at the ends?",
                        lambda r: "at the ends" if np.diff(r.value)[0] > np.diff(r.value)[7] else "in the middle",
                        "From 0.08 near zero to 0.30 at the left end. Few normal weights lie out there.",
                    ),
                ),
            ),
            Scene(
                "From weights to bytes",
                "Scale by the largest magnitude, take the nearest of the sixteen, put two codes in a byte.",
                quantized,
                (
                    Question(
                        "scale =",
                        "What is the scale of this block?",
                        lambda r: float(r.value.absmax[0]),
                        "The largest magnitude: −1.20, without its sign.",
                    ),
                    Question(
                        "pairs = pack",
                        "Which code does −1.20, now −1, get? And 0.00?",
                        lambda r: np.array([codes[3], codes[5]]),
                        "0 is the lowest value, −1; 7 is the exact zero.",
                    ),
                    Question(
                        "packed = high",
                        "Which nibble does the first code of a pair go into: high or low?",
                        lambda r: "high" if r.value.codes[0] >> 4 == codes[0] else "low",
                        "The codes 8 and 4 become 84. The other order would swap every pair of neighbors.",
                    ),
                ),
                (
                    "packed",
                    "pairs",
                    "returned.codes",
                    "pack.returned",
                    "quantize.codes",
                    "_encode.codes",
                    "_encode.pairs",
                ),
            ),
            Scene(
                "And back",
                "c_q · a, the value that each code stands for times the scale of its block.",
                step(nf4.dequantize, quantized.value, into=("_decode",)),
                (
                    Question(
                        "return w[",
                        "−0.05 / 1.20 is −0.0417; the midpoint to its left is −0.0455. What does −0.05 come back as?",
                        lambda r: float(r.value[6]) + 0.0,
                        "It fell to the exact zero.",
                    ),
                ),
                ("nf4._decode.codes", "q.codes"),
            ),
            Scene(
                "The same block in evenly spaced codes",
                "INT4 has 15 values, all 1/7 apart. It loses more of normal weights; of one block it may lose less.",
                step(blockwise.round_trip_error, BLOCK, INT4, 64, depth=0),
                (
                    Question(
                        "return float",
                        f"NF4's mean error here is {nf4_error:.4f}. Is INT4's larger?",
                        lambda r: "yes" if r.value > nf4_error else "no",
                    ),
                ),
            ),
        ),
    )


def double_quant_lesson() -> Lesson:
    scales = np.array([1.0, 1.1, 0.9, 1.0, 0.99, 1.0, 2.009, 0.001], np.float32)
    compressed = step(double_quant.compress_scales, scales, 4, depth=0)
    return Lesson(
        "double_quant",
        "Double quantization: the scales are quantized too",
        "Eight block scales, four to a nested block (256 in practice). The last one is tiny.",
        (
            Scene(
                "From eight float32 scales to eight bytes",
                "Scales are all positive and much alike: their mean is taken off, the rest kept in 8 bits.",
                compressed,
                (
                    Question(
                        "offset =",
                        "What is the mean of [1, 1.1, 0.9, 1, 0.99, 1, 2.009, 0.001]?",
                        lambda r: float(r.value.offset),
                    ),
                    Question(
                        "nearest =",
                        "Why is the mean taken off first?",
                        "All scales are positive, so half of a signed map would never be used.",
                    ),
                    Question(
                        "codes = np.maximum",
                        "Is there a scale whose nearest code would decode to a negative number?",
                        lambda r: "yes" if _negative(r) else "no",
                        "All weights of its block would change their sign. It gets the smallest code that does not.",
                    ),
                ),
            ),
            Scene(
                "And back",
                "Two roundings to float32: one of the product, one of the sum.",
                step(compressed.value.decode, depth=0),
                (
                    Question(
                        "return",
                        "Is the tiny scale still positive?",
                        lambda r: "yes" if (r.value >= 0).all() else "no",
                    ),
                ),
            ),
            Scene(
                "What it saves",
                "With blocks of 64 weights and 256 scales.",
                step(double_quant.overhead_bits, 64, 256),
                (
                    Question(
                        "return",
                        "float32 scales cost 32/64 = 0.5 bits a weight. And now?",
                        lambda r: r.value,
                        "4.5 bits a weight become 4.127.",
                    ),
                ),
            ),
        ),
    )


def _negative(recording) -> bool:
    """Whether the nearest codes alone would give a negative scale."""
    step = next(step for step in recording.steps if step.text.startswith("codes = np.maximum"))
    return bool((step.before["nearest"].codes < np.repeat(step.before["lowest"], 4)).any())


def dequantize_lesson() -> Lesson:
    weights = np.stack([BLOCK, 2 * BLOCK]).reshape(2, 8)
    blocks = np.zeros((2, 64), np.float32)
    blocks[:, :8] = weights
    q = double_quant.compress(nf4.quantize(blocks), 2)
    recording = step(nf4.dequantize, q, depth=0, into=("DoubleQuantizedScales.decode", "nf4._decode"))
    return Lesson(
        "dequantize",
        "Dequantization: scales first, then weights",
        "Two blocks of 64 weights; the second is twice the first, and all but eight of each are zero. "
        "Their two scales are double-quantized.",
        (
            Scene(
                "From bytes to weights",
                "The scales are decoded first, then each byte gives two weights.",
                recording,
                (
                    Question(
                        "def dequantize",
                        "Both blocks have the same codes. Why?",
                        "Codes are relative to the block's scale: twice the weights, twice the scale, the same codes.",
                    ),
                    Question(
                        "return blockwise.dequantize(self",
                        "The scales were 1.2 and 2.4, their mean is 1.8. What is kept of each in 8 bits?",
                        "−0.6 and +0.6, relative to the larger of the two.",
                        "So the two bytes stand for −0.993 and +1: the map has no −1.",
                        "decode",
                    ),
                    Question(
                        "rows *=",
                        "The first byte is 84. Which two values of the table are these?",
                        lambda r: nf4.CODE[[8, 4]],
                        "High nibble first: code 8, then code 4.",
                    ),
                ),
                ("nf4._decode.codes", "q.codes"),
            ),
        ),
    )
