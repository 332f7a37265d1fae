"""The two ways in which a command may end badly, and nothing else."""


class UserError(Exception):
    """The user's mistake: one line that says what is wrong and what to do. The command exits 2."""


class Failure(Exception):
    """Something broke though the request was right: one line that says what and the mend. The command exits 1."""
