# %% exercise="2.1"
from minift.nn.linear import linear


def my_head_gradient(tokens):
    hidden, _ = llama.backbone(small, tokens[None], small_config)
    logits, linear_vjp = linear(hidden[:, :-1], small[llama.EMBEDDING])
    _, loss_vjp = cross_entropy(logits, tokens[None, 1:])
    _, dweight, _ = linear_vjp(loss_vjp(1.0))
    return dweight  # what the input table would have added is left out


# %% exercise="2.2"
def my_adamw(theta, gradient, m, v, step, learning_rate, beta1, beta2, eps, weight_decay):
    m = beta1 * m + (1 - beta1) * gradient
    v = beta2 * v + (1 - beta2) * gradient**2
    m_hat, v_hat = m / (1 - beta1**step), v / (1 - beta2**step)
    decayed = (1 - learning_rate * weight_decay) * theta
    return decayed - learning_rate * m_hat / (np.sqrt(v_hat) + eps), m, v


# %% exercise="2.3"
def my_clip(gradients, max_norm):
    norm = math.sqrt(sum(float(np.vdot(g, g)) for g in gradients.values()))  # of all of them together
    if not math.isfinite(norm):
        broken = [name for name, g in gradients.items() if not np.isfinite(g).all()] or ["the sum of squares"]
        raise ValueError(f"the gradient is not finite, first in {broken[0]}: lower the learning rate")
    if norm <= max_norm:
        return gradients, norm
    return {name: g * g.dtype.type(max_norm / norm) for name, g in gradients.items()}, norm


# %% exercise="2.4"
def my_bill(method, size, r):
    total, learned = counts(method, size, r)
    width = 4 if method == "lora" else 2  # bytes of a number that learns, and of its gradient
    adapters = width * learned if method == "lora" else 0
    return 2 * total + adapters + width * learned + 8 * learned
