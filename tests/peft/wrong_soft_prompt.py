"""Soft prompts, wrong in the ways they have been wrong in published code: each must be rejected by a property.

A wrong version is a context in which one piece of the right one is replaced.
"""

import contextlib
from unittest import mock

import numpy as np

from minift.models import llama
from minift.nn.attention import causal_mask
from minift.nn.lstm import bidirectional_lstm
from minift.nn.rope import frequencies, rope, rotations
from minift.peft import p_tuning, prefix_tuning, reparameterization, soft_prompt
from minift.peft.reparameterization import EMBEDDING

right = contextlib.nullcontext
prepend, fold, feed_forward = soft_prompt.prepend, soft_prompt.fold, reparameterization.feed_forward
layout, backbone, split = llama._layout, llama.backbone, prefix_tuning.split


def position_offset_forgotten():
    """The text starts at position 0 behind a prefix (transformers #41696, ChatGLM3 #359)."""

    def wrong(x, config, segments, prefix, cache):
        made = layout(x, config, segments, prefix, cache)
        if prefix is None:
            return made
        at = np.broadcast_to(np.arange(x.shape[1]), x.shape[:2])
        omega = frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        return llama._Layout(*rotations(at, omega, x.dtype), made.visible)

    return mock.patch.object(llama, "_layout", wrong)


def mask_ignores_the_prefix():
    """It was made for the text alone: the last p keys are never seen."""

    def wrong(positions, keys, segments=None):
        return causal_mask(positions - (keys - positions.shape[1]), keys, segments)

    return mock.patch.object(llama, "causal_mask", wrong)


def prefix_hidden():
    def wrong(positions, keys, segments=None):
        visible = causal_mask(positions, keys, segments).copy()
        visible[..., : keys - positions.shape[1]] = False
        return visible

    return mock.patch.object(llama, "causal_mask", wrong)


def prefix_is_rotated():
    """Keys of a cache are rotated already."""

    def wrong(table, kv_heads, head_dim):
        made = split(table, kv_heads, head_dim).copy()
        at = np.tile(np.arange(len(table)), (len(made), 1))
        cos, sin = rotations(at, frequencies(head_dim, 10000.0), made.dtype)
        made[:, 0] = rope(made[:, 0], cos, sin)[0]
        return made

    return mock.patch.object(prefix_tuning, "split", wrong)


def values_before_keys():
    return mock.patch.object(prefix_tuning, "split", lambda *args: split(*args)[:, ::-1])


def all_keys_before_all_values():
    """(2, L) read for (L, 2)."""

    def wrong(table, kv_heads, head_dim):
        layers = table.shape[1] // (2 * kv_heads * head_dim)
        return table.reshape(len(table), 2, layers, kv_heads, head_dim).transpose(2, 1, 3, 0, 4)

    return mock.patch.object(prefix_tuning, "split", wrong)


def labels_shifted():
    """The hidden states of the text are taken one position too early, from the prompt's last on."""

    def wrong(params, inputs, config, **options):
        hidden, vjp = backbone(params, inputs, config, **options)
        if not soft_prompt.length(params):
            return hidden, vjp
        return np.roll(hidden, 1, axis=1), lambda dhidden: vjp(np.roll(dhidden, -1, axis=1))

    return mock.patch.object(llama, "backbone", wrong)


def _prepend(*, order="before", over_batch="sum", gradient_of="prompt", every_pass=False, lengths_grow=True, dx="text"):
    def wrong(params, x, kv_heads, head_dim, *, lengths=None, segments=None, prefix=None, cache=None):
        which = soft_prompt.kind(params)
        if which in (None, "PREFIX_TUNING") or (cache is not None and cache.lengths.any() and not every_pass):
            x, lengths, prefix, vjp = prepend(
                params, x, kv_heads, head_dim, lengths=lengths, segments=segments, prefix=prefix, cache=cache
            )
            return x, lengths, prefix, vjp
        made, encode_vjp = soft_prompt.encode(params)
        p, batch = len(made), len(x)
        repeated = np.broadcast_to(made, (batch, *made.shape))
        grown = None if lengths is None else lengths + (p if lengths_grow else 0)

        def vjp(dx_, _):
            dprompt = dx_[:, :p] if gradient_of == "prompt" else dx_[:, -p:]
            dmade = {"sum": dprompt.sum(0), "mean": dprompt.mean(0), "first": dprompt[0]}[over_batch]
            return (dx_[:, p:] if dx == "text" else dx_[:, : dx_.shape[1] - p]), None, encode_vjp(dmade)

        return np.concatenate([repeated, x] if order == "before" else [x, repeated], axis=1), grown, None, vjp

    return mock.patch.object(soft_prompt, "prepend", wrong)


