# %% exercise="1.1"
def my_rms_norm(x, weight, eps):
    inv_rms = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
    x_hat = x * inv_rms
    y = x_hat * weight

    def vjp(dy):
        dx_hat = dy * weight
        dx = inv_rms * (dx_hat - x_hat * np.mean(dx_hat * x_hat, axis=-1, keepdims=True))  # rms depends on x too
        dweight = (dy * x_hat).reshape(-1, x.shape[-1]).sum(axis=0)
        return dx, dweight

    return y, vjp


# %% exercise="1.2"
def my_rope(x, cos, sin):
    cos, sin = cos[:, None], sin[:, None]  # (batch, 1, tokens, d/2): the same for every head

    def turn(x, sin):
        x1, x2 = np.split(x, 2, axis=-1)
        return np.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)

    return turn(x, sin), lambda dy: turn(dy, -sin)


# %% exercise="1.3"
def my_attention(q, k, v, visible):
    group = q.shape[1] // k.shape[1]
    scale = 1 / math.sqrt(q.shape[-1])
    keys, values = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)  # heads 0, 0, 1, 1
    scores = q @ keys.swapaxes(-1, -2) * scale
    scores = np.where(visible[:, None], scores, q.dtype.type(-np.inf))
    top = scores.max(axis=-1, keepdims=True)
    e = np.exp(scores - np.where(np.isneginf(top), 0, top))
    total = e.sum(axis=-1, keepdims=True)
    p = e / np.where(total == 0, 1, total)  # a token that sees nothing

    def vjp(dy):
        def shared(x):  # heads that read the same keys add up what they say of them
            return x.reshape(*k.shape[:2], group, *x.shape[2:]).sum(axis=2)

        dp = dy @ values.swapaxes(-1, -2)
        dscores = p * (dp - np.sum(p * dp, axis=-1, keepdims=True))
        return dscores @ keys * scale, shared(dscores.swapaxes(-1, -2) @ q) * scale, shared(p.swapaxes(-1, -2) @ dy)

    return p @ values, vjp


# %% exercise="1.4"
def my_cross_entropy(logits, labels, normalizer):
    counts = labels != IGNORE_INDEX
    target = np.where(counts, labels, 0)[..., None]
    if ((target < 0) | (target >= logits.shape[-1])).any():
        raise ValueError(f"labels: needed 0 to {logits.shape[-1] - 1} or {IGNORE_INDEX}")
    n = logits.dtype.type(max(counts.sum(), 1) if normalizer is None else normalizer)
    shifted = logits - logits.max(axis=-1, keepdims=True)  # nothing overflows
    total = np.exp(shifted).sum(axis=-1, keepdims=True)
    log_p = np.take_along_axis(shifted, target, axis=-1) - np.log(total)
    loss = -np.where(counts, log_p[..., 0], 0).sum() / n

    def vjp(dloss):
        one_hot = np.arange(logits.shape[-1]) == target
        share = logits.dtype.type(dloss) / n
        return np.where(counts[..., None], (np.exp(shifted) / total - one_hot) * share, logits.dtype.type(0))

    return loss, vjp
