"""What the tests of quantizers share: refusals with their messages, and peak memory."""

import tracemalloc


def refused(call, message):
    """ValueError, and its message says this; it ends there if `message` ends with a new line."""
    found = "nothing was raised"
    try:
        call()
    except ValueError as error:
        found = f"{error}\n"
    assert message in found, f"expected a ValueError with {message!r}: {found}"


def peak_memory(call):
    """What a call returns, the second time, and how many bytes it held at most."""
    call()
    tracemalloc.start()
    try:
        return call(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
