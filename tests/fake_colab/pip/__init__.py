"""Stands in for pip where Colab is emulated: see __main__."""
