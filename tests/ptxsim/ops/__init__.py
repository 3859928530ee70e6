"""Operand access and the per-thread (ALU / conversion) instruction semantics."""

from __future__ import annotations
