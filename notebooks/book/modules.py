"""What stands in the packages, read from their source and never imported: so the twins are described without torch."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {  # in the order of the house, and within a package what others build upon first; then by name
    "minift": "nn models quant peft optim rlhf train data io step conformance studies claims cli",
    "minift.nn": "linear embedding norms rope attention mlp losses dropout weight",
    "minift.models": "llama gpt2 bert",
    "minift.quant": "blockwise codebooks nf4 double_quant",
    "minift.peft": "lora qlora merge adapter prompt_tuning prefix_tuning p_tuning",
    "minift.optim": "adamw adamw8bit paged",
    "minift.rlhf": "reward_model advantages ppo grpo dpo",
    "minift_kernels": "nn models quant peft optim rlhf train",
}
NUMBER = re.compile(r"\s{2,}\((\d+[a-z]?)\)$")  # at the end of a line: that of an equation
Definition = ast.FunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Module:
    """One file: its name, its path in the repository, what it says of itself and what it offers."""

    name: str
    path: Path
    source: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)

    @cached_property
    def doc(self) -> str:
        return docstring(self.tree)

    @property
    def page(self) -> str:
        """The document's name: `minift/nn/norms`, or `minift/nn/index` for a package."""
        path = self.path.with_suffix("")
        return path.with_name("index").as_posix() if path.name == "__init__" else path.as_posix()

    @property
    def short(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"

    @property
    def summary(self) -> str:
        """The docstring's first sentence."""
        first = re.split(r"(?<=[.?])\s|\s{3,}|\n\n", self.doc, maxsplit=1)[0]
        return " ".join(first.split())

    @cached_property
    def numbers(self) -> set[str]:
        """The numbers of its equations."""
        nodes = [self.tree, *(node for node in ast.walk(self.tree) if isinstance(node, Definition))]
        lines = [line for node in nodes for line in docstring(node).split("\n")]
        return {found[1] for line in lines if (found := NUMBER.search(line))}

    @cached_property
    def definitions(self) -> list[Definition]:
        """The functions and classes of the file, in its order."""
        return [node for node in self.tree.body if isinstance(node, Definition)]

    @cached_property
    def members(self) -> set[str]:
        """The public names that are defined here: of functions, classes and constants; `Class.method` too."""
        found = {name for name, _ in self.constants}
        for node in self.definitions:
            found.add(node.name)
            if isinstance(node, ast.ClassDef):
                found |= {f"{node.name}.{method.name}" for method in methods(node)}
        return {name for name in found if is_public(name)}

    @cached_property
    def constants(self) -> list[tuple[str, ast.Assign | ast.AnnAssign]]:
        found = []
        for node in self.tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(targets[0], ast.Name):
                found.append((targets[0].id, node))
        return found

    @cached_property
    def imported(self) -> dict[str, str]:
        """What a name of this file stands for elsewhere: {"Weight": "minift.nn.weight.Weight"}."""
        return {
            alias.asname or alias.name: f"{node.module}.{alias.name}"
            for node in ast.walk(self.tree)
            if isinstance(node, ast.ImportFrom) and node.module
            for alias in node.names
        }

    @cached_property
    def variables(self) -> set[str]:
        """Names of arguments and variables: in `backticks` these mean what they mean here."""
        found = {node.arg for node in ast.walk(self.tree) if isinstance(node, ast.arg)}
        return found | {
            node.id for node in ast.walk(self.tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        }


class Names:
    """All modules, and what a name in a docstring refers to."""

    def __init__(self, modules: list[Module]):
        self.modules = {module.name: module for module in modules}
        self.all = {f"{module.name}.{name}" for module in modules for name in module.members} | {*self.modules}
        self.by_end: dict[str, list[str]] = {}
        for name in self.all:
            for end in _ends(name):
                self.by_end.setdefault(end, []).append(name)

    def inside(self, package: Module) -> list[Module]:
        """The modules and packages of a package."""
        return [module for module in self.modules.values() if module.name.rpartition(".")[0] == package.name]

    def origin(self, name: str) -> str:
        """Where a name of a module is defined: `minift.peft.adapter.Adapter` for `minift.peft.lora.Adapter`; "" if not
        in one of ours."""
        if name in self.all:
            return name
        module = next((m for m in self._before(name) if m in self.modules), "")
        first, dot, rest = name.removeprefix(f"{module}.").partition(".")
        there = self.modules[module].imported.get(first) if module else None
        return self.origin(f"{there}{dot}{rest}") if there else ""

    def _before(self, name: str) -> list[str]:
        """The names that it could be a part of, longest first."""
        pieces = name.split(".")
        return [".".join(pieces[:i]) for i in range(len(pieces) - 1, 0, -1)]

    def find(self, written: str, within: str = "") -> str | None:
        """The full name of what is written in a docstring of the module `within`, None if it is not one of ours."""
        written = written.removesuffix("()")
        here = self.modules.get(within)
        if here and written in here.members:
            return f"{within}.{written}"
        if here and (origin := self.origin(f"{within}.{written}")):
            return origin
        if written in self.all:
            return written
        if "." not in written and here and written in here.variables:
            return None
        found = [name for name in self.by_end.get(written, []) if "." in written or name in self.modules]
        for start in (within.rpartition(".")[0], within.partition(".")[0]):
            near = [name for name in found if name.startswith(f"{start}.")]
            if len(near) == 1:
                return near[0]
        return found[0] if len(found) == 1 else None


def _ends(name: str) -> list[str]:
    pieces = name.split(".")
    return [".".join(pieces[i:]) for i in range(len(pieces))]


@cache
def read(within: str = "") -> Names:
    """The public modules of both packages, in the order of the book: those whose page's name `within` matches."""
    modules = []
    for top in (ROOT / "minift", ROOT / "kernels" / "minift_kernels"):
        for path in sorted(top.rglob("*.py")):
            name = ".".join(path.relative_to(top.parent).with_suffix("").parts).removesuffix(".__init__")
            module = Module(name, path.relative_to(ROOT), path.read_text())
            if is_public(name) and re.match(within, module.page):
                modules.append(module)
    return Names(sorted(modules, key=_place))


def _place(module: Module) -> list[tuple[int, str]]:
    """A package stands before its modules; packages of the house stand before what else is in a folder."""
    pieces = module.name.split(".")
    place = [(0, pieces[0])]
    for depth in range(1, len(pieces)):
        order = PACKAGES.get(".".join(pieces[:depth]), "").split()
        place.append((order.index(pieces[depth]) if pieces[depth] in order else len(order), pieces[depth]))
    return place


def docstring(node: ast.Module | Definition) -> str:
    """As it is written, less the indentation of the code that it stands in."""
    first = node.body[0] if node.body else None
    if not (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    ):
        return ""
    return dedented(first.value.value, first.col_offset)


def dedented(text: str, columns: int) -> str:
    """Unlike `inspect.cleandoc`, which would take away the indentation of an equation that stands alone."""
    first, *lines = text.strip().split("\n")
    return "\n".join([first, *(line[columns:] if not line[:columns].strip() else line for line in lines)])


def methods(node: ast.ClassDef) -> list[ast.FunctionDef]:
    return [method for method in node.body if isinstance(method, ast.FunctionDef) and is_public(method.name)]


def is_public(name: str) -> bool:
    return not any(piece.startswith("_") for piece in name.split("."))
