"""LoRA, merging, QLoRA and prefix tuning, on a matrix of twelve numbers."""

from __future__ import annotations

import numpy as np

from minift.nn.attention import attention_1, causal_mask
from minift.nn.linear import linear
from minift.nn.weight import Frozen
from minift.peft import lora, merge, prefix_tuning
from minift.peft.lora import LoRA
from minift.quant import nf4
from minift.step.lessons.lesson import Lesson, Question, Scene
from minift.step.recorder import step

W = np.array([[1.0, 0, 2], [0, 1, 0], [1, 1, 0], [2, 0, 1]])  # (out, in) = (4, 3)
A = np.array([[1.0, 0, -1]])  # (r, in), r = 1
X = np.array([[1.0, 2, 0]])  # one row of activations
DY = np.array([[1.0, 0, -1, 2]])  # what the layers above say of y
ALPHA, LEARNING_RATE = 2, 0.5
NAME = "model.layers.0.self_attn.q_proj.weight"


def lora_lesson() -> Lesson:
    scaling = lora.scaling(ALPHA, len(A))
    B = np.zeros((4, 1))
    first = step(lora.forward, X, W, A, B, scaling, cotangent=DY)
    B = B - LEARNING_RATE * first.gradients[3]
    second = step(lora.forward, X, W, A, B, scaling, cotangent=DY)
    merged = step(LoRA(Frozen(W), A, B, ALPHA).dense, into=("LoRA.delta",))
    return Lesson(
        "lora",
        "LoRA: W' = W + s B A",
        "A weight of 4 × 3 numbers stays as it is; what is learned is a difference of rank 1, s B A, s = α / r = 2. "
        "B starts at zero. One row of activations goes forward, one cotangent back, and B takes one step.",
        (
            Scene(
                "At the start, B = 0",
                "x = [1, 2, 0], A = [1, 0, −1]. The cotangent dy = [1, 0, −1, 2] is what the layers above say of y.",
                first,
                (
                    Question(
                        "def forward",
                        "W has 12 numbers. How many are trainable here?",
                        lambda r: lora.trainable_parameters(W.shape[0], W.shape[1], len(r.args[2])),
                        "r (in + out) = 1 · (3 + 4). It saves nothing once r ≥ in · out / (in + out).",
                    ),
                    Question(
                        "h = x_tilde",
                        "x = [1, 2, 0] and A = [1, 0, −1]: what is x Aᵀ?",
                        lambda r: r.args[0] @ r.args[2].T,
                        "1·1 + 2·0 + 0·(−1). Three numbers have become r = 1.",
                    ),
                    Question(
                        "y += h",
                        "By how much will the detour change y?",
                        lambda r: float(np.abs(r.value[0] - X @ W.T).max()),
                        "B is zero, so the first step sees exactly the base model, to the bit.",
                    ),
                    Question(
                        "dA =",
                        "Can A move in this step? What is dA?",
                        lambda r: r.gradients[2],
                        "dA is a product with B, and B is zero.",
                    ),
                    Question(
                        "dB =",
                        "dy = [1, 0, −1, 2] and h = 2: what is dB?",
                        lambda r: r.gradients[3],
                        "B can move, because A is not zero. With both at zero nothing would ever move; "
                        "     with neither at zero the model would have changed before the first step.",
                    ),
                ),
            ),
            Scene(
                "After one step of gradient descent",
                "B ← B − ½ dB = [−1, 0, 1, −2]. A has not moved. The same x and the same dy again.",
                second,
                (
                    Question(
                        "y += h",
                        "x Wᵀ = [1, 2, 3, 2], h = 2, B = [−1, 0, 1, −2]: what is y now?",
                        lambda r: r.value[0],
                    ),
                    Question(
                        "dA =",
                        "And now: does A get a gradient?",
                        lambda r: "yes, " + str(r.gradients[2].ravel().tolist()),
                        "B is no longer zero.",
                    ),
                ),
            ),
            Scene(
                "The two matrices as one",
                "ΔW = s B A is never formed in training. Here it is, added to W.",
                merged,
                (
                    Question(
                        "return self.scaling",
                        "ΔW has four rows of three. What is its rank?",
                        lambda r: int(np.linalg.matrix_rank(r.value - W)),
                        "Every row is a multiple of A: one singular value is not zero.",
                    ),
                ),
            ),
            Scene(
                "The same y, in one product",
                "x W'ᵀ with the merged matrix.",
                step(linear, X, merged.value),
                (
                    Question(
                        "y = x @ weight.T",
                        "What will it be?",
                        lambda r: r.value[0],
                        "As with A and B apart. A merged model runs at the base model's speed.",
                    ),
                ),
            ),
        ),
    )


