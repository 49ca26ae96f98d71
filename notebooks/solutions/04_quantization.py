# %% exercise="4.1"
def my_quantize(x, code, block_size):
    if not np.isfinite(x).all():
        raise ValueError("x: NaN or infinity, which no code stands for")
    flat = x.reshape(-1).astype(np.float32)
    blocks = np.append(flat, np.zeros(-flat.size % block_size, np.float32)).reshape(-1, block_size)
    absmax = np.abs(blocks).max(axis=1, initial=0)
    scaled = blocks * (1 / np.maximum(absmax, np.float32(1e-38)))[:, None]
    midpoints = (code[:-1] + code[1:]) / 2
    codes = np.searchsorted(midpoints, scaled, side="left")
    return codes.reshape(-1)[: flat.size].astype(np.uint8), absmax


# %% exercise="4.2"
def my_affine_round_trip(x, bits):
    least = x.min()
    step = np.float32((x.max() - least) / (2**bits - 1))  # stored, so rounded to float32
    codes = np.rint((x - np.float64(least)) / (step or 1))
    return codes * np.float64(step) + least


# %% exercise="4.3"
def my_int8_product(x, W, threshold):
    q, a, O = int8_vectorwise.quantize_rows(x, threshold)
    p, b, _ = int8_vectorwise.quantize_rows(W)
    y = np.outer(a, b) / 127**2 * (q.astype(np.int32) @ p.T.astype(np.int32))
    w_hat = p * b[:, None] / 127
    return y + x[:, O] @ w_hat[:, O].T
