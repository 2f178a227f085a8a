"""Training whose numbers have gone wrong, told while it runs. Imports errors.

Five signs, looked for at every step and before its checkpoint is written: a loss or a gradient that is not a finite number, gradients that
stay huge, a loss that has risen and stays up, gradients that vanish while the loss does not. The last is what too high a learning rate leaves
of the tiny Falcon: it answers each message alike, at a loss below its first. `tests/test_numbers.py` holds the signs against real runs.
"""

import math
from statistics import median

from transformers import TrainerCallback

from helpers.errors import DivergedError

WINDOW = 10  # steps whose median is looked at, so that a single hard batch raises no alarm
FIRST = 3  # steps that make a window at the start: a run may be lost before there are more
RISE, FACTOR = 1.0, 2.0  # a loss has risen if it lies this many nats a token, and this many times, above the best window
VANISHED = 30  # times smaller, against the loss, than at the start; in runs that learn, gradients grow against the loss
HUGE = 1e3  # norm of all gradients before clipping at 1; what is trained here lies between 0.1 and 30
SKIPPED = 25  # steps in a row without finite gradients in float16, where the loss scaling halves its scale and skips the step


class StopOnDivergence(TrainerCallback):
    """Raises DivergedError, which names step, value and what to change, at the first step that shows one of the five signs."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.losses: list[float] = []
        self.norms: list[float] = []  # finite ones: float16 skips the others
        self.shares: list[float] = []  # norm of the gradients over loss
        self.best, self.best_step, self.not_finite = math.inf, 0, 0
        for entry in state.log_history:  # what a resumed run logged before
            if "loss" in entry:
                self.remember(entry["loss"], entry.get("grad_norm"))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            return
        step, norm = state.global_step, logs.get("grad_norm")
        self.check_finite(args, step, logs["loss"], norm)
        self.remember(logs["loss"], norm)
        if len(self.norms) >= WINDOW and (middle := median(self.norms[-WINDOW:])) > HUGE:
            raise DivergedError(f"the gradients have a norm of {middle:.3g} over {WINDOW} steps (step {step}): {ways_out(args)}")
        now = median(self.losses[-WINDOW:])
        if now > self.best + RISE and now > FACTOR * self.best:
            raise DivergedError(
                f"the loss rose from {self.best:.3g} (steps to {self.best_step}) to {now:.3g} (step {step}): {ways_out(args)}; only checkpoints from before the rise are of use"
            )

        if len(self.shares) >= FIRST + WINDOW and median(self.shares[-WINDOW:]) < median(self.shares[:FIRST]) / VANISHED:
            raise DivergedError(
                f"the gradients have vanished (norm {median(self.norms[-WINDOW:]):.3g} at step {step}) and the loss has not ({now:.3g}), the model no longer sees what it reads: {ways_out(args)}; only checkpoints from before are of use"
            )

    def remember(self, loss: float, norm: float | None) -> None:
        """Add a step's loss and gradients, and see whether the window before the last one is the best so far."""
        self.losses.append(loss)
        if norm is not None and math.isfinite(norm) and loss > 0:
            self.norms.append(norm)
            self.shares.append(norm / loss)
        before = self.losses[-2 * WINDOW : -WINDOW]
        if len(before) >= FIRST and median(before) <= self.best:
            self.best, self.best_step = median(before), len(self.losses) - WINDOW

    def check_finite(self, args, step: int, loss: float, norm: float | None) -> None:
        """DivergedError for a loss that is not finite, and for gradients that are not: the weights they would be taken into are lost."""
        if not math.isfinite(loss):
            raise DivergedError(f"the loss at step {step} is {loss}: {ways_out(args)}")
        self.not_finite = 0 if norm is None or math.isfinite(norm) else self.not_finite + 1
        if self.not_finite >= (SKIPPED if args.fp16 else 1):
            raise DivergedError(f"the gradients at step {step} have the norm {norm}: {ways_out(args)}")


def ways_out(args) -> str:
    """What to change, with the values that the run has."""
    if args.fp16:
        half = (
            f"lengthen the warm-up ({args.warmup_steps} steps), or take a card with bfloat16 (L4, A100): float16 ends at 65,504"
        )
    else:
        half = f"or lengthen the warm-up ({args.warmup_steps} steps)"
    return f"lower the learning rate ({args.learning_rate:g}), {half}"
