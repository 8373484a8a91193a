"""Exit codes of the commands, and mistakes that a user can correct."""

import contextlib
import sys

MISTAKE = 2
"""Exit code: the user has something to correct; another try would end the same way."""
TROUBLE = 74
"""Exit code: the machine has trouble that may pass, such as a full disk; try again (EX_IOERR of sysexits.h)."""
STOPPED = 75
"""Exit code: asked to stop, the command saved its state and can be resumed (EX_TEMPFAIL of sysexits.h)."""

INTERRUPTED = 130
"""Exit code: Ctrl-C ended the command at once, as a shell reports it."""


class UserError(Exception):
    """A mistake that the user can correct. The message names it and the way out in one sentence."""


def complain(error: object) -> int:
    """Print a mistake, or trouble of the machine, on standard error.

    Args:
      error: an exception, or the sentence itself.

    Returns:
      The exit code: `TROUBLE` for what may pass by itself, `MISTAKE` for anything else.
    """
    sentence, passes = error, getattr(error, "passes", False)
    if isinstance(error, Exception):
        with contextlib.suppress(ImportError):  # a command that needs no packages can run where there are none
            from rspo_jax.records.trouble import trouble_of  # brings JAX along, which takes seconds

            if trouble := trouble_of(error):
                sentence, passes = trouble.words if isinstance(error, OSError) else error, trouble.passes
    print(f"error: {sentence}", file=sys.stderr)
    return TROUBLE if passes else MISTAKE
