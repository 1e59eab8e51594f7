"""What is the user's to mend, in one sentence."""


class UserError(ValueError):
    """One sentence that names the thing and the remedy; the apps print it and exit with 1, without a traceback."""


class PeerRankError(UserError):
    """A rank ends because another one did, whose own words matter more."""
