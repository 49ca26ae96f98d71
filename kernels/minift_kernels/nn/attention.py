"""Causal attention with grouped key/value heads, and the cache: the twin of `minift.nn.attention`.

The kernels keep no matrix of tokens × keys; `attention_kernels` says how. What they need beside the mask is the list of
tiles to visit. It depends on the mask alone, so a model makes it once for all of its layers:

    visible = causal_mask(positions, keys)
    tiles = tile_map(visible, head_dim, q.dtype)
    y = attention(q, k, v, visible, tiles=tiles)            # in every layer

Results and gradients lie in memory as (batch, tokens, heads, d): the projection that comes next reads them as rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor
from torch.nn import functional

from minift_kernels import backend as backends
from minift_kernels.backend import Launch, power_of_two

KERNELS = "minift_kernels.nn.attention_kernels"


def causal_mask(
    positions: Integer[Tensor, "batch tokens"],
    keys: int,
    segments: Integer[Tensor, "batch tokens"] | None = None,
) -> Bool[Tensor, "batch tokens keys"]:
    """Key slot j is visible from the query at slot m if j ≤ m, and, in a packed row, if both belong to one segment."""
    visible = torch.arange(keys, device=positions.device) <= positions[..., None]  # (batch, tokens, keys)
    if segments is not None:
        before = keys - segments.shape[-1]  # a prefix belongs to every segment
        visible[..., before:] &= segments[:, :, None] == segments[:, None, :]
    return visible


def attention(
    q: Float[Tensor, "batch heads tokens d"],
    k: Float[Tensor, "batch kv_heads keys d"],
    v: Float[Tensor, "batch kv_heads keys d"],
    visible: Bool[Tensor, "#batch tokens keys"],
    *,
    tiles: Tiles | None = None,
    backend: str | None = None,
) -> Float[Tensor, "batch heads tokens d"]:
    """y = softmax(q kᵀ / √d where visible, else −∞) v; zeros for a token that sees nothing.

    `tiles`: what `tile_map` made of this `visible`, made here if not given. ValueError if it is of another shape.
    """
    how = backends.choose(backend, q.device, q.dtype)
    if how == "torch":
        return _attention_torch(q, k, v, visible)
    if tiles is None:
        tiles = tile_map(visible, q.shape[-1], q.dtype, backend=how)
        assert tiles is not None
    tiles.check(visible)
    return _attention(q, k, v, visible, tiles.by_query, tiles.by_key, tiles.sizes, how)[0]


def _attention_torch(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """The query heads of a group stand below each other, as in `minift.nn.attention.attention_2`."""
    (batch, heads, tokens, d), (kv_heads, keys) = q.shape, k.shape[1:3]
    wide, k, v = (backends.widened(x) for x in (q, k, v))
    stacked = (batch, kv_heads, heads // kv_heads * tokens)
    scores = wide.reshape(*stacked, d) / math.sqrt(d) @ k.transpose(-1, -2)
    some = visible.any(dim=-1, keepdim=True)  # softmax of nothing but −∞ is no number: such a row is 0 afterwards
    hidden = (some & ~visible)[:, None, None].expand(batch, kv_heads, heads // kv_heads, tokens, keys)
    p = torch.softmax(scores.view(hidden.shape).masked_fill(hidden, -math.inf), dim=-1) * some[:, None, None]
    return (p.view(scores.shape) @ v).view(q.shape).to(q.dtype)


# In Triton: which tiles are visited, the forward pass, and two launches backward.


@dataclass(frozen=True)
class Tiles:
    """For every program its tiles: how many are visible as a whole, how many in part, then their numbers, in this
    order. `by_query`: programs that own queries and walk over keys, (#batch, programs, 2 + tiles) int32; `by_key`: the
    other way round. `sizes`: queries a program and keys a step of the first, keys a program and queries a step of the
    second."""

    by_query: Integer[Tensor, "#batch programs tiles"]
    by_key: Integer[Tensor, "#batch programs2 tiles2"]
    sizes: list[int]
    shape: tuple[int, ...]  # of the mask

    def check(self, visible: Tensor) -> None:
        if self.shape != tuple(visible.shape):
            raise ValueError(
                f"tiles: of a mask of shape {self.shape}, needed {tuple(visible.shape)}: call tile_map with this mask"
            )


def tile_map(
    visible: Bool[Tensor, "batch tokens keys"], head_dim: int, dtype: torch.dtype, *, backend: str | None = None
) -> Tiles | None:
    """Which tiles of queries and keys are visible as a whole, and which in part: once a mask, for all layers.

    None for plain PyTorch, which needs no such thing. Tile sizes depend on the number of features and on their type.
    ValueError for float64, for which there are none."""
    how = backends.choose(backend, visible.device, dtype)
    if how == "torch":
        return None
    if dtype.itemsize > 4:
        raise ValueError(f"dtype: {dtype} has no kernel, needed at most 32 bits: use backend='torch'")
    table = backends.load(KERNELS, how)
    found = table.configuration(dtype.itemsize, _block(head_dim))
    (queries, keys), (keys_owned, queries_a_step) = found["forward"][:2], found["backward_kv"][:2]
    queries = min(queries, max(table.SMALLEST, power_of_two(visible.shape[1])))  # few: generation has one
    once = visible[:1] if visible.stride(0) == 0 else visible  # the same for every sequence
    by_key = _lists(once.transpose(1, 2), keys_owned, queries_a_step)
    sizes = [queries, keys, keys_owned, queries_a_step]
    return Tiles(_lists(once, queries, keys), by_key, sizes, tuple(visible.shape))


def _lists(visible: Tensor, own: int, step: int) -> Tensor:
    """A row for every `own` rows of the mask; a tile is as wide as `step` columns. One that reaches beyond the last
    column is never whole: there is something to compare. One that reaches beyond the last row may be."""
    batch, rows, columns = visible.shape
    programs, tiles = -(-rows // own), -(-columns // step)
    padded = functional.pad(visible, (0, tiles * step - columns, 0, programs * own - rows))
    count = padded.reshape(batch, programs, own, tiles, step).sum(dim=(2, 4))
    there = (rows - own * torch.arange(programs, device=visible.device)).clamp(max=own) * step
    whole = count == there[:, None]
    part = (count > 0) & ~whole
    order = torch.where(whole, 0, torch.where(part, 1, 2)).argsort(dim=-1, stable=True)
    numbers = torch.stack([whole.sum(-1), part.sum(-1)], dim=-1)
    return torch.cat([numbers, order], dim=-1).to(torch.int32)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, by_query: Tensor, by_key: Tensor, sizes: list[int], backend: str
) -> tuple[Tensor, Tensor]:
    """The operator `minift::attention`: y, and L of equation (2) of every query and head."""
    y, lse = _like_forward(q)
    q, k, v, visible = map(_neighbors, (q, k, v, visible))
    forward_launch(y, lse, q, k, v, visible, by_query, sizes, backend).run(q.device)
    return y, lse


def _like_forward(q: Tensor, *_) -> tuple[Tensor, Tensor]:
    return _like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def forward_launch(
    y: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    by_query: Tensor,
    sizes: list[int],
    backend: str,
) -> Launch:
    """Equations (1), (2) and (5) of `attention_kernels`; features, and keys of the mask, are neighbors in memory."""
    kernels = backends.load(KERNELS, backend)
    (batch, heads, tokens, d), (kv_heads, keys) = q.shape, k.shape[1:3]
    n_tiles = by_query.shape[1]
    strides = *(x.stride()[:3] for x in (y, q, k, v)), _mask_strides(visible), _mask_strides(by_query)
    counts = heads, heads // max(kv_heads, 1), tokens, keys, n_tiles, math.log2(math.e) / math.sqrt(d)
    arguments = (y, lse, q, k, v, visible.view(torch.uint8), by_query, *strides, *counts)
    options = _options(kernels, "forward", q, sizes[:2])
    return Launch(kernels.forward, (n_tiles * heads * batch,), arguments, options, outputs=2)


def _backward(
    dy: Tensor,
    y: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    by_query: Tensor,
    by_key: Tensor,
    sizes: list[int],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator `minift::attention_backward`: dq, dk, dv."""
    dq, dk, dv = _like_backward(dy, y, lse, q, k, v)
    delta = torch.empty_like(lse)
    dy, y, q, k, v, visible = map(_neighbors, (dy, y, q, k, v, visible))
    first = backward_q_launch(dq, delta, dy, y, q, k, v, lse, visible, by_query, sizes, backend)
    second = backward_kv_launch(dk, dv, dy, q, k, v, lse, delta, visible, by_key, sizes, backend)
    first.run(q.device)
    second.run(q.device)
    return dq, dk, dv


def _like_backward(dy, y, lse, q, k, v, *_):
    return _like(q), _like(k), _like(v)


def backward_q_launch(
    dq: Tensor,
    delta: Tensor,
    dy: Tensor,
    y: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    visible: Tensor,
    by_query: Tensor,
    sizes: list[int],
    backend: str,
) -> Launch:
    """dq and δ: equations (3) and (4) of `attention_kernels`."""
    kernels = backends.load(KERNELS, backend)
    (batch, heads, tokens, d), (kv_heads, keys) = q.shape, k.shape[1:3]
    n_tiles = by_query.shape[1]
    strides = *(x.stride()[:3] for x in (dq, dy, y, q, k, v)), _mask_strides(visible), _mask_strides(by_query)
    counts = heads, heads // max(kv_heads, 1), tokens, keys, n_tiles, math.log2(math.e) / math.sqrt(d), d**-0.5
    arguments = (dq, delta, dy, y, q, k, v, lse, visible.view(torch.uint8), by_query, *strides, *counts)
    options = _options(kernels, "backward_q", q, sizes[:2])
    return Launch(kernels.backward_q, (n_tiles * heads * batch,), arguments, options, outputs=2)


def backward_kv_launch(
    dk: Tensor,
    dv: Tensor,
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    visible: Tensor,
    by_key: Tensor,
    sizes: list[int],
    backend: str,
) -> Launch:
    """dk and dv: equation (4) of `attention_kernels`, from the δ that the other launch has written."""
    kernels = backends.load(KERNELS, backend)
    (batch, heads, tokens, d), (kv_heads, keys) = q.shape, k.shape[1:3]
    n_tiles = by_key.shape[1]
    strides = *(x.stride()[:3] for x in (dk, dv, dy, q, k, v)), _mask_strides(visible), _mask_strides(by_key)
    counts = kv_heads, heads // max(kv_heads, 1), tokens, keys, n_tiles, math.log2(math.e) / math.sqrt(d), d**-0.5
    arguments = (dk, dv, dy, q, k, v, lse, delta, visible.view(torch.uint8), by_key, *strides, *counts)
    options = _options(kernels, "backward_kv", q, sizes[2:])
    return Launch(kernels.backward_kv, (n_tiles * kv_heads * batch,), arguments, options, outputs=2)


def _options(kernels, name: str, q: Tensor, sizes: list[int]) -> dict:
    """Tile sizes of the lists, which may be smaller than the table's; a warp of AMD's has 64 lanes."""
    d = q.shape[-1]
    *_, lanes, stages = kernels.configuration(q.element_size(), _block(d))[name]
    tile = {"OWN": sizes[0], "STEP": sizes[1]}
    return {"D": d, "BLOCK_D": _block(d), **tile, "num_warps": lanes // backends.warp_size(), "num_stages": stages}


def _block(d: int) -> int:
    return max(16, power_of_two(d))


def _mask_strides(x: Tensor) -> tuple[int, int]:
    """Of a mask, or of lists of tiles, that may be the same for every sequence."""
    return (x.stride(0) if x.shape[0] > 1 else 0), x.stride(1)


def _neighbors(x: Tensor) -> Tensor:
    """Features of a row next to each other, and rows so near that offsets within a tile fit into 32 bits."""
    return x if x.stride(-1) == 1 and x.stride(-2) < 1 << 24 else x.contiguous()


def _like(x: Tensor) -> Tensor:
    """(batch, heads, tokens, d), in memory as (batch, tokens, heads, d)."""
    return torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def _save(ctx, inputs, output):
    *tensors, ctx.sizes, ctx.backend = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, dy, _):
    dq, dk, dv = _attention_backward(dy, *ctx.saved_tensors, ctx.sizes, ctx.backend)
    return dq, dk, dv, None, None, None, None, None


_attention = backends.operator(
    "attention(Tensor q, Tensor k, Tensor v, Tensor visible, Tensor by_query, Tensor by_key, int[] sizes, str backend)"
    " -> (Tensor, Tensor)",
    _forward,
    _like_forward,
    _differentiate,
    _save,
)
_attention_backward = backends.operator(
    "attention_backward(Tensor dy, Tensor y, Tensor lse, Tensor q, Tensor k, Tensor v, Tensor visible, Tensor by_query,"
    " Tensor by_key, int[] sizes, str backend) -> (Tensor, Tensor, Tensor)",
    _backward,
    _like_backward,
)


@dataclass
class KVCache:
    """The keys and values of the tokens so far; the one place where the model writes into something it was given.

    Slot m of row b holds its token at position m; `lengths[b]` slots are filled, and what is behind them no query sees.
    `lengths` stays on the CPU: where to write is decided there, without waiting for the GPU. Nothing in here learns."""

    layers: int
    batch: int
    kv_heads: int
    capacity: int
    head_dim: int
    dtype: torch.dtype = torch.float32
    keys: Tensor = field(init=False, repr=False)
    values: Tensor = field(init=False, repr=False)
    lengths: Tensor = field(init=False)
    device: torch.device | str = field(default="cpu", kw_only=True)

    def __post_init__(self):
        shape = (self.layers, self.batch, self.kv_heads, self.capacity, self.head_dim)
        self.keys, self.values = (torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2))
        self.lengths = torch.zeros(self.batch, dtype=torch.int64)

    @torch.no_grad()
    def write(
        self,
        layer: int,
        k: Float[Tensor, "batch kv_heads tokens d"],
        v: Float[Tensor, "batch kv_heads tokens d"],
    ) -> tuple[Tensor, Tensor]:
        """Put k and v behind the filled slots; returns views of all slots in use. ValueError when they do not fit."""
        tokens = k.shape[2]
        start, filled = int(self.lengths.min()), int(self.lengths.max())
        end = filled + tokens
        if end > self.capacity:
            raise ValueError(
                f"the cache has {self.capacity} slots, {end} are needed: make it larger or the text shorter"
            )
        if start == filled:
            self.keys[layer, :, :, start:end] = k
            self.values[layer, :, :, start:end] = v
        else:
            row = torch.arange(self.batch)[:, None].to(self.device)
            slot = (self.lengths[:, None] + torch.arange(tokens)).to(self.device)  # (batch, tokens)
            self.keys[layer][row, :, slot] = k.transpose(1, 2).to(self.dtype)
            self.values[layer][row, :, slot] = v.transpose(1, 2).to(self.dtype)
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, lengths: Tensor) -> None:
        """The tokens just written are part of the text: call once, after the last layer."""
        self.lengths = self.lengths + lengths.cpu()

    def put_prefix(self, prefix: Float[Tensor, "layers 2 kv_heads prefix d"]) -> None:
        """Fill the first slots of every row with learned keys and values."""
        for layer, (k, v) in enumerate(prefix):
            self.write(layer, *(x.expand(self.batch, *x.shape) for x in (k, v)))
        self.advance(torch.full((self.batch,), prefix.shape[3]))

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes
