"""The errors that the user can correct."""


class UserError(ValueError):
    """An error that the user can correct, described in one sentence.

    The message names what is wrong, where, and what to do. The apps print it and exit with 1,
    without a traceback.
    """


class PeerRankError(UserError):
    """A peer rank failed; its error is the one to report."""
