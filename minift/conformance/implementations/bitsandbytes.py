"""bitsandbytes on the CPU: NF4, its dynamic 8-bit map, and double quantization."""

from __future__ import annotations

import numpy as np

from minift.conformance.implementations.quiet import absent, import_quietly
from minift.conformance.operation import Implementation
from minift.conformance.torch_functions import array, tensor

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def implementations() -> list[Implementation]:
    try:
        import torch

        bnb = import_quietly("bitsandbytes.functional")
    except ImportError as error:
        return [Implementation("bitsandbytes", missing=absent(error))]

    @torch.compiler.set_stance("force_eager")  # it would compile for many seconds
    def nf4_quantize(w, block_size):
        _needs(block_size in BLOCK_SIZES, f"blocks of {', '.join(map(str, BLOCK_SIZES))} only")
        codes, state = bnb.quantize_4bit(tensor(w), blocksize=block_size, quant_type="nf4")
        return array(codes).reshape(-1), array(state.absmax)

    @torch.compiler.set_stance("force_eager")
    def nf4_dequantize(codes, absmax, shape, block_size, dtype="float32"):
        _needs(block_size in BLOCK_SIZES, f"blocks of {', '.join(map(str, BLOCK_SIZES))} only")
        _needs(len(shape) > 0, "tensors with axes only")
        table, kind = bnb.get_4bit_type("nf4", device="cpu"), getattr(torch, dtype)
        size = torch.Size(shape)
        state = bnb.QuantState(tensor(absmax), size, table, block_size, "nf4", kind)
        return array(bnb.dequantize_4bit(tensor(codes)[:, None], state))

    def quantize(x, code, block_size):
        _needs(code.size == 256, "tables of 256 entries only")
        codes, state = bnb.quantize_blockwise(tensor(x), tensor(code), blocksize=block_size)
        return array(codes).reshape(-1), array(state.absmax)

    def dequantize(codes, absmax, code, shape, block_size, dtype="float32"):
        _needs(code.size == 256, "tables of 256 entries only")
        kind = getattr(torch, dtype)
        state = bnb.QuantState(tensor(absmax), code=tensor(code), blocksize=block_size, dtype=kind)
        return array(bnb.dequantize_blockwise(tensor(codes).reshape(shape), state))

    @torch.compiler.set_stance("force_eager")
    def compress(scales, block_size):
        """Of blocks that hold their scale and zeros."""
        _needs(block_size == 256, "groups of 256 scales only")
        w = np.zeros((scales.size, 64), np.float32)
        w[:, 0] = scales
        state = bnb.quantize_4bit(tensor(w), blocksize=64, quant_type="nf4", compress_statistics=True)[1]
        return array(state.absmax).reshape(-1), array(state.state2.absmax), array(state.offset)

    def decode(codes, absmax, offset, block_size):
        code = bnb.create_dynamic_map()
        state = bnb.QuantState(tensor(absmax), code=code, blocksize=block_size, dtype=torch.float32)
        return array(bnb.dequantize_blockwise(tensor(codes), state) + tensor(offset))

    functions = {
        "nf4.quantize": nf4_quantize,
        "nf4.dequantize": nf4_dequantize,
        "blockwise.quantize": quantize,
        "blockwise.dequantize": dequantize,
        "double_quant.compress": compress,
        "double_quant.decode": decode,
    }
    return [Implementation("bitsandbytes", functions, ("float32", "float16"))]


def _needs(condition: bool, what: str) -> None:
    if not condition:
        raise NotImplementedError(what)
