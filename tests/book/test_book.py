"""The book: it builds without a warning, no link of it leads nowhere, it asks nothing of another host, and in a browser
its pages load without an error, wide and narrow, light and dark."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import browser

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "notebooks" / "book" / "build.py"
SOME = r"(minift|kernels/minift_kernels)/(index|(nn|quant)/)"  # modules enough to see every kind of docstring
pytest.importorskip("myst_nb", reason="the extra `book` is not installed")
pytestmark = pytest.mark.xdist_group("book")


def build(folder, notebooks, only=""):
    command = [sys.executable, BUILD, "--out", folder, "--notebooks", notebooks, "--only", only]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING" not in done.stderr, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """The committed notebooks, and one that is wider than any phone; some of the modules, all lessons."""
    folder = tmp_path_factory.mktemp("book")
    notebooks = folder / "notebooks"
    notebooks.mkdir()
    for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"):
        shutil.copy(path, notebooks)
    shutil.copy(Path(__file__).with_name("wide.ipynb"), notebooks / "99_wide.ipynb")
    return build(folder / "site", notebooks, SOME)


class Page(HTMLParser):
    """What a page links to, what it loads, and the names that links to it may end in."""

    def __init__(self, text):
        super().__init__()
        self.links, self.loads, self.names = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.names |= {given[key] for key in ("id", "name") if given.get(key)}
        if tag in ("a", "area") and given.get("href"):
            self.links.append(given["href"])
        if (
            tag == "link"
            and given.get("href")
            and given.get("rel") not in ("index", "search", "next", "prev", "canonical")
        ):
            self.loads.append(given["href"])
        if tag != "a":
            self.loads += [given[key] for key in ("src", "data", "poster") if given.get(key)]
            self.loads += [part.split()[0] for part in (given.get("srcset") or "").split(",") if part.strip()]


def problems(folder):
    """Links and files that are not there, and what another host would have to be asked for."""
    pages = {path: Page(path.read_text()) for path in folder.rglob("*.html")}
    found = []
    for path, page in pages.items():
        for address in page.links + page.loads:
            parts = urlsplit(address)
            if parts.scheme == "data" or (parts.scheme and address in page.links and address not in page.loads):
                continue
            if parts.scheme or parts.netloc:
                found.append(f"{path.name}: {address} is on another host")
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                found.append(f"{path.name}: {address} is not there")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].names:
                found.append(f"{path.name}: {address}: no such place in that page")
    for path in folder.rglob("*.css"):
        text = re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)
        for address in re.findall(r"url\(\s*[\"']?([^\"')]+)|@import\s+[\"']([^\"']+)", text):
            address = "".join(address)
            if address.startswith(("http:", "https:", "//")):
                found.append(f"{path.name}: {address} is on another host")
            elif not address.startswith(("data:", "#")) and not (path.parent / urlsplit(address).path).is_file():
                found.append(f"{path.name}: {address} is not there")
    return found


def test_every_link_leads_somewhere_and_nothing_is_on_another_host(book):
    assert problems(book) == []
    lessons = {path.stem for path in (book / "steps").glob("*.html")}
    assert len(lessons) == 16
    listed = Page((book / "steps.html").read_text()).links
    assert {f"steps/{name}.html" for name in lessons} <= set(listed)


@pytest.mark.parametrize(
    "wrong",
    [
        '<a href="nowhere.html">',
        '<a href="index.html#nowhere">',
        '<a href="#nowhere">',
        '<img src="nowhere.png">',
        '<script src="https://cdn.example/x.js"></script>',
        '<link rel="stylesheet" href="//cdn.example/x.css">',
        '<iframe src="steps/nowhere.html"></iframe>',
    ],
)
def test_a_link_that_leads_nowhere_is_noticed(tmp_path, wrong):
    (tmp_path / "index.html").write_text(
        f'<h1 id="here"><a href="#here"></a></h1><a href="https://example.org">{wrong}'
    )
    assert len(problems(tmp_path)) == 1


def test_a_style_from_another_host_is_noticed(tmp_path):
    (tmp_path / "x.css").write_text('@import "https://fonts.example/x.css"; a { background: url(nowhere.png) }')
    assert len(problems(tmp_path)) == 2


def test_equations_of_a_docstring_keep_their_lines_and_their_numbers(book):
    page = (book / "minift" / "quant" / "nf4.html").read_text()
    assert (
        "negative entries    v_i = −Φ⁻¹(p_i)     p_i evenly spaced from δ down to ½, 8 points, the last left out\n"
        in page
    )
    assert all(f'id="equation-{number}">({number})</span>' in page for number in range(1, 6))
    assert re.search(r'href="#equation-1">\(1\)</a>–<a [^>]*href="#equation-4">\(4\)</a> is what the authors', page)
    assert re.search(r'href="double_quant.html#minift.quant.double_quant.DoubleQuantizedScales"[^>]*><code', page)
    assert "<strong>Where the sixteen numbers come from.</strong>" in page and "**" not in page.partition("<article")[2]
    norms = (book / "minift" / "nn" / "norms.html").read_text()
    assert '<span class="source">(Zhang &amp; Sennrich 2019, arXiv 1910.07467, eq. 4)</span>' in norms
    assert 'href="../../kernels/minift_kernels/nn/norms.html' in norms


class Served(SimpleHTTPRequestHandler):
    """The book, with a first script in each page that notes what goes wrong in it."""

    NOTES = """<script>
    window.wrong = [];
    const name = (e) => e.message || `${e.target.tagName} ${e.target.src || e.target.href}`;
    addEventListener("error", (e) => wrong.push(name(e)), true);
    addEventListener("unhandledrejection", (e) => wrong.push(String(e.reason)));
    const error = console.error;
    console.error = (...words) => { wrong.push(words.join(" ")); error(...words); };
    </script>"""

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        if path.suffix != ".html" or not path.is_file():
            return super().do_GET()
        text = path.read_text()
        body = text.replace("<head>", f"<head>{self.NOTES}", 1).encode() if "<head>" in text else text.encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format, *args):
        pass

    def log_error(self, format, *args):
        self.server.failed.append(self.path)


DRIVER = """<!doctype html><meta charset=utf-8><body><iframe style="height:900px;border:0"></iframe><script>
const frame = document.querySelector("iframe"), found = {};
const inside = () => frame.contentDocument;
async function open(address, width) {
  frame.style.width = `${width}px`;
  await new Promise((done) => { frame.onload = done; frame.src = address; });
  const view = frame.contentWindow;
  if (view.MathJax?.startup) await view.MathJax.startup.promise;
  return view;
}
function state(view) {
  return {
    title: inside().title, wrong: view.wrong, overflow: inside().documentElement.scrollWidth - view.innerWidth,
    elsewhere: view.performance.getEntriesByType("resource").map((r) => r.name)
      .filter((name) => !name.startsWith(location.origin) && !name.startsWith("data:")),
    math: inside().querySelectorAll("mjx-container svg").length,
  };
}
const paper = () => frame.contentWindow.getComputedStyle(inside().body).backgroundColor;
(async () => { SCRIPT })().catch((error) => { found.failed = String(error); }).finally(() => {
  const result = document.createElement("pre");
  result.id = "result";
  result.textContent = JSON.stringify(found);
  document.body.replaceChildren(result);
});
</script>"""


@pytest.fixture
def browse(book, tmp_path):
    """browse(script) -> what it found; `failed` are the requests that were not answered."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Served, directory=str(book)))
    server.failed = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    driver = book / "_driver.html"

    def browse(script):
        driver.write_text(DRIVER.replace("SCRIPT", script))
        found = browser.found(tmp_path, f"http://127.0.0.1:{server.server_port}/_driver.html")
        assert "failed" not in found, found["failed"]
        assert [path for path in server.failed if path != "/favicon.ico"] == []
        return found

    yield browse
    server.shutdown()
    server.server_close()
    driver.unlink()


