"""What a small model is made of before its first step: its sizes, its tokenizer, and text as rows of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers

from minift.data.batches import Encoded, chunks
from minift.data.example import Example
from minift.data.templates import CHATML
from minift.io import Tokenizer
from minift.models import llama

END_OF_TEXT, TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

PRESETS = {
    "tiny": llama.Config(
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    ),
    "nano": llama.Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    ),
}


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE learned from these texts, with the tokens that a chat template needs."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT, TURN, END_OF_TURN],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return Tokenizer(bpe, eos_token=END_OF_TURN, pad_token=END_OF_TEXT, chat_template=CHATML)


def entry(example: Example) -> str:
    """An entry of a dictionary: what the question asks about, and the answer."""
    question, sentence = (message.content for message in example.messages)
    return f"{question.split('`')[1]}: {sentence}"


def marked(text: str) -> str:
    """A text between the marks of a turn, so that the tokens of the chat template are known before the first chat."""
    return f"{TURN}{text}{END_OF_TURN}"


def rows(texts: Sequence[str], tokenizer: Tokenizer, seq_len: int, rng: np.random.Generator) -> list[Encoded]:
    """All texts, marked and shuffled, one behind the other, cut into rows."""
    shuffled = (f"{marked(texts[i])}\n" for i in rng.permutation(len(texts)))
    return chunks([token for text in shuffled for token in tokenizer.encode(text)], seq_len)
