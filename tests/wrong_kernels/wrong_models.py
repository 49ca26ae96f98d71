"""Networks in torch that are wrong in one place each: {what is wrong: {name in the twin's module: the wrong one}}."""

import torch

from minift_kernels.models import bert, gpt2, llama
from minift_kernels.nn import attention, linear, mlp, norms, pooling


def _attention(looks):
    def wrong(q, k, v, visible, **options):
        see = {
            "at padding": torch.ones_like(visible),
            "back only": visible & torch.ones_like(visible).tril(),
            "not at itself": visible & ~torch.eye(visible.shape[-1], dtype=torch.bool),
        }
        return attention.attention(q, k, v, see[looks], **options)

    return {"attention": wrong}


def _heads_mixed(q, k, v, visible, **options):
    """What joins the heads then reads them in another order."""
    return attention.attention(q, k, v, visible, **options).flip(1)


def _no_bias(x, weight, bias=None, **options):
    return linear.linear(x, weight, **options)


def _bias_that_does_not_learn(x, weight, bias=None, **options):
    detached = bias.detach() if isinstance(bias, torch.Tensor) else bias
    return linear.linear(x, weight, detached, **options)


def _no_dropout(x, weight, bias=None, *, dropout_key=None, **options):
    return linear.linear(x, weight, bias, **options)


def _other_eps(x, weight, bias, eps, **options):
    return norms.layer_norm(x, weight, bias, 1e-12, **options)


def _no_types(params, tokens, token_types, *rest, right=bert._embeddings):
    return right(params, tokens, None, *rest)


def _from_position_one(before, tokens, segments=None, right=gpt2.slots_and_positions):
    slots, positions = right(before, tokens, segments)
    return slots, positions + 1


def _no_restart(before, tokens, segments=None, right=gpt2.slots_and_positions):
    return right(before, tokens)


def _texts_see_each_other(positions, keys, segments=None):
    return attention.causal_mask(positions, keys)


def _looks_ahead(positions, keys, segments=None):
    return attention.causal_mask(positions + 1, keys, segments)


def _pool(token):
    def wrong(params, hidden, *, backend=None, right=bert.pool):
        return right(params, hidden[:, token:], backend=backend)

    return {"pool": wrong}


def _without(option):
    """A module whose trunk is not told something."""

    class Deaf:
        Config, HEAD, POOLER, pool = llama.Config, llama.HEAD, bert.POOLER, staticmethod(bert.pool)

        @staticmethod
        def backbone(params, tokens, config, **options):
            module = llama if isinstance(config, llama.Config) else bert
            return module.backbone(params, tokens, config, **(options | {option: None}))

    return Deaf


_EVERYWHERE = {
    "heads in another order": {"attention": _heads_mixed},
    "no bias": {"linear": _no_bias},
    "a bias that does not learn": {"linear": _bias_that_does_not_learn},
    "no dropout": {"linear": _no_dropout},
    "one key for every layer": {"fold_in": lambda key, index: key},
    "another ε": {"layer_norm": _other_eps},
}
BERT = _EVERYWHERE | {
    "padding is looked at": _attention("at padding"),
    "causal": _attention("back only"),
    "no token sees itself": _attention("not at itself"),
    "the tanh form of GELU": {"gelu": mlp.gelu_tanh},
    "no token types": {"_embeddings": _no_types},
    "the second token is pooled": _pool(1),
    "a mean over padding": {"mean_pool": lambda x, lengths: x.mean(dim=1)},
    "embeddings of any length": {"unit_length": lambda x: x},
}
GPT2 = _EVERYWHERE | {
    "the exact form of GELU": {"gelu_tanh": mlp.gelu},
    "positions from one": {"slots_and_positions": _from_position_one},
    "positions of a packed row go on": {"slots_and_positions": _no_restart},
    "texts of a packed row see each other": {"causal_mask": _texts_see_each_other},
    "a token sees the next": {"causal_mask": _looks_ahead},
    "one block for all": {"block_name": lambda layer: "transformer.h.0."},
    "a head that is not tied": {"head_name": lambda config: gpt2.POSITIONS},
}
CLASSIFIER = {
    "the last column": {"last_token": lambda x, lengths: x[:, -1]},
    "the mean": {"last_token": pooling.mean_pool},
    "no bias": {"linear": _no_bias},
    "a head that does not learn": {
        "linear": lambda x, weight, bias=None, **options: linear.linear(x, weight.detach(), bias, **options)
    },
    "no dropout": {"linear": _no_dropout, "llama": _without("dropout_key"), "bert": _without("dropout_key")},
    "padding is looked at": {"bert": _without("lengths")},
}
POOLING = {
    "mean_pool": {
        "padding counts": lambda x, n: x.nan_to_num().sum(1) / x.shape[1],
        "padding is multiplied away": lambda x, n: (x * pooling._real(x, n)[..., None]).sum(1) / n[:, None],
        "the first row's length": lambda x, n: pooling.mean_pool(x, n) * n[:, None] / n[0],
        "lengths do not divide the gradient": lambda x, n: (
            pooling.mean_pool(x, n).detach() + (s := x.nan_to_num().sum(1)) - s.detach()
        ),
    },
    "last_token": {
        "the last column": lambda x, n: x[:, -1],
        "one before": lambda x, n: x[torch.arange(len(x)), n - 2],
        "a gradient for all": lambda x, n: pooling.last_token(x, n) + (s := x.nan_to_num().sum(1)) - s.detach(),
    },
    "unit_length": {
        "not the root": lambda x, eps: x / x.square().sum(-1, keepdim=True).clamp(min=eps),
        "no least length": lambda x, eps: x / x.norm(dim=-1, keepdim=True),
        "a length that is a constant": lambda x, eps: x / x.detach().norm(dim=-1, keepdim=True).clamp(min=eps),
        "a length that learns below ε": lambda x, eps: x / (x.square().sum(-1, keepdim=True) + eps**2).sqrt(),
    },
}
