"""From conversations to tokens, and which of them are learned.

A model's chat template is a Jinja program that writes a conversation down the way the model was trained to read it.
The loss counts the assistant's answers and the token that ends each of them, so that the model learns to stop:

    <|im_start|>user\\n2 + 2?<|im_end|>\\n<|im_start|>assistant\\n4<|im_end|>\\n
                                                            ^^^^^^^^^^^        learned

Where an answer starts is where generation would start: the length of the conversation before it, rendered with its
generation prompt. Where it ends is the length of the conversation up to and including it. Both must be prefixes of
the whole rendering, which is checked. The whole is tokenized *once* (byte pairs may merge across a border, so that
pieces tokenized apart are not what the model will read), and a token is learned if it lies entirely in an answer.

Text that looks like a special token *is* one: a user who writes "<|im_end|>" ends the turn, here as in transformers.
Clean what comes from strangers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import jinja2
import jinja2.ext
import numpy as np
from jaxtyping import Int
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minift.data.batches import IGNORE_INDEX, Encoded, chunks
from minift.data.example import Example, Message

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


PLAIN = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize + ': ' + message['content'] }}"
    "{{ (eos_token if message['role'] == 'assistant' else '') + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


@runtime_checkable
class Tokenizer(Protocol):
    """What is asked of a tokenizer. Encoding adds no special token; the text of one in the input becomes its id."""

    @property
    def eos_token_id(self) -> int | None: ...

    @property
    def eos_token(self) -> str | None: ...

    @property
    def bos_token(self) -> str | None: ...

    @property
    def chat_template(self) -> str | None: ...

    def encode(self, text: str) -> list[int]: ...

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids and, for each, the characters [start, end) of the text that it stands for."""


class TemplateError(ValueError):
    """A chat template that cannot write this conversation, or not so that the answers can be found in it."""


def render(
    messages: Sequence[Message],
    template: str = CHATML,
    *,
    add_generation_prompt: bool = False,
    bos_token: str | None = None,
    eos_token: str | None = None,
) -> str:
    """The conversation as the model reads it, the same as transformers' `apply_chat_template(tokenize=False)`.

    Templates come with downloaded models, so they run in Jinja's sandbox. Raises TemplateError with the template's
    own complaint ("roles must alternate …") or the place of its mistake."""
    special = {name: text for name, text in (("bos_token", bos_token), ("eos_token", eos_token)) if text is not None}
    program = _compile(template)
    try:
        return program.render(
            messages=[{"role": m.role, "content": m.content} for m in messages],
            add_generation_prompt=add_generation_prompt,
            tools=None,
            documents=None,
            **special,
        )
    except Exception as error:  # the template is somebody else's program and may fail in any way
        roles = ", ".join(m.role for m in messages) or "no messages"
        raise TemplateError(f"the chat template refused a conversation of {roles}: {error}") from error


