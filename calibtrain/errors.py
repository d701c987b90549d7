"""The one exception for what a user can mend: it is printed without a traceback and ends the command with exit code 2."""


class UserError(Exception):
    """A mistake in a config, a file or a call; the message names the place and says how to mend it."""
