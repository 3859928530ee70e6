"""The commands of `python -m diffkern`, a module each."""
