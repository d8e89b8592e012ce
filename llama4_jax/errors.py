"""The one error that a person, rather than a programmer, has to read."""


class UserError(ValueError):
    """Bad input: a misspelt field, a missing file, a mesh that does not divide.

    The message is one line that says what was wrong, which value, and what to do.
    Apps print it without a traceback and exit with status 2; notebooks see an ordinary ValueError.
    """
