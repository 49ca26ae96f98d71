"""What an NF4 dequantization kernel must satisfy: functions `(implementation, case) -> None`.

An implementation makes a `Launch` from `(out, codes, scales, block_size, nested_block_size)`, as
`nf4.dequantize_launch` does. The oracle is the NumPy reference, which has oracles of its own in tests/quant.
"""

import dataclasses
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from interpreter_memory import Watched, watch

from minift.quant import double_quant, nf4
from minift_kernels.quant import double_quant as double_quant_twin
from minift_kernels.quant import nf4 as nf4_twin

CPU = torch.device("cpu")
TYPES = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
PAD = 16  # canary words on either side of what is written
CANARY = 777


class Case(NamedTuple):
    n: int
    block_size: int = 64
    nested: int = 0  # how many scales share a nested scale; 0: float32 scales
    dtype: str = "float16"
    kind: str = "normal"


@cache
def tensor(case):
    """The reference's NF4Tensor: random bytes, all 256 of them if there is room, and scales of a kind."""
    rng = np.random.default_rng([case.n, case.block_size, case.nested, *case.kind.encode()])
    n_bytes, blocks = (case.n + 1) // 2, -(-case.n // case.block_size)
    codes = rng.permutation(np.resize(np.arange(256), n_bytes)).astype(np.uint8)
    if case.n % 2:
        codes[-1] = codes[-1] & 0xF0 | nf4.ZERO
    scales = np.exp(rng.standard_normal(blocks)).astype(np.float32)
    if case.kind == "signed":  # a file may hold double-quantized scales that decode to negative numbers
        scales *= rng.choice(np.float32([-1, 1, 0, 1e-3]), blocks)
    if case.kind == "tiny":  # products that are subnormal in float16, some in float32 too
        scales *= rng.choice(np.float32([1e-7, 3e-6, 1e-38]), blocks)
    if not case.nested:
        return nf4.NF4Tensor(codes, scales, (case.n,), case.block_size)
    groups = -(-blocks // case.nested)
    offset = np.float32(0.01 if case.kind == "signed" else 1.1)
    absmax = np.exp(rng.standard_normal(groups)).astype(np.float32)
    codes_of_scales = rng.integers(0, 256, blocks).astype(np.uint8)
    nested = double_quant.DoubleQuantizedScales(codes_of_scales, absmax, offset, case.nested)
    return nf4.NF4Tensor(codes, nested, (case.n,), case.block_size)


def twin(q):
    """The same tensor in torch."""
    if isinstance(q.absmax, np.ndarray):
        return nf4_twin.NF4Tensor(torch.tensor(q.codes), torch.tensor(q.absmax), q.shape, q.block_size)
    s = q.absmax
    parts = (torch.tensor(part) for part in (s.codes, s.absmax, s.offset))
    scales = double_quant_twin.DoubleQuantizedScales(*parts, s.block_size, torch.tensor(s.code))
    return nf4_twin.NF4Tensor(torch.tensor(q.codes), scales, q.shape, q.block_size)


@cache
def expected(case):
    with np.errstate(over="ignore", under="ignore"):
        return nf4.dequantize(tensor(case), np.dtype(case.dtype))


def parts(q):
    """The four tensors of the scales, and the nested block size."""
    s = q.absmax
    if isinstance(s, torch.Tensor):
        return (s, None, None, None), 0
    return (s.codes, s.absmax, s.code, s.offset), s.block_size


def prepared(implementation, case):
    """A launch into NaN between canaries: (launch, the whole buffer, the inputs)."""
    q = twin(tensor(case))
    scales, nested = parts(q)
    buffer = torch.full((case.n + 2 * PAD,), CANARY, dtype=TYPES[case.dtype])
    out = buffer[PAD : PAD + case.n]
    out.fill_(torch.nan)
    launch = implementation(out, q.codes, scales, q.block_size, nested)
    return launch, buffer, [q.codes, *(part for part in scales if part is not None)]


def bits(x):
    return x.detach().cpu().contiguous().numpy().tobytes()


def equals_the_reference(implementation, case):
    """Bit for bit: c_q · a rounded to float32 once, then to the type of the output."""
    launch, buffer, _ = prepared(implementation, case)
    launch.run(CPU)
    found, wanted = buffer[PAD : PAD + case.n].numpy(), expected(case)
    if found.tobytes() != wanted.tobytes():
        i = next(i for i in range(case.n) if found[i].tobytes() != wanted[i].tobytes())
        raise AssertionError(f"{case}: weight {i} is {found[i]!r}, expected {wanted[i]!r}")


def touches_only_its_own(implementation, case):
    """Loads in the inputs, stores in the output, each place stored to once, none forgotten; canaries unharmed."""
    launch, buffer, inputs = prepared(implementation, case)
    table = launch.arguments[3]
    out = buffer[PAD : PAD + case.n]
    written = Watched(out, write=True)
    with watch([written, Watched(table), *map(Watched, inputs)]):
        launch.run(CPU)
    assert len(written.touched) == case.n, f"{case}: {len(written.touched)} of {case.n} places stored to"
    canaries = torch.cat([buffer[:PAD], buffer[PAD + case.n :]])
    assert (canaries == CANARY).all(), f"{case}: a canary beside the output was changed"


def leaves_its_inputs_alone(implementation, case):
    launch, _, inputs = prepared(implementation, case)
    before = [bits(part) for part in inputs]
    launch.run(CPU)
    assert [bits(part) for part in inputs] == before, f"{case}: an input was changed"


def gives_the_same_twice(implementation, case):
    """Into the same output: nothing of what was there before matters."""
    launch, buffer, _ = prepared(implementation, case)
    launch.run(CPU)
    once = bits(buffer)
    launch.run(CPU)
    assert bits(buffer) == once, f"{case}: another result the second time"


def offsets_have_64_bits(implementation, case):
    """What comes out at the beginning also comes out behind 2³³ weights, where no offset fits into 32 bits."""
    launch, buffer, inputs = prepared(implementation, case)
    launch.run(CPU)
    near = bits(buffer)
    buffer[PAD : PAD + case.n] = torch.nan
    tile = launch.options["TILE"]
    weights = 1 << 33
    programs = weights // tile
    out, codes, absmax, table, n, n_bytes, *rest = launch.arguments
    arguments = (out, codes, absmax, table, n + weights, n_bytes + weights // 2, *rest)
    far = dataclasses.replace(launch, arguments=arguments)
    blocks = weights // case.block_size
    size = TYPES[case.dtype].itemsize
    places = [Watched(inputs[0], weights // 2), Watched(inputs[1], blocks * (1 if case.nested else 4))]
    if case.nested:
        places += [Watched(inputs[2], blocks // case.nested * 4), *map(Watched, inputs[3:])]
    with watch([Watched(out, weights * size, write=True), Watched(table), *places], programs):
        far.run(CPU)
    assert bits(buffer) == near, f"{case}: other numbers behind {weights:,} weights"


OF_A_KERNEL = [
    equals_the_reference,
    touches_only_its_own,
    leaves_its_inputs_alone,
    gives_the_same_twice,
    offsets_have_64_bits,
]

# Tiles in tests have 256 weights: sizes around a block, around a tile, and odd ones; blocks shorter and longer.
FLOAT_SCALES = [
    *(Case(n) for n in (0, 1, 2, 63, 64, 65, 255, 256, 257, 1000)),
    *(Case(2 * block_size + 77, block_size) for block_size in nf4.BLOCK_SIZES),
    *(Case(600, kind=kind, dtype=dtype) for kind in ("signed", "tiny") for dtype in TYPES),
    *(Case(n, 32, dtype="float32") for n in (0, 1, 65, 513)),
]
NESTED_SCALES = [
    *(Case(n, 32, nested=4) for n in (0, 1, 65, 127, 1000)),
    *(Case(3 * block_size + 77, block_size, nested=2) for block_size in nf4.BLOCK_SIZES),
    *(Case(2049, 32, nested=nested, kind=kind) for nested in (1, 16, 256) for kind in ("normal", "signed")),
    *(Case(1111, 32, nested=8, dtype=dtype) for dtype in TYPES),
]

# Enough to reject every wrong version, and quick.
FOR_WRONG_VERSIONS = [
    Case(257, 32),
    Case(65, 64, dtype="float32"),
    Case(600, kind="signed"),
    Case(600, kind="tiny"),
    Case(513, 32, nested=4),
    Case(2049, 32, nested=16, kind="signed", dtype="float32"),
]
