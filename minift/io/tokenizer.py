"""Text ↔ token ids, by the `tokenizers` library, with what a chat needs beside it.

A tokenizer on disk is `tokenizer.json` (the algorithm and its vocabulary), `tokenizer_config.json` (which token is
which) and `chat_template.jinja` (how a conversation becomes text; transformers 4 kept it inside
tokenizer_config.json). No special token is ever added silently: what a template writes is what the model reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import index
from pathlib import Path
from typing import Any, SupportsIndex

import tokenizers
from tokenizers.decoders import DecodeStream

from minift.io import checksum
from minift.io.atomic import atomic_write
from minift.io.errors import FormatError, shown
from minift.io.json_file import json_bytes, read_json

SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token", "mask_token")


class Tokenizer:
    """A tokenizer with its special tokens and chat template.

    `stop_token_ids` are the ids that end a turn: eos first, then what the model's generation settings add.
    Raises ValueError if a special token is not in the vocabulary.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        pad_token: str | None = None,
        unk_token: str | None = None,
        cls_token: str | None = None,
        sep_token: str | None = None,
        mask_token: str | None = None,
        chat_template: str | None = None,
        stop_token_ids: Iterable[int] = (),
    ):
        backend.no_truncation()  # a file may ask for both, and would silently cut or lengthen the text
        backend.no_padding()
        self._post_processor = (
            backend.post_processor
        )  # adds special tokens and trims spaces off offsets: we want neither
        backend.post_processor = None
        self.backend = backend
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1  # the largest id + 1
        self.bos_token, self.eos_token, self.pad_token, self.unk_token = bos_token, eos_token, pad_token, unk_token
        self.cls_token, self.sep_token, self.mask_token = cls_token, sep_token, mask_token  # of encoders
        self.chat_template = chat_template
        for role in SPECIAL:
            token = getattr(self, role)
            if token is not None and backend.token_to_id(token) is None:
                raise ValueError(f"{role} {token!r} is not in the vocabulary")
        eos = [] if self.eos_token_id is None else [self.eos_token_id]
        self.stop_token_ids: tuple[int, ...] = tuple(dict.fromkeys([*eos, *stop_token_ids]))

    @property
    def bos_token_id(self) -> int | None:
        return self._id(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        return self._id(self.eos_token)

    @property
    def pad_token_id(self) -> int | None:
        return self._id(self.pad_token)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. Nothing is added; a special token's own string in the text becomes its id.

        Byte-level BPE gives every text back, if all 256 bytes are in its vocabulary. The built-in one has them; SmolLM2
        lacks six control characters and U+40000 to U+BFFFF, which disappear, as with the library everywhere.
        ValueError for half a surrogate pair, which no encoding can write."""
        return self._encode(text).ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids, and for each the characters text[start:end] that it stands for, spaces included.

        Tokens that are parts of one character all have that character's span."""
        encoding = self._encode(text)
        return encoding.ids, encoding.offsets

    def encode_framed(self, text: str, max_length: int | None = None) -> list[int]:
        """Token ids of a text between the special tokens that tokenizer.json puts around one, [CLS] and [SEP] of BERT;
        of a text that is too long the end is cut, not these. `encode` where the file names none.

        ValueError as `encode`, and for a `max_length` that leaves no room for a token of the text."""
        encoding, frame = self._encode(text), self._post_processor
        around = 0 if frame is None else frame.num_special_tokens_to_add(False)
        if max_length is not None:
            if max_length <= around:
                raise ValueError(f"max_length is {max_length}, needed more than the {around} tokens around a text")
            encoding.truncate(max_length - around)
        return (encoding if frame is None else frame.process(encoding)).ids

    def decode(self, ids: Iterable[SupportsIndex], skip_special_tokens: bool = False) -> str:
        """The text of these ids; bytes that are not UTF-8 become U+FFFD."""
        return self.backend.decode([index(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def decode_stream(self, ids: Iterable[SupportsIndex], skip_special_tokens: bool = False) -> Iterator[str]:
        """Pieces of text as the ids arrive, never half a character; together they are `decode` of all ids."""
        stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        seen: list[int] = []
        sent = 0
        for i in ids:
            seen.append(index(i))
            if piece := stream.step(self.backend, seen[-1]):
                sent += len(piece)
                yield piece
        if rest := self.decode(seen, skip_special_tokens)[sent:]:  # the text ended within a character
            yield rest

    def save(self, folder: Path | str) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja, as transformers 5 does."""
        folder = Path(folder)
        whole = tokenizers.Tokenizer.from_str(self.backend.to_str())
        if self._post_processor is not None:
            whole.post_processor = self._post_processor
        config: dict[str, Any] = {"backend": "tokenizers", "tokenizer_class": "PreTrainedTokenizerFast"}
        config |= {role: getattr(self, role) for role in SPECIAL if getattr(self, role) is not None}
        atomic_write(folder / "tokenizer.json", whole.to_str(pretty=True).encode("utf-8"))
        atomic_write(folder / "tokenizer_config.json", json_bytes(config | {"clean_up_tokenization_spaces": False}))
        if self.chat_template is not None:
            atomic_write(folder / "chat_template.jinja", self.chat_template.encode("utf-8"))

    @classmethod
    def load(cls, folder: Path | str) -> Tokenizer:
        """Read a tokenizer saved by transformers 4 or 5, or by `save`. Raises FormatError."""
        folder = Path(folder)
        path = folder / "tokenizer.json"
        config_path = folder / "tokenizer_config.json"
        config = read_json(config_path) if config_path.exists() else {}
        older_path = folder / "special_tokens_map.json"
        older = read_json(older_path) if older_path.exists() else {}
        try:
            backend = _parse(path, checksum.read_bytes(path).decode("utf-8"))
        except OSError as error:
            raise FormatError(path, "", error.strerror, "a tokenizer in the `tokenizers` library's format") from error
        except UnicodeDecodeError as error:
            raise FormatError(path, "", error, "a tokenizer in the `tokenizers` library's format") from error
        if _parse(path, written := backend.to_str()).to_str() != written:  # ids given twice, or unlike those asked for
            raise FormatError(path, "", "ids that change when it is saved", "one id for each token, without gaps")
        special = {role: _content(config_path, role, config.get(role, older.get(role))) for role in SPECIAL}
        stops, template = _stop_token_ids(folder), _chat_template(folder, config)
        try:
            tokenizer = cls(backend, **special, chat_template=template, stop_token_ids=stops)
        except ValueError as error:
            raise FormatError(config_path, "", error, "special tokens from the vocabulary") from error
        _check_vocab_size(folder, tokenizer)
        return tokenizer

    def __repr__(self) -> str:
        return f"Tokenizer({self.vocab_size:,} tokens, eos {self.eos_token!r}, stops at {list(self.stop_token_ids)})"

    def _encode(self, text: str) -> tokenizers.Encoding:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:  # bytes of another encoding, typed or piped in, arrive as half surrogates
            found = f"U+{ord(text[error.start]):04X} at character {error.start}"
            raise ValueError(f"the text is not valid Unicode ({found}), needed UTF-8") from None
        return self.backend.encode(text, add_special_tokens=False)

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self.backend.token_to_id(token)


def _parse(path: Path, text: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a plain Exception, or Rust's PanicException, which is not even that
        raise FormatError(path, "", error, "a tokenizer in the `tokenizers` library's format") from error


def _content(path: Path, role: str, token: Any) -> str | None:
    """A special token: its string, or transformers 4's object with flags around it."""
    token = token.get("content") if isinstance(token, dict) else token
    if token is not None and not isinstance(token, str):
        raise FormatError(path, role, shown(token), "a string")
    return token


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return checksum.read_bytes(path).decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise FormatError(path, "", error, "a template in UTF-8") from error
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = [item for item in template if isinstance(item, dict) and item.get("name") == "default"]
        template = named[-1].get("template") if named else None
    if template is not None and not isinstance(template, str):
        raise FormatError(folder / "tokenizer_config.json", "chat_template", type(template).__name__, "a string")
    if template is not None and any("\ud800" <= c <= "\udfff" for c in template):
        raise FormatError(folder / "tokenizer_config.json", "chat_template", "half a surrogate pair", "Unicode text")
    return template


def _stop_token_ids(folder: Path) -> list[int]:
    """eos_token_id, a number or a list, from generation_config.json and config.json."""
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        if (folder / name).exists():
            ids = read_json(folder / name).get("eos_token_id")
            ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
            if not all(type(i) is int and 0 <= i < 2**32 for i in ids):
                raise FormatError(folder / name, "eos_token_id", shown(ids), "a token id or a list of them")
            found += ids
    return found


def _check_vocab_size(folder: Path, tokenizer: Tokenizer) -> None:
    if (folder / "config.json").exists():
        rows = read_json(folder / "config.json").get("vocab_size")
        if isinstance(rows, int) and tokenizer.vocab_size > rows:
            found = f"token id {tokenizer.vocab_size - 1}"
            raise FormatError(folder / "tokenizer.json", "vocab", found, f"less than the model's vocab_size = {rows}")
