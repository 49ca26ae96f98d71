"""What the compiler makes of the NF4 kernels, for three GPUs and without one: widths, registers, spills, roundings."""

import dataclasses
import re

import pytest
import torch
import triton

from minift_kernels import aot
from minift_kernels.quant import nf4

N = 4096 * 4096
SIXTEEN_BITS = [torch.float16, torch.bfloat16]
FUSED = r"fma\.|mad\.\S*f32"  # PTX
FUSED_MACHINE = r"\bFFMA|\bHFMA|\bDFMA|\bv_(pk_)?(fma|fmac|mac|mad)_f"  # SASS; GCN


def compiled(target, **settings):
    return aot.compile_launch(nf4.meta_launch(settings.pop("n", N), **settings), target)


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("nested", [0, 256])
@pytest.mark.parametrize("dtype", [*SIXTEEN_BITS, torch.float32], ids=str)
def test_the_kernel_that_is_launched(target, nested, dtype):
    """16 bytes a store and nothing narrower, no detour through shared memory, nothing spilled, nothing fused."""
    found = compiled(target, dtype=dtype, nested_block_size=nested)
    print(f"{target} {dtype} nested {nested}: {found.registers} registers, {found.spilled} spilled")
    stores = found.widths("store")
    assert stores and set(stores) == {128}
    assert found.widths("load")
    assert found.spilled == 0 and found.shared == 0
    assert 0 < found.registers <= 64, "more than 64 registers, and not all 2,048 lanes of a multiprocessor fit"
    rounds_as_written(found)


def rounds_as_written(found):
    assert not found.count(FUSED) and not re.search(FUSED_MACHINE, found.machine)
    if found.target == "gfx942":
        assert re.search(r"\.amdhsa_float_denorm_mode_32 3", found.assembly), "subnormal numbers would be flushed"
    else:
        assert ".ftz" not in found.assembly, "subnormal numbers would be flushed"
        assert found.count(r"mul\.rn\.f32") and not found.count(r"mul\.f32"), "a product that ptxas may fuse"


@pytest.mark.parametrize("target", aot.TARGETS)
def test_the_two_roundings_depend_on_the_option(target):
    """Without it the compiler fuses: so the tests above can fail, and the option is what they depend on."""
    launch = nf4.meta_launch(N, torch.float16, nested_block_size=256)
    assert launch.options["enable_fp_fusion"] is False
    fused = dataclasses.replace(launch, options=launch.options | {"enable_fp_fusion": True})
    with pytest.raises(AssertionError):
        rounds_as_written(aot.compile_launch(fused, target))


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("step", range(1, 8))
def test_every_step_compiles(target, step):
    found = compiled(target, dtype=torch.float16, step=step)
    assert found.spilled == 0 and found.widths("store")
    rounds_as_written(found)
    if target == "sm_90":
        says_what_the_ladder_says(step, found)


def says_what_the_ladder_says(step, found):
    """The counts in the comments of nf4_kernels.py, for a lane that decodes 8 float16 weights (step 7: 4 times 8)."""
    loads, stores = found.widths("load"), found.widths("store")
    if step == 1:
        assert found.count(r"ld\.global") == 3 * 8 and stores == [128], "three loads a weight, one store for 8"
        assert len(loads) == 20, "the assembler makes one of each byte's two loads"
    if step == 2:
        assert len(loads) == 13 and stores == [16] * 8, "2 bytes at a time"
    if step == 3:
        assert len(loads) == 13 and stores == [128] and max(loads) == 32, "step 2's loads, step 1's store"
    if step == 4:
        assert len(loads) == 13 - 3 and stores == [128], "one scale for the lane's four bytes"
    if step == 5:
        assert len(loads) == 2 and found.count(r"selp\.f32") == 15 * 8, "15 selections a weight, no look-up"
    if step == 6:
        assert found.shared == 64 and found.count(r"ld\.shared") == 8 and found.count(r"bar\.sync") > 0
    if step == 7:
        assert stores == [128] * 4 and found.shared == 0 and len(loads) == 4 * 10
        order = re.findall(r"^\s*(?:@!?%p\d+\s+)?(ld|st)\.global", found.assembly, re.MULTILINE)
        assert order.index("st") == len(loads), "every load before the first store"


@pytest.mark.parametrize("step", [7, 8])
def test_without_the_hint_results_take_a_detour(step):
    """Step 7's reason: the same tile as step 4 has it goes through shared memory."""
    assert compiled("sm_90", dtype=torch.float16, step=4, tile=(4096, 4)).shared > 0
    assert compiled("sm_90", dtype=torch.float16, step=step, tile=(4096, 4)).shared == 0


@pytest.mark.parametrize("n", [(1 << 33) + 4096, 1001, 1])
def test_other_sizes_are_other_kernels(n):
    """A size of 64 bits keeps its wide stores; one that 16 does not divide is stored weight by weight; 1 compiles."""
    found = compiled("sm_90", n=n, dtype=torch.float16, nested_block_size=256)
    assert set(found.widths("store")) == ({128} if n % 16 == 0 else {16})
    assert found.spilled == 0
    rounds_as_written(found)


def test_compiling_needs_the_launchs_own_arguments():
    """A pointer that 16 does not divide, such as a slice has, makes another kernel."""
    out, codes, scales = torch.empty(4097, dtype=torch.float16), torch.empty(2048, dtype=torch.uint8), torch.empty(64)
    launch = nf4.dequantize_launch(out[1:], codes, (scales, None, None, None), 64, 0, "triton")
    assert 128 not in aot.compile_launch(launch, "sm_90").widths("store")


def test_both_kinds_live_in_one_process():
    """The interpreter leaves the language as it was: what is compiled afterwards is the same."""
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.always_compile = True  # Triton's cache may hold another checkout's, with other paths
        before = compiled("sm_90", dtype=torch.float16).assembly
        q = nf4.quantize(torch.ones(65))
        assert torch.equal(nf4.dequantize(q, backend="interpreter"), torch.ones(65))
        assert compiled("sm_90", dtype=torch.float16).assembly == before
