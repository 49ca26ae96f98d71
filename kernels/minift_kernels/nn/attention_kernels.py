"""Attention on a GPU without its matrix: scores live in registers for the time of a tile, and never in memory.

    s_ij = c q_i·k_j   where key j is visible from query i, else −∞        c = log₂e / √d                          (1)
    L_i  = log₂ Σ_j 2^s_ij        p_ij = 2^(s_ij − L_i)        y_i = Σ_j p_ij v_j                                   (2)
    δ_i  = dy_i·y_i        dS_ij = p_ij (dy_i·v_j − δ_i)                                                           (3)
    dv_j = Σ_i p_ij dy_i        dk_j = Σ_i dS_ij q_i / √d        dq_i = Σ_j dS_ij k_j / √d                          (4)

This is softmax with base 2, because 2^x is one instruction of a GPU and e^x is two; (3) is equation (2) of
`minift.nn.attention`, where Σ_j p_ij dP_ij is written as dy_i·y_i.              (Dao et al. 2022, arXiv 2205.14135)

**The sum in one pass.** A program holds OWN queries and walks over the keys, STEP at a time. It keeps for every query
the largest score so far m, the sum z of 2^(s − m), and the vector a of Σ 2^(s − m) v. When a step brings a larger m',
what was summed before is multiplied by 2^(m − m'):

    m' = max(m, max_j s_j)    z' = z 2^(m − m') + Σ_j 2^(s_j − m')    a' = a 2^(m − m') + Σ_j 2^(s_j − m') v_j      (5)

At the end y = a / z and L = m + log₂ z. L is all that the backward pass keeps beside y: 4 bytes a query and head.

**Why it is fast.** P of a head has T × S numbers: for 4,096 tokens and 64 features, 16 times as many as q, k, v and y
together, and they would be written and read several times. Here these four are read and written, and two products
remain, which tensor cores do. In the backward pass p is formed again from q, k and L, in each of two kernels: seven
products instead of the four that a kept P would need, and still less time than reading it.

**Two kernels backward, no atomics.** dq_i is a sum over keys, dk_j and dv_j are sums over queries. A program that owns
the sum's place can form it in registers and write it once, in the same order every time. So `backward_q` owns queries
and walks over keys, `backward_kv` owns keys and walks over queries, of all the query heads that read this key/value
head.

**Which tiles.** The mask may be any. Before the launch `attention.tile_map` looks at it once, and lists for every
program the tiles it has to visit: first those that are visible as a whole, for which no mask is loaded and nothing is
compared, then those that are visible in part, whose bytes are loaded. The others do not appear: a causal text costs
half, a packed row of n texts one n-th of that. Two plain loops without a branch inside, so that the compiler can load
the next tile while tensor cores are busy with this one. In the second, which is short, what is the same in every step
(`disable_licm`: loop-invariant code motion) is computed again each time rather than held in registers.

Arithmetic is in float32. For 16-bit numbers p and dS are rounded to their type before a product with v, dy, k or q,
because tensor cores take both factors in one type. That rounding is part of the bound in minift.conformance.
A query that sees nothing has z = 0: its y is zero, and so are its gradients.

D is the number of features, BLOCK_D that number rounded up to a power of two, 16 at least.
"""

import triton
import triton.language as tl

# (bytes of a number, BLOCK_D): (OWN, STEP, lanes, num_stages) of each kernel; `forward` and `backward_q` walk over the
# same tiles. A lane has 255 registers at most (512 on an MI300), for its share of a tile of scores, of the sums, and of
# what stays loaded: up to 128 features of 16 bits nothing is put aside in memory with these sizes. `backward_kv` has
# two sums to hold: with 128 features and 32 queries a step, 28 registers would be put aside on an A100. Tiles on their
# way to tensor cores lie in shared memory: 163 KB on an A100, 64 KB on an MI300. Three stages are the number of a tile,
# the tile, the products. float32 has no tensor cores on NVIDIA's GPUs if it is not to lose bits, and takes many more
# registers than there are: it is for comparison, not for speed.
CONFIGURATIONS = {
    (2, 64): {"forward": (128, 64, 256, 3), "backward_q": (128, 64, 256, 3), "backward_kv": (128, 32, 256, 3)},
    (2, 128): {"forward": (128, 32, 256, 3), "backward_q": (128, 32, 256, 3), "backward_kv": (128, 16, 256, 2)},
    (2, 256): {"forward": (64, 16, 128, 1), "backward_q": (64, 16, 128, 1), "backward_kv": (64, 16, 128, 1)},
    (4, 64): {"forward": (32, 32, 128, 1), "backward_q": (32, 32, 128, 1), "backward_kv": (32, 32, 128, 1)},
    (4, 128): {"forward": (32, 16, 128, 1), "backward_q": (32, 16, 128, 1), "backward_kv": (32, 16, 128, 1)},
}
SMALLEST = 16  # rows of a tile, and features: what a tensor core multiplies


