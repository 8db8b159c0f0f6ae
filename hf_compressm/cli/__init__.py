"""The command line: one module for each command of hf-compressm."""

from . import analyze, benchmark, compress, demo, estimate, export, show
from .app import app

__all__ = ["analyze", "app", "benchmark", "compress", "demo", "estimate", "export", "show"]
