"""Attention on a GPU, forward and backward, beside PyTorch's; `timing.py` says how, `run.py` runs it.

Of causal texts the peer is `scaled_dot_product_attention` by flash attention. Of several texts packed in one row it is
flash attention for texts of their own lengths (`varlen_attn`), which is given them one after the other; FlexAttention
takes the mask. `tile_map` is not in the time: a model calls it once for all layers, and so it has a row of its own.

Operations are those of the visible pairs: two products forward and five more backward, of 2 d each a head. Bytes are
those of q, k, v and y, and backward of them all again with dy, dq, dk and dv.

This has not been run yet: it needs a CUDA device, and no figure of it is quoted anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from timing import Machine, Row, both, compare, compiled, forward, in_float32, row
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel, varlen
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from minift_kernels.nn import attention

# batch, query heads, key/value heads, tokens, features of a head: SmolLM2, Llama 3 8B, one long text
SHAPES = ((8, 9, 3, 2048, 64), (4, 32, 8, 2048, 128), (1, 32, 8, 16384, 128))
TEXTS = 5  # in a packed row, the later the longer
DTYPE = torch.bfloat16
WITHIN = 2**-5  # of the largest number: weights of 16 bits, and backward differences of nearly equal numbers


def rows(on: Machine, replays: int) -> list[Row]:
    """Causal and packed: the forward pass alone, both passes, and the map of tiles."""
    found = []
    for batch, heads, kv_heads, tokens, d in SHAPES:
        for packed in (False, True):
            texts = segments(batch, tokens, on.device) if packed else None
            positions = torch.arange(tokens, device=on.device).expand(batch if packed else 1, -1)
            visible = attention.causal_mask(positions, tokens, texts)
            pairs = int(visible.sum()) * heads * batch // len(visible)
            size = DTYPE.itemsize * batch * (heads + kv_heads) * tokens * d * 2
            made = partial(_queries, on, batch, tokens, d)
            given = [(made(heads), made(kv_heads), made(kv_heads)) for _ in on.sets(size)]
            inputs = [(torch.randn_like(q), q, k, v) for q, k, v in given]
            about = (
                f"{'packed' if packed else 'causal'}, {batch} x {tokens} tokens, {heads} and {kv_heads} heads of {d}"
            )
            functions, exact = contenders(on, visible, texts, d), plain(visible)
            wanted = in_float32(forward(exact), *given[0])
            values = {what: forward(f) for what, f in functions.items()}
            found += compare(on, about, size, 4 * d * pairs, values, given, replays, wanted, WITHIN)
            wanted = in_float32(both(exact), *inputs[0])
            gradients = {what: both(f) for what, f in functions.items()}
            operations, moved = 14 * d * pairs, 3 * size
            found += compare(on, f"{about}, both passes", moved, operations, gradients, inputs, replays, wanted, WITHIN)
            mapping = partial(attention.tile_map, visible, d, DTYPE, backend=on.backend)
            found.append(row(on, "minift", f"{about}, map of tiles", visible.nbytes, 0, [mapping], replays))
    return found


def contenders(on: Machine, visible: torch.Tensor, texts: torch.Tensor | None, d: int) -> dict[str, Callable]:
    """Functions of q, k and v, ours first."""
    tiles = attention.tile_map(visible, d, DTYPE, backend=on.backend)

    def ours(q, k, v):
        return attention.attention(q, k, v, visible, tiles=tiles, backend=on.backend)

    if texts is None:
        return {"minift": ours, "torch, flash": flash}
    return {"minift": ours, **packed_peers(texts)}


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def packed_peers(texts: torch.Tensor) -> dict[str, Callable]:
    """Functions of q, k and v for texts that stand one after the other in each row."""
    batch, tokens = texts.shape
    mask = create_block_mask(same_text(texts), batch, None, tokens, tokens, device=texts.device)
    flex = compiled(partial(flex_attention, block_mask=mask, enable_gqa=True))
    starts = texts.diff(dim=1, prepend=texts.new_full((batch, 1), -1)).flatten().nonzero().flatten()
    edges = functional.pad(starts, (0, 1), value=batch * tokens).to(torch.int32)
    longest = int(edges.diff().max())

    def flash(q, k, v):
        one_after_the_other = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (tokens of all, heads, d)
        causal = {"window_size": (-1, 0), "enable_gqa": True}  # no key to the right
        y = varlen.varlen_attn(*one_after_the_other, edges, edges, longest, longest, **causal)
        return y.view(batch, tokens, *y.shape[1:]).transpose(1, 2)

    return {"torch, flash": flash, "torch, flex": flex}


def same_text(texts: torch.Tensor) -> Callable:
    """What FlexAttention asks of a pair: is the key visible?"""
    return lambda b, head, query, key: (key <= query) & (texts[b, query] == texts[b, key])


def plain(visible: torch.Tensor) -> Callable:
    """PyTorch's function for any mask and type, which has a key head for each query head."""

    def attend(q, k, v):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None])

    return attend


def segments(batch: int, tokens: int, device: str) -> torch.Tensor:
    """(batch, tokens): which text each token belongs to; TEXTS of them, of lengths 1 : 2 : 3 and so on."""
    ends = torch.arange(1, TEXTS).cumsum(0) * tokens // (TEXTS * (TEXTS + 1) // 2)
    of_token = (torch.arange(tokens)[:, None] >= ends).sum(dim=1)
    return of_token.expand(batch, -1).to(device)


def _queries(on: Machine, batch: int, tokens: int, d: int, heads: int) -> torch.Tensor:
    """(batch, heads, tokens, d), as a projection leaves them: a token's heads are neighbors in memory."""
    return on.random(batch, tokens, heads, d, dtype=DTYPE).transpose(1, 2).requires_grad_()
