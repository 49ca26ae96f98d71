"""Mutation testing: change one thing in the source, run the tests, and see whether they notice.

    python -m tests.mutation minift/quant tests/quant minift/peft tests/peft

takes pairs of a source folder (or file) and its tests. Every mutant is run in a copy of the tree, in a fork of a
process that has the large imports behind it: `pytest -x`, hypothesis derandomized, the mirror test file first
and by itself.
A mutant is killed if a test fails or time is up. Survivors are printed; those in `mutation_equivalent.txt` are argued
there to be equivalent. The exit status is 0 only if no other survives, and none of that list is killed or gone.

Why not mutmut or cosmic-ray: the first changes functions only, and here constants, defaults and dataclass fields are
half the point; the second changes the working tree and starts Python, torch included, anew for each mutant.
"""

from __future__ import annotations

import argparse
import ast
import gc
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).resolve().parent.parent
EQUIVALENT = ROOT / "tests" / "mutation_equivalent.txt"
PRELOAD = (
    "numpy",
    "torch",
    "bitsandbytes.functional",
    "peft",
    "hypothesis.extra.numpy",
    "pytest",
    "jaxtyping",
    "beartype",
)
SLOW = "not kill_matrix"  # wrong versions against properties: a test of the tests, not of the source

BINARY = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "*", ast.Pow: "*",
    ast.LShift: ">>", ast.RShift: "<<", ast.BitAnd: "|", ast.BitOr: "&", ast.BitXor: "|", ast.MatMult: "*",
}  # fmt: skip
COMPARE = {
    ast.Lt: ("<=", ">="), ast.LtE: ("<", ">"), ast.Gt: (">=", "<="), ast.GtE: (">", "<"), ast.Eq: ("!=",),
    ast.NotEq: ("==",), ast.Is: ("is not",), ast.IsNot: ("is",), ast.In: ("not in",), ast.NotIn: ("in",),
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum", "any": "all", "all": "any",
         "left": "right", "right": "left", "argmax": "argmin", "sum": "mean", "mean": "sum"}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """`source[start:stop]`, in bytes, becomes `after`."""

    path: str
    line: int
    start: int
    stop: int
    before: str
    after: str
    context: str  # the line, stripped: names the mutant across edits elsewhere
    nth: int  # of those with the same change on the same text

    @property
    def key(self) -> str:
        def shown(text):
            return " ".join(text.split())

        return f"{self.path} :: {shown(self.context)} :: {shown(self.before)} -> {shown(self.after)} :: {self.nth}"


def mutants(path: Path) -> Iterator[Mutant]:
    """All mutants of a file, in the order of the source."""
    source = path.read_bytes()
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    seen: Counter = Counter()
    found = []
    for node, after in changes(ast.parse(source)):
        start, stop = (
            starts[node.lineno - 1] + node.col_offset,
            starts[node.end_lineno - 1] + node.end_col_offset,
        )
        found.append((start, stop, node.lineno, after))
    name = str(path.relative_to(ROOT))
    for start, stop, line, after in sorted(found):
        before, context = source[start:stop].decode(), lines[line - 1].decode().strip()
        seen[context, before, after] += 1
        yield Mutant(name, line, start, stop, before, after, context, seen[context, before, after])


