"""Several runs at a time, one thread each. Imports study.runner."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from multiprocessing import connection

import torch
import transformers
from tqdm import tqdm

from helpers import results
from helpers.study import runner
from helpers.study.run import Run


def start_worker() -> None:
    """One thread, no bars; an interrupt is the parent's to handle, and a worker does not outlive its parent."""
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow_parent():
        connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def execute_all(runs: Iterable[Run], workers: int | None = None, progress: bool = True) -> Iterator[dict]:
    """Execute `runs` in `workers` processes (default: as many as there are cores) and yield each row as soon as it is there.

    At an interrupt the runs under way are finished and yielded, then KeyboardInterrupt is raised; a second one gives them up.
    """
    runs = list(runs)
    if not runs:
        return
    pool = ProcessPoolExecutor(min(workers or os.cpu_count() or 1, len(runs)), multiprocessing.get_context("spawn"), start_worker)
    waiting = {pool.submit(runner.execute, run) for run in runs}
    try:
        with tqdm(total=len(runs), unit="run", desc="study", disable=not progress) as bar:
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result() | results.versions()
                    bar.update()
    except KeyboardInterrupt:
        print("\nfinishing the runs under way; interrupt again to give them up", file=sys.stderr)
        for future in [future for future in waiting if not future.cancel()]:
            yield future.result() | results.versions()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