def prompt_behind_the_text():
    return _prepend(order="behind")


def gradient_not_summed_over_the_batch():
    return _prepend(over_batch="first")


def gradient_averaged_over_the_batch():
    return _prepend(over_batch="mean")


def gradient_of_the_last_tokens():
    return _prepend(gradient_of="text")


def prompt_before_every_new_token():
    return _prepend(every_pass=True)


def lengths_without_the_prompt():
    return _prepend(lengths_grow=False)


def text_gets_the_prompts_gradient():
    return _prepend(dx="prompt")


def network_kept_after_folding():
    """The table takes the place of the embedding, and goes through the network a second time."""

    def wrong(params):
        if EMBEDDING not in params:
            return fold(params)
        made, _ = soft_prompt.encode(params)
        if made.shape != params[EMBEDDING].shape:
            return params | {EMBEDDING: made[:, : params[EMBEDDING].shape[1]].copy()}
        return params | {EMBEDDING: made.copy()}

    return mock.patch.object(soft_prompt, "fold", wrong)


def embedding_kept_after_folding():
    """The network is dropped, and its input kept in place of its output."""

    def wrong(params):
        folded, name = fold(params), prefix_tuning.TABLE
        if EMBEDDING in params and name not in folded:
            return folded | {"prompt_embeddings": soft_prompt.dense(params[EMBEDDING])}
        return folded | {name: folded[name] * 0.5} if EMBEDDING in params else folded

    return mock.patch.object(soft_prompt, "fold", wrong)


def _lstm(change):
    def wrong(x, ahead, back):
        return bidirectional_lstm(x, change(ahead), change(back))

    return mock.patch.object(p_tuning, "bidirectional_lstm", wrong)


def gates_in_another_order():
    return _lstm(lambda weights: tuple(np.concatenate(np.split(w, 4)[:2] + np.split(w, 4)[:1:-1]) for w in weights))


def bias_twice():
    return _lstm(lambda weights: (*weights[:2], weights[2], weights[2]))


def _feed_forward(*, activation=None, last=False):
    def wrong(arrays, path, x, phi):
        made, vjp = feed_forward(arrays, path, x, activation or phi)
        return (np.maximum(made, 0), lambda dy: vjp(dy * (made > 0))) if last else (made, vjp)

    stack = contextlib.ExitStack()
    for module in (p_tuning, prefix_tuning):
        stack.enter_context(mock.patch.object(module, "feed_forward", wrong))
    return stack


def tanh_everywhere():
    return _feed_forward(activation="tanh")


def relu_everywhere():
    return _feed_forward(activation="relu")


def activation_after_the_last_layer():
    return _feed_forward(last=True)


MODEL = (
    position_offset_forgotten,
    mask_ignores_the_prefix,
    prefix_hidden,
    prefix_is_rotated,
    values_before_keys,
    all_keys_before_all_values,
    labels_shifted,
    prompt_behind_the_text,
    gradient_not_summed_over_the_batch,
    gradient_averaged_over_the_batch,
    gradient_of_the_last_tokens,
    prompt_before_every_new_token,
    lengths_without_the_prompt,
    text_gets_the_prompts_gradient,
)
ENCODER = (
    network_kept_after_folding,
    embedding_kept_after_folding,
    gates_in_another_order,
    bias_twice,
    tanh_everywhere,
    relu_everywhere,
    activation_after_the_last_layer,
)
