"""Kernels of attention, each wrong in one way: the properties must reject every one of them.

With WRONG = "nothing" they are right. Only what is wrong differs. They are shorter than the right ones: every tile is
visited as if it were visible in part, which costs time and changes no bit of a result.
"""

import triton
import triton.language as tl

FORWARD = (
    "sees the next",  # the mask one place too far to the left
    "mask -1e4",  # hidden scores are −10,000 instead of −∞
    "no rescale",  # what was summed before a larger maximum is kept as it is
    "no maximum",  # 2^s overflows
    "no scale",  # 1/√d forgotten
    "1/d",
    "head % kv heads",  # instead of head // group
    "tail counts",  # keys behind the last one have the score 0
    "no division",  # by the sum of the numerators
    "natural level",  # log instead of log₂ in L
    "part is whole",  # the mask is not looked at
    "first tile forgotten",
    "mask of the first",  # of sequence 0 for all
)
BACKWARD_Q = (
    "no delta",
    "delta of dy",  # Σ dy instead of Σ dy y
    "no scale",
    "part is whole",
    "e for 2",  # e^(s − L)
    "next query's level",
    "last tile forgotten",
    "delta of the first head",  # δ stored where it belongs only for head 0
)
BACKWARD_KV = (
    "last head only",  # of the query heads that share this key/value head
    "head of another group",
    "dS for P",  # in dv
    "no delta",
    "no scale",
    "scale in dv too",
    "part is whole",
    "parts forgotten",
)


@triton.jit
def load_rows(x, first, n_rows, stride, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_D)[None, :]
    return tl.load(x + first * stride + (row * stride + column), mask=(row < n_rows - first) & (column < D), other=0)


@triton.jit
def store_rows(x, values, first, n_rows, stride, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_D)[None, :]
    inside = (row < n_rows - first) & (column < D)
    tl.store(x + first * stride + (row * stride + column), values.to(x.dtype.element_ty), mask=inside)


@triton.jit
def load_mask(
    visible, query, key, tokens, keys, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WRONG: tl.constexpr
):  # fmt: skip
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    there = (row < tokens - query) & (column < keys - key)
    at = visible + query * stride + key + (row * stride + column)
    if WRONG == "sees the next":
        sees = (tl.load(at - 1, mask=there & (key + column > 0), other=1) != 0) & there
    elif WRONG == "part is whole":
        sees = there
    elif WRONG == "tail counts":
        sees = (tl.load(at, mask=there, other=0) != 0) | (column >= keys - key)
    else:
        sees = tl.load(at, mask=there, other=0) != 0
    return sees


