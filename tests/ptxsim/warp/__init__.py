"""Warp level data movement and matrix instructions."""

from __future__ import annotations
