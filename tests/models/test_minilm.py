"""MiniLM, the real encoder: the same tokens and the same sentence embeddings as transformers computes, and sense.

The pooling is what sentence-transformers does by the folder's own `1_Pooling/config.json`: the mean over the real
tokens, scaled to length 1. How close two float32 computations must be: `rounding.moved_by_rounding`.
"""

import json

import numpy as np
import pytest
import torch
import transformers

import minilm
from minift.data.batches import pad
from minift.io import Tokenizer, load_encoder
from minift.models import bert
from rounding import moved_by_rounding

pytestmark = minilm.NEEDED

SENTENCES = [
    "Stop.",
    "The cat sits outside.",
    "A man is playing the guitar, badly, in a café of Zürich.",
    "Interest rates rose again on Thursday, the third time this year, and economists expect (at least) one more step.",
    "naïve résumé: 東京 costs 1,234.56€ -- or does it?! It's unbelievably_long_identifier_with_underscores",
    "The quick brown fox jumps over the lazy dog, while the bank of the river floods the meadow. " * 2,
]


@pytest.fixture(scope="module")
def model():
    return load_encoder("minilm")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(minilm.folder())


def encoded(tokenizer, sentences, max_length=256):
    return pad([(np.array(ids, np.int32),) * 2 for s in sentences if (ids := tokenizer.encode_framed(s, max_length))])


def test_the_folder_asks_for_this_pooling():
    pooling = json.loads((minilm.folder() / "1_Pooling" / "config.json").read_text())
    assert [key for key, on in pooling.items() if on is True] == ["pooling_mode_mean_tokens"]
    assert [part["type"].split(".")[-1] for part in json.loads((minilm.folder() / "modules.json").read_text())] == [
        "Transformer",
        "Pooling",
        "Normalize",
    ]


@pytest.mark.parametrize("max_length", [256, 16])
def test_the_same_tokens(tokenizer, max_length):
    peer = transformers.AutoTokenizer.from_pretrained(minilm.folder())
    expected = peer(SENTENCES, truncation=True, max_length=max_length, padding=False).input_ids
    assert [tokenizer.encode_framed(sentence, max_length) for sentence in SENTENCES] == expected


def test_embeddings_equal_those_of_transformers(model, tokenizer):
    config, params = model
    batch = encoded(tokenizer, SENTENCES)
    assert len(set(batch.lengths.tolist())) >= 5  # several lengths, one batch, much padding
    found, _ = bert.embed(params, batch.tokens, config, batch.lengths, recompute=True)

    def embeddings(params):
        return bert.embed(params, batch.tokens, config, batch.lengths, recompute=True)[0]

    bound, exact = moved_by_rounding(embeddings, params, config.intermediate_size)
    peer = transformers.AutoModel.from_pretrained(minilm.folder(), attn_implementation="eager").eval()
    real = torch.tensor(np.arange(batch.tokens.shape[1]) < batch.lengths[:, None])
    with torch.no_grad():
        hidden = peer(torch.tensor(batch.tokens.astype(np.int64)), attention_mask=real.long()).last_hidden_state
        mask = real[..., None].float()
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)  # sentence-transformers' Pooling, word for word
        theirs = torch.nn.functional.normalize(mean, p=2, dim=1).numpy()
    print(f"\nbound {bound:.2e}; ours − exact {np.abs(found - exact).max():.2e}; theirs − exact "
          f"{np.abs(theirs - exact).max():.2e}; ours − theirs {np.abs(found - theirs).max():.2e}")  # fmt: skip
    assert np.abs(found - exact).max() <= bound
    assert np.abs(found - theirs).max() <= 2 * bound  # each of the two is off by at most one
    assert bound < 1e-3 * exact.std()  # and the bound says something


def test_what_means_the_same_is_near(model, tokenizer):
    config, params = model
    sentences = ["A kitten rests on a rug.", "The cat sits on the mat.", "The parliament passed a new tax law."]
    batch = encoded(tokenizer, sentences)
    e, _ = bert.embed(params, batch.tokens, config, batch.lengths)
    cosine = e @ e.T
    assert cosine[0, 1] > 0.5 > 0.2 > max(cosine[0, 2], cosine[1, 2])
