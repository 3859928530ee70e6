"""SIMT interpreter: scheduling, memory instructions, barriers, asynchronous copies."""

from __future__ import annotations

from .options import Options, dims3
from .scheduler import Machine

__all__ = ["Machine", "Options", "dims3"]
