"""`python notebooks/book/build.py`: the book, from what is committed. How it is made stands in `conf.py`."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

import api
import steps
from modules import ROOT, read
from sphinx.cmd.build import build_main

HERE = Path(__file__).resolve().parent


def sources(notebooks: Path, within: str) -> dict[str, str]:
    """{path below the folder that Sphinx reads: text} of every page."""
    found = {"index.md": (HERE / "index.md").read_text()}
    found |= {f"{name}.rst": text for name, text in api.pages(read(within)).items()}
    found |= {name if name.endswith(".rst") else f"extra/{name}": text for name, text in steps.pages().items()}
    for path in sorted(notebooks.glob("[0-9]*.ipynb")):
        text = with_folded_plots(path.read_text())
        found[f"notebooks/{path.name}"] = with_links(text, {f"../{name}" for name in found})
    return found


def with_links(notebook: str, pages: set[str]) -> str:
    """Links to files of the packages lead to their pages; where there is none, only the words are left."""

    def link(found: re.Match) -> str:
        words, file = found.groups()
        page = file.removesuffix(".py").removesuffix("/")
        there = [name for name in (f"{page}.rst", f"{page}/index.rst") if name in pages]
        return f"[{words}]({there[0]})" if there else words

    return re.sub(r"\[([^]\n]*)\]\((\.\./[\w./]+)\)", link, notebook)


def with_folded_plots(notebook: str) -> str:
    """The code of a cell that draws is folded: a reader wants the picture, and the code at a click."""
    found = json.loads(notebook)
    for cell in found["cells"]:
        if cell["cell_type"] == "code" and "plt.show()" in "".join(cell["source"]):
            cell["metadata"]["tags"] = [*cell["metadata"].get("tags", []), "hide-input"]
    return json.dumps(found)


def lay_out(folder: Path, files: dict[str, str]) -> None:
    """Write what has changed, and delete what is no more: Sphinx reads a page again if its file is newer."""
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        if path.relative_to(folder).as_posix() not in files:
            path.unlink()
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def main() -> int:
    parser = argparse.ArgumentParser(description="Builds the book.")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "book", help="the site; default build/book")
    parser.add_argument(
        "--notebooks", type=Path, default=ROOT / "notebooks", help="the folder that they are taken from"
    )
    parser.add_argument("--fresh", action="store_true", help="build every page again")
    parser.add_argument("--only", default="", metavar="REGEX", help="of the modules, those whose page's name matches")
    options = parser.parse_args()
    source, doctrees = (options.out.with_name(f"{options.out.name}-{what}") for what in ("source", "doctrees"))
    if options.fresh:
        for folder in (source, doctrees, options.out):
            shutil.rmtree(folder, ignore_errors=True)
    lay_out(source, sources(options.notebooks, options.only))
    arguments = ["-q", "-W", "--keep-going", "-n", "-D", f"book_only={options.only}", "-c", HERE, "-d", doctrees]
    status = build_main([*map(str, [*arguments, source, options.out])])
    if status == 0:
        print(f"{options.out / 'index.html'}: {sum(1 for _ in options.out.rglob('*.html'))} pages")
    return status


if __name__ == "__main__":
    sys.exit(main())
