"""A small byte-level BPE tokenizer with ChatML's tokens, trained here, as `minift.data` and as transformers see it."""

from __future__ import annotations

import functools

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<|im_end|>", "<|im_start|>", "<s>", "</s>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]


class SmallTokenizer:
    """`minift.data.templates.Tokenizer` over a `tokenizers.Tokenizer`."""

    def __init__(self, backend, chat_template=None, bos_token="<s>", eos_token="<|im_end|>"):
        self.backend, self.chat_template, self.bos_token, self.eos_token = backend, chat_template, bos_token, eos_token
        self.eos_token_id = None if eos_token is None else backend.token_to_id(eos_token)

    def encode(self, text):
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_with_offsets(self, text):
        encoding = self.backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids):
        return self.backend.decode(list(ids), skip_special_tokens=False)


@functools.cache
def backend(special: tuple[str, ...] = tuple(SPECIAL), by_words: bool = True) -> tokenizers.Tokenizer:
    """Without `by_words` pairs merge over anything, line breaks and role names included."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=by_words)
    trained.decoder = decoders.ByteLevel()
    corpus = [
        "user\nassistant\n4 yes two words\nline\n",
        "Assistant: yes\nUser: a\n\nb",
        "ab ab assistant\nab\n\n",
    ] * 9 + ["\nab?" * 99]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(corpus, trainer)
    return trained


def in_transformers(chat_template: str, bos_token="<s>", eos_token="<|im_end|>") -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend(), bos_token=bos_token, eos_token=eos_token)
    tokenizer.chat_template = chat_template
    return tokenizer
