"""The exceptions the command line turns into one line and an exit code."""


class InputError(ValueError):
    """Bad input: the message is one line that says what, why and what to do; the command line exits with 2."""


class UnavailableError(InputError):
    """What was asked for is not on this machine (a device, a back-end); the command line exits with 3."""


class BrokenStreamError(RuntimeError):
    """The model produced what is no picture; nothing of it was delivered. The command line exits with 1."""
