"""The commands of ``python -m diffkern``: `info`, `plan`, and in `demo` those of the demo, demo and sample."""
