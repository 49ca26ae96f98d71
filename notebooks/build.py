"""Build the notebooks from their texts, with outputs: `make notebooks`, or `python notebooks/build.py 05 11`.

A notebook is written as text, `source/05_nf4.py` (jupytext's percent format), so that it can be read in a diff, checked
by ruff, and changed without an eye on outputs; `05_nf4.ipynb` is made from it and executed, from the first cell to the
last, in a fresh kernel. Metadata of a cell, behind `# %%`:

    exercise="5.1"     the reader's attempt; `solutions/05_nf4.py` has a cell of the same name that solves it
    stated=true        what the cell prints stands in the text: the tests compare it, in small mode too
    varies=true        what the cell prints differs from run to run (seconds, memory not written yet): never compared
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
KEPT = ("exercise", "stated", "varies", "tags")  # of a cell's metadata
CELL_SECONDS = 900


def sources() -> list[Path]:
    return sorted((HERE / "source").glob("[0-9][0-9]_*.py"))


def read(source: Path) -> nbformat.NotebookNode:
    """The notebook of this text, without outputs. A cell is identified by its number: no diff without a change."""
    notebook = jupytext.read(source, fmt="py:percent")
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = nbformat.from_dict({name: cell.metadata[name] for name in KEPT if name in cell.metadata})
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return notebook


def solved(source: Path) -> nbformat.NotebookNode:
    """The same with each exercise's cell replaced by its solution. KeyError for an exercise that has none."""
    notebook, solutions = read(source), jupytext.read(HERE / "solutions" / source.name, fmt="py:percent")
    answers = {cell.metadata["exercise"]: cell.source for cell in solutions.cells if "exercise" in cell.metadata}
    for cell in notebook.cells:
        if "exercise" in cell.metadata:
            cell.source = answers[cell.metadata["exercise"]]
    return notebook


def execute(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Run every cell, in the folder of the notebooks. Raises nbclient's CellExecutionError at the first that fails."""
    options = {"timeout": CELL_SECONDS, "resources": {"metadata": {"path": str(HERE)}}, "store_widget_state": False}
    client = NotebookClient(notebook, **options)
    client.execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when it ran
    return notebook


def build(source: Path) -> None:
    """Write the notebook of this text beside the folder of texts, executed. An old one stays if a cell fails."""
    notebook = execute(read(source))
    nbformat.validate(notebook)
    target = HERE / f"{source.stem}.ipynb"
    unfinished = target.with_suffix(".unfinished")
    unfinished.write_text(nbformat.writes(notebook), encoding="utf-8")
    unfinished.replace(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("only", nargs="*", help="how the names begin, such as 05; all without it")
    only = tuple(parser.parse_args().only)
    chosen = [source for source in sources() if not only or source.name.startswith(only)]
    if not chosen:
        sys.exit(f"no notebook begins with {' or '.join(only)}: there are {', '.join(s.stem for s in sources())}")
    for source in chosen:
        print(source.stem, flush=True)
        build(source)


if __name__ == "__main__":
    main()
