"""What all command lines share: numbers that are checked, errors in one sentence, exit status. Imports processes, profiles and errors.

Exit status of every `python -m helpers.X`: 0 done; 1 an error of `helpers.errors`, told in one sentence on stderr; 2 wrong usage, told by
argparse before anything else is done; 130 interrupted (Ctrl-C), with how to go on.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace

from helpers import processes, profiles
from helpers.errors import OutputError, ProcessLostError, ResourceError, TutorialError
from helpers.profiles import Profile


def whole(what: str, least: int = 1, most: int = 10**6) -> Callable[[str], int]:
    """An argparse type: a whole number from `least` to `most`, in ASCII digits; any other text "is no WHAT"."""

    def read(text: str) -> int:
        if not (text.isascii() and text.isdecimal()) or len(text) > 18 or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is no {what}: give a whole number from {least} to {most:,}")
        return int(text)

    return read


steps = whole("number of steps")
seed = whole("seed", least=0, most=2**32 - 1)  # what numpy takes


def named(text: str) -> str:
    """An argparse type: the name of a file or folder. An empty one, often a shell variable that is not set, would mean the default."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} names nothing: give a name, or leave the option out")
    return text


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """The options that helpers.training and helpers.sharding have in common."""
    parser.add_argument(
        "--profile", default="tiny", help=f"auto (ask the hardware) or one of {', '.join(profiles.PROFILES)}; default tiny"
    )
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--steps", type=steps, help="optimizer steps, for a short trial; default the profile's")
    parser.add_argument("--save-steps", type=steps, help="steps between checkpoints; default the profile's")
    parser.add_argument("--output", type=named, help="folder for checkpoints, adapter and results.json; default runs/<profile>")
    parser.add_argument("--resume", action="store_true", help="go on from the newest sound checkpoint")


def chosen_profile(args: argparse.Namespace) -> Profile:
    """The profile named on the command line, with its steps. ProfileError if there is none or it does not fit the hardware."""
    asked = {"max_steps": args.steps, "save_steps": args.save_steps}
    return replace(profiles.resolve(args.profile), **{name: value for name, value in asked.items() if value})


def status(work: Callable[[], int | None], interrupted: str) -> int:
    """Do a command line's work and return its exit status (above). `interrupted` says how to go on, unless the interrupt itself does."""
    try:
        return work() or 0
    except TutorialError as error:
        return tell(error)
    except MemoryError:
        return tell(ResourceError("the memory ran out: close other programs or kernels, or use profile 'tiny'"))
    except KeyboardInterrupt as interrupt:
        if processes.world().leads:
            print(f"\n{str(interrupt) or interrupted}", file=sys.stderr)
        return 130


def tell(error: TutorialError) -> int:
    """Print an error in one sentence, once if it comes up in all processes; returns the exit status."""
    if processes.world().leads or isinstance(error, ProcessLostError | OutputError):
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    return 1
