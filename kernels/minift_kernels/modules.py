"""LoRA, NF4 and both as layers of PyTorch, for models that are built of `torch.nn.Module`.

A module saves, moves and trains only what it registers. So A and B are parameters here, codes and scales are buffers,
and the dataclass that multiplies (`LoRA`, `NF4Tensor`) is made of them in each `forward`. Names in a state dict are
PEFT's: `lora_A.weight`, `lora_B.weight`, and the base's own behind `base_layer.`.

    layer = QLoRALinear.from_linear(linear, r=16, lora_alpha=32)      # 4 bits, and a fresh adapter
    model.to("cuda", torch.bfloat16)                                  # codes and scales keep their bytes
    y = layer(x, dropout_key)                                         # dropout only in training and with a key
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from minift_kernels.nn.weight import Frozen
from minift_kernels.peft.lora import LoRA
from minift_kernels.quant import double_quant, nf4
from minift_kernels.quant.double_quant import DoubleQuantizedScales
from minift_kernels.quant.nf4 import NF4Tensor, Scales

__all__ = ["LoRALinear", "NF4Linear", "QLoRALinear"]

SCALES = ("absmax", "nested_absmax", "nested_code", "offset")  # float32, but for absmax where the others are there


class NF4Linear(nn.Module):
    """y = x Ŵᵀ + bias, with Ŵ in 4 bits. `from_linear` quantizes a layer, `from_weight` takes an NF4Tensor."""

    codes: Tensor
    absmax: Tensor  # float32 scales, or their codes
    nested_absmax: Tensor | None
    nested_code: Tensor | None
    offset: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: NF4Tensor, bias: Tensor | None = None, *, backend: str | None = None):
        super().__init__()
        if len(weight.shape) != 2:
            raise ValueError(f"weight: shape {tuple(weight.shape)}, needed (out, in)")
        self.out_features, self.in_features = weight.shape
        self.block_size, self.backend = weight.block_size, backend
        s = weight.absmax
        scales: tuple[Tensor | None, ...] = (s, None, None, None) if isinstance(s, Tensor) else _parts(s)
        self.nested_block_size = 0 if isinstance(s, Tensor) else s.block_size
        self.register_buffer("codes", weight.codes)
        for name, part in zip(SCALES, scales, strict=True):
            self.register_buffer(name, part)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @classmethod
    def from_weight(cls, weight: NF4Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> NF4Linear:
        return cls(weight, bias, backend=backend)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, block_size: int = 64, use_double_quant: bool = True, *, backend: str | None = None
    ) -> NF4Linear:
        """The layer, quantized. ValueError for NaN or infinity in its weight."""
        q = nf4.quantize(linear.weight, block_size, backend=backend)
        return cls(double_quant.compress(q) if use_double_quant else q, linear.bias, backend=backend)

    @property
    def weight(self) -> NF4Tensor:
        """The dataclass that multiplies, made of the buffers as they are now."""
        scales: Tensor | DoubleQuantizedScales = self.absmax
        if self.nested_absmax is not None and self.nested_code is not None and self.offset is not None:
            scales = DoubleQuantizedScales(
                self.absmax, self.nested_absmax, self.offset, self.nested_block_size, self.nested_code
            )
        return NF4Tensor(self.codes, scales, (self.out_features, self.in_features), self.block_size)

    def forward(self, x: Tensor) -> Tensor:
        y = self.weight.linear(x, backend=self.backend)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _apply(self, fn: Callable, recurse: bool = True) -> NF4Linear:
        """Moves everything, but scales stay float32: under `half()` and the like they would lose bits for good."""
        before = {name: self._buffers[name] for name in SCALES}
        super()._apply(fn, recurse)
        for name, kept in before.items():
            moved = self._buffers[name]
            if kept is not None and moved is not None and moved.dtype != kept.dtype:
                self._buffers[name] = kept.to(moved.device)
        return self

    def merge(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """The same layer with a dense weight."""
        return _linear(self.weight.dense(dtype), self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features} to {self.out_features}, {self.weight.bits_per_parameter:.3f} bits per parameter"


class LoRALinear(nn.Module):
    """A frozen layer and a detour of rank r: y = x Wᵀ + s (x̃ Aᵀ) Bᵀ + bias. A fresh one has B = 0.

    `base` is an `nn.Linear`, whose parameters are frozen, or an `NF4Linear`."""

    def __init__(
        self,
        base: nn.Linear | NF4Linear,
        r: int = 8,
        lora_alpha: float = 16,
        *,
        use_rslora: bool = False,
        lora_dropout: float = 0.0,
        generator: torch.Generator | None = None,
        backend: str | None = None,
    ):
        super().__init__()
        if not 0 <= lora_dropout < 1:
            raise ValueError(f"lora_dropout is {lora_dropout}, needed 0 <= lora_dropout < 1")
        if r < 1 or not 0 < lora_alpha < math.inf:
            raise ValueError(f"r is {r} and lora_alpha {lora_alpha}, needed r >= 1 and a positive alpha")
        self.base_layer = base.requires_grad_(False)
        self.lora_alpha, self.use_rslora, self.lora_dropout = lora_alpha, use_rslora, lora_dropout
        self.backend = backend
        device = (base.codes if isinstance(base, NF4Linear) else base.weight).device
        self.lora_A = nn.Linear(base.in_features, r, bias=False, device=device)
        self.lora_B = nn.Linear(r, base.out_features, bias=False, device=device)
        bound = 1 / math.sqrt(base.in_features)
        nn.init.uniform_(self.lora_A.weight, -bound, bound, generator=generator)
        nn.init.zeros_(self.lora_B.weight)

    @classmethod
    def from_linear(cls, linear: nn.Linear, r: int = 8, lora_alpha: float = 16, **settings) -> LoRALinear:
        """A fresh adapter on this layer, which is frozen and shared, not copied. Settings as in the constructor."""
        return cls(linear, r, lora_alpha, **settings)

    @classmethod
    def from_weight(cls, weight: LoRA, bias: Tensor | None = None, *, backend: str | None = None) -> LoRALinear:
        """The layer of a `LoRA`: base and adapter, with A and B copied."""
        if isinstance(weight.base, NF4Tensor):
            base: nn.Linear | NF4Linear = NF4Linear(weight.base, bias, backend=backend)
        else:
            base = _linear(weight.base.dense(), bias)
        layer = cls(
            base,
            len(weight.A),
            weight.lora_alpha,
            use_rslora=weight.use_rslora,
            lora_dropout=weight.lora_dropout,
            backend=backend,
        )
        layer.lora_A.weight = nn.Parameter(weight.A.detach().clone())
        layer.lora_B.weight = nn.Parameter(weight.B.detach().clone())
        return layer

    @property
    def weight(self) -> LoRA:
        """The dataclass that multiplies, made of parameters and buffers as they are now."""
        base = self.base_layer.weight
        frozen = base if isinstance(base, NF4Tensor) else Frozen(base.detach())
        A, B = self.lora_A.weight, self.lora_B.weight
        return LoRA(frozen, A, B, self.lora_alpha, self.use_rslora, self.lora_dropout)

    def forward(self, x: Tensor, dropout_key: int | None = None) -> Tensor:
        """Dropout in training, and then only with a key: an integer, another one each step and layer (`fold_in`)."""
        y = self.weight.linear(x, dropout_key if self.training else None, backend=self.backend)
        bias = self.base_layer.bias
        return y if bias is None else y + bias.to(y.dtype)

    def merge(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """W' = W + s B A as a dense layer, in the type of the base (of A over NF4) unless another is asked for."""
        w = self.weight
        own = w.A.dtype if isinstance(w.base, NF4Tensor) else w.base.dense().dtype
        return _linear(w.dense(dtype or own), self.base_layer.bias)

    def extra_repr(self) -> str:
        return f"r={self.lora_A.out_features}, lora_alpha={self.lora_alpha:g}, lora_dropout={self.lora_dropout:g}"


class QLoRALinear(LoRALinear):
    """A `LoRALinear` whose base is an `NF4Linear`."""

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int = 8,
        lora_alpha: float = 16,
        *,
        block_size: int = 64,
        use_double_quant: bool = True,
        backend: str | None = None,
        **settings,
    ) -> LoRALinear:
        """The layer quantized, and a fresh adapter on it."""
        base = NF4Linear.from_linear(linear, block_size, use_double_quant, backend=backend)
        return cls(base, r, lora_alpha, backend=backend, **settings)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A frozen layer of this matrix."""
    d_out, d_in = weight.shape
    layer = nn.Linear(d_in, d_out, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=False)
    return layer


def _parts(s: Scales) -> tuple[Tensor, ...]:
    return s.codes, s.absmax, s.code, s.offset