def configuration(element_size, BLOCK_D):
    """Other sizes take the next larger that is listed, or the largest, whose tiles may not fit for more features."""
    sizes = [key for key in CONFIGURATIONS if key[0] == element_size]
    return CONFIGURATIONS[next((key for key in sizes if key[1] >= BLOCK_D), sizes[-1])]


@triton.jit
def load_rows(
    x, first, n_rows, stride, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, ALL: tl.constexpr
):  # fmt: skip
    """(ROWS, BLOCK_D) from row `first` of a matrix with D columns, zeros beyond. ALL: the rows exist, so nothing need
    be compared. Where the tile begins is a number of 64 bits, the same in all lanes; within it 32 are enough."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_D)[None, :]
    at = x + first * stride + (row * stride + column)
    if ALL:
        values = tl.load(at) if D == BLOCK_D else tl.load(at, mask=column < D, other=0)
    else:
        values = tl.load(at, mask=(row < n_rows - first) & (column < D), other=0)
    return values


@triton.jit
def store_rows(x, values, first, n_rows, stride, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_D)[None, :]
    inside = (row < n_rows - first) & (column < D)
    tl.store(x + first * stride + (row * stride + column), values.to(x.dtype.element_ty), mask=inside)


@triton.jit
def forward(
    y, lse, q, k, v, visible, lists, y_strides, q_strides, k_strides, v_strides, visible_strides, list_strides,
    heads, group, tokens, keys, n_tiles, c,
    D: tl.constexpr, BLOCK_D: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Equations (1), (2) and (5) for OWN queries of one head. The last queries, which in a text see most, go first."""
    program = tl.program_id(0)
    tile = n_tiles - 1 - program % n_tiles
    head = (program // n_tiles % heads).to(tl.int64)
    batch = (program // n_tiles // heads).to(tl.int64)
    q += batch * q_strides[0] + head * q_strides[1]
    k += batch * k_strides[0] + head // group * k_strides[1]
    v += batch * v_strides[0] + head // group * v_strides[1]
    visible += batch * visible_strides[0]
    lists += batch * list_strides[0] + tile * list_strides[1]
    query = tile.to(tl.int64) * OWN  # the first of them
    questions = load_rows(q, query, tokens, q_strides[2], D, BLOCK_D, OWN, False)
    top = tl.full((OWN,), float("-inf"), tl.float32)
    total = tl.zeros((OWN,), tl.float32)
    mean = tl.zeros((OWN, BLOCK_D), tl.float32)
    whole, part = tl.load(lists), tl.load(lists + 1)
    for i in range(0, whole):
        key = tl.load(lists + 2 + i).to(tl.int64) * STEP
        top, total, mean = attend(
            top, total, mean, questions, query, key, k, v, visible, k_strides[2], v_strides[2], visible_strides[1],
            tokens, keys, c, D, BLOCK_D, OWN, STEP, True,
        )  # fmt: skip
    for i in tl.range(whole, whole + part, disable_licm=True):
        key = tl.load(lists + 2 + i).to(tl.int64) * STEP
        top, total, mean = attend(
            top, total, mean, questions, query, key, k, v, visible, k_strides[2], v_strides[2], visible_strides[1],
            tokens, keys, c, D, BLOCK_D, OWN, STEP, False,
        )  # fmt: skip
    nothing = total == 0
    total = tl.where(nothing, 1.0, total)
    y += batch * y_strides[0] + head * y_strides[1]
    store_rows(y, mean * (1 / total)[:, None], query, tokens, y_strides[2], D, BLOCK_D, OWN)
    level = tl.where(nothing, 0.0, top + tl.log2(total))
    row = tl.arange(0, OWN)
    tl.store(lse + (batch * heads + head) * tokens + query + row, level, mask=row < tokens - query)


@triton.jit
def attend(
    top, total, mean, questions, query, key, k, v, visible, k_stride, v_stride, visible_stride, tokens, keys, c,
    D: tl.constexpr, BLOCK_D: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """Equation (5) for one step."""
    s = (
        tl.dot(questions, tl.trans(load_rows(k, key, keys, k_stride, D, BLOCK_D, STEP, ALL)), input_precision="ieee")
        * c
    )
    if not ALL:
        row, column = tl.arange(0, OWN)[:, None], tl.arange(0, STEP)[None, :]
        sees = load_mask(visible, query, key, row, column, tokens, keys, visible_stride)
        s = tl.where(sees, s, float("-inf"))
    higher = tl.maximum(top, tl.max(s, axis=1))
    base = tl.where(higher == float("-inf"), 0.0, higher)  # of a row that has seen nothing yet: −∞ − −∞ is no number
    p = tl.exp2(s - base[:, None])
    shrink = tl.exp2(top - base)
    values = load_rows(v, key, keys, v_stride, D, BLOCK_D, STEP, ALL)
    mean = tl.dot(p.to(values.dtype), values, mean * shrink[:, None], input_precision="ieee")
    return higher, total * shrink + tl.sum(p, axis=1), mean


@triton.jit
def load_mask(visible, query, key, row, column, tokens, keys, stride):
    """A tile of the mask, row a query and column a key of it; what is not there is not visible."""
    there = (row < tokens - query) & (column < keys - key)
    return tl.load(visible + query * stride + key + (row * stride + column), mask=there, other=0) != 0


@triton.jit
def backward_q(
    dq, delta, dy, y, q, k, v, lse, visible, lists,
    dq_strides, dy_strides, y_strides, q_strides, k_strides, v_strides, visible_strides, list_strides,
    heads, group, tokens, keys, n_tiles, c, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """dq of (4) for OWN queries of one head, and δ of (3), which `backward_kv` reads."""
    program = tl.program_id(0)
    tile = n_tiles - 1 - program % n_tiles
    head = (program // n_tiles % heads).to(tl.int64)
    batch = (program // n_tiles // heads).to(tl.int64)
    q += batch * q_strides[0] + head * q_strides[1]
    k += batch * k_strides[0] + head // group * k_strides[1]
    v += batch * v_strides[0] + head // group * v_strides[1]
    visible += batch * visible_strides[0]
    lists += batch * list_strides[0] + tile * list_strides[1]
    query = tile.to(tl.int64) * OWN  # the first of them
    questions = load_rows(q, query, tokens, q_strides[2], D, BLOCK_D, OWN, False)
    dy += batch * dy_strides[0] + head * dy_strides[1]
    y += batch * y_strides[0] + head * y_strides[1]
    cotangent = load_rows(dy, query, tokens, dy_strides[2], D, BLOCK_D, OWN, False)
    answer = load_rows(y, query, tokens, y_strides[2], D, BLOCK_D, OWN, False)
    projection = tl.sum(cotangent.to(tl.float32) * answer.to(tl.float32), axis=1)
    row = tl.arange(0, OWN)
    at = (batch * heads + head) * tokens + query + row
    tl.store(delta + at, projection, mask=row < tokens - query)
    level = tl.load(lse + at, mask=row < tokens - query, other=0)
    result = tl.zeros((OWN, BLOCK_D), tl.float32)
    whole, part = tl.load(lists), tl.load(lists + 1)
    for i in range(0, whole):
        key = tl.load(lists + 2 + i).to(tl.int64) * STEP
        result = differentiate_q(
            result, questions, cotangent, level, projection, query, key, k, v, visible, k_strides[2], v_strides[2],
            visible_strides[1], tokens, keys, c, D, BLOCK_D, OWN, STEP, True,
        )  # fmt: skip
    for i in tl.range(whole, whole + part, disable_licm=True):
        key = tl.load(lists + 2 + i).to(tl.int64) * STEP
        result = differentiate_q(
            result, questions, cotangent, level, projection, query, key, k, v, visible, k_strides[2], v_strides[2],
            visible_strides[1], tokens, keys, c, D, BLOCK_D, OWN, STEP, False,
        )  # fmt: skip
    dq += batch * dq_strides[0] + head * dq_strides[1]
    store_rows(dq, result * scale, query, tokens, dq_strides[2], D, BLOCK_D, OWN)


@triton.jit
def differentiate_q(
    result, questions, cotangent, level, projection, query, key, k, v, visible, k_stride, v_stride, visible_stride,
    tokens, keys, c, D: tl.constexpr, BLOCK_D: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """What one step's keys add to dq √d."""
    tile_of_k = load_rows(k, key, keys, k_stride, D, BLOCK_D, STEP, ALL)
    p = tl.exp2(tl.dot(questions, tl.trans(tile_of_k), input_precision="ieee") * c - level[:, None])
    if not ALL:
        row, column = tl.arange(0, OWN)[:, None], tl.arange(0, STEP)[None, :]
        p = tl.where(load_mask(visible, query, key, row, column, tokens, keys, visible_stride), p, 0.0)
    values = load_rows(v, key, keys, v_stride, D, BLOCK_D, STEP, ALL)
    dp = tl.dot(cotangent, tl.trans(values), input_precision="ieee")
    ds = p * (dp - projection[:, None])
    return tl.dot(ds.to(tile_of_k.dtype), tile_of_k, result, input_precision="ieee")


@triton.jit
def backward_kv(
    dk, dv, dy, q, k, v, lse, delta, visible, lists,
    dk_strides, dv_strides, dy_strides, q_strides, k_strides, v_strides, visible_strides, list_strides,
    kv_heads, group, tokens, keys, n_tiles, c, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """dk and dv of (4) for OWN keys of one key/value head. Scores stand on their side: a row a key, so that the sums
    over queries are products of p and dS as they are. The first keys, which in a text are seen most, go first."""
    program = tl.program_id(0)
    tile = program % n_tiles
    kv_head = (program // n_tiles % kv_heads).to(tl.int64)
    batch = (program // n_tiles // kv_heads).to(tl.int64)
    visible += batch * visible_strides[0]
    lists += batch * list_strides[0] + tile * list_strides[1]
    key = tile.to(tl.int64) * OWN  # the first of them
    k += batch * k_strides[0] + kv_head * k_strides[1]
    v += batch * v_strides[0] + kv_head * v_strides[1]
    tile_of_k = load_rows(k, key, keys, k_strides[2], D, BLOCK_D, OWN, False)
    values = load_rows(v, key, keys, v_strides[2], D, BLOCK_D, OWN, False)
    dk_sum = tl.zeros((OWN, BLOCK_D), tl.float32)
    dv_sum = tl.zeros((OWN, BLOCK_D), tl.float32)
    whole, part = tl.load(lists), tl.load(lists + 1)
    for member in range(0, group):
        head = kv_head * group + member
        q_head = q + batch * q_strides[0] + head * q_strides[1]
        dy_head = dy + batch * dy_strides[0] + head * dy_strides[1]
        at = (batch * kv_heads * group + head) * tokens
        for i in range(0, whole):
            query = tl.load(lists + 2 + i).to(tl.int64) * STEP
            dk_sum, dv_sum = differentiate_kv(
                dk_sum, dv_sum, tile_of_k, values, query, key, q_head, dy_head, lse + at, delta + at, visible,
                q_strides[2], dy_strides[2], visible_strides[1], tokens, keys, c, D, BLOCK_D, OWN, STEP, True,
            )  # fmt: skip
        for i in tl.range(whole, whole + part, disable_licm=True):
            query = tl.load(lists + 2 + i).to(tl.int64) * STEP
            dk_sum, dv_sum = differentiate_kv(
                dk_sum, dv_sum, tile_of_k, values, query, key, q_head, dy_head, lse + at, delta + at, visible,
                q_strides[2], dy_strides[2], visible_strides[1], tokens, keys, c, D, BLOCK_D, OWN, STEP, False,
            )  # fmt: skip
    dk += batch * dk_strides[0] + kv_head * dk_strides[1]
    dv += batch * dv_strides[0] + kv_head * dv_strides[1]
    store_rows(dk, dk_sum * scale, key, keys, dk_strides[2], D, BLOCK_D, OWN)
    store_rows(dv, dv_sum, key, keys, dv_strides[2], D, BLOCK_D, OWN)


@triton.jit
def differentiate_kv(
    dk_sum, dv_sum, tile_of_k, values, query, key, q, dy, lse, delta, visible, q_stride, dy_stride, visible_stride,
    tokens, keys, c, D: tl.constexpr, BLOCK_D: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """What one step's queries add to dk √d and dv."""
    questions = load_rows(q, query, tokens, q_stride, D, BLOCK_D, STEP, ALL)
    row = tl.arange(0, STEP)
    there = ALL | (row < tokens - query)
    level = tl.load(lse + query + row, mask=there, other=0)
    p = tl.exp2(tl.dot(tile_of_k, tl.trans(questions), input_precision="ieee") * c - level[None, :])
    if not ALL:
        sees = load_mask(visible, query, key, row[:, None], tl.arange(0, OWN)[None, :], tokens, keys, visible_stride)
        p = tl.where(tl.trans(sees), p, 0.0)
    cotangent = load_rows(dy, query, tokens, dy_stride, D, BLOCK_D, STEP, ALL)
    dv_sum = tl.dot(p.to(cotangent.dtype), cotangent, dv_sum, input_precision="ieee")
    dp = tl.dot(values, tl.trans(cotangent), input_precision="ieee")
    projection = tl.load(delta + query + row, mask=there, other=0)
    ds = p * (dp - projection[None, :])
    dk_sum = tl.dot(ds.to(questions.dtype), questions, dk_sum, input_precision="ieee")
    return dk_sum, dv_sum
