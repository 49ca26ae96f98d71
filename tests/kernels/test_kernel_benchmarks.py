"""The benchmarks, as far as they go without a GPU: what is timed is right, and so is the arithmetic of the figures.

A machine with a CPU and Triton's interpreter takes the place of the GPU, and shapes are tiny; so every contender of
every family is called, the ladders' steps among them. Seconds are made up. Liger, which is not installed here, is
replaced by PyTorch's functions under its names.
"""

import ast
import contextlib
import dataclasses
import functools
import json
import re
import sys
import types
from pathlib import Path

import bitsandbytes
import pytest
import torch
from torch.nn import functional
from torch.nn.attention import flex_attention as flex

FOLDER = Path(__file__).parents[2] / "kernels" / "benchmarks"
SMALL = {
    "adamw": {"LAYERS": 1, "WIDTH": 64, "INNER": 72, "RANK": 2, "STEPS": 2, "DTYPES": (torch.float32, torch.float16)},
    "attention": {"SHAPES": ((2, 4, 2, 40, 16),)},
    "blockwise": {"SHAPES": ((3, 200),), "DTYPES": (torch.float16, torch.float32)},
    "lora": {"SHAPES": ((64, 128),), "ROWS": (3,)},
    "losses": {"LOGITS": ((5, 300),), "HEADS": ((5, 70, 32),)},
    "mlp": {"SHAPES": ((3, 50),)},
    "nf4": {"SHAPES": ((3, 128),), "DTYPES": (torch.float16, torch.float32)},
    "nf4_matmul": {"SHAPES": ((64, 128),), "ROWS": (1, 3)},
    "norms": {"SHAPES": ((5, 48),)},
    "rlhf_losses": {"LOGITS": ((5, 300),), "ANSWERS": ((3, 20),)},
    "rope": {"SHAPES": ((2, 4, 2, 5, 16),)},
}


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(FOLDER)
        yield patched


@pytest.fixture(scope="module")
def run(patch):
    import run

    return run


@pytest.fixture(scope="module")
def timing(patch):
    import timing

    return timing


@pytest.fixture(scope="module")
def machine(timing):
    return timing.Machine("a CPU", 1, 0, 2e9, 5e9, device="cpu", backend="interpreter")


def made_up(calls, replays, captured=True):
    """The first call takes place, and `seconds` are of no meaning but positive."""
    calls[0]()
    times = {"seconds": 2e-6, "fastest": 1e-6, "slowest": 3e-6, "one_call": 4e-6, "peak_bytes": 5_000_000}
    return times | {"sets": len(calls), "replays": replays}


@pytest.fixture(scope="module")
def timed(timing):
    """The function itself, before others take its place."""
    return timing.timed


@pytest.fixture(scope="module")
def real(patch):
    """What the targets name, and tests change."""
    import nf4
    import nf4_matmul

    return nf4.DTYPES, nf4_matmul.ROWS


@pytest.fixture(scope="module")
def rows(patch, run, timing, timed, machine, real):
    """family -> its rows, made once."""
    patch.setattr(timing, "timed", made_up)
    patch.setattr(torch, "compile", lambda f, **_: f)
    for name, module in liger().items():
        patch.setitem(sys.modules, name, module)
    found = {}
    torch.manual_seed(0)
    for name, family in run.families().items():
        module = sys.modules[name]
        for constant, value in SMALL[name].items():
            patch.setattr(module, constant, value)
        if hasattr(module, "DTYPE"):
            patch.setattr(module, "DTYPE", torch.float16)
            patch.setattr(module, "WITHIN", module.WITHIN / 8)  # bounds are for bfloat16, of which it is an eighth
        if name == "attention":
            patch.setattr(module.varlen, "varlen_attn", varlen_attn)
            patch.setattr(module, "flex_attention", flex_attention)
        if name == "nf4_matmul":
            patch.setattr(bitsandbytes.functional, "gemv_4bit", gemv_4bit)
        if name == "adamw":
            patch.setitem(module.WITHIN, torch.float16, 2**-9)
        found[name] = family(machine, 3)
    return found


def liger():
    """Modules under Liger's names, with the signatures of its functions, as far as they are used."""
    names = ["liger_kernel", "liger_kernel.transformers"]
    names += [f"liger_kernel.transformers.{name}" for name in ("functional", "rope")]
    modules = {name: types.ModuleType(name) for name in names}
    functions = modules["liger_kernel.transformers.functional"]
    functions.liger_cross_entropy = functional.cross_entropy
    functions.liger_fused_linear_cross_entropy = lambda x, W, labels: functional.cross_entropy(x @ W.T, labels)
    functions.liger_swiglu = lambda a, b: functional.silu(a) * b
    functions.liger_rms_norm = lambda X, W, eps, in_place=True: functional.rms_norm(X, W.shape, W, eps)
    functions.liger_layer_norm = lambda X, W, B, eps: functional.layer_norm(X, W.shape, W, B, eps)

    def turned(x, cos, sin):
        first, second = x.chunk(2, dim=-1)
        return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]

    modules["liger_kernel.transformers.rope"].liger_rotary_pos_emb = lambda q, k, cos, sin: (
        turned(q, cos, sin),
        turned(k, cos, sin),
    )
    return modules


