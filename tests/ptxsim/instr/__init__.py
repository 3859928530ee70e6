"""Builders for memory, control-flow and synchronisation instructions.

build.build(cx) returns (kind, handler): kind 0 handlers run for a group and fall through, kind 1 handlers return the
next pc of the whole group or -1 after having re-queued the lanes themselves.
"""

from __future__ import annotations
