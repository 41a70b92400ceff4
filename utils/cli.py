"""Argument parsing, error reporting and exit codes shared by the command-line scripts.

Imports nothing heavy, so that scripts parse their arguments before they import torch or monai.
"""

import argparse
import difflib
import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

# Environment variables that set how long idle OpenMP threads spin: any runtime's, GNU's, and Intel's and LLVM's.
SPIN_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
SPIN_COUNT = "10000"  # default GOMP_SPINCOUNT of the scripts
# Errors that any access to a file can raise and only the user can fix.
FILE_SYSTEM_ERRORS = (errno.EFBIG, errno.ENAMETOOLONG, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


class UserError(Exception):
    """A mistake by the user; the message is one sentence that says how to fix it."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help formatter that appends every default but None, which a flag's own help text explains."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """Argument parser with defaults in `--help`, no abbreviated flags and one-line errors."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            self.error(f"unknown argument {unknown[0]!r}{did_you_mean(flag, self._option_string_actions)}")
        return known

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def run_parser(description: str, *, on_slices: bool = True) -> ArgumentParser:
    """Return a parser with the flags shared by all runs, `--data_dir` only for runs on preprocessed slices."""
    parser = ArgumentParser(description=description)
    add = parser.add_argument
    add("--gpu_id", default="0", help="index of the CUDA device, or cpu")
    add("--dataset", default="brats", help="which config to use: brats (the paper) or phantom (the demo)")
    sizes = "size of network, images and training: small trains on a CPU in minutes (default: that of --dataset)"
    add("--preset", choices=["paper", "small"], help=sizes)
    if on_slices:
        add("--data_dir", help="folder of preprocessed slices (default: the config's, ./datasets/data for brats)")
    add("--input", help="modality available at test time (default: the config's, flair)")
    add("--trans", help="modality to translate it to (default: the config's, t2)")
    places = "folder of all experiments, local or on object storage: gs://bucket/path, az://account/container/path"
    add("--logdir", default="./experiments", help=places)
    add("--seed", type=int, help="seed of all random numbers (default: the config's, 0)")
    add("--config.KEY", metavar="VALUE", help="override any field of the config, as --config.KEY=VALUE")
    return parser


def config_fields(args: argparse.Namespace) -> dict[str, Any]:
    """Return the values of `run_parser`'s flags by dotted config key, None for those not given."""
    fields = {f"data.{name}": getattr(args, name, None) for name in ("data_dir", "input", "trans")}
    return fields | {"seed": args.seed}


def parse_run_args(parser: ArgumentParser) -> tuple[argparse.Namespace, list[str]]:
    """Return the parsed flags and, unparsed, the `--config.KEY=VALUE` arguments."""
    overrides = [argument for argument in sys.argv[1:] if argument.startswith("--config.")]
    return parser.parse_args([argument for argument in sys.argv[1:] if argument not in overrides]), overrides


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `, did you mean 'x'?` for the known name closest to `name`, or "" if none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def limit_spinning() -> None:
    """Shorten the busy-waiting of OpenMP threads, unless the user has set it; call this before importing torch.

    On cores shared with other processes, a spinning thread takes time from the very thread it is waiting for, see
    benchmarks/neighbours.py.
    """
    if not any(name in os.environ for name in SPIN_VARIABLES):
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT


def keep_compiled_code() -> None:
    """Let torch keep compiled networks in the user's cache, not in a temporary folder, unless the user has set one.

    Call this before torch.compile's modules are imported, which set the variable themselves.
    """
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR"):  # an empty one would be the working directory
        return
    home = os.path.expanduser("~")  # noqa: PTH111  (unlike Path.home, raises nothing if there is none)
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path(home, ".cache"), "torchinductor")
    if folder.is_absolute() and os.access(next(parent for parent in folder.parents if parent.exists()), os.W_OK):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


def thread_excepthook(error: threading.ExceptHookArgs) -> None:
    """Print a thread's exception, except file-system errors: TensorBoard's writer raises those in the main thread."""
    if not (isinstance(error.exc_value, OSError) and error.exc_value.errno in FILE_SYSTEM_ERRORS):
        threading.__excepthook__(error)


def run(main: Callable[[], None]) -> NoReturn:
    """Call `main` and exit: 0 on success, 2 with one sentence on stderr for a user or disk error, 130 for Ctrl-C.

    Exit with 141, without a sentence, if the output goes to a pipe that its reader has closed.
    """
    limit_spinning()
    keep_compiled_code()
    threading.excepthook = thread_excepthook
    code, message = 0, ""
    for stream in (sys.stdout, sys.stderr):  # not every terminal or file name is UTF-8
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        except UserError as error:
            code, message = 2, " ".join(str(error).splitlines())  # of a path, say
        except OSError as error:
            if error.errno not in FILE_SYSTEM_ERRORS:
                raise
            code, message = 2, f"{error.filename or 'a file'}: {error.strerror}"
        except KeyboardInterrupt:
            code, message = 130, "interrupted"
        if message:
            print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        if sys.stdout:
            sys.stdout.flush()
    except BrokenPipeError:
        code = code or 128 + signal.SIGPIPE
        sys.stdout = sys.stderr = None  # else Python would flush them again at exit
    sys.exit(code)
