"""Choosing and appending tokens, wrong in the usual ways: each version must be rejected by a property."""

import numpy as np

from minift.models import llama
from minift.models.generation import choose
from nn.wrong_nn import variants


def _probabilities(
    logits,
    temperature=1.0,
    top_k=None,
    top_p=None,
    *,
    tempering="divide",
    k_off=0,
    crossing="kept",
    order="k, p",
    renormalized=True,
    ascending=False,
    ties="lower id",
    at_least_one=True,
    low=False,
    in_place=False,
    reached=False,
    checks=True,
    batch=False,
):
    if checks and ((top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1)):
        raise ValueError("top_k or top_p")
    z = logits / temperature if tempering == "divide" else logits * temperature if tempering == "multiply" else logits
    if in_place:
        logits -= logits.max(-1, keepdims=True)
    z = z.astype(np.float16 if low else np.float64)
    top = z.max() if batch else z.max(-1, keepdims=True)
    p = np.exp(z - top).astype(np.float64)
    p /= p.sum() / len(p) if batch else p.sum(-1, keepdims=True)
    out = np.zeros_like(p)
    for row, kept in zip(p, out, strict=True):
        key = row if ascending else -row
        ids = sorted(range(len(row)), key=lambda i: (key[i], -i if ties == "higher id" else i))
        k = len(row) if top_k is None else max(top_k + k_off, 1)
        ranked = ids[:k] if order == "k, p" else ids
        if ties == "all" and top_k is not None:
            ranked = [i for i in ids if row[i] >= row[ids[min(k, len(ids)) - 1]]]
        total = sum(row[i] for i in ranked) if renormalized and order == "k, p" else 1.0
        before, chosen = 0.0, []
        for i in ranked:
            share = row[i] / total
            full = before > (top_p or 2) if reached else before >= (top_p or 2)
            if crossing == "dropped":
                full = before + share > (top_p or 2) and (chosen or not at_least_one)
            if top_p is not None and full:
                break
            chosen.append(i)
            before += share
        if order != "k, p":
            chosen = chosen[:k]
        for i in chosen:
            kept[i] = row[i]
    return out / out.sum(-1, keepdims=True) if renormalized else out


PROBABILITIES = variants(
    _probabilities,
    tempering=("multiply", "none"),
    k_off=(1, -1),
    crossing="dropped",
    order="p, k",
    renormalized=False,
    ascending=True,
    ties=("higher id", "all"),
    low=True,
    in_place=True,
    reached=True,
    checks=False,
    batch=True,
)


def _sample(p, rng, *, same_u=False, off=0, unnormalized=False, strict=False, greedy=False, own=False, squared=False):
    generator = np.random.default_rng(0) if own else rng
    u = generator.random((1 if same_u else len(p), 1))
    if squared:
        u = u * u
    cumulated = np.cumsum(p, axis=-1)
    u = u if unnormalized else u * cumulated[:, -1:]
    index = ((cumulated < u) if strict else (cumulated <= u)).sum(-1) + off
    return p.argmax(-1) if greedy else np.clip(index, 0, p.shape[-1] - 1)


SAMPLE = variants(
    _sample, same_u=True, off=(1, -1), unnormalized=True, strict=True, greedy=True, own=True, squared=True
)


_seen: dict = {}


def last_logits(params, text, config, prefix=None):
    """Logits behind the last token by a full forward pass, remembered: the loops below ask for the same texts."""
    key = id(params), tuple(text), None if prefix is None else prefix.tobytes()
    if key not in _seen:
        y, _ = llama.forward(params, np.array([text]), config, prefix=prefix)
        _seen[key] = params, y[0, -1]  # keeps params alive, and so its id
    return _seen[key][1]


def _generate(
    params,
    tokens,
    config,
    max_new_tokens=64,
    temperature=0.0,
    rng=None,
    *,
    stop_tokens=(),
    lengths=None,
    prefix=None,
    top_k=None,
    top_p=None,
    last="real",
    after_stop="repeat",
    ends=True,
    more=0,
    window=None,
    fresh=False,
    drop_prefix=False,
    keep_prompt=True,
    wrong_prompt=False,
    ignore_top=False,
):
    """Without a cache: the whole text again for every token."""
    rows = [list(row[: (len(row) if lengths is None else n)]) for row, n in
            zip(tokens.tolist(), [0] * len(tokens) if lengths is None else lengths.tolist(), strict=True)]  # fmt: skip
    if any(not row for row in rows):
        raise ValueError("a prompt is empty")
    padded = [list(row) for row in tokens.tolist()]
    stopped, columns = [None] * len(rows), []
    for _ in range(max_new_tokens + more):
        logits = []
        for row, wide in zip(rows, padded, strict=True):
            text = (row if last == "real" else wide)[-window if window else None :]
            logits.append(last_logits(params, text, config, None if drop_prefix else prefix))
        if ignore_top:
            top_k = top_p = None
        chosen = choose(np.array(logits), temperature, np.random.default_rng(0) if fresh and rng else rng, top_k, top_p)
        column = []
        for b, token in enumerate(chosen.tolist()):
            if stopped[b] is not None and after_stop == "repeat":
                token = stopped[b]
            if stopped[b] is not None and after_stop == "zero":
                token = 0
            if token in stop_tokens and stopped[b] is None:
                stopped[b] = token
            rows[b].append(token)
            padded[b].append(token)
            column.append(token)
        columns.append(column)
        if ends and all(s is not None for s in stopped):
            break
    new = np.array(columns, tokens.dtype).T.reshape(len(rows), -1)
    given = np.sort(tokens) if wrong_prompt else tokens
    return np.concatenate([given, new], axis=1) if keep_prompt else new


GENERATE = variants(
    _generate,
    last="padded",
    after_stop=("zero", "goes on"),
    ends=False,
    more=(1, -1),
    window=2,
    fresh=True,
    drop_prefix=True,
    keep_prompt=False,
    wrong_prompt=True,
    ignore_top=True,
)
