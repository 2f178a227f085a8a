"""Errors a reader can act on: one sentence says what was wrong, with the value, and what to do."""


class TutorialError(Exception):
    """Base of the helpers' own errors: settings, hardware, folders, diverged runs."""


class DataError(TutorialError):
    """A data set that cannot be read, or that holds nothing to train on."""


class ModelError(TutorialError):
    """A base model that is missing, damaged, or of a kind that cannot be used here."""


class NotQuantizedError(ModelError):
    """A model that was to be 4-bit and is not."""


class AdapterError(TutorialError):
    """An adapter folder that is missing, damaged, or made for another base model."""
