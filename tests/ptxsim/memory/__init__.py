"""Device memory (registered buffers) and per-CTA shared memory with hazard tracking."""

from __future__ import annotations

from .buffers import Memory, Region, buffer_span
from .shared import SharedMem

__all__ = ["Memory", "Region", "SharedMem", "buffer_span"]