@browser.needs_browser
def test_pages_load_without_an_error_and_none_scrolls_sideways(book, browse):
    pages = ["index.html", "steps.html", "search.html", "genindex.html", "steps/lora.html", "steps/nf4.html"]
    pages += ["minift/index.html", "kernels/minift_kernels/quant/nf4.html"]
    pages += [path.relative_to(book).as_posix() for path in sorted((book / "notebooks").glob("*.html"))]
    pages += [f"minift/{name}.html" for name in ("nn/index", "nn/norms", "nn/attention", "nn/weight", "quant/nf4")]
    found = browse(f"for (const page of {pages}) for (const width of [1280, 390]) "
                   "found[`${page} ${width}`] = state(await open(page, width));")  # fmt: skip
    assert len(found) == 2 * len(pages)
    assert {where: state["wrong"] for where, state in found.items() if state["wrong"]} == {}
    assert {where: state["overflow"] for where, state in found.items() if state["overflow"] > 0} == {}
    assert {where: state["elsewhere"] for where, state in found.items() if state["elsewhere"]} == {}
    assert found["notebooks/99_wide.html 390"]["math"] >= 3, "mathematics is set"


@browser.needs_browser
def test_from_the_front_page_into_a_lesson_forward_and_back_and_home(browse):
    found = browse("""
    await open("index.html", 1280);
    const follow = async (link) => {
      const loaded = new Promise((done) => { frame.onload = done; });
      link.click();
      await loaded;
    };
    await follow([...inside().querySelectorAll("a")].find((a) => a.getAttribute("href") === "steps/nf4.html"));
    const count = () => inside().getElementById("count").textContent;
    found.counts = [count()];
    for (const id of ["next", "next", "next", "back"]) {
      inside().getElementById(id).click();
      found.counts.push(count());
    }
    found.lesson = state(frame.contentWindow);
    inside().querySelectorAll(".around a").forEach((a) => { a.target = "_self"; });  // the test's frame is not the top
    await follow(inside().querySelector(".around a[rel=next]"));
    found.next = inside().title;
    inside().querySelectorAll(".around a").forEach((a) => { a.target = "_self"; });
    await follow(inside().querySelector(".around a"));
    found.list = inside().title;
    """)
    first, *others = (int(count.split()[0]) for count in found["counts"])
    assert first == 1 and others[-1] == others[-2] - 1 and max(others) > 1
    assert found["lesson"]["wrong"] == []
    assert found["next"].startswith("Double quantization") and found["list"].startswith("Step by step")


@browser.needs_browser
def test_dark_is_chosen_by_a_click_and_holds_in_lessons_too(browse):
    found = browse("""
    await open("index.html", 1280);
    found.light = paper();
    inside().querySelector(".theme-toggle").click();
    await new Promise((done) => setTimeout(done, 500));
    found.dark = paper();
    await open("minift/nn/norms.html", 1280);
    found.module = paper();
    await open("steps/lora.html", 1280);
    found.lesson = paper();
    """)

    def brightness(color):
        return sum(map(int, re.findall(r"\d+", color)[:3]))

    assert brightness(found["light"]) > 600
    assert max(brightness(found[page]) for page in ("dark", "module", "lesson")) < 200


@pytest.mark.slow
def test_every_module_has_a_page(tmp_path):
    folder = build(tmp_path / "site", ROOT / "notebooks")
    assert problems(folder) == []
    for top in (ROOT / "minift", ROOT / "kernels" / "minift_kernels"):
        for path in top.rglob("*.py"):
            page = path.relative_to(ROOT).with_suffix(".html")
            page = page.with_name("index.html") if path.name == "__init__.py" else page
            assert path.name.startswith("__main__") or (folder / page).is_file(), page
