"""What a user can cause, or can mend, has a class here; a broken promise between our own parts is an `assert`.

Every message says what is wrong with its value, where (config path, file:line, problem id), why where that is not
plain, and what to do, in at most three lines. The command line prints it without a traceback and exits with 2.
Errors cross process borders by pickle: one message argument, no constructor of their own.
"""


class RlsysError(Exception):
    """Any failure that is explained to the user instead of traced."""


class ConfigError(RlsysError, ValueError):
    """A configuration that cannot be used."""


class DataError(RlsysError, ValueError):
    """A data file, problem or sequence that cannot be used."""


class CheckpointError(RlsysError):
    """A model directory, checkpoint or run directory that is missing, damaged or of another kind."""


class RewardError(RlsysError):
    """A reward part that cannot be loaded, or so many failed parts that the run must stop."""


class RoleError(RlsysError):
    """A role (rollout worker, learner, ...) that could not do what it was asked for."""


class RoleLostError(RoleError):
    """A role's process died, or did not answer before its deadline: nothing more is to be had of it."""
