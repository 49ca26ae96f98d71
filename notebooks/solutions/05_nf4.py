# %% exercise="5.1"
def my_quantiles(offset):
    inverse = NormalDist().inv_cdf
    positive = [inverse(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    negative = [-inverse(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    values = np.sort(np.array([*negative, 0.0, *positive]))
    return values / values.max()


# %% exercise="5.2"
def my_quantize(w, block_size):
    if not np.isfinite(w).all():
        raise ValueError("w: NaN or infinity, which no code stands for")
    numbers = w.reshape(-1).astype(np.float32)
    n = numbers.size
    padded = np.append(numbers, np.zeros(-n % block_size, np.float32)).reshape(-1, block_size)
    absmax = np.abs(padded).max(axis=1, initial=0)
    inverse = 1 / np.maximum(absmax, np.float32(1e-38))  # 1/a would be infinite, for a block of zeros too
    scaled = padded * inverse[:, None]
    codes = (scaled[..., None] > nf4.MIDPOINTS).sum(axis=-1, dtype=np.uint8).reshape(-1)[:n]
    if n % 2:
        codes = np.append(codes, np.uint8(nf4.ZERO))
    return codes[0::2] << 4 | codes[1::2], absmax


# %% exercise="5.3"
def my_dequantize(codes, absmax, shape, block_size):
    n = int(np.prod(shape))
    values = nf4.CODE[np.stack([codes >> 4, codes & 15], axis=1).reshape(-1)[:n]]
    return (values * np.repeat(absmax, block_size)[:n]).reshape(shape)
