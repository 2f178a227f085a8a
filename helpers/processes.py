"""One run on several processes: which one is this, what is its share, and what if another dies. Imports profiles and errors.

`accelerate launch` and `torchrun` start every process with its place in the environment: RANK, WORLD_SIZE, LOCAL_RANK.
"""

import contextlib
import math
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import distributed

from helpers.errors import LaunchError, ProcessLostError
from helpers.profiles import Profile


@dataclass(frozen=True)
class World:
    """The place of this process: `rank` of `size` in all, `local_rank` on its machine. Rank 0 alone prints, scores and writes."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def device(self, profile: Profile) -> str:
        """The device of this process: the card of its local rank, or the CPU."""
        return f"cuda:{self.local_rank}" if profile.device == "cuda" else "cpu"

    def say(self, text: str) -> None:
        if self.leads:
            print(text, flush=True)


def world() -> World:
    """This process's place, read from the environment; one process alone is rank 0 of 1."""
    return World(*(int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))))


def share(profile: Profile, size: int) -> Profile:
    """The profile of one of `size` processes: the same examples in an optimizer step, spread over them.

    Accumulation is shared first, which costs no memory and no speed, then the micro batch. Raises LaunchError if that does not come out even.
    """
    if size < 1:
        raise LaunchError(f"a run of {size} processes cannot be planned: start at least 1")
    shared = math.gcd(profile.accumulation, size)
    rest = size // shared
    if profile.micro_batch % rest:
        batch = profile.micro_batch * profile.accumulation
        possible = [n for n in range(1, batch + 1) if profile.micro_batch % (n // math.gcd(profile.accumulation, n)) == 0]
        raise LaunchError(
            f"{size} processes cannot share the {batch} examples of a step of profile {profile.name!r} evenly: start one of {', '.join(map(str, possible))} processes"
        )
    return replace(profile, accumulation=profile.accumulation // shared, micro_batch=profile.micro_batch // rest)


def any_of(flag: bool, device: torch.device | str = "cpu") -> bool:
    """Whether `flag` is set in any process of the run: all of them get the same answer at the same moment."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return flag
    votes = torch.tensor(int(flag), device=device)
    distributed.all_reduce(votes, op=distributed.ReduceOp.MAX)
    return bool(votes.item())


def wait_for_all() -> None:
    """Go on only when every process of the run has come here."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()


@contextlib.contextmanager
def loss_of_a_process_is_told() -> Iterator[None]:
    """While active, ProcessLostError in place of what the libraries raise when another process of the run is gone.

    Two things reach the ones left: their connection breaks, and the launcher ends them with SIGTERM. One process alone is left as it is.
    """
    here = world()
    told = ProcessLostError(
        f"process {here.rank} of {here.size} stopped because another process of the run was killed or failed: run the same command with --resume to go on from the last sound checkpoint"
    )

    def terminated(*signal_and_frame):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise told

    if here.size == 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, terminated)
    try:
        yield
    except RuntimeError as error:
        if not is_broken_connection(error):
            raise
        raise told from error
    finally:
        signal.signal(signal.SIGTERM, previous)


def is_broken_connection(error: BaseException) -> bool:
    """Whether an error says that another process of the run can no longer be reached."""
    text = str(error)
    return isinstance(error, distributed.DistError) or any(
        words in text for words in ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed")
    )
