"""Drop-in classes and functions for other projects: the same names and signatures, on diffkern's fused ops."""
