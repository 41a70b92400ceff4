"""Work spread over processes that end when the one that started them does."""

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
    """Call `work` with the arguments of each job, `workers` at a time, behind a progress bar (tqdm's arguments).

    Yields each job with its future, once it is done. At most twice as many as there are workers are under way, so that
    results do not pile up in memory. A UserError if a worker is killed.
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
            raise UserError(
                "a worker was killed, perhaps because memory ran out: run the same command with fewer --workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)  # after a failure, leave the remaining jobs


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, for a worker would answer it with a traceback; and end when the parent has."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