def answer_spans(
    messages: Sequence[Message], template: str = CHATML, **special: Any
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation and the characters [start, end) of each answer with the mark that ends it.

    White space that the template puts after that mark is not part of the answer: generation stops at the mark.
    Raises TemplateError where a shorter conversation is not rendered as the beginning of the longer one."""
    whole = render(messages, template, **special)
    spans = []
    for i, message in enumerate(messages):
        if message.role != "assistant":
            continue
        before = render(messages[:i], template, add_generation_prompt=True, **special)
        through = render(messages[: i + 1], template, **special)
        if not (through.startswith(before) and whole.startswith(through)):
            raise TemplateError(
                f"message {i}: this chat template writes a conversation differently once it goes on (or begins answers "
                "otherwise than its generation prompt does), so the answer cannot be located; train on conversations "
                "of one answer, or use a template that only appends"
            )
        turn, content = through[len(before) :], message.content.strip()
        mark = turn.rpartition(content)[2] if content else turn  # all that follows the answer's text
        end = len(through.rstrip()) if mark.strip() else len(through)
        spans.append((len(before), end))
    return whole, spans


def encode_example(
    example: Example, tokenizer: Tokenizer, template: str | None = None, max_length: int | None = None
) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, " T"]]:
    """Tokens and labels of an example: label = token where it is learned, −100 elsewhere.

    Of a conversation the answers are learned, of a plain text everything and the end-of-text token that is appended.
    A token across the border of an answer counts as prompt. `template` is by default the tokenizer's own, or else
    `default_template`. What is longer than `max_length` loses its end.
    Raises TemplateError, and ValueError for a max_length under 2 or a plain text without a token that ends it."""
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length is {max_length}, needed at least 2: one token to read and one to predict")
    if example.text:
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no eos_token, needed to end a plain text")
        tokens = np.array([*tokenizer.encode(example.text), tokenizer.eos_token_id], np.int32)
        return tokens[:max_length], tokens[:max_length].copy()
    text, spans = answer_spans(example.messages, _template(tokenizer, template), **_special(tokenizer))
    ids, offsets = tokenizer.encode_with_offsets(text)
    tokens = np.array(ids, np.int32)
    labels = np.where(_inside(offsets, spans), tokens, np.int32(IGNORE_INDEX))
    return tokens[:max_length], labels[:max_length]


def encode_prompt(
    messages: Sequence[Message], tokenizer: Tokenizer, template: str | None = None
) -> Int[np.ndarray, " T"]:
    """The tokens after which the model writes its answer to this conversation."""
    text = render(messages, _template(tokenizer, template), add_generation_prompt=True, **_special(tokenizer))
    return np.array(tokenizer.encode(text), np.int32)


@dataclass(frozen=True)
class EncodedSet:
    """Examples as tokens and labels, and what became of those that did not fit."""

    examples: list[Encoded]
    truncated: int  # lost their end
    dropped: int  # have nothing to learn, most often because the answer was cut off entirely


def encode_all(
    examples: Iterable[Example], tokenizer: Tokenizer, template: str | None = None, max_length: int | None = None
) -> EncodedSet:
    """`encode_example` for each; those with nothing to learn are left out and counted.

    A plain text that is longer than `max_length` loses nothing: it becomes several examples."""
    kept: list[Encoded] = []
    truncated = dropped = 0
    for index, example in enumerate(examples):
        try:
            tokens, labels = encode_example(example, tokenizer, template)  # whole, to see what is cut
        except TemplateError as error:
            raise TemplateError(f"example {index}: {error}") from error
        if example.text and max_length is not None and len(tokens) > max_length:
            kept += chunks(tokens, max_length)
            continue
        if (labels[1:max_length] == IGNORE_INDEX).all():
            dropped += 1
            continue
        truncated += max_length is not None and len(tokens) > max_length
        kept.append((tokens[:max_length], labels[:max_length]))
    return EncodedSet(kept, truncated, dropped)


def end_of_turn(tokenizer: Tokenizer, template: str | None = None) -> list[int]:
    """The tokens that end an answer in this template, where generation stops: one, in a model made for chat.

    Empty for a template that ends its answers with nothing at all."""
    messages = (Message("user", "?"), Message("assistant", "!"))
    text, [(start, end)] = answer_spans(messages, _template(tokenizer, template), **_special(tokenizer))
    return tokenizer.encode(text[start:end].partition("!")[2])


def default_template(tokenizer: Tokenizer) -> str:
    """For a tokenizer that brings none: ChatML where "<|im_end|>" is a token, or else "User: …", "Assistant: …" with
    the answer ended by the eos token. In ChatML spelled out in pieces the model would not learn to stop."""
    return CHATML if len(tokenizer.encode("<|im_end|>")) == 1 or tokenizer.eos_token is None else PLAIN


def _inside(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> np.ndarray:
    """Which tokens lie entirely in one of the spans.

    Some tokenizers report a token without its leading blank; it reaches back to the end of the one before it."""
    starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T
    starts = np.minimum(starts, np.concatenate([[0], ends[:-1]]))
    inside = np.zeros(len(starts), bool)
    for start, end in spans:
        inside |= (starts >= start) & (ends <= end)
    return inside


def _template(tokenizer: Tokenizer, template: str | None) -> str:
    return template or tokenizer.chat_template or default_template(tokenizer)


def _special(tokenizer: Tokenizer) -> dict[str, str | None]:
    return {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}


@lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    """As transformers compiles chat templates, with the functions and filters that they may use."""
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    try:
        return env.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"the chat template is not valid Jinja, line {error.lineno}: {error.message}") from error


class _Generation(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}`, which marks answers for other trainers, renders what is in it."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's interface)

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Jinja's own filter would escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
