# %% exercise="13.1"
@interpreted
def my_norm_kernel(y, x, weight, x_stride, n_features, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    feature = tl.arange(0, BLOCK)
    inside = feature < n_features
    values = tl.load(x + row * x_stride + feature, mask=inside, other=0).to(tl.float32)
    rho = 1 / tl.sqrt(tl.sum(values * values, axis=0) / n_features + eps)
    result = values * rho * tl.load(weight + feature, mask=inside, other=0).to(tl.float32)
    tl.store(y + row * n_features + feature, result.to(y.dtype.element_ty), mask=inside)


# %% exercise="13.2"
@interpreted
def my_dequantize_kernel(out, codes, absmax, table, n, n_bytes, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * (TILE // 2) + tl.arange(0, TILE // 2)
    byte = tl.load(codes + at, mask=at < n_bytes, other=0)
    scale = tl.load(absmax + 2 * at // BLOCK_SIZE, mask=at < n_bytes, other=0)
    tl.store(out + 2 * at, tl.load(table + (byte >> 4)) * scale, mask=2 * at < n)
    tl.store(out + 2 * at + 1, tl.load(table + (byte & 15)) * scale, mask=2 * at + 1 < n)


# %% exercise="13.3"
@interpreted
def my_first_of_tile(program, TILE: tl.constexpr):
    return program.to(tl.int64) * TILE
