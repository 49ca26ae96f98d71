"""Whole networks, composed of `minift.nn`: one module an architecture, and in each the same names.

Config, shapes, head_name      the sizes, the parameters they make, and which of these is the output matrix
backbone, forward              the trunk, and the trunk with its head: `y, vjp`
fuse, stream, generate         the same model to generate with
"""

from __future__ import annotations

from types import ModuleType

from minift.models import gpt2, llama

Config = llama.Config | gpt2.Config


def module_of(config: Config) -> ModuleType:
    """The module that computes a model of this configuration."""
    return gpt2 if isinstance(config, gpt2.Config) else llama