def varlen_attn(q, k, v, q_edges, k_edges, q_longest, k_longest, *, window_size, enable_gqa):
    """What PyTorch has for GPUs: texts one after the other, (tokens, heads, d)."""
    assert torch.equal(q_edges, k_edges) and q_edges.dtype == torch.int32 and window_size == (-1, 0) and enable_gqa
    sizes = q_edges.diff().tolist()
    assert sum(sizes) == len(q) and max(sizes) == q_longest == k_longest
    texts = zip(*(x.transpose(0, 1).split(sizes, dim=1) for x in (q, k, v)), strict=True)
    of_text = functools.partial(functional.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    return torch.cat([of_text(*text) for text in texts], dim=1).transpose(0, 1)


def gemv_4bit(A, B, state):
    """That of bitsandbytes takes another layout on a CPU than on a GPU."""
    assert A.shape == (1, state.shape[1])
    return functional.linear(A, bitsandbytes.functional.dequantize_4bit(B, state))


def flex_attention(q, k, v, *, block_mask, enable_gqa):
    """PyTorch's has no gradient on a CPU."""
    mask = flex.create_mask(block_mask.mask_mod, len(q), None, q.shape[2], k.shape[2], device="cpu")
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=enable_gqa)


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run the benchmark")
def test_without_a_gpu_nothing_is_timed(run):
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        run.Benchmarks().run()


def test_every_file_is_a_family(run):
    others = {"run", "timing", "compiled"}
    assert run.families().keys() == {path.stem for path in FOLDER.glob("*.py")} - others == SMALL.keys()
    with pytest.raises(SystemExit, match="--only nf5: needed some of adamw, attention"):
        run.Benchmarks(only=("nf5",)).run()


@pytest.mark.parametrize("family", SMALL)
def test_every_contender_is_right(rows, family):
    """Peers too: those that only 16 bits hold together by the bound of ours, the others bit for bit."""
    module = sys.modules[family]
    assert {row["what"].partition(",")[0] for row in rows[family]} > {"minift"}
    for row in rows[family]:
        within = getattr(module, "WITHIN", 0)
        if isinstance(within, dict):
            within = max(within.values())
        if "map of tiles" in row["task"]:
            continue
        assert row["difference"] <= within or row["task"].startswith("quantize"), row


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_takes_the_mask(rows):
    """The real one, as far as it goes on a CPU."""
    module = sys.modules["attention"]
    texts = module.segments(2, 40, "cpu")
    mask = flex.create_block_mask(module.same_text(texts), 2, None, 40, 40, device="cpu")
    q, k = torch.randn(2, 4, 40, 16), torch.randn(2, 2, 40, 16)
    visible = module.attention.causal_mask(torch.arange(40).expand(2, -1), 40, texts)
    found = flex.flex_attention(q, k, k, block_mask=mask, enable_gqa=True)
    torch.testing.assert_close(found, module.attention.attention(q, k, k, visible))


def test_ladders_are_complete(rows):
    from minift_kernels.quant import nf4_kernels, nf4_matmul_kernels, nf4_matvec_kernels

    decoders = {row["what"] for row in rows["nf4"] if row["task"].endswith("3 x 128")}
    assert decoders > {f"minift, step {step}" for step in range(1, nf4_kernels.LAST)} | {"minift", "bitsandbytes"}
    products = {row["what"] for row in rows["nf4_matmul"] if row["task"].startswith("1 rows")}
    assert products == {
        *("minift", "cuBLAS", "bitsandbytes", "bitsandbytes, gemv"),
        *(f"minift, matvec step {step}" for step in range(1, nf4_matvec_kernels.LAST + 1)),
        *(f"minift, matmul step {step}" for step in range(1, nf4_matmul_kernels.LAST + 1)),
    }


def test_a_wrong_contender_is_not_timed(timing, machine, rows):
    x = torch.ones(3)
    half = {"minift": lambda x: x / 2}
    with pytest.raises(AssertionError, match=r"halves, minift: off by 0\.5, needed 0\.1"):
        timing.compare(machine, "halves", 1, 1, half, [(x,)], 3, x, 0.1)
    with pytest.raises(AssertionError, match="needed 0"):
        timing.compare(machine, "bits", 1, 1, {"minift": lambda x: -x}, [(x * 0,)], 3, x * 0, 0)
    (row,) = timing.compare(machine, "bits", 1, 1, {"a peer": lambda x: -x}, [(x * 0,)], 3, x * 0, 0)
    assert row["same_bits"] is False and row["difference"] == 0


