"""MiniLM in torch: the reference's sentence embeddings, within what rounding its weights does to them, and LoRA's
gradients over NF4."""

import numpy as np
import pytest
import torch
from twin_models import agree, cast, tensor

import minilm
from minift.data.batches import pad
from minift.io import Tokenizer, load_encoder
from minift.models import bert as reference
from minift.nn.weight import replace, trainable
from minift.peft import lora, qlora
from minift_kernels.models import bert
from minift_kernels.nn import weight
from minift_kernels.params import from_numpy
from rounding import moved_by_rounding

pytestmark = minilm.NEEDED

SENTENCES = ["Stop.", "A man is playing the guitar, badly, in a café of Zürich.", "A kitten rests on a rug."]


@pytest.fixture(scope="module")
def model():
    return load_encoder("minilm")


@pytest.fixture(scope="module")
def texts():
    """Tokens and lengths of a padded batch."""
    tokenizer = Tokenizer.load(minilm.folder())
    batch = pad([(np.array(tokenizer.encode_framed(s, 64), np.int32),) * 2 for s in SENTENCES])
    assert len(set(batch.lengths.tolist())) == 3
    return batch.tokens.astype(np.int64), batch.lengths.astype(np.int64)


def test_embeddings_are_within_the_bound(model, texts):
    config, params = model
    bound, exact = moved_by_rounding(
        lambda p: reference.embed(p, texts[0], config, texts[1], recompute=True)[0], params, config.intermediate_size
    )
    with torch.no_grad():
        found = bert.embed(from_numpy(params), tensor(texts[0]), config, tensor(texts[1])).numpy()
    print(f"\nbound {bound:.2e}, found {np.abs(found - exact).max():.2e}")
    assert np.abs(found - exact).max() <= bound < 1e-3 * exact.std()


def test_gradients_of_a_lora_over_nf4_are_the_references(model, texts, rng):
    """In float64, with the yardstick of `twin_models`: two blocks learn, of which one is the last."""
    config, params = model
    carried = lora.attach(qlora.quantize(params), r".*layer\.[15]\.(attention|output).*", 4, 8, rng=rng)
    learned = {n: a + 0.02 * rng.standard_normal(a.shape).astype(a.dtype) for n, a in trainable(carried).items()}
    exact, low = (cast(replace(carried, learned), dtype) for dtype in (np.float64, np.float32))
    (y, vjp), (_, low_vjp) = (reference.embed(p, texts[0], config, texts[1]) for p in (exact, low))
    dy = rng.standard_normal(y.shape).astype(np.float32)
    gradients, of_float32 = vjp(dy.astype(float)), low_vjp(dy)
    there = from_numpy(exact, dtype=torch.float64)
    found = bert.embed(there, tensor(texts[0]), config, tensor(texts[1]))
    asked = weight.trainable(there)
    assert asked.keys() == gradients.keys() and len(asked) == 2 * 2 * 5
    for name, dw in zip(asked, torch.autograd.grad(found, list(asked.values()), tensor(dy).double()), strict=True):
        agree(dw, gradients[name], of_float32[name], name)
