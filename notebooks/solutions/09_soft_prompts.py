# %% exercise="9.1"
def my_count(p, layers, query_heads, kv_heads, head_dim):
    return 2 * p * layers * kv_heads * head_dim  # a key and a value; what query heads share is stored once


# %% exercise="9.2"
def my_prepend(prompt, x, lengths, dy):
    p = len(prompt)
    y = np.concatenate([np.broadcast_to(prompt, (len(x), *prompt.shape)), x], axis=1)
    dx, dprompt = dy[:, p:], dy[:, :p].sum(axis=0)  # every text begins with the same numbers
    return y, lengths + p, dx, dprompt


# %% exercise="9.3"
def my_layout(p, tokens):
    positions = p + np.arange(tokens)
    visible = np.tril(np.ones((tokens, p + tokens), bool), k=p)
    return positions, visible


# %% exercise="9.4"
def my_lstm(x, W_ih, W_hh, b_ih, b_hh):
    h, c = np.zeros((2, len(x), W_hh.shape[1]), x.dtype)
    steps = []
    for t in range(x.shape[1]):
        i, f, g, o = np.split(x[:, t] @ W_ih.T + b_ih + h @ W_hh.T + b_hh, 4, axis=-1)
        i, f, g, o = sigmoid(i), sigmoid(f), np.tanh(g), sigmoid(o)
        h_before, c_before = h, c
        c = f * c + i * g
        h = o * np.tanh(c)
        steps.append((i, f, g, o, h_before, c_before, c, h))
    y = np.stack([step[-1] for step in steps], axis=1) if steps else np.zeros((*x.shape[:2], W_hh.shape[1]), x.dtype)

    def vjp(dy):
        dx, dW_ih, dW_hh, db = np.zeros_like(x), np.zeros_like(W_ih), np.zeros_like(W_hh), np.zeros_like(b_ih)
        dh, dc = np.zeros((2, len(x), W_hh.shape[1]), x.dtype)
        for t in reversed(range(x.shape[1])):
            i, f, g, o, h_before, c_before, c, _ = steps[t]
            dh = dy[:, t] + dh  # h goes to the output and to the next step
            dc = dc + dh * o * (1 - np.tanh(c) ** 2)
            di, df, dg = dc * g * i * (1 - i), dc * c_before * f * (1 - f), dc * i * (1 - g * g)
            do = dh * np.tanh(c) * o * (1 - o)
            da = np.concatenate([di, df, dg, do], axis=-1)
            dx[:, t] = da @ W_ih
            dW_ih += da.T @ x[:, t]
            dW_hh += da.T @ h_before
            db += da.sum(axis=0)
            dh, dc = da @ W_hh, dc * f
        return dx, dW_ih, dW_hh, db, db.copy()

    return y, vjp