def test_nan_is_not_right(timing, machine, rows):
    x = torch.ones(3)
    with pytest.raises(AssertionError, match="off by nan"):
        timing.compare(machine, "nan", 1, 1, {"minift": lambda x: x * torch.nan}, [(x,)], 3, x, 0.1)


@pytest.mark.parametrize("captured", [True, False])
def test_a_figure_is_the_median_of_replays(timed, monkeypatch, captured):
    """With a CUDA that says what it is told to: 6, 2 and 4 ms for two calls."""
    done, milliseconds = [], [6.0, 2.0, 4.0]
    monkeypatch.setattr(torch, "cuda", cuda(done, milliseconds))
    found = timed([lambda: done.append("a"), lambda: done.append("b")], 3, captured)
    assert (found["seconds"], found["fastest"], found["slowest"]) == (2e-3, 1e-3, 3e-3)
    assert (found["sets"], found["replays"], found["peak_bytes"]) == (2, 3, 70)
    before = [*"ab", "a", *"ab"]  # warm, for the memory, for the time of starting one
    assert done == before + ([*"ab"] + ["replay"] * 4 if captured else [*"ab"] * 4)


def test_slow_contenders_are_replayed_less(timed, monkeypatch):
    monkeypatch.setattr(torch, "cuda", cuda([], [2000.0] * 50))
    assert timed([lambda: None], 50)["replays"] == 3
    monkeypatch.setattr(torch, "cuda", cuda([], [500.0] * 50))
    assert timed([lambda: None], 50)["replays"] == 6, "three seconds"


def cuda(done, milliseconds):
    """As much of torch.cuda as is used; `milliseconds` are between the two events of a replay."""
    times = iter(milliseconds)
    event = types.SimpleNamespace(record=lambda: None, synchronize=lambda: None, elapsed_time=lambda other: next(times))
    return types.SimpleNamespace(
        Stream=lambda: "a stream",
        stream=contextlib.nullcontext,
        synchronize=lambda: None,
        reset_peak_memory_stats=lambda: None,
        memory_allocated=lambda: 30,
        max_memory_allocated=lambda: 100,
        CUDAGraph=lambda: types.SimpleNamespace(replay=lambda: done.append("replay")),
        graph=lambda graph, stream: contextlib.nullcontext(),
        Event=lambda enable_timing: event,
    )


def test_the_floor_is_the_longer_time(machine):
    assert machine.floor(4e9) == 2 and machine.floor(4e9, 5e9) == 2 and machine.floor(4e9, 15e9) == 3


def test_sets_are_larger_than_the_cache(machine):
    large = dataclasses.replace(machine, l2_bytes=1000)
    assert len(machine.sets(10)) == 2 and len(large.sets(1)) == 256
    for nbytes in (16, 100, 3999, 4000, 10**9):
        assert len(large.sets(nbytes)) * nbytes > 4000 and len(large.sets(nbytes)) >= 2


