"""Stands in for the package that exists on Colab only: the four modules that notebooks may touch, with Colab's names and behaviour."""
