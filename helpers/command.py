"""What the command lines of helpers.training and helpers.sharding share. Imports processes, profiles and errors."""

import argparse
import sys
from dataclasses import replace

from helpers import processes, profiles
from helpers.errors import OutputError, ProcessLostError, TutorialError
from helpers.profiles import Profile


def steps(text: str) -> int:
    """A number of steps from the command line: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of steps: give a whole number of at least 1")
    return int(text)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """The options that helpers.training and helpers.sharding have in common."""
    parser.add_argument(
        "--profile", default="tiny", help=f"auto (ask the hardware) or one of {', '.join(profiles.PROFILES)}; default tiny"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=steps, help="optimizer steps, for a short trial; default the profile's")
    parser.add_argument("--save-steps", type=steps, help="steps between checkpoints; default the profile's")
    parser.add_argument("--output", help="folder for checkpoints, adapter and results.json; default runs/<profile>")
    parser.add_argument("--resume", action="store_true", help="go on from the newest sound checkpoint")


def chosen_profile(args: argparse.Namespace) -> Profile:
    """The profile named on the command line, with its steps. ProfileError if there is none or it does not fit the hardware."""
    asked = {"max_steps": args.steps, "save_steps": args.save_steps}
    return replace(profiles.resolve(args.profile), **{name: value for name, value in asked.items() if value})


def tell(error: TutorialError) -> int:
    """Print an error in one sentence, once if it comes up in all processes; returns the exit status."""
    if processes.world().leads or isinstance(error, ProcessLostError | OutputError):
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    return 1
