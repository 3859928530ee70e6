"""Images for training and evaluation, whatever they are kept in, and the order in which a run sees them."""

from __future__ import annotations
