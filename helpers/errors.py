"""Errors a reader can act on. Each message is one sentence: what was wrong, with the value, and what to do next."""


class TutorialError(Exception):
    """Base of all errors that the helpers raise on purpose."""


class SetupError(TutorialError):
    """Packages that are missing, or something asked of a place (Colab, Kaggle, a checkout) that it does not have."""


class ResourceError(TutorialError):
    """Too little disk or RAM for a model, found out before its download."""


class ProfileError(TutorialError):
    """An unknown hardware profile, or one that does not fit the hardware found."""


class DataError(TutorialError):
    """A data set that cannot be read, or that holds nothing to train on."""


class ModelError(TutorialError):
    """A base model that is missing, damaged, or not a Falcon."""


class PickledWeightsError(ModelError):
    """A base model whose weights come pickled only: they are not loaded, pickles can run code and need the memory of a whole file."""


class NotQuantizedError(ModelError):
    """A model that was to be 4-bit and is not."""


class AdapterError(TutorialError):
    """An adapter folder that is missing, damaged, or made for another base model."""


class OutputError(TutorialError):
    """An output folder that cannot be written, or that holds something else."""


class CheckpointError(TutorialError):
    """Nothing sound to resume from, or a checkpoint of another run."""


class DivergedError(TutorialError):
    """Training produced a loss that is not a finite number."""


class PlanError(TutorialError):
    """A memory plan asked for with an unknown name or an impossible size."""


class LaunchError(TutorialError):
    """A number of processes that a run cannot be shared among."""


class ProcessLostError(TutorialError):
    """Another process of the same run was killed or failed, so that this one cannot go on."""


class NotShardedError(TutorialError):
    """A model whose parameters were to be spread over processes and were not."""


class ExerciseError(TutorialError):
    """The number of an exercise that does not exist."""


class WrongAnswer(TutorialError):
    """An answer to an exercise that is not right yet; the message is a hint. In a notebook it shows as one line, without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [f"✗ {self}"]
