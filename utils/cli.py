"""What the command lines share: plain errors, exit codes, quick `--help`.

Nothing heavy is imported here, so that a script can parse its arguments before it imports torch or monai.
"""

import argparse
import difflib
import errno
import io
import os
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

# What says how OpenMP's threads wait, of GNU's and of Intel's and LLVM's, and how often GNU's look before they sleep.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
SPINS = "10000"
# What the system says of a file or a disk wherever one is touched, and no code can mend.
BEYOND_US = (errno.EFBIG, errno.ENAMETOOLONG, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


class UserError(Exception):
    """A mistake of the user's; its message is one plain sentence that says what to do about it."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults there are: a flag whose default is None says in its own words what that means."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """argparse with defaults in `--help`, no abbreviated flags, and errors of one line."""

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
    """A parser with the flags that all runs share; `--data_dir` is one of those that work on preprocessed slices."""
    parser = ArgumentParser(description=description)
    add = parser.add_argument
    add("--gpu_id", default="0", help="number of the CUDA device, or cpu")
    add("--dataset", default="brats", help="whose config is used: brats (the paper) or phantom (the demo)")
    sizes = (
        "network, images and training: paper, or small, which a CPU trains in minutes (default: as --dataset has it)"
    )
    add("--preset", choices=["paper", "small"], help=sizes)
    if on_slices:
        add("--data_dir", help="folder of preprocessed slices (default: the config's, ./datasets/data for brats)")
    add("--input", help="modality at hand at test time (default: the config's, flair)")
    add("--trans", help="modality it is translated to (default: the config's, t2)")
    places = "folder of all experiments; or on object storage, gs://bucket/path or az://account/container/path"
    add("--logdir", default="./experiments", help=places)
    add("--seed", type=int, help="seed of everything random (default: the config's, 0)")
    add("--config.KEY", metavar="VALUE", help="override any field of the config, as --config.KEY=VALUE")
    return parser


def config_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The flags of `run_parser` that stand for fields of the config; None where they were not given."""
    fields = {f"data.{name}": getattr(args, name, None) for name in ("data_dir", "input", "trans")}
    return fields | {"seed": args.seed}


def parse_run_args(parser: ArgumentParser) -> tuple[argparse.Namespace, list[str]]:
    """The command line's flags, and its `--config.KEY=VALUE` arguments as they stand."""
    overrides = [argument for argument in sys.argv[1:] if argument.startswith("--config.")]
    return parser.parse_args([argument for argument in sys.argv[1:] if argument not in overrides]), overrides


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`, did you mean 'x'?` for the known name closest to `name`, or an empty string where none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def wait_within_bounds() -> None:
    """Have the threads of torch, which is not loaded yet, wait for each other actively only for a moment.

    By default they try a hundred thousand times before they sleep. On cores that others use, too, that is time taken
    from the very thread they are waiting for: see benchmarks/neighbours.py. What the user has set holds.
    """
    if not any(name in os.environ for name in WAITING):
        os.environ["GOMP_SPINCOUNT"] = SPINS


def leave_to_main(error: threading.ExceptHookArgs) -> None:
    """Show what ends a thread, but not what the disk refuses: TensorBoard's thread hands that on to the main one."""
    if not (isinstance(error.exc_value, OSError) and error.exc_value.errno in BEYOND_US):
        threading.__excepthook__(error)


def run(main: Callable[[], None]) -> NoReturn:
    """Call `main` and exit: 0 done, 2 with one sentence on stderr for a `UserError` or a full disk, 130 for Ctrl-C."""
    wait_within_bounds()
    threading.excepthook = leave_to_main
    code, message = 0, ""
    for stream in (sys.stdout, sys.stderr):  # a terminal or a file name may know other characters than UTF-8's
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:
        code, message = 2, str(error)
    except OSError as error:
        if error.errno not in BEYOND_US:
            raise
        code, message = 2, f"{error.filename or 'a file'}: {error.strerror}"
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    if code:
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(code)
