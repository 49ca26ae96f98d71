# %% exercise="10.1"
def my_labels(turns):
    labels = []
    for number, turn in enumerate(turns):
        role = "assistant" if number % 2 else "user"
        header, body, end = (tokenizer.encode(text) for text in (f"<|im_start|>{role}\n", turn, "<|im_end|>\n"))
        if role == "assistant":
            mark, *behind = end
            labels += [IGNORE_INDEX] * len(header) + body + [mark] + [IGNORE_INDEX] * len(behind)
        else:
            labels += [IGNORE_INDEX] * len(header + body + end)
    return np.array(labels)


# %% exercise="10.2"
def my_packed_layout(segments):
    _, tokens = segments.shape
    slots = np.arange(tokens)
    visible = (slots <= slots[:, None]) & (segments[:, :, None] == segments[:, None, :])
    starts = (segments[:, :, None] > segments[:, None, :]).sum(axis=-1)  # how many tokens belong to earlier texts
    return visible, slots - starts


# %% exercise="10.3"
def my_accumulation(logits, labels, cut):
    n = float(max((labels != IGNORE_INDEX).sum(), 1))  # of the whole batch
    total, gradients = 0.0, []
    for part in (slice(None, cut), slice(cut, None)):
        loss, vjp = cross_entropy(logits[part], labels[part], n)
        total += loss
        gradients.append(vjp(1.0))
    return total, np.concatenate(gradients)


# %% exercise="10.4"
def my_rate(step, peak, total_steps, warmup_steps):
    if step <= warmup_steps:
        return peak * step / warmup_steps  # the first step moves
    progress = (step - warmup_steps) / (total_steps - warmup_steps)  # from 0, where the warm-up ends
    return peak * 0.5 * (1 + math.cos(math.pi * progress))
