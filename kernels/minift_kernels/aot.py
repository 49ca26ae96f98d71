"""Compile a launch for a GPU that is not there, and look at what came out.

Triton compiles one version of a kernel for each kind of arguments: whether a pointer or a size is divisible by 16
(only then can 16 bytes be loaded at once), whether a size is 1, whether it needs 64 bits. A kernel compiled without
these hints is another kernel. So `compile_launch` derives them from the launch's own arguments, by the functions that
Triton's launcher uses (internal ones: they belong to the version in constraints.txt). Tensors on the "meta" device
will do, which have a size and no memory.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from minift_kernels.backend import Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),  # A100
    "sm_90": GPUTarget("cuda", 90, 32),  # H100
    "gfx942": GPUTarget("hip", "gfx942", 64),  # MI300
}


_HIP_BITS = {"byte": 8, "short": 16, "dword": 32}


@dataclass(frozen=True)
class Compiled:
    """A kernel for one target. Bytes of shared memory are a program's, registers and spilled registers a lane's."""

    target: str
    registers: int
    shared: int
    spilled: int  # registers that were put aside in memory for want of others
    assembly: str  # PTX for CUDA, GCN assembly for HIP
    machine: str  # SASS for CUDA, the same assembly for HIP

    def count(self, pattern: str) -> int:
        """How many instructions of the assembly match: a regular expression for the name at the start of a line."""
        return len(re.findall(rf"^\s*(?:@!?%p\d+\s+)?{pattern}", self.assembly, re.MULTILINE))

    def widths(self, what: str) -> list[int]:
        """The bits that a lane moves with each "load" or "store" of global memory, in the order of the machine code."""
        if TARGETS[self.target].backend == "hip":
            pattern = rf"^\s*(?:global|buffer|flat)_{what}_[us]?(byte|short|dword)(?:x(\d))?"
            found = re.findall(pattern, self.machine, re.MULTILINE)
            return [_HIP_BITS[name] * int(times or 1) for name, times in found]
        name = {"load": "LDG", "store": "STG"}[what]
        suffixes = re.findall(rf"\b{name}((?:\.\w+)+)", self.machine)
        return [next((int(w) for w in re.findall(r"\.[SU]?(8|16|64|128)\b", s)), 32) for s in suffixes]


def compile_launch(launch: Launch, target: str) -> Compiled:
    """What this launch would run on that target ("sm_80", "sm_90" or "gfx942")."""
    gpu = TARGETS[target]
    kernel, compiler = launch.kernel, make_backend(gpu)
    bind = create_function_from_signature(kernel.signature, kernel.params, compiler)
    options: dict[str, Any] = {"debug": False, "instrumentation_mode": "", **launch.options}
    bound, specialization, rest = bind(*launch.arguments, **options)
    parsed, signature, constants, attributes = kernel._pack_args(compiler, options, bound, specialization, rest)
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=gpu, options=parsed.__dict__)
    return _cuda(target, compiled) if gpu.backend == "cuda" else _hip(target, compiled)


def _cuda(target: str, compiled: Any) -> Compiled:
    """From the binary itself. These kernels have no arrays, so every store to local memory (STL) is of a register."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        usage, machine = (_cuobjdump(option, binary) for option in ("-res-usage", "-sass"))
    registers = int(re.findall(r"REG:(\d+)", usage)[0])
    spilled = len(re.findall(r"\bSTL\b", machine))
    return Compiled(target, registers, compiled.metadata.shared, spilled, compiled.asm["ptx"], machine)


def _cuobjdump(option: str, binary: Path) -> str:
    tool = triton.knobs.nvidia.cuobjdump.path
    return subprocess.run([tool, option, str(binary)], check=True, capture_output=True, text=True).stdout


def _hip(target: str, compiled: Any) -> Compiled:
    """From the notes at the end of the assembly."""
    assembly = compiled.asm["amdgcn"]
    found = {key: int(value) for key, value in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", assembly)}
    return Compiled(
        target, found["vgpr_count"], compiled.metadata.shared, found["vgpr_spill_count"], assembly, assembly
    )
