"""Weights of other libraries' networks: read, brought to our names and shapes, and written back."""
