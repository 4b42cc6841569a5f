"""The one exception that means: the user's input is wrong, not the program."""


class UserError(ValueError):
    """Bad input, described in one sentence that names the file, shape or value; the command line exits with 2."""