def test_bytes_and_operations(rows):
    """Counted by hand for the tiny shapes."""

    def limits(family, task):
        (found,) = {(row["bytes"], row["operations"]) for row in rows[family] if row["task"] == task}
        return found

    assert limits("nf4", "dequantize to float16, 3 x 128") == (192 + 4 * 6 + 2 * 384, 0)
    assert limits("nf4_matmul", "3 rows, 128 to 64") == (64 * 64 + 4 * 128 + 2 * 3 * 192, 2 * 3 * 128 * 64)
    assert limits("norms", "rms_norm, 5 x 48, both passes") == (5 * 2 * 5 * 48, 0)
    assert limits("losses", "cross-entropy, 5 x 300") == (3 * 2 * 5 * 300, 0)
    causal = 40 * 41 // 2
    texts = sum(n * (n + 1) // 2 for n in (2, 6, 8, 10, 14))  # 40 tokens cut at 2, 8, 16 and 26
    about = "2 x 40 tokens, 4 and 2 heads of 16"
    assert limits("attention", f"causal, {about}") == (2 * 2 * 40 * 12 * 16, 2 * 4 * causal * 4 * 16)
    assert limits("attention", f"packed, {about}, both passes")[1] == 2 * 4 * texts * 14 * 16


def test_targets_are_of_rows_that_exist(run, patch, machine, rows, real):
    """With the types and the numbers of rows of the real benchmark, for which nothing is computed here."""
    nf4, nf4_matmul = sys.modules["nf4"], sys.modules["nf4_matmul"]
    with patch.context() as inside:
        inside.setattr(nf4, "DTYPES", real[0])
        inside.setattr(nf4_matmul, "ROWS", real[1])
        for module in (nf4, nf4_matmul):
            inside.setattr(module, "compare", named)
        found = run.reached(rows | {module.__name__: module.rows(machine, 3) for module in (nf4, nf4_matmul)})
    assert len(found) == len(run.TARGETS)
    for target in found:
        assert target["task"], target
        assert target["beside"] == "floor" or target["found"] == 1


def named(on, about, nbytes, operations, contenders, *_):
    return [{"task": about, "what": what, "seconds": 1.0, "of_floor": 0.5} for what in contenders]


def test_the_worst_task_counts(run):
    def row(task, what, seconds, of_floor):
        return {"task": f"dequantize to bfloat16, {task}", "what": what, "seconds": seconds, "of_floor": of_floor}

    found = run.reached({"nf4": [
        row("a", "minift", 1.0, 0.95), row("a", "bitsandbytes", 3.0, 0.3),
        row("b", "minift", 1.0, 0.92), row("b", "bitsandbytes", 1.5, 0.6), row("b", "minift, step 1", 9.0, 0.1),
    ]})  # fmt: skip
    assert [(t["found"], t["reached"], t["task"][-1]) for t in found] == [(0.92, True, "b"), (1.5, False, "b")]
    alone = run.reached({"rope": [{"task": "a", "what": "minift", "seconds": 1.0, "of_floor": 0.5}]})
    assert [(t["found"], t["reached"]) for t in alone] == [(None, False)], "without Liger"


def test_one_command_writes_one_file(run, patch, timing, machine, rows, tmp_path, capsys):
    def broken(on, replays):
        raise ValueError("no kernel")

    with patch.context() as inside:
        inside.setattr(timing, "machine", lambda: machine)
        inside.setattr(run, "families", lambda: {"rope": lambda on, replays: rows["rope"], "norms": broken})
        with pytest.raises(SystemExit, match="failed: norms"):
            run.Benchmarks(out=tmp_path / "some" / "a.json").run()
    found = json.loads((tmp_path / "some" / "a.json").read_text())
    assert found["rows"] == {"rope": rows["rope"]} and found["machine"] == dataclasses.asdict(machine)
    assert found["failures"] == {"norms": "ValueError: no kernel"}
    assert [target["name"] for target in found["targets"]] == ["rotary positions"]
    assert found["versions"]["torch"] == torch.__version__
    printed = capsys.readouterr().out
    assert "rope on a CPU" in printed and "Targets" in printed and "no kernel" in printed


def test_table(timing, rows, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    one = rows["mlp"][0] | {"seconds": 2e-6, "bytes": 4000, "operations": 6e6, "of_floor": 0.5, "difference": 0.25}
    timing.show([one, one | {"what": "slow", "seconds": 5e-6}], "a title")
    lines = [re.split(r"\s*│\s*", line) for line in capsys.readouterr().out.splitlines() if "swiglu" in line]
    assert lines[0][2:-1] == ["minift", "2.0", "2", "3", "0.50", "1.00", "4.0", "5.0", "no", "0.2"]
    assert lines[1][2:5] == ["slow", "5.0", "1"] and lines[1][7] == "2.50"


@pytest.fixture(scope="module")
def compiled(patch):
    import compiled

    return compiled


def test_compiled_says_what_a_launch_becomes(compiled, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    compiled.Report(target=("sm_90",), only=("rope", "dropout"), json=tmp_path / "a.json").run()
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [row["family"] for row in rows] == ["rope"] * 2 + ["dropout"]
    assert all(row["spilled"] == 0 and row["store_bits"] == [128] and row["registers"] > 16 for row in rows)
    assert "turn, heads of 128" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--only some: needed some of nf4, "):
        compiled.Report(only=("some",)).run()


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_compiled_makes_every_launch(compiled, dtype, target):
    """Of every kernel in the package, with a name of its own."""
    made = set()
    with compiled.made_for(target):
        for family in compiled.FAMILIES.values():
            launches = list(family(dtype))
            assert len({name for name, _ in launches}) == len(launches)
            made |= {
                (launch.kernel.fn.__module__.partition("[")[0], launch.kernel.fn.__name__) for _, launch in launches
            }
    assert torch.version.hip is None
    assert made == set(kernels())


def kernels():
    """(module, name) of every kernel that is launched: a function of Triton that no other one in its file names."""
    for path in sorted(FOLDER.parent.glob("minift_kernels/**/*_kernels.py")):
        tree = ast.parse(path.read_text())
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.decorator_list]
        called = {node.id for f in functions for node in ast.walk(f) if isinstance(node, ast.Name)}
        module = ".".join(path.relative_to(FOLDER.parent).with_suffix("").parts)
        yield from ((module, f.name) for f in functions if f.name not in called)
