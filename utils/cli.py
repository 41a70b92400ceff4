"""What the command lines share: plain errors, exit codes, quick `--help`.

Nothing heavy is imported here, so that a script can parse its arguments before it imports torch or monai.
"""

import argparse
import difflib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn


class UserError(Exception):
    """A mistake of the user's; its message is one plain sentence that says what to do about it."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse with defaults in `--help`, no abbreviated flags, and errors of one line."""

    def __init__(self, **kwargs):
        kwargs.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            self.error(f"unknown argument {unknown[0]!r}{did_you_mean(flag, self._option_string_actions)}")
        return known

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`, did you mean 'x'?` for the known name closest to `name`, or an empty string where none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def run(main: Callable[[], None]) -> NoReturn:
    """Call `main` and exit: 0 done, 2 with one sentence on stderr for a `UserError`, 130 for Ctrl-C."""
    try:
        main()
    except UserError as error:
        sys.exit(_fail(str(error), 2))
    except KeyboardInterrupt:
        sys.exit(_fail("interrupted", 130))
    sys.exit(0)


def _fail(message: str, code: int) -> int:
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    return code
