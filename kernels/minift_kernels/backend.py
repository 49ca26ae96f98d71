"""Three ways to run a function here, side by side in one process.

    "torch"        plain PyTorch operations, on any device: what a CPU tensor gets unless it asks for something else
    "triton"       the Triton kernel, compiled for the GPU that holds the tensor: what a CUDA tensor gets
    "interpreter"  the same kernel file run by Triton's interpreter, on any device: slow, for tests and for looking
                   inside a kernel with `print` and a debugger

**How one file is two things.** `@triton.jit` decides when a file is loaded: compiled, or interpreted if the setting
`triton.knobs.runtime.interpret` is on at that moment. So `load` runs a kernel file once under either setting, and both
copies live side by side. The environment variable TRITON_INTERPRET=1 is not needed, and should not be set: it turns
Triton's own library into interpreted functions for good, and then nothing can be compiled in that process. Part of
that library (`tl.max`, `tl.sum`, `tl.cdiv`, `tl.rand`) is written in Triton itself; while an interpreted kernel runs,
`_interpreted_library` puts interpreted versions in its place. Two rules for kernel files follow: they import triton and
no other kernel file, and they write `tl.max(x)`, not `x.max()`.

**What the interpreter does not show.** It runs one program after the other, so a race between programs goes unseen; it
does not notice a load or store outside of a tensor; and its bfloat16 is wrong (Triton 3.7 truncates instead of
rounding), so `choose` refuses that type. In float32 and float16 it has NumPy's arithmetic, every operation rounded.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

BACKENDS = ("torch", "triton", "interpreter")

_LIBRARY = torch.library.Library("minift", "FRAGMENT")


def choose(backend: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that was asked for, or the default for this device: Triton on CUDA (and ROCm), PyTorch elsewhere.

    Raises ValueError for an unknown name, for Triton without a GPU, and for bfloat16 in the interpreter."""
    if backend is None:
        return "triton" if device.type == "cuda" else "torch"
    if backend not in BACKENDS:
        raise ValueError(f"backend: {backend!r}, needed one of {', '.join(map(repr, BACKENDS))} or None")
    if backend == "triton" and device.type != "cuda":
        raise ValueError(f"backend: 'triton' needs CUDA tensors, found {device.type}: use 'torch' or 'interpreter'")
    if backend == "interpreter" and dtype == torch.bfloat16:
        raise ValueError("backend: 'interpreter' truncates to bfloat16 instead of rounding: use 'torch' or a GPU")
    return backend


@cache
def load(file: str, backend: str) -> ModuleType:
    """The kernel file of this dotted name, compiled ("triton") or interpreted ("interpreter")."""
    import triton

    found = importlib.util.find_spec(file)
    assert found is not None and found.origin is not None, f"no module {file}"
    spec = importlib.util.spec_from_file_location(f"{file}[{backend}]", found.origin)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = backend == "interpreter"
        spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Launch:
    """A launch that has not happened yet: the kernel, how many programs, and what they are given.

    What is compiled ahead of time (`aot.compile_launch`) is then exactly what would be launched. A kernel's first
    arguments are what it writes; so a test can put guards around them without knowing the kernel."""

    kernel: Any  # a function of a kernel file
    grid: tuple[int, ...]
    arguments: tuple
    options: dict[str, Any] = field(default_factory=dict)  # constexpr arguments, num_warps and the like
    outputs: int = 1  # how many of the first arguments are written: every element of them, exactly once
    in_place: bool = False  # whether they are read as well

    def run(self, device: torch.device) -> None:
        """On that device and its current stream. An empty grid, which CUDA refuses, launches nothing."""
        if 0 in self.grid:
            return
        with contextlib.ExitStack() as stack:
            if device.type == "cuda":
                stack.enter_context(torch.cuda.device(device))
            if type(self.kernel).__module__ == "triton.runtime.interpreter":
                stack.enter_context(_interpreted_library())
            self.kernel[self.grid](*self.arguments, **self.options)


@contextlib.contextmanager
def _interpreted_library() -> Iterator[None]:
    """While inside, the functions of triton.language that are written in Triton are interpreted ones.

    Their calls patch `triton.language.core` and leave it so; patched here first, it is as before at the end. NumPy
    does not warn of overflow and NaN, as a GPU does not."""
    from triton.language import standard
    from triton.runtime.interpreter import _patch_lang

    functions = _library_functions()
    core = _patch_lang(standard.cdiv.fn)
    for module, name, _, interpreted in functions:
        setattr(module, name, interpreted)
    try:
        with np.errstate(all="ignore"):
            yield
    finally:
        for module, name, compiled, _ in functions:
            setattr(module, name, compiled)
        core.restore()


@cache
def _library_functions() -> list[tuple[ModuleType, str, Any, Any]]:
    """(module, name, compiled, interpreted); a function that has several names is the same object under all of them."""
    import triton.experimental.gluon  # noqa: F401  (imported by Triton at a first launch; it insists on compiled ones)
    from triton import language
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    modules = (language, language.standard, language.random)
    found = [(m, name, f) for m in modules for name, f in vars(m).items() if isinstance(f, JITFunction)]
    interpreted = {f: InterpretedFunction(f.fn) for _, _, f in found}
    return [(module, name, f, interpreted[f]) for module, name, f in found]


def operator(
    schema: str,
    implementation: Callable,
    fake: Callable,
    backward: Callable | None = None,
    save: Callable | None = None,
) -> Callable:
    """Register `torch.ops.minift.<name>` for every device, so that torch.compile sees one opaque operation.

    `fake` makes the result's shape and type without its numbers. Defined directly in a library, because a call through
    `torch.library.custom_op` costs about three times as much. An opaque operation also keeps its roundings: the
    compiler cannot fuse a product in it with a sum.

    `save(ctx, inputs, output)` keeps what `backward(ctx, *cotangents)` needs, which gives a cotangent or None for every
    input. Without the two there is no gradient: the operation is a constant to autograd, or the backward pass itself.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"minift::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"minift::{name}", backward, setup_context=save, lib=_LIBRARY)
    return getattr(torch.ops.minift, name).default


def rows(x: Tensor) -> Tensor:
    """(..., d) as a matrix (N, d) whose rows' elements are neighbors in memory; without a copy where it can be."""
    matrix = x.reshape(-1, x.shape[-1])
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()


def widened(x: Tensor) -> Tensor:
    """16-bit numbers in float32, in which kernels compute; float32 and float64 as they are."""
    return x.to(torch.float32) if x.element_size() == 2 else x


def power_of_two(n: int) -> int:
    """The smallest power of two that is not less than n: what `tl.arange` can count to."""
    return 1 << max(n - 1, 0).bit_length()


def warp_size() -> int:
    """Lanes of a warp: 64 on the GPUs of AMD's data centers, for which PyTorch is built with HIP, otherwise 32."""
    return 64 if torch.version.hip else 32
