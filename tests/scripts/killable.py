"""Run the repository's scripts in forks of one process with everything imported, and signal them at exact moments.

Read one JSON object per line from stdin, and answer each with one on stdout:

- {"script", "args", "cwd", "output", "signals": [[signal, moment, count], …]}: run the script, with stdout and stderr
  redirected to the file `output`. It sends itself each signal at the count-th occurrence of its moment. The answer is
  {"pid", "code", "moments"}: the exit code (negative for a signal, as in `subprocess`; null if stopped by SIGSTOP)
  and the number of occurrences of each moment.
- {"kill": pid}: kill a stopped script. The answer is {"code"}.

Moments are counted, not timed, so that they do not depend on the machine's load. They are

- step: a training step begins
- line: a line of checkpoint.py or logger.py is about to run
- piece: part of a checkpoint file has been flushed, and the rest has not
"""

import contextlib
import importlib
import json
import os
import runpy
import signal
import sys
from collections import Counter
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))
PIECES = 8  # per file


class Moments:
    """Count moments in this process and send the signals due at them."""

    def __init__(self, signals: list):
        self.seen = Counter()
        self.due = {(moment, count): number for number, moment, count in signals}

    def came(self, moment: str) -> None:
        self.seen[moment] += 1
        number = self.due.get((moment, self.seen[moment]))
        if number:
            os.kill(os.getpid(), number)

    def watch(self) -> None:
        traced = {
            str(REPOSITORY / "guided_diffusion" / name): name
            for name in ("checkpoint.py", "logger.py", "train_util.py")
        }

        def enter(frame, event, arg):
            name = traced.get(frame.f_code.co_filename)
            if name == "train_util.py" and frame.f_code.co_name == "_train_step":
                self.came("step")
            return line if name in ("checkpoint.py", "logger.py") else None

        def line(frame, event, arg):
            if event == "line":
                self.came("line")
            return line

        moments, original_open = self, Path.open

        class InPieces:
            def __init__(self, file):
                self.file = file

            def __enter__(self):
                return self

            def __exit__(self, *_):
                self.file.close()

            def __getattr__(self, name):
                return getattr(self.file, name)

            def write(self, data):
                size = max(len(data) // PIECES, 1)
                for begin in range(0, len(data), size):
                    self.file.write(data[begin : begin + size])
                    self.file.flush()
                    if begin + size < len(data):
                        moments.came("piece")

        def open_in_pieces(path, mode="r", *args, **kwargs):
            file = original_open(path, mode, *args, **kwargs)
            return InPieces(file) if mode == "wb" and ".pt" in path.suffixes else file

        Path.open = open_in_pieces
        sys.settrace(enter)


def run(script: str, args: list[str], signals: list, report: Path) -> int:
    """Run a script in this process and write the count of each moment to `report`."""
    sys.argv = [str(REPOSITORY / script), *args]
    moments = Moments(signals)
    moments.watch()
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    finally:
        sys.settrace(None)
        report.write_text(json.dumps(moments.seen))
    return 0


def fork(order: dict) -> dict:
    report = Path(order["output"]).with_suffix(".moments")
    report.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with Path(order["output"]).open("w", buffering=1) as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            os.chdir(order["cwd"])
            code = run(order["script"], order["args"], order["signals"], report)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(code)
    return {"pid": pid, "code": wait(pid)} | {"moments": json.loads(report.read_text()) if report.exists() else {}}


def wait(pid: int) -> int | None:
    _, status = os.waitpid(pid, os.WUNTRACED)
    return None if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)


def kill(pid: int) -> dict:
    os.kill(pid, signal.SIGKILL)
    return {"code": wait(pid)}


def main() -> None:
    import torch

    for name in (
        "config",
        "datasets.brats2021",
        "datasets.loader",
        "guided_diffusion.train_util",
        "models.training",
        "models.mmccd",
    ):
        importlib.import_module(name)
    importlib.import_module("evaluation.figures")
    torch.optim.AdamW([torch.zeros(1)])  # the first optimizer triggers more slow imports
    torch.set_num_threads(1)  # threads do not survive a fork
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # keeps prints out of the answers
    for line in sys.stdin:
        order = json.loads(line)
        answers.write(json.dumps(kill(order["kill"]) if "kill" in order else fork(order)) + "\n")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
