"""No network, one thread, a small tokenizer, and what the fuzzed readers did."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter):
    """With MINIFT_FUZZ: the counts of this process, so without xdist."""
    from fuzzing import COUNTS, report

    if "MINIFT_FUZZ" in os.environ and COUNTS:
        failed = len(terminalreporter.getreports("failed"))
        terminalreporter.section("fuzzed readers")
        terminalreporter.write_line(report())
        terminalreporter.write_line(f"anything else: {failed or 'never'}")


@pytest.fixture(scope="session")
def bpe():
    """A byte-level BPE tokenizer of 300 tokens, trained here, with ChatML's special tokens first."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(["the quick brown fox, it's the theory of the thing"] * 4, trainer)
    return backend.to_str()


@pytest.fixture
def tokenizer(bpe):
    from minift.io import Tokenizer

    return Tokenizer(
        tokenizers.Tokenizer.from_str(bpe),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template="{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>\n{% endfor %}",
    )
