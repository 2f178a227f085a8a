"""What a run will take: predicted memory and steps before it starts, the time left once ten steps are measured. Imports memory, profiles."""

import time

from transformers import FalconConfig, TrainerCallback

from helpers import memory
from helpers.profiles import Profile

MEASURED_STEPS = 10


def duration(seconds: float) -> str:
    """Seconds as a reader says them: "45 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


class Forecast(TrainerCallback):
    """Prints two lines: at the start what is predicted, after ten steps what is measured and what is left."""

    def __init__(self, profile: Profile, config: FalconConfig):
        self.kind = "GPU memory" if profile.gpu_bytes else "memory"
        self.predicted = memory.plan(config, profile).total
        self.batch = profile.micro_batch * profile.accumulation

    def on_train_begin(self, args, state, control, **kwargs):
        self.first, self.began = state.global_step, time.monotonic()
        if state.is_world_process_zero:
            left = state.max_steps - self.first
            print(f"predicted {self.kind} {self.predicted / 1e9:.1f} GB; {left} steps of {self.batch} examples to go")

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.first + MEASURED_STEPS and state.is_world_process_zero:
            rate = MEASURED_STEPS / (time.monotonic() - self.began)
            left = (state.max_steps - state.global_step) / rate
            print(f"measured {rate:.2f} steps a second over the first {MEASURED_STEPS}: about {duration(left)} left")
