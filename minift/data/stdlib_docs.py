"""The embedded training set: what Python's standard library says about itself.

Nothing is stored and nothing is fetched; the set is made in a second by the Python that runs:

    pairs     docstrings: "What does `math.isqrt` do?" "Return the integer part of the square root of the input."
    text      the language reference, as `pydoc_data.topics` keeps it for `help()`

It is the same in every process of one Python and a little different in another version. What is held out for
evaluation appears in no training text, neither in the pairs nor in the plain text: `embedded()` gives all four parts.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import pkgutil
import re
import sys
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from minift.data.docstrings import first_sentence
from minift.data.example import Example, pair
from minift.data.split import is_held_out, normalize, searchable, stands_in, train_and_held_out

HELD_OUT_SECTIONS = 0.12  # of the reference: a tenth of its characters, as sections differ in length

# Not imported: what opens a browser or a window, prints, changes the terminal, tests Python itself, or is about to go.
_SKIPPED = """
    antigravity this idlelib tkinter turtle turtledemo test lib2to3 readline rlcompleter pydoc_data encodings
    ensurepip posixpath ntpath genericpath nturl2path posix nt opcode pyexpat sre_compile sre_constants sre_parse
    aifc asynchat asyncore audioop cgi cgitb chunk crypt distutils imghdr imp mailcap msilib nis nntplib ossaudiodev
    pipes smtpd sndhdr spwd sunau telnetlib uu xdrlib
"""
SKIPPED = frozenset(_SKIPPED.split())

_ROUTINES: tuple[type, ...] = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.ClassMethodDescriptorType,
    classmethod,
    staticmethod,
    type(functools.cache(len)),
)
_ATTRIBUTES: tuple[type, ...] = (
    property,
    functools.cached_property,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
)
_VERBS = ("Return", "Create", "Convert", "Construct", "Make ", "Get ", "Set ")  # `filter` is a class that does
_ASCII = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "...", "\xa0": " "})
_HEADING = re.compile(r"\n(?=[^\n]+\n(?:\*{4,}|={4,}|-{4,}|~{4,}|\^{4,})\n)")


@dataclass(frozen=True)
class Embedded:
    """The embedded set in its four parts; pairs and documents are `Example`s alike."""

    train_pairs: list[Example]
    held_out_pairs: list[Example]
    train_text: list[Example]
    held_out_text: list[Example]


@functools.cache
def instruction_pairs() -> tuple[Example, ...]:
    """A question about each documented public name of the standard library, and the sentence that answers it.

    Sorted by name. A thing with several names is asked about once, under the shortest; an answer stands once."""
    pairs: list[Example] = []
    seen: set[str] = set()
    for name, thing in sorted(public_names().items()):
        answer = first_sentence(getattr(thing, "__doc__", None), name)
        if answer and normalize(answer) not in seen:
            seen.add(normalize(answer))
            pairs.append(pair(_question(name, thing, answer), answer))
    return tuple(pairs)


def _question(name: str, thing: Any, answer: str) -> str:
    if isinstance(thing, types.ModuleType):
        return f"What is the `{name}` module for?"
    does = answer.startswith(_VERBS) or not isinstance(thing, (type, *_ATTRIBUTES))
    return f"What does `{name}` do?" if does else f"What is `{name}`?"


def public_names() -> dict[str, Any]:
    """{name: module, class, function, method or property}, each thing under its shortest name only."""
    best: dict[int, tuple[tuple, str, Any]] = {}

    def offer(name: str, thing: Any, borrowed: bool) -> None:
        rank = (name.count("."), borrowed, name)  # `asyncio.Queue`, not `asyncio.queues.Queue`
        if id(thing) not in best or rank < best[id(thing)][0]:
            best[id(thing)] = rank, name, thing

    for prefix, module in _modules():
        offer(prefix, module, False)
        listed = getattr(module, "__all__", None)
        for attribute in vars(module) if listed is None else listed:
            thing = vars(module).get(attribute)
            home = getattr(thing, "__module__", None) or ""
            if attribute.startswith("_") or not isinstance(thing, (type, *_ROUTINES)):
                continue
            if listed is None and home.removeprefix("_") != prefix:
                continue  # imported from elsewhere
            name = attribute if prefix == "builtins" else f"{prefix}.{attribute}"
            offer(name, thing, home != prefix)
            for member, value in vars(thing).items() if isinstance(thing, type) else ():
                value = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
                if not member.startswith(("_", "do_", "help_")) and isinstance(value, (*_ROUTINES, *_ATTRIBUTES)):
                    offer(f"{name}.{member}", value, home != prefix)
    return {name: thing for _, name, thing in best.values()}


def _modules() -> Iterator[tuple[str, types.ModuleType]]:
    """The public modules of the standard library, submodules included; what this machine lacks is passed over."""
    names = [n for n in sorted(sys.stdlib_module_names) if not n.startswith("_")]
    for name in [*names, "os.path"]:
        yield from _with_submodules(name)


def _with_submodules(name: str) -> Iterator[tuple[str, types.ModuleType]]:
    if name in SKIPPED or (module := _import(name)) is None:
        return
    yield name, module
    for found in pkgutil.iter_modules(getattr(module, "__path__", [])):
        if not found.name.startswith("_") and found.name != "test":
            yield from _with_submodules(f"{name}.{found.name}")


def _import(name: str) -> types.ModuleType | None:
    hush = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with hush[0], hush[1], warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except (Exception, SystemExit):
            return None


@functools.cache
def plain_text() -> tuple[Example, ...]:
    """The language reference, a document a section, in the order and wording of `help()`; some sections stand twice.

    Only typographic quotes and dashes are written in ASCII, and blanks at the ends of lines dropped."""
    from pydoc_data.topics import topics

    sections = []
    for _, topic in sorted(topics.items()):
        text = "\n".join(line.rstrip() for line in topic.translate(_ASCII).strip().split("\n"))
        sections += [section.strip() for section in _HEADING.split(text)]
    return tuple(Example(text=section) for section in sections if section)


@functools.cache
def embedded() -> Embedded:
    """The embedded set, split by the hash of the normalized answer, or of the normalized section.

    No answer and no paragraph that is held out stands in any training text, whether pair or document. What would is
    dropped from the evaluation: a short answer that the reference also uses, a paragraph that it repeats."""
    text = plain_text()
    train_text = [e for e in text if not is_held_out(e.text, HELD_OUT_SECTIONS)]
    train_pairs, held_out_pairs = train_and_held_out(instruction_pairs(), [e.text for e in train_text])
    corpus = searchable(e.everything for e in [*train_pairs, *train_text])
    held_out_text: list[Example] = []
    seen: set[str] = set()
    for section in (e.text for e in text if is_held_out(e.text, HELD_OUT_SECTIONS)):
        fresh = {p: None for p in section.split("\n\n") if not (normalize(p) in seen or stands_in(p, corpus))}
        seen.update(map(normalize, fresh))
        if fresh:
            held_out_text.append(Example(text="\n\n".join(fresh)))
    return Embedded(train_pairs, held_out_pairs, train_text, held_out_text)
