"""minift_kernels: the twin of each operation, in plain PyTorch, in Triton's interpreter, or on a GPU.

A twin is found by the operation's name: "norms.rms_norm" is `rms_norm` of minift_kernels.nn.norms, and takes tensors
for arrays. Where that is not all (dataclasses, arguments that are overwritten), ADAPTED says how to call it.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from minift.conformance import torch_functions
from minift.conformance.implementations.quiet import absent
from minift.conformance.operation import Implementation, Operation
from minift.conformance.operations import every

FOLDERS = ("nn", "quant", "peft", "optim", "models", "rlhf")
DTYPES = {
    "torch": ("float32", "float16", "float64"),
    "interpreter": ("float32", "float16"),
    "triton": ("float32", "float16"),
}


class Place(NamedTuple):
    """Where a twin runs. `dtype` is "bfloat16" if floating arrays become that."""

    backend: str
    device: str = "cpu"
    dtype: str | None = None

    def function(self, f: Any) -> Any:
        """`f` in this backend, or None. What takes no `backend` is plain PyTorch, and has nothing to interpret."""
        if f is not None and "backend" in inspect.signature(f).parameters:
            return partial(f, backend=self.backend)
        return None if self.backend == "interpreter" else f

    def plain(self, f: Any) -> Any:
        """As a function of arrays, where nothing is differentiated; None stays None."""
        return f and torch_functions.plain(f, self.device, self.dtype)

    def differentiable(self, f: Any) -> Any:
        return f and torch_functions.differentiable(f, self.device, self.dtype)


def implementations(backend: str) -> list[Implementation]:
    """One, or two on a GPU: bfloat16 has adapters of its own."""
    try:
        import torch

        import minift_kernels  # noqa: F401
    except ImportError as error:
        return [Implementation(backend, ours=True, missing=f"{absent(error)} (pip install 'minift[kernels]')")]
    if backend != "triton":
        return [Implementation(backend, _functions(Place(backend)), DTYPES[backend], ours=True)]
    if not torch.cuda.is_available():
        return [Implementation(backend, ours=True, missing="no GPU that PyTorch can use")]
    return [
        Implementation(backend, _functions(Place(backend, "cuda")), DTYPES[backend], ours=True),
        Implementation(f"{backend} bfloat16", _functions(Place(backend, "cuda", "bfloat16")), ("bfloat16",), ours=True),
    ]


def _functions(place: Place) -> dict[str, Callable]:
    """Of those operations that have a twin which runs there."""
    found = {name: _twin(operation, place) for name, operation in every().items()}
    return {name: f for name, f in found.items() if f is not None}


def _twin(operation: Operation, place: Place) -> Callable | None:
    file, name = operation.name.split(".")
    names = (f"minift_kernels.{folder}.{file}" for folder in FOLDERS)
    module = next((importlib.import_module(found) for found in names if importlib.util.find_spec(found)), None)
    if module is None:
        return None
    if operation.name in ADAPTED:
        return ADAPTED[operation.name](module, place)
    wrap = place.differentiable if operation.has_pullback else place.plain
    return wrap(place.function(getattr(module, name, None)))


def _nf4_dequantize(module: ModuleType, place: Place) -> Callable | None:
    import torch

    decode = place.function(module.dequantize)

    def f(codes, absmax, shape, block_size, dtype="float32"):
        return decode(module.NF4Tensor(codes, absmax, shape, block_size), getattr(torch, dtype))

    return place._replace(dtype=None).plain(decode and f)  # scales are float32 always


def _blockwise_dequantize(module: ModuleType, place: Place) -> Callable | None:
    import torch

    decode = place.function(module.dequantize)

    def f(codes, absmax, code, shape, block_size, dtype="float32"):
        return decode(module.BlockwiseTensor(codes, absmax, code, shape, block_size), getattr(torch, dtype))

    return place._replace(dtype=None).plain(decode and f)


def _blockwise_quantize(module: ModuleType, place: Place) -> Callable | None:
    import torch

    encode = place.function(module.quantize)

    def f(x, code, block_size):
        return encode(x.to(getattr(torch, place.dtype)) if place.dtype else x, code, block_size)

    return place._replace(dtype=None).plain(encode and f)  # the table is float32 always


def _compress(module: ModuleType, place: Place) -> Callable | None:
    return place.plain(place.function(module.compress_scales))


def _decode(module: ModuleType, place: Place) -> Callable | None:
    return place.plain(place.function(lambda *parts: module.DoubleQuantizedScales(*parts).decode()))


def _nf4_linear(module: ModuleType, place: Place) -> Callable:
    """Of a tensor of the reference, whose parts become tensors. It has kernels of its own, and takes a backend."""
    from minift_kernels.quant.double_quant import DoubleQuantizedScales

    def there(array):
        return torch_functions.tensor(array, place.device)

    def f(q, x):
        s = q.absmax
        nested = not isinstance(s, np.ndarray)
        parts = (there(s.codes), there(s.absmax), there(s.offset), s.block_size, there(s.code)) if nested else ()
        scales = DoubleQuantizedScales(*parts) if nested else there(s)
        weight = module.NF4Tensor(there(q.codes), scales, q.shape, q.block_size)
        y, vjp = place.differentiable(lambda x: weight.linear(x, backend=place.backend))(x)
        return y, lambda dy: (vjp(dy), None)

    return f


def _rope(module: ModuleType, place: Place) -> Callable | None:
    """The angles do not learn."""
    rope = place.function(module.rope)

    def f(x, cos, sin):
        angles = [torch_functions.tensor(a, place.device) for a in (cos, sin)]
        return place.differentiable(lambda x: rope(x, *angles))(x)

    return rope and f


def _clip(module: ModuleType, place: Place) -> Callable | None:
    clip = place.function(module.clip_by_global_norm)
    return clip and torch_functions.on_tensors(clip, place.device, (0,) if place.dtype else ())


def _optimizer(module: ModuleType, place: Place) -> Callable:
    return torch_functions.optimizer(module.AdamW, place.device, bool(place.dtype), backend=place.backend)


def _step_in_place(module: ModuleType, place: Place) -> Callable | None:
    step = place.function(module.adamw_2)
    return step and torch_functions.on_tensors(step, place.device, (0, 1) if place.dtype else ())


def _step(module: ModuleType, place: Place) -> Callable | None:
    step = place.function(module.adamw_1)
    return step and torch_functions.on_tensors(step, place.device, (0, 1) if place.dtype else ())


def _step_8bit(name: str) -> Callable[[ModuleType, Place], Callable | None]:
    """Codes and scales become block-wise tensors over the two dynamic maps."""

    def adapted(module: ModuleType, place: Place) -> Callable | None:
        step = place.function(getattr(module, name))

        def f(theta, gradient, *rest):
            result = step(theta, gradient, *moments_8bit(theta, *rest[:5]), *rest[5:])
            return result and (result[0], *(part for q in result[1:] for part in (q.codes, q.absmax)))

        return step and torch_functions.on_tensors(f, place.device, (0, 1) if place.dtype else ())

    return adapted


def moments_8bit(theta: Any, m_codes: Any, m_absmax: Any, v_codes: Any, v_absmax: Any, block_size: int) -> tuple:
    """m and v of tensors that they share."""
    from minift_kernels.quant import codebooks
    from minift_kernels.quant.blockwise import BlockwiseTensor

    parts = (m_codes, m_absmax, codebooks.DYNAMIC), (v_codes, v_absmax, codebooks.DYNAMIC_UNSIGNED)
    return tuple(
        BlockwiseTensor(codes, absmax, codebooks.on_device(code, theta.device), tuple(theta.shape), block_size)
        for codes, absmax, code in parts
    )


def _both_directions(module: ModuleType, place: Place) -> Callable | None:
    layers = place.function(module.bidirectional_lstm)
    return place.differentiable(layers and (lambda x, *eight: layers(x, eight[:4], eight[4:])))


def _batched(module: ModuleType, place: Place) -> Callable | None:
    forward = place.function(module.forward)

    def f(x, W, A, B, scaling, index):
        return forward(x, W, module.Stack(A, B, scaling), index)

    def without_scaling(*args):  # which does not learn, and has no cotangent
        y, vjp = place.differentiable(f)(*args)
        return y, lambda dy: vjp(dy)[:-1]

    return forward and without_scaling


def _only_what_learns(name: str, n: int) -> Callable[[ModuleType, Place], Callable | None]:
    """Of the arguments the first n have a cotangent; the others are fixed."""

    def adapt(module: ModuleType, place: Place) -> Callable | None:
        loss = place.differentiable(place.function(getattr(module, name)))

        def f(*args):
            y, vjp = loss(*args)
            return y, lambda dloss: vjp(dloss)[:n]

        return loss and f

    return adapt


ADAPTED: dict[str, Callable[[ModuleType, Place], Callable | None]] = {
    "nf4.linear": _nf4_linear,
    "rope.rope": _rope,
    "adamw.adamw_1": _step,
    "adamw.adamw_2": _step_in_place,
    "adamw.AdamW": _optimizer,
    "adamw.clip_by_global_norm": _clip,
    "adamw8bit.adamw8bit_1": _step_8bit("adamw8bit_1"),
    "adamw8bit.adamw8bit_2": _step_8bit("adamw8bit_2"),
    "batched.forward": _batched,
    "lstm.bidirectional_lstm": _both_directions,
    "ppo.minibatch_loss": _only_what_learns("minibatch_loss", 3),
    "reward_model.pairwise_loss": _only_what_learns("pairwise_loss", 2),
    "dpo.preference_loss": _only_what_learns("preference_loss", 2),
    "nf4.dequantize": _nf4_dequantize,
    "blockwise.quantize": _blockwise_quantize,
    "blockwise.dequantize": _blockwise_dequantize,
    "double_quant.compress": _compress,
    "double_quant.decode": _decode,
}
