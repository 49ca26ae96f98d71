# %% exercise="8.1"
def my_adamw(theta, gradient, m, v, step, learning_rate, beta1, beta2, eps, weight_decay):
    m = beta1 * m + (1 - beta1) * gradient
    v = beta2 * v + (1 - beta2) * gradient * gradient
    m_hat, v_hat = m / (1 - beta1**step), v / (1 - beta2**step)
    theta = (1 - learning_rate * weight_decay) * theta - learning_rate * m_hat / (np.sqrt(v_hat) + eps)
    return theta, m, v


# %% exercise="8.2"
def my_adamw8bit(
    theta,
    gradient,
    m_codes,
    m_absmax,
    v_codes,
    v_absmax,
    block_size,
    step,
    learning_rate,
    beta1,
    beta2,
    eps,
    weight_decay,
):
    if not (np.abs(gradient) <= 1e19).all():  # NaN too
        raise ValueError("the gradient has no finite square")
    m = opened_moment(m_codes, m_absmax, DYNAMIC, theta, block_size)
    v = opened_moment(v_codes, v_absmax, DYNAMIC_UNSIGNED, theta, block_size)
    theta, m, v = adamw_1(theta, gradient, m, v, step, learning_rate, beta1, beta2, eps, weight_decay)
    q_m = blockwise.quantize(m, DYNAMIC, block_size)
    q_v = blockwise.quantize(v, DYNAMIC_UNSIGNED, block_size)
    v_codes = np.maximum(q_v.codes, v.reshape(-1) > 0)  # (8.5)
    return theta, q_m.codes, q_m.absmax, v_codes.astype(np.uint8), q_v.absmax


# %% exercise="8.3"
def my_count(room, accesses):
    resident, faults, evictions = [], 0, 0
    for number in accesses:
        if number in resident:
            resident.remove(number)  # it is used now: back to the end of the line
        else:
            faults += 1
            if len(resident) == room:
                resident.pop(0)
                evictions += 1
        resident.append(number)
    return faults, evictions
