"""Chromium, without other packages: a script writes what it found into its page, and the browser prints the page."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine (Debian's package is chromium)")

QUIET = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
ALONE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"  # whatever a page asks of another host fails


def dumped(tmp_path: Path, address: str, *options: str) -> str:
    """The document at the end, as HTML. The profile is a new one, below `tmp_path`."""
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += [*QUIET, ALONE, *options, "--dump-dom", address]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=True).stdout


def found(tmp_path: Path, address: str, *options: str) -> Any:
    """What the page's script has written into `<pre id="result">` as JSON."""
    document = dumped(tmp_path, address, "--virtual-time-budget=60000", "--window-size=1400,1000", *options)
    result = re.search(r'<pre id="result">(.*?)</pre>', document, re.DOTALL)
    assert result, document[-500:]
    return json.loads(unescape(result[1]))
