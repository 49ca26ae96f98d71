"""Damaged files and what a reader may do with them.

A tree is JSON whose objects are lists of [key, value] (`Pairs`), so that a key may stand there twice, and whose leaves
may be `Raw` text, so that numbers may be what no Python number is. `edited` takes a tree and makes it wrong; `damaged`
does the same to bytes. `outcome` runs a reader and holds it to its promise.

    make fuzz

runs ten times as many examples as the tests do, in four minutes, and prints what became of them; MINIFT_FUZZ=100 makes
it a hundred times as many.
"""

import copy
import json
import os
import signal
import sys
import tracemalloc
import warnings
from collections import Counter
from contextlib import contextmanager

import numpy as np
from hypothesis import currently_in_test_context, event, settings
from hypothesis import strategies as st

from minift.data.example import DataError
from minift.io import FormatError
from minift.io.bitsandbytes4 import pack_tensor
from minift.quant.nf4 import NF4Tensor

TIMES = int(os.environ.get("MINIFT_FUZZ", 1))  # how many times the examples of a normal run
COUNTS: Counter[tuple[str, str]] = Counter()  # (reader, refused or accepted)
SECONDS = 10  # a reader that takes longer on a small file has been talked into work without bound
FORBIDDEN = ("exec", "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess", "pickle", "socket", "shutil")


def examples(n):
    return settings(max_examples=n * TIMES)


# --- trees ------------------------------------------------------------------------------------------------------------


class Raw(str):
    """JSON text that is written as it is."""


class Pairs(list):
    """An object's [key, value] pairs, in order."""


def tree(value):
    if isinstance(value, dict):
        return Pairs([key, tree(inner)] for key, inner in value.items())
    return [tree(inner) for inner in value] if isinstance(value, list) else value


def text(value):
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{json.dumps(key)}:{text(inner)}" for key, inner in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(text, value)) + "]"
    return json.dumps(value)


def slots(value):
    """Every place in a tree: (list, index)."""
    if isinstance(value, list):
        for i, inner in enumerate(value):
            yield value, i
            yield from slots(inner[1] if isinstance(value, Pairs) else inner)


NESTED = [Raw("[" * n + "]" * n) for n in (30, 150, 900, 940, 960, 980, 990, 100_000)]
WORDS = ["", "\0", "\ud800", ".", "..", "../x", "é🎉", "x" * 300, "nf4", "fp4", "F32", "BF16", "BOOL", "F4", "default"]
WORDS += ["llama3", "linear", "(", "[[", "a{99999999999}", "__metadata__", "model.safetensors", "a" * 5000]
NUMBERS = [0, 1, -1, 2, 7, 31, 64, 2**31, 2**63, 2**64, 10**12, 10**18, 10**400, 0.5, -0.0, 1e-320, 1e-60, 1e39, 1e300]
NUMBERS += [Raw("1" * 5000), Raw("NaN"), Raw("-Infinity"), Raw("1e999")]
OTHERS = [None, True, False, [], Pairs(), [[]], [Pairs()], [1, 2], ["a", "a"], [None], [0, 2**62, 2**62], [1] * 70]
HOSTILE = st.one_of(*map(st.sampled_from, (NUMBERS, WORDS, OTHERS, NESTED)), st.integers(), st.floats(), st.text())


@st.composite
def edited(draw, original):
    """The text of a tree with one to three things wrong."""
    value = tree(original)
    for _ in range(draw(st.integers(1, 3))):
        places = list(slots(value))
        if not places:
            break
        box, i = places[draw(st.integers(0, len(places) - 1))]
        match draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename", "repeat", "number"])):
            case "remove":
                del box[i]
            case "repeat":
                box.append(copy.deepcopy(box[i]))
            case "rename" if isinstance(box, Pairs):
                box[i] = [draw(st.sampled_from(WORDS)), box[i][1]]
            case how:
                new = copy.deepcopy(draw(st.sampled_from(NUMBERS) if how == "number" else HOSTILE))
                box[i] = [box[i][0], new] if isinstance(box, Pairs) else new
    return text(value)


