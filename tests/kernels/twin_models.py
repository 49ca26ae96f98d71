"""What the twin of a network must satisfy: the reference's value and every gradient, from the same parameters.

In float64 two orders of summation differ by the network's condition times 2⁻⁵³. The condition is measured on the spot,
as in tests/models/test_bert.py: how far float32 moves the reference's own result, times 2⁻²⁹ (the ratio of the
roundoffs), times 16.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from minift.nn.weight import Frozen, replace, trainable
from minift.peft import lora, qlora
from minift.peft.lora import LoRA
from minift.peft.tuned import Tuned
from minift_kernels.nn import weight
from minift_kernels.params import from_numpy


def cast(params, dtype):
    """The same parameters in this type; codes stay codes, so a LoRA over NF4 is exact in both."""

    def one(w):
        match w:
            case np.ndarray():
                return w.astype(dtype)
            case Frozen():
                return Frozen(w.array.astype(dtype))
            case LoRA():
                return dataclasses.replace(w, base=one(w.base), A=w.A.astype(dtype), B=w.B.astype(dtype))
            case Tuned():
                return dataclasses.replace(w, base=one(w.base), array=w.array.astype(dtype))
        return w

    return {name: one(w) for name, w in params.items()}


def kinds(target_modules, saved, learning):
    """{name: params -> params}: all that may learn in a network. Adapters have dropout and do something: B is not 0."""

    def adapted(params):
        rng = np.random.default_rng(1)
        carried = lora.attach(params, target_modules, 3, 7, rng=rng, lora_dropout=0.25, modules_to_save=[saved])
        return replace(carried, {n: a + 0.2 * rng.standard_normal(a.shape) for n, a in trainable(carried).items()})

    def partly(params):
        return {n: w if n.startswith(learning) else Frozen(w) for n, w in params.items()}

    return {"full": dict, "partly": partly, "lora": adapted, "qlora": lambda params: adapted(qlora.quantize(params))}


def tensor(x):
    return torch.from_numpy(np.array(x))


def agree(found, expected, low, what, of=16 * 2.0**-29):
    """`found` is `expected`, up to what float32 did to `low`; `of`: how much of that."""
    found = found.detach().numpy() if isinstance(found, torch.Tensor) else found
    assert low.dtype == np.float32 and expected.dtype == np.float64, what
    assert found.shape == expected.shape, f"{what}: {found.shape}, needed {expected.shape}"
    allowed = of * np.abs(expected - low.astype(float)).max(initial=1e-12)
    error = np.abs(found - expected).max(initial=0)
    assert error <= allowed, f"{what}: off by {error:.3g} where {allowed:.3g} is allowed"


@dataclasses.dataclass(frozen=True)
class Expected:
    """What the reference says: `ours(params) -> value, vjp`, in float64 and in float32. Where `real` is False nothing
    is promised, and nothing is asked for."""

    ours: Callable[[Any], tuple[np.ndarray, Callable]]
    params: dict[str, Any]
    real: np.ndarray | None = None

    def __call__(self, theirs, dtype=np.float64, of=16 * 2.0**-29):
        """`theirs(params) -> value` of torch is the same, with every gradient."""
        value, low, dy, gradients, low_gradients = self.results
        there = from_numpy(cast(self.params, dtype), dtype=torch.from_numpy(np.zeros(0, dtype)).dtype)
        found = theirs(there)
        seen = slice(None) if self.real is None else self.real
        agree(found.detach().numpy()[seen], value[seen], low[seen], "value", of)
        learned = weight.trainable(there)
        results = torch.autograd.grad(found, list(learned.values()), tensor(dy).to(found.dtype), allow_unused=True)
        reached = {name: gradient for name, gradient in zip(learned, results, strict=True) if gradient is not None}
        assert reached.keys() == gradients.keys(), reached.keys() ^ gradients.keys()
        for name, gradient in reached.items():
            agree(gradient, gradients[name], low_gradients[name], name, of)

    @functools.cached_property
    def results(self):
        (value, vjp), (low, low_vjp) = (self.ours(cast(self.params, dtype)) for dtype in (np.float64, np.float32))
        dy = np.random.default_rng(len(self.params)).standard_normal(value.shape).astype(np.float32)
        dy = dy if self.real is None else dy * self.real[..., None]
        return value, low, dy, vjp(dy.astype(float)), low_vjp(dy)


def survivors(module, versions, properties, monkeypatch):
    """Names of wrong versions ({name: {attribute of the module: wrong}}) that satisfy all of the properties, which the
    module as it stands must."""
    for holds in properties:
        holds()
    alive = []
    for name, replaced in versions.items():
        with monkeypatch.context() as patch:
            for attribute, wrong in replaced.items():
                assert hasattr(module, attribute)
                patch.setattr(module, attribute, wrong)
            for holds in properties:
                try:
                    holds()
                except AssertionError:
                    break
            else:
                alive.append(name)
    return alive
