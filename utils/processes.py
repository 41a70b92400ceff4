"""Parallel jobs in worker processes that exit with their parent."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

from .cli import UserError

Job = TypeVar("Job", bound=tuple)


def in_processes(work: Callable, jobs: Sequence[Job], workers: int, **progress: str) -> Iterator[tuple[Job, Future]]:
    """Call `work(*job)` for all jobs in `workers` processes, and yield each job with its future when it is done.

    `progress` are arguments of tqdm. At most two jobs per worker are submitted at once, to bound the results in memory.

    Raises:
        UserError: if a worker is killed.
    """
    from tqdm import tqdm

    with ProcessPoolExecutor(max(1, min(workers, len(jobs))), initializer=_start_worker) as pool:
        try:
            waiting = iter(jobs)
            running = {pool.submit(work, *job): job for job in islice(waiting, 2 * workers)}
            with tqdm(total=len(jobs), **progress) as bar:
                while running:
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        yield running.pop(future), future
                        running.update({pool.submit(work, *job): job for job in islice(waiting, 1)})
                        bar.update()
        except BrokenProcessPool as error:
            raise UserError("a worker was killed, possibly out of memory: run again with fewer --workers") from error
        finally:
            pool.shutdown(cancel_futures=True)  # after a failure, drop the remaining jobs


def _start_worker() -> None:
    """Ignore Ctrl-C, which the parent handles without a traceback, and exit when the parent has."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def exit_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()
