"""How good a set of images is, by features of a network: distances, precision and recall, agreement."""

from __future__ import annotations
