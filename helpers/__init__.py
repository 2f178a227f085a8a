"""Shared loading, prompting and training code of the notebooks. Imports run downwards: see the module docstrings."""
