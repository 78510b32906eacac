"""The one exception that a user is meant to read: the command line prints it as a single line, without a traceback."""


class UserError(Exception):
    """Bad input. The message names the key or file, what was wrong, and what is accepted."""
