"""How the book is made.

`make book` runs `notebooks/book/build.py`, which lays out the pages in `build/book-source`, under the names that their
originals have in the repository, and has Sphinx turn them into `build/book`:

    index.md               the front page, as it stands in this folder
    notebooks/*.ipynb      the notebooks, as they are committed, with their outputs: nothing is executed here
    minift/nn/norms.rst    a page for each module, from its source (`modules`, `api`, `docstrings`)
    steps.rst, steps/      the lessons of `minift step`, each a page of its own (`steps`)

The book is read from a folder, without a network: MathJax is in the package sphinx-mathjax-offline, the letters of the
equations come with matplotlib. Warnings are errors, so that no link leads nowhere.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import matplotlib

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

project = "minift"
author = "The minift authors"
copyright = "The minift authors, Apache-2.0"
language = "en"
smartquotes = False  # W' is not W’

extensions = ["myst_nb", "sphinx.ext.mathjax", "sphinx_copybutton", "course", "docstrings"]
exclude_patterns = ["extra"]
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "dollarmath"]
myst_heading_anchors = 3

python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
toc_object_entries = False
add_module_names = False

mathjax_path = "tex-svg-full.js"
mathjax3_config = {"svg": {"fontCache": "global"}, "options": {"enableMenu": False}}

html_theme = "furo"
html_title = "minift"
html_show_sourcelink = False
html_copy_source = False
html_show_sphinx = False
html_static_path = [
    str(HERE / "book.css"),
    str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSansMono.ttf")),
    str(Path(find_spec("sphinx-mathjax-offline").origin).parent / "static" / "mathjax" / "tex-svg-full.js"),
]
html_css_files = ["book.css"]
pygments_style = "default"
pygments_dark_style = "github-dark"
copybutton_exclude = ".linenos, .gp, .go"


def short_navigation(app, page, template, context, doctree):
    """Only the branch that a page is in is open: three hundred pages that each list all would take minutes to write."""
    if whole := context.get("toctree"):
        context["toctree"] = lambda **options: whole(**options | {"collapse": True})


def setup(app):
    app.config.html_extra_path = [str(Path(app.srcdir, "extra"))]
    app.connect("html-page-context", short_navigation, priority=100)  # before the theme's
