"""Commands as a user calls them, and a model whose weights are not in 4 bits, as the built-in one's are."""

import dataclasses
import json

import numpy as np
import pytest

from minift.cli import main
from minift.io import load_model, load_tokenizer, save_model
from minift.models import llama


@pytest.fixture
def call(capsys):
    def call(*arguments):
        status = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        lines = captured.out.splitlines()
        result = json.loads(lines[-1]) if "--json" in arguments and status == 0 else None
        return status, result, captured

    return call


@pytest.fixture
def plain(tmp_path):
    """plain(tied) -> folder, config, params: the built-in model's sizes and tokenizer, and normal weights."""

    def plain(tied=True):
        config = dataclasses.replace(load_model("tiny")[0], tie_word_embeddings=tied)
        rng = np.random.default_rng(0)
        shapes = llama.shapes(config).items()
        params = {n: (rng.standard_normal(s) * 0.05 + (len(s) == 1)).astype(np.float32) for n, s in shapes}
        save_model(tmp_path / "plain", config, params, load_tokenizer("tiny"))
        return tmp_path / "plain", config, params

    return plain
