"""Whole networks on torch tensors: the twins of `minift.models`, one module an architecture."""

from __future__ import annotations

from types import ModuleType

from minift.models import Config
from minift_kernels.models import gpt2, llama

__all__ = ["Config", "module_of"]


def module_of(config: Config) -> ModuleType:
    """The module that computes a model of this configuration."""
    return gpt2 if isinstance(config, gpt2.Config) else llama