@triton.jit
def forward(
    y, lse, q, k, v, visible, lists, y_strides, q_strides, k_strides, v_strides, visible_strides, list_strides,
    heads, group, tokens, keys, n_tiles, c,
    D: tl.constexpr, BLOCK_D: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr, WRONG: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tile = n_tiles - 1 - program % n_tiles
    head = (program // n_tiles % heads).to(tl.int64)
    batch = (program // n_tiles // heads).to(tl.int64)
    kv_head = head // group
    if WRONG == "head % kv heads":
        kv_head = head % (heads // group)
    q += batch * q_strides[0] + head * q_strides[1]
    k += batch * k_strides[0] + kv_head * k_strides[1]
    v += batch * v_strides[0] + kv_head * v_strides[1]
    if WRONG != "mask of the first":
        visible += batch * visible_strides[0]
    lists += batch * list_strides[0] + tile * list_strides[1]
    query = tile.to(tl.int64) * OWN
    if WRONG == "no scale":
        c = 1.4426950408889634
    if WRONG == "1/d":
        c = c * c / 1.4426950408889634
    questions = load_rows(q, query, tokens, q_strides[2], D, BLOCK_D, OWN)
    top = tl.full((OWN,), float("-inf"), tl.float32)
    total = tl.zeros((OWN,), tl.float32)
    mean = tl.zeros((OWN, BLOCK_D), tl.float32)
    n = tl.load(lists) + tl.load(lists + 1)
    start = 1 if WRONG == "first tile forgotten" else 0
    for i in range(start, n):
        key = tl.load(lists + 2 + i).to(tl.int64) * STEP
        tile_of_k = load_rows(k, key, keys, k_strides[2], D, BLOCK_D, STEP)
        s = tl.dot(questions, tl.trans(tile_of_k), input_precision="ieee") * c
        sees = load_mask(visible, query, key, tokens, keys, visible_strides[1], OWN, STEP, WRONG)
        s = tl.where(sees, s, -1e4 if WRONG == "mask -1e4" else float("-inf"))
        higher = tl.maximum(top, tl.max(s, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        if WRONG == "no maximum":
            higher = tl.zeros((OWN,), tl.float32)
            base = higher
        p = tl.exp2(s - base[:, None])
        shrink = tl.exp2(top - base)
        if WRONG == "no rescale":
            shrink = tl.full((OWN,), 1.0, tl.float32)
        values = load_rows(v, key, keys, v_strides[2], D, BLOCK_D, STEP)
        mean = tl.dot(p.to(values.dtype), values, mean * shrink[:, None], input_precision="ieee")
        total = total * shrink + tl.sum(p, axis=1)
        top = higher
    nothing = total == 0
    total = tl.where(nothing, 1.0, total)
    y += batch * y_strides[0] + head * y_strides[1]
    result = mean * (1 / total)[:, None]
    if WRONG == "no division":
        result = mean
    store_rows(y, result, query, tokens, y_strides[2], D, BLOCK_D, OWN)
    level = tl.where(nothing, 0.0, top + (tl.log(total) if WRONG == "natural level" else tl.log2(total)))
    row = tl.arange(0, OWN)
    tl.store(lse + (batch * heads + head) * tokens + query + row, level, mask=row < tokens - query)


@triton.jit
def backward_q(
    dq, delta, dy, y, q, k, v, lse, visible, lists,
    dq_strides, dy_strides, y_strides, q_strides, k_strides, v_strides, visible_strides, list_strides,
    heads, group, tokens, keys, n_tiles, c, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr, WRONG: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tile = n_tiles - 1 - program % n_tiles
    head = (program // n_tiles % heads).to(tl.int64)
    batch = (program // n_tiles // heads).to(tl.int64)
    q += batch * q_strides[0] + head * q_strides[1]
    k += batch * k_strides[0] + head // group * k_strides[1]
    v += batch * v_strides[0] + head // group * v_strides[1]
    visible += batch * visible_strides[0]
    lists += batch * list_strides[0] + tile * list_strides[1]
    query = tile.to(tl.int64) * OWN
    questions = load_rows(q, query, tokens, q_strides[2], D, BLOCK_D, OWN)
    dy += batch * dy_strides[0] + head * dy_strides[1]
    y += batch * y_strides[0] + head * y_strides[1]
    cotangent = load_rows(dy, query, tokens, dy_strides[2], D, BLOCK_D, OWN)
    answer = load_rows(y, query, tokens, y_strides[2], D, BLOCK_D, OWN).to(tl.float32)
    if WRONG == "delta of dy":
        answer = tl.full((OWN, BLOCK_D), 1.0, tl.float32)
    projection = tl.sum(cotangent.to(tl.float32) * answer, axis=1)
    row = tl.arange(0, OWN)
    at = (batch * heads + head) * tokens + query + row
    if WRONG == "delta of the first head":
        first = tl.load(lse + at, mask=row < tokens - query, other=0)
        tl.store(delta + at, tl.where(head == 0, projection, first), mask=row < tokens - query)
    else:
        tl.store(delta + at, projection, mask=row < tokens - query)
    if WRONG == "no delta":
        projection = tl.zeros((OWN,), tl.float32)
    level = tl.load(lse + at, mask=row < tokens - query, other=0)
    if WRONG == "next query's level":
        level = tl.load(lse + at + 1, mask=row + 1 < tokens - query, other=0)
    result = tl.zeros((OWN, BLOCK_D), tl.float32)
    n = tl.load(lists) + tl.load(lists + 1)
    if WRONG == "last tile forgotten":
        n -= 1
    for i in range(0, n):
        key = tl.load(lists + 2 + i).to(tl.int64) * STEP
        tile_of_k = load_rows(k, key, keys, k_strides[2], D, BLOCK_D, STEP)
        s = tl.dot(questions, tl.trans(tile_of_k), input_precision="ieee") * c - level[:, None]
        p = tl.exp(s) if WRONG == "e for 2" else tl.exp2(s)
        p = tl.where(load_mask(visible, query, key, tokens, keys, visible_strides[1], OWN, STEP, WRONG), p, 0.0)
        values = load_rows(v, key, keys, v_strides[2], D, BLOCK_D, STEP)
        dp = tl.dot(cotangent, tl.trans(values), input_precision="ieee")
        ds = p * (dp - projection[:, None])
        result = tl.dot(ds.to(tile_of_k.dtype), tile_of_k, result, input_precision="ieee")
    if WRONG == "no scale":
        scale = 1.0
    dq += batch * dq_strides[0] + head * dq_strides[1]
    store_rows(dq, result * scale, query, tokens, dq_strides[2], D, BLOCK_D, OWN)


@triton.jit
def backward_kv(
    dk, dv, dy, q, k, v, lse, delta, visible, lists,
    dk_strides, dv_strides, dy_strides, q_strides, k_strides, v_strides, visible_strides, list_strides,
    kv_heads, group, tokens, keys, n_tiles, c, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr, WRONG: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tile = program % n_tiles
    kv_head = (program // n_tiles % kv_heads).to(tl.int64)
    batch = (program // n_tiles // kv_heads).to(tl.int64)
    visible += batch * visible_strides[0]
    lists += batch * list_strides[0] + tile * list_strides[1]
    key = tile.to(tl.int64) * OWN
    k += batch * k_strides[0] + kv_head * k_strides[1]
    v += batch * v_strides[0] + kv_head * v_strides[1]
    tile_of_k = load_rows(k, key, keys, k_strides[2], D, BLOCK_D, OWN)
    values = load_rows(v, key, keys, v_strides[2], D, BLOCK_D, OWN)
    dk_sum = tl.zeros((OWN, BLOCK_D), tl.float32)
    dv_sum = tl.zeros((OWN, BLOCK_D), tl.float32)
    n = tl.load(lists)
    if WRONG != "parts forgotten":
        n += tl.load(lists + 1)
    first_member = 0
    if WRONG == "last head only":
        first_member = group - 1
    row = tl.arange(0, STEP)
    for member in range(first_member, group):
        head = kv_head * group + member
        if WRONG == "head of another group":
            head = kv_head + member * kv_heads
        q_head = q + batch * q_strides[0] + head * q_strides[1]
        dy_head = dy + batch * dy_strides[0] + head * dy_strides[1]
        at = (batch * kv_heads * group + head) * tokens
        for i in range(0, n):
            query = tl.load(lists + 2 + i).to(tl.int64) * STEP
            questions = load_rows(q_head, query, tokens, q_strides[2], D, BLOCK_D, STEP)
            there = row < tokens - query
            level = tl.load(lse + at + query + row, mask=there, other=0)
            p = tl.exp2(tl.dot(tile_of_k, tl.trans(questions), input_precision="ieee") * c - level[None, :])
            sees = load_mask(visible, query, key, tokens, keys, visible_strides[1], STEP, OWN, WRONG)
            p = tl.where(tl.trans(sees), p, 0.0)
            cotangent = load_rows(dy_head, query, tokens, dy_strides[2], D, BLOCK_D, STEP)
            dp = tl.dot(values, tl.trans(cotangent), input_precision="ieee")
            projection = tl.load(delta + at + query + row, mask=there, other=0)
            if WRONG == "no delta":
                projection = tl.zeros((STEP,), tl.float32)
            ds = p * (dp - projection[None, :])
            if WRONG == "dS for P":
                p = ds
            dv_sum = tl.dot(p.to(cotangent.dtype), cotangent, dv_sum, input_precision="ieee")
            dk_sum = tl.dot(ds.to(questions.dtype), questions, dk_sum, input_precision="ieee")
    if WRONG == "scale in dv too":
        dv_sum *= scale
    if WRONG == "no scale":
        scale = 1.0
    dk += batch * dk_strides[0] + kv_head * dk_strides[1]
    dv += batch * dv_strides[0] + kv_head * dv_strides[1]
    store_rows(dk, dk_sum * scale, key, keys, dk_strides[2], D, BLOCK_D, OWN)
    store_rows(dv, dv_sum, key, keys, dv_strides[2], D, BLOCK_D, OWN)