@st.composite
def damaged(draw, data):
    """Bytes with up to four of them changed, or some cut out, put in, or cut off."""
    data = bytearray(data)
    at = draw(st.integers(0, len(data) - 1))
    match draw(st.sampled_from(["change", "change", "early", "truncate", "insert", "remove", "append"])):
        case "change":
            for _ in range(draw(st.integers(1, 4))):
                data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
        case "early":  # where the headers are
            data[at % min(len(data), 400)] = draw(st.sampled_from([0, 1, 8, 34, 48, 127, 128, 255]))
        case "truncate":
            del data[at:]
        case "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=9))
        case "remove":
            del data[at : at + draw(st.integers(1, 9))]
        case "append":
            data += draw(st.binary(min_size=1, max_size=9))
    return bytes(data)


# --- the promise ------------------------------------------------------------------------------------------------------

_watching = False


def _watch(name, arguments):
    if _watching and (name.startswith(FORBIDDEN) or (name == "open" and str(arguments[1]).startswith(("w", "a")))):
        raise AssertionError(f"the reader did {name} {arguments}")


sys.addaudithook(_watch)


@contextmanager
def watched():
    """No code is run, no process started, nothing written, and it ends."""
    global _watching

    def stop(*_):
        raise AssertionError(f"the reader took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    _watching = True
    try:
        yield
    finally:
        _watching = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome(reader, path, size, times=10, constant=2**21, warned=False):
    """What `reader()` gives for files of `size` bytes in or at `path`, or None if it refuses them as documented.

    Fails on any other exception, on a message that does not name the path, is endless or cannot be printed, on a
    warning (unless `warned`), on running or writing anything, and on more memory than `times` the size and a constant.
    Each call is counted; what was read is for the caller to save and read again."""
    tracemalloc.start()
    try:
        with warnings.catch_warnings(record=True) as caught, watched():
            warnings.simplefilter("always")  # errors would be caught, and hidden, by some readers
            try:
                result = reader()
            except (FormatError, DataError) as error:
                result, message = None, str(error)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert warned or not caught, [str(w.message) for w in caught]
    assert all("not as it was written" in str(w.message) for w in caught), [str(w.message) for w in caught]
    assert peak <= times * size + constant, f"{peak:,} bytes for a file of {size:,}"
    if result is None:
        assert message.startswith(str(path)) and len(message) < 2000, message[:2000]
        message.encode("utf-8")
    said = "refused" if result is None else "accepted"
    if currently_in_test_context():
        event(said)
    COUNTS[
        os.environ["PYTEST_CURRENT_TEST"].split("::")[-1].split(" ")[0].split("[")[0].removeprefix("test_"), said
    ] += 1
    return result


def report():
    """What happened to every reader, as a table: calls, documented errors, and objects that survived saving."""
    rows = [("", "calls", "documented error", "read, and the same when saved and read again")]
    for reader in dict.fromkeys(reader for reader, _ in COUNTS):
        refused, accepted = COUNTS[reader, "refused"], COUNTS[reader, "accepted"]
        rows.append((reader, *(f"{n:,}" for n in (refused + accepted, refused, accepted))))
    sums = [sum(n for (_, what), n in COUNTS.items() if what == said) for said in ("refused", "accepted")]
    rows.append(("all", *(f"{n:,}" for n in (sum(sums), *sums))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def plain(arrays):
    """NF4 tensors as the arrays that a file keeps."""
    found = {}
    for name, w in arrays.items():
        found |= pack_tensor(name, w) if isinstance(w, NF4Tensor) else {name: w}
    return found


def assert_same(found, expected):
    found, expected = plain(found), plain(expected)
    assert found.keys() == expected.keys()
    for name, a in found.items():
        b = expected[name]
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        assert a.tobytes() == b.tobytes(), name
        assert np.asarray(a).size == np.asarray(b).size
