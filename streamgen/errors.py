"""The one exception the command line turns into exit code 2."""


class InputError(ValueError):
    """Bad input: the message is one line that says what, why and what to do; the command line exits with 2."""
