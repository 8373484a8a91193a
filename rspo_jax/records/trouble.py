"""Trouble of a machine with the files of a run: its reason in words, and whether it passes by itself.

The reason is the `errno` of the operating system. It comes as an OSError, or inside the text of another error:
TensorStore writes "[os_error_code='28']", and an error of another process has its text only.
"""

import errno
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

_PASSES = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "the disk quota is used up: free some space",
    errno.ENFILE: "the machine has too many open files: close other programs",
    errno.ENOMEM: "the machine is out of memory: close other programs",
    errno.EIO: "the disk or its network reports an error",
}
_STAYS = {
    errno.ENOENT: "there is no such file or folder",
    errno.EROFS: "the file system is read-only: make it writable, or choose another folder",
    errno.EACCES: "permission is denied: change the permissions, or choose another folder",
    errno.EPERM: "the operation is not permitted: change the permissions, or choose another folder",
    errno.ENAMETOOLONG: "the name is too long: choose a shorter one",
    errno.ENOTDIR: "a file is in the place of a folder: move it away, or choose another folder",
    errno.EEXIST: "a file is in the place of a folder: move it away, or choose another folder",
    errno.EISDIR: "a folder is in the place of a file: move it away, or choose another folder",
    errno.ELOOP: "its symbolic links form a circle: remove one of them",
    errno.EMFILE: "this process has too many open files: raise the limit with ulimit -n",
    errno.EFBIG: "the file has reached the largest size allowed: raise the limit with ulimit -f",
}
_OF_ONE_FILE = {errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.EIO}
"""Reasons that may lie in a single file, while others can be read."""


class Trouble(NamedTuple):
    """Trouble of a machine with a file."""

    number: int
    """The `errno`."""
    words: str
    """The reason and the way out; the file, if it is known, comes first."""

    @property
    def passes(self) -> bool:
        """True if the same command may succeed later, although nobody corrects it."""
        return self.number not in _STAYS

    @property
    def is_of_machine(self) -> bool:
        """True if the trouble tells nothing about the file in which it was met."""
        return self.number not in _OF_ONE_FILE


def trouble_of(error: BaseException) -> Trouble | None:
    """Return the trouble that an error, or one of its causes, tells of; None for other errors."""
    for link in _causes(error):
        if isinstance(link, OSError) and link.errno is not None:
            where = f"{os.fsdecode(link.filename)}: " if isinstance(link.filename, str | bytes) else ""
            return Trouble(link.errno, where + _words(link.errno))
        if found := re.search(r"\[(?:Errno |os_error_code=')(\d+)", str(link)):
            return Trouble(int(found[1]), _words(int(found[1])))
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _words(number: int) -> str:
    return (_PASSES.get(number) or _STAYS.get(number) or os.strerror(number)) + f" [Errno {number}]"
