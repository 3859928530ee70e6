"""The demo: a small class-conditional diffusion model of handwritten digits, by the package's own parts.

`pictures` the strips that it draws · `run` the whole job; its command: `diffkern.command.demo`.

What it needs beyond torch (scikit-learn, matplotlib, Pillow, safetensors, PyYAML, torch-fidelity) is the extra
``diffkern[demo]``, imported where it is used.
"""
