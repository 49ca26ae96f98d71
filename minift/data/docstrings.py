"""The first sentence of a docstring, as a well-formed answer, or nothing.

A small model copies the habits of what it reads. So what is not one plain English sentence (an example, a list, a
signature, a formula, half a sentence, a reference to another docstring) is left out rather than repaired.
"""

from __future__ import annotations

import inspect
import re

SHORTEST, LONGEST = 15, 200  # characters

_ROLE = re.compile(r":(?:[a-z]+:)+`~?\.?([^`<]*?)(?: ?<[^`]*>)?`")  # Sphinx: :class:`int`
_EMPHASIS = re.compile(r"(?<![\w*])\*{1,2}(\w+)\*{1,2}(?![\w*])")  # *name*
_ABBREVIATIONS = (r"e\.g", r"i\.e", "eg", "ie", "etc", "vs", "cf", "resp", "approx", "max", r"a\.k\.a")
SENTENCE_END = re.compile("(?<=[.!?])" + "".join(rf"(?<!\b{a}\.)" for a in _ABBREVIATIONS) + r"\s+")
_LIST = re.compile(r"\n\s*(?:[-*+•]|\d+[.)])\s|\n\s*\w+\s+--?\s|\n\s*\w+: ")
_SIGNATURE = re.compile(r"^(?:[\w.]+\s*\(|\w+\s*->)")
_CALL = re.compile(r"[\w.]+\s*\(.*\)\s*(?:$|:$|->|--)|\w+\s*->")  # a line that is a signature, to its end
_REFUSED = re.compile(
    r"""
      >>> | :: | == | -- | -> | => | \.\.\. | \*\* | \s=\s | =None\b | [^\x20-\x7e] | [|{}@\\~^<\#] | https?://
    | ^\( | \b(?: XXX | TODO | FIXME | TBD | __doc__ | docstring | deprecated | above | below | following )\b
    | \bsee\ (?: also | help | the )\b | \(see\b
    | ^(?: see | same | like | ditto | idem | as\ for | as\ with | similar | alias | helper | overrid\w+ | inherited
      | implements? | implementation\ of | internal | private | undocumented | not\ implemented | constructor | note
      | warning | example | usage | initiali[sz]e\ self | return\ self | an\ enumeration | this\ file
      | (?: instance\ | class\ | public\ )?(?: attributes | variables ) )\b
    """,
    re.IGNORECASE | re.VERBOSE,
)


def first_sentence(doc: object, name: str) -> str:
    """The first sentence of the docstring of `name`, 15 to 200 characters, or "" where there is no good one.

    Signature lines and markup are dropped, white space is collapsed, it begins with a capital unless with a name, and
    ends with a full stop."""
    if not isinstance(doc, str):
        return ""
    short = name.rpartition(".")[2]
    text = without_signature(inspect.cleandoc(doc)).partition("\n\n")[0]
    text = _EMPHASIS.sub(r"\1", _ROLE.sub(r"`\1`", text).replace("``", "`"))
    text = re.sub(
        rf"^`?(?:[\w.]+\.)?{re.escape(short)}(?:\.py|\([^)\n]*\))?`?\s*(?::|--?)\s+", "", text
    )  # "name - what it does"
    sentence = SENTENCE_END.split(text, maxsplit=1)[0]
    if _LIST.search(sentence):
        return ""
    sentence = " ".join(sentence.split())
    if not sentence.endswith((".", "!", "?")):
        sentence = sentence.rstrip(";, ") + "."
    if re.match(r"[a-z]+[ ,.]", sentence) and not re.match(rf"{re.escape(short)} \w+s\b", sentence):  # "bisect does"
        sentence = sentence[0].upper() + sentence[1:]
    return sentence if _is_good(sentence) else ""


def _is_good(sentence: str) -> bool:
    words = re.findall(r"[A-Za-z]+", sentence)
    return (
        SHORTEST <= len(sentence) <= LONGEST
        and len(words) >= 3
        and sum(map(len, words)) >= 0.75 * len(sentence.replace(" ", ""))  # mostly letters
        and not _REFUSED.search(sentence)
        and not sentence.endswith((":.", ",.", "etc..", "..", " a.", " the.", " of."))
        and sentence.count("(") == sentence.count(")")
        and sentence.count("[") == sentence.count("]")
        and sentence.count("`") % 2 == 0
        and sentence.count('"') % 2 == 0
    )


def without_signature(doc: str) -> str:
    """The docstring after its lines like "isqrt(n, /)" or "S.find(sub) -> int"; what such a line says of the result is
    kept only after a "--": "T.index(value) -- return the first index"."""
    while _SIGNATURE.match(doc):
        line, _, rest = doc.partition("\n")
        while line.count("(") > line.count(")") and rest:  # a signature over several lines
            more, _, rest = rest.partition("\n")
            line += " " + more.strip()
        if not _CALL.match(line):
            break
        if says := re.search(r"\)\s*(?:->.*?)?\s--\s+(.+)$", line):
            return f"{says[1]}\n{rest}"
        if "->" in line and rest[:1].islower():  # the description goes on from the line of the signature
            return ""
        doc = rest.lstrip("\n")
    return doc
