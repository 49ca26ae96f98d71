"""Dropout on a GPU: the mask is computed where it is used, and never stored.

    y_i = x_i m_i / (1 − p)        m_i = [u(key, offset + i) > p]        u = `tl.rand`, Philox4x32-10             (1)

The backward pass is the same kernel on dy: same key, same counters, same mask. A stored mask would be a byte an element
from the forward pass to the backward pass, written once and read once.

What it costs. Philox is ten rounds of two 32-bit products, each a high and a low half, and a few exclusive ors: about a
hundred integer instructions an element, where a copy has two or three. So the prediction is that integer arithmetic and
not memory is the limit. A call gives four words, of which (1) uses one: an element's number is then a function of
its own counter, whatever the tile, and the same as that of every other implementation. A fourth of the calls would do
if four neighbors shared a counter; it would be another mask.

The comparison and the one product are in float32. p and 1 / (1 − p) come rounded to float32. Counters are 64-bit.
"""

import triton
import triton.language as tl

TILES = {2: (2048, 4), 4: (1024, 4), 8: (1024, 4)}  # bytes of a number: (BLOCK, num_warps), 16 bytes a lane or more


@triton.jit(do_not_specialize=["key", "offset"])  # every key is another number: none is worth a kernel of its own
def dropout(y, x, n, key, offset, p, scale, BLOCK: tl.constexpr):
    """Equation (1) for a tile of n numbers; both are contiguous. 0 · x and not 0: NaN stays NaN."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    value = tl.load(x + i, mask=inside).to(tl.float32)
    factor = tl.where(tl.rand(key, offset + i) > p, scale, 0.0)
    tl.store(y + i, (value * factor).to(y.dtype.element_ty), mask=inside)