def merge_lesson() -> Lesson:
    B = np.array([[-1.0], [0], [1], [-2]])
    trained = {NAME: LoRA(Frozen(W), A, B, ALPHA)}
    merged = step(lora.merge, trained, into=("LoRA.dense", "LoRA.delta"))
    _, adapter = lora.detach(trained)
    small = {NAME: LoRA(nf4.quantize(W), A.astype(np.float32), 0.05 * B.astype(np.float32), ALPHA)}
    requantized = step(merge.merge_requantized, small)
    return Lesson(
        "merge",
        "Merging: the adapter becomes part of the weight",
        "W' = W + s B A is formed once. It is exact over plain weights; over 4-bit weights it depends on what one "
        "writes the result into.",
        (
            Scene(
                "Merge",
                "A model of one layer, which carries an adapter of rank 1 with s = 2.",
                merged,
                (
                    Question(
                        "return self.scaling",
                        "B = [−1, 0, 1, −2], A = [1, 0, −1]: what is the first row of ΔW = s B A?",
                        lambda r: (r.value[NAME].array - W)[0],
                    ),
                ),
            ),
            Scene(
                "And back",
                "W = W' − s B A, up to rounding; with these numbers exactly.",
                step(lora.unmerge, merged.value, adapter, into=("LoRA.delta",)),
            ),
            Scene(
                "Over 4-bit weights, quantized again",
                "Now the base is NF4, and the adapter adds little: s B A is 0.1 or 0.2 in size. "
                "What moves a weight by less than half a gap between two values of its block moves it not at all.",
                requantized,
            ),
            Scene(
                "What was lost",
                "In units of what the adapter does.",
                step(merge.merge_error, requantized.value, small),
                (
                    Question(
                        "return math.sqrt",
                        "Is more than half of what was learned lost, or less?",
                        lambda r: "more" if r.value > 0.5 else "less",
                        "At 1 the merged weights are as far from the trained ones as the base without any adapter.",
                    ),
                ),
            ),
        ),
    )


def qlora_lesson() -> Lesson:
    B = np.array([[-1.0], [0], [1], [-2]], np.float32)
    x, a, dy = (array.astype(np.float32) for array in (X, A, DY))
    q = nf4.quantize(W)
    recording = step(lora.forward, x, q, a, B, lora.scaling(ALPHA, len(A)), cotangent=dy, into=("NF4Tensor.linear",))
    return Lesson(
        "qlora",
        "QLoRA: a LoRA whose base is stored in 4 bits",
        "The same adapter on the same weight, which is now an NF4Tensor: it multiplies by dequantizing itself.",
        (
            Scene(
                "Forward and backward through quantized weights",
                "There is no other code: it is `lora.forward`, as in the lesson `lora`.",
                recording,
                (
                    Question(
                        "def forward",
                        "W in float32 takes 48 bytes. How many do 12 codes and one float32 scale take?",
                        lambda r: r.args[1].nbytes,
                        "Two codes a byte, and 4 bytes for the scale of the block.",
                    ),
                    Question(
                        "y = x @ self.dense",
                        "x Wᵀ was [1, 2, 3, 2]. Will it be the same with Ŵ?",
                        lambda r: "no" if not np.array_equal(r.args[1].dense(), W) else "yes",
                        "1/2 is not one of the sixteen values: 1 = ½ · 2 becomes "
                        + f"{float(q.dense()[0, 0]):.4g}. The adapter also learns to mend that.",
                    ),
                    Question(
                        "return dy @ self.dense",
                        "Which of W, A and B get a gradient?",
                        lambda r: " and ".join(n for n, g in zip("WAB", r.gradients[1:], strict=True) if g is not None),
                        "The gradient flows through the quantized weights; they themselves never change.",
                    ),
                ),
            ),
        ),
    )


def prefix_lesson() -> Lesson:
    table = np.array([[1.0, 0, 4, 0]])  # one virtual token; its key, then its value
    text_k, text_v = np.array([[0.0, 1], [1, 1]]), np.array([[0.0, 2], [2, 2]])
    q = np.array([[2.0, 0], [0, 2]])[None, None]
    learned = step(prefix_tuning.split, table, 1, 2)
    K, V = learned.value[0]
    k, v = (np.concatenate([part, text[None]], axis=1)[None] for part, text in ((K, text_k), (V, text_v)))
    mask = step(causal_mask, np.array([[1, 2]]), 3)
    attended = step(attention_1, q, k, v, mask.value, cotangent=np.array([[1.0, 0], [0, 1]])[None, None])
    return Lesson(
        "prefix",
        "Prefix tuning: learned keys and values before the text",
        "Each layer finds one more slot in its cache, as if a token had been read. Nobody computes its hidden state.",
        (
            Scene(
                "What is learned",
                "One row of the table is a virtual token: its key, then its value, for each layer.",
                learned,
                (
                    Question(
                        "def split",
                        "One layer, one key/value head of 2 numbers, one virtual token: how many numbers learn?",
                        lambda r: prefix_tuning.trainable_parameters(1, 1, 2),
                        "2 · L · p · d.",
                    ),
                ),
            ),
            Scene(
                "Who sees whom",
                "Two tokens of text behind one slot of prefix: their positions are 1 and 2.",
                mask,
                (
                    Question(
                        "return visible",
                        "Does the first token of the text see the prefix?",
                        lambda r: "yes" if r.value[0, 0, 0] else "no",
                        "Every token does. The prefix itself asks nothing: it has no query and predicts nothing.",
                    ),
                ),
            ),
            Scene(
                "Attention over prefix and text",
                "The first of the three keys and values is the prefix.",
                attended,
                (
                    Question(
                        "p = probabilities",
                        "The first token scores the prefix, itself, and what comes after. The last one's probability?",
                        lambda r: float(r.value_of("p", "attention_1")[0, 2]),
                        "Its score is −inf: it cannot be seen.",
                    ),
                    Question(
                        "dv[b, g] +=",
                        "Which rows of dk and dv train the prefix?",
                        "The first. The other rows go on into the projections of the text.",
                    ),
                ),
            ),
        ),
    )