def changes(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """(node, what its text becomes)."""
    for node in nodes(tree):
        if isinstance(node, ast.BinOp) and type(node.op) in BINARY:
            yield node, f"({text(node.left)}) {BINARY[type(node.op)]} ({text(node.right)})"
        elif isinstance(node, ast.AugAssign):
            yield node, "pass"
            if type(node.op) in BINARY:
                yield node, f"{text(node.target)} {BINARY[type(node.op)]}= {text(node.value)}"
        elif isinstance(node, ast.Compare) and len(node.ops) == 1:
            for operator in COMPARE[type(node.ops[0])]:
                yield node, f"({text(node.left)}) {operator} ({text(node.comparators[0])})"
        elif isinstance(node, ast.BoolOp):
            operator = " or " if isinstance(node.op, ast.And) else " and "
            yield node, f"({operator.join(f'({text(value)})' for value in node.values)})"
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub, ast.Invert)):
            if isinstance(node.operand, ast.Constant):
                yield node, text(node.operand)
            else:
                yield node, f"({text(node.operand)})"
        elif isinstance(node, (ast.IfExp, ast.If, ast.While)):
            yield node.test, "True"
            yield node.test, "False"
        elif isinstance(node, ast.Constant):
            value = node.value
            if isinstance(value, bool):
                yield node, str(not value)
            elif isinstance(value, int):
                yield node, str(value + 1)
                yield node, str(value - 1)
            elif isinstance(value, float):
                yield node, repr(value * 1.001 or 0.001)
                if value:
                    yield node, repr(value * 0.999)
            elif isinstance(value, str):
                yield node, repr(NAMES.get(value, value + "XX"))
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in NAMES:
            yield node, NAMES[node.id]
        elif isinstance(node, ast.Attribute) and node.attr in NAMES:
            operand = text(node.value)
            grouped = isinstance(node.value, (ast.BinOp, ast.BoolOp, ast.Compare, ast.UnaryOp))
            yield node, f"({operand}).{NAMES[node.attr]}" if grouped else f"{operand}.{NAMES[node.attr]}"
        elif isinstance(node, (ast.Raise, ast.Expr)):
            yield node, "pass"
        elif isinstance(node, ast.Return) and node.value is not None:
            yield node, "return None"


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but docstrings, annotations, imports, the insides of f-strings, and bodies that are only `...`."""
    for name, value in ast.iter_fields(tree):
        if name in ("annotation", "returns"):
            continue
        for node in value if isinstance(value, list) else [value]:
            if not isinstance(node, ast.AST) or isinstance(node, (ast.Import, ast.ImportFrom, ast.JoinedStr)):
                continue
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                continue
            if isinstance(node, ast.Assign) and [text(t) for t in node.targets] == ["__all__"]:
                continue
            yield node
            yield from nodes(node)


def text(node: ast.AST) -> str:
    return ast.unparse(node)


def run(tree: Path, tests: list[str], log: Path, limit: float) -> tuple[str, float]:
    """pytest in a fork of this process, in that tree: ("passed" | "failed" | "timeout" | "broken", seconds)."""
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.setsid()
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            os.chdir(tree)
            sys.path[:] = [str(tree), *(p for p in sys.path if p not in ("", str(ROOT)))]
            sys.dont_write_bytecode = True
            import pytest

            code = int(
                pytest.main(
                    [
                        "-x",
                        "-q",
                        "--tb=line",
                        "--assert=plain",
                        "-p",
                        "no:cacheprovider",
                        "-p",
                        "no:unraisableexception",
                        "-k",
                        SLOW,
                        *tests,
                    ]
                )
            )
            if not str(sys.modules["minift"].__file__).startswith(str(tree)):
                code = 99
                print(f"minift was imported from {sys.modules['minift'].__file__}, not from {tree}")
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        seconds = time.monotonic() - began
        if done:
            code = os.waitstatus_to_exitcode(status)
            return {0: "passed", 99: "broken"}.get(code, "failed"), seconds
        if seconds > limit:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "timeout", seconds
        time.sleep(0.02)


def mirror_first(path: str, tests: str) -> list[list[str]]:
    """Two runs: the tests of the same name, or of its folder's first if there is none, and then the others."""
    files = [str(p.relative_to(ROOT)) for p in sorted((ROOT / tests).glob("test_*.py"))] or [tests]
    files.sort(key=lambda p: Path(p).name != f"test_{Path(path).name}")
    return [files[:1], files[1:]] if files[1:] else [files]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation")
    parser.add_argument("pairs", nargs="+", help="SOURCE TESTS [SOURCE TESTS ...]")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", default="", help="mutants whose description contains this text")
    parser.add_argument("--list", action="store_true", help="list the mutants, run nothing")
    options = parser.parse_args()
    if len(options.pairs) % 2:
        parser.error("sources and tests come in pairs")

    todo: list[tuple[Mutant, str]] = []
    for source, tests in zip(options.pairs[::2], options.pairs[1::2], strict=True):
        files = [ROOT / source] if source.endswith(".py") else sorted((ROOT / source).rglob("*.py"))
        todo += [(m, tests) for path in files for m in mutants(path) if options.only in m.key]
    if options.list:
        print(*(m.key for m, _ in todo), f"{len(todo)} mutants", sep="\n")
        return 0

    os.environ.update(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1", HYPOTHESIS_PROFILE="ci", TORCHDYNAMO_DISABLE="1")
    for module in PRELOAD:
        try:
            importlib.import_module(module)
        except ImportError:
            print(f"without {module}")
    gc.collect()
    gc.freeze()  # the children need not look through what the imports have made
    with tempfile.TemporaryDirectory() as folder:
        trees: Queue[Path] = Queue()
        for job in range(options.jobs):
            tree = Path(folder) / str(job)
            for name in ("minift", "tests", "pyproject.toml"):
                copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
                tree.mkdir(exist_ok=True)
                keywords = {"ignore": shutil.ignore_patterns("__pycache__")} if copy is shutil.copytree else {}
                copy(ROOT / name, tree / name, **keywords)  # type: ignore[operator]
            trees.put(tree)
        return report(todo, trees, options.jobs, whole=not options.only)


def report(todo: list[tuple[Mutant, str]], trees: Queue[Path], jobs: int, whole: bool) -> int:
    """Run them all, print the survivors, and return the exit status."""
    limits = {}
    for tests in dict.fromkeys(tests for _, tests in todo):
        tree = trees.get()
        result, seconds = run(tree, [tests], tree / "log", 600)
        if result != "passed":
            print((tree / "log").read_text()[-3000:], f"\n{tests} must pass without a mutation, but {result}")
            return 2
        trees.put(tree)
        limits[tests] = 20 + 2 * jobs * seconds
        print(f"{tests}: passes in {seconds:.1f} s without a mutation", flush=True)

    def attempt(item):
        mutant, tests = item
        tree = trees.get()
        try:
            target = tree / mutant.path
            original = target.read_bytes()
            try:
                changed = original[: mutant.start] + mutant.after.encode() + original[mutant.stop :]
                compile(changed, mutant.path, "exec")
                target.write_bytes(changed)
                for some in mirror_first(mutant.path, tests):
                    result, _ = run(tree, some, tree / "log", limits[tests])
                    if result != "passed":
                        break
                return mutant, result
            finally:
                target.write_bytes(original)
        finally:
            trees.put(tree)

    argued = dict(line.split(" ## ", 1) for line in equivalent_lines())
    counts: Counter = Counter()
    problems = []
    with ThreadPoolExecutor(jobs) as pool:
        for done, (mutant, result) in enumerate(pool.map(attempt, todo), 1):
            survived = result == "passed"
            listed = mutant.key in argued
            counts["timeout"] += result == "timeout"
            counts["equivalent" if survived and listed else "survived" if survived else "killed"] += 1
            if survived != listed or result == "broken":
                kind = "SURVIVED" if survived else f"LISTED AS EQUIVALENT BUT {result}" if listed else result
                if survived or listed or result == "broken":
                    problems.append(mutant.key)
                    print(f"{kind}: line {mutant.line}: {mutant.key}", flush=True)
            if done % 10 == 0:
                print(f"{done} of {len(todo)}: {dict(counts)}", flush=True)
    sources = {mutant.path for mutant, _ in todo}
    gone = {key for key in argued if key.split(" :: ")[0] in sources} - {mutant.key for mutant, _ in todo}
    if whole and gone:
        print(*(f"NO SUCH MUTANT: {key}" for key in sorted(gone)), sep="\n")
    print(
        f"{len(todo)} mutants, {counts['killed']} killed ({counts['timeout']} by time), "
        f"{counts['equivalent']} equivalent, {counts['survived']} survived"
    )
    return 1 if problems or (whole and gone) else 0


def equivalent_lines() -> list[str]:
    """`key ## reason`, one a line; lines that start with # are comments."""
    lines = EQUIVALENT.read_text().splitlines() if EQUIVALENT.exists() else []
    return [line for line in lines if line.strip() and not line.startswith("#")]


if __name__ == "__main__":
    raise SystemExit(main())
