# %% exercise="11.1"
def my_loss(chosen, rejected, margin=None, normalizer=None):
    d = chosen - rejected if margin is None else chosen - rejected - margin
    n = max(len(d), 1) if normalizer is None else normalizer
    loss = np.logaddexp(0, -d).sum() / d.dtype.type(n)  # log(1 + e^−d) without e^−d

    def vjp(dloss):
        dd = -np.exp(-np.logaddexp(0, d)) * d.dtype.type(dloss / n)  # −σ(−d)
        return dd, -dd, None

    return loss, vjp


# %% exercise="11.2"
def my_last_token(x, lengths):
    return x[np.arange(len(x)), lengths - 1]


# %% exercise="11.3"
def my_ranking_loss(rewards, ranks):
    total = 0.0
    for row, rank in zip(rewards, ranks, strict=True):
        pairs = [(i, j) for i in range(len(row)) for j in range(len(row)) if rank[i] < rank[j]]
        if pairs:
            total += np.mean([np.logaddexp(0, -(row[i] - row[j])) for i, j in pairs])
    return np.float32(total / len(rewards))
