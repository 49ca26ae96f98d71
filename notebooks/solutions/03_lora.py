# %% exercise="3.1"
def my_count(d_out, d_in, r):
    return r * (d_in + d_out)


# %% exercise="3.2"
def my_forward(x, W, A, B, scaling, p, dropout_key):
    x_tilde, dropout_vjp = (x, lambda dx: dx) if not p or dropout_key is None else dropout(x, p, dropout_key)
    h = scaling * (x_tilde @ A.T)
    y = x @ W.T + h @ B.T

    def vjp(dy):
        dh = scaling * (dy @ B)
        dA = rows(dh).T @ rows(x_tilde)
        dB = rows(dy).T @ rows(h)
        dx = dy @ W + dropout_vjp(dh @ A)
        return dx, None, dA, dB

    return y, vjp


# %% exercise="3.3"
def my_merge(W, A, B, lora_alpha):
    return W + lora_alpha / len(A) * B @ A
