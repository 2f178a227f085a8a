"""Stands in for the package that exists on Colab only."""
