"""torchao's NF4. It keeps no float32 scales: its own `get_block_absmax` stands for them, and decoding is left out."""

from __future__ import annotations

from minift.conformance.implementations.quiet import absent, import_quietly
from minift.conformance.operation import Implementation
from minift.conformance.torch_functions import array, tensor

MODULES = (  # where NF4 has been, newest first
    "torchao.quantization.quantize_.workflows.nf4.nf4_tensor",
    "torchao.dtypes.nf4tensor",
)


def implementations() -> list[Implementation]:
    try:
        import_quietly("torchao")
    except ImportError as error:
        return [Implementation("torchao", missing=absent(error))]
    for name in MODULES:
        try:
            module = import_quietly(name)
            break
        except ImportError:
            continue
    else:
        return [Implementation("torchao", missing="this version has no NF4 where it used to be")]

    def quantize(w, block_size):
        if w.size == 0 or w.size % block_size or w.ndim not in (1, 2):
            raise NotImplementedError("vectors and matrices of whole blocks only")
        flat = tensor(w)
        q = module.to_nf4(flat, block_size, 1)
        return array(q.quantized_data), array(module.get_block_absmax(flat.flatten(), block_size))

    return [Implementation("torchao", {"nf4.quantize": quantize})]
