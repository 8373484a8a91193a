"""Trouble of a machine: found in errors of any kind, in words, and told apart by whether it passes."""

import errno
import os

import pytest

from rspo_jax.records.trouble import trouble_of


@pytest.mark.parametrize(
    ("number", "passes", "is_of_machine", "words"),
    [
        (errno.ENOSPC, True, True, "the disk is full: free some space"),
        (errno.EDQUOT, True, True, "quota"),
        (errno.ENFILE, True, True, "close other programs"),
        (errno.ENOMEM, True, True, "out of memory"),
        (errno.EIO, True, False, "reports an error"),
        (errno.ENOENT, False, False, "there is no such file"),
        (errno.EROFS, False, True, "read-only"),
        (errno.EACCES, False, True, "permission is denied"),
        (errno.EPERM, False, True, "not permitted"),
        (errno.ENAMETOOLONG, False, True, "choose a shorter one"),
        (errno.ENOTDIR, False, False, "a file is in the place of a folder"),
        (errno.EEXIST, False, False, "a file is in the place of a folder"),
        (errno.EISDIR, False, False, "a folder is in the place of a file"),
        (errno.ELOOP, False, False, "form a circle"),
        (errno.EMFILE, False, True, "ulimit -n"),
        (errno.EFBIG, False, True, "ulimit -f"),
        (errno.ETIMEDOUT, True, True, os.strerror(errno.ETIMEDOUT)),  # in no table: another try may succeed
    ],
)
def test_each_reason_has_words_and_passes_or_stays(number, passes, is_of_machine, words):
    trouble = trouble_of(OSError(number, "as the system calls it"))
    assert trouble is not None
    assert (trouble.number, trouble.passes, trouble.is_of_machine) == (number, passes, is_of_machine)
    assert words in trouble.words and trouble.words.endswith(f" [Errno {number}]")


@pytest.mark.parametrize("name", ["runs/mine", b"runs/mine"])
def test_the_file_comes_first(name):
    trouble = trouble_of(OSError(errno.ENOSPC, "No space left on device", name))
    assert trouble is not None and trouble.words == "runs/mine: the disk is full: free some space [Errno 28]"


def test_an_open_file_has_no_name():
    trouble = trouble_of(OSError(errno.ENOSPC, "No space left on device", 3))
    assert trouble is not None and trouble.words.startswith("the disk is full")


@pytest.mark.parametrize(
    "text",
    [
        "Error writing 'state/array': No space left on device [os_error_code='28']",  # of TensorStore
        "process 1 gave up: OSError: [Errno 28] No space left on device: 'metrics.jsonl'",
    ],
)
def test_text_of_other_errors_tells_it(text):
    trouble = trouble_of(RuntimeError(text))
    assert trouble is not None and (trouble.number, trouble.passes) == (errno.ENOSPC, True)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("28"),
        RuntimeError("error 28: [28]"),
        OSError("without a number"),
        KeyError("missing"),
    ],
)
def test_other_errors_are_no_trouble(error):
    assert trouble_of(error) is None


def chain(error, *, cause=None, context=None, suppressed=False):
    """Return an error as `raise` would leave it."""
    error.__cause__, error.__context__, error.__suppress_context__ = cause, context, suppressed
    return error


def test_causes_and_contexts_are_followed():
    full, denied = OSError(errno.ENOSPC, "full"), PermissionError(errno.EACCES, "denied")
    for error, number in [
        (chain(ValueError("a"), cause=full), errno.ENOSPC),
        (chain(ValueError("a"), context=full), errno.ENOSPC),
        (chain(ValueError("a"), cause=chain(ValueError("b"), context=full)), errno.ENOSPC),
        (chain(ValueError("a"), cause=full, context=denied, suppressed=True), errno.ENOSPC),
        (chain(PermissionError(errno.EACCES, "denied"), cause=full), errno.EACCES),  # the outermost counts
    ]:
        trouble = trouble_of(error)
        assert trouble is not None and trouble.number == number, error


def test_a_suppressed_context_is_not_followed():
    full = OSError(errno.ENOSPC, "full")
    assert trouble_of(chain(ValueError("a"), context=full, suppressed=True)) is None  # raise ... from None


def test_a_circle_of_causes_ends():
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert trouble_of(first) is None
