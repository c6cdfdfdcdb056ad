"""vit_efficient: make a Vision Transformer small and fast without lying about its accuracy.

Importing this package loads nothing heavy and starts nothing: no CUDA, no global flags, no downloads.
"""

__version__ = "0.1.0"
