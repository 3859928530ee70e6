"""Whole networks beside diffusers' own: evaluations, training steps, sampling runs, profiles, counts for GPUs.

`python -m benchmarks.networks` measures them and writes a section of docs/benchmarks.md.
"""
