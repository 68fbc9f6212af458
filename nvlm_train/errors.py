"""Errors a user can act on.

Every error says what is wrong (with the value), where (file:line and key, shard and key, rank) and what would be
right. The command line prints an `NvlmError` without a traceback and exits with 2, a `PeerError` without one and exits
with 1; anything else is a bug and keeps its traceback and exit code 1.
"""

from __future__ import annotations

import errno


class NvlmError(Exception):
    """Something the user can put right; the message is all that is shown."""


class RecipeError(NvlmError):
    """A recipe that cannot be read, is not valid, or does not fit the run directory it names."""


class DataError(NvlmError):
    """A data file, a sample or an image that cannot be used."""


class CheckpointError(NvlmError):
    """Weights or a checkpoint that are missing, damaged or do not fit the model."""


class SetupError(NvlmError):
    """The environment: launcher variables, devices, packages, disk space."""


class PeerError(Exception):
    """Another rank was lost, failed or stands still, so that this one cannot go on. Start the job again."""


def is_users(error: BaseException) -> bool:
    """Whether an error is the user's to mend, so that its message is enough: ours, and a full disk."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or isinstance(error, NvlmError)
