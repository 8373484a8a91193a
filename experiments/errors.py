"""Exit codes of the commands, and mistakes that a user can correct."""

import sys

MISTAKE = 2
"""Exit code: the user has something to correct; another try would end the same way."""
STOPPED = 75
"""Exit code: asked to stop, the command saved its state and can be resumed (EX_TEMPFAIL of sysexits.h)."""


class UserError(Exception):
    """A mistake that the user can correct. The message names it and the way out in one sentence."""


def complain(error: object) -> int:
    """Print a mistake on standard error and return the exit code `MISTAKE`."""
    print(f"error: {error}", file=sys.stderr)
    return MISTAKE
