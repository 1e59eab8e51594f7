"""The errors that the user can correct."""


class UserError(ValueError):
    """An error that the user can correct, described in one sentence.

    The message names what is wrong, where, and what to do. The apps print it and exit with 1,
    without a traceback.
    """


def reason(error: BaseException) -> str:
    """Returns the first line of an error's message, or its type if it has none; for a sentence."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


class PeerRankError(UserError):
    """A peer rank failed; its error is the one to report."""


class MissingPackageError(UserError):
    """An optional package is not installed; the message has the command that installs it."""
