"""The three ways to say no, and how a command that ends with one says it."""

from __future__ import annotations

import errno


class UserError(Exception):
    """The user's mistake: one line that says what is wrong and what to do. The command exits 2."""


class Failure(Exception):
    """Something broke though the request was right: one line that says what, and the fix. The command exits 1."""


class Rejection(Exception):
    """A scan that is not used: where it is, the reason's code (`mu2llm.ct.REASONS`) and one sentence.

    The one exception that reading a scan raises for what is wrong with the scan itself.
    """

    def __init__(self, uri: str, reason: str, message: str, case_id: str = "") -> None:
        super().__init__(uri, reason, message, case_id)
        self.uri, self.reason, self.message, self.case_id = uri, reason, message, case_id

    def __str__(self) -> str:
        return f"{self.uri}: {self.reason}: {self.message}"

    def row(self) -> dict[str, str]:
        return {"uri": self.uri, "reason": self.reason, "message": self.message, "case_id": self.case_id}


def explain(error: BaseException) -> tuple[int, str]:
    """What went wrong → (exit code, one line); what a Ray task raised is explained as if it had been raised here."""
    error = _reason(error)
    if isinstance(error, UserError):
        return 2, str(error)
    if isinstance(error, Rejection):
        return 1, str(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return (
            1,
            f"the disk is full ({error.filename or 'while writing'}); free some space and run the same command again",
        )
    if isinstance(error, Failure):
        return 1, str(error)
    if type(error).__module__.startswith(("click", "typer")) and hasattr(error, "format_message"):
        return 2, f"{error.format_message().rstrip('.')}; see mu2llm --help"
    first = str(error).strip().splitlines() or [""]
    return 1, f"{type(error).__name__}: {first[0]} (--debug shows where)"


def _reason(error: BaseException) -> BaseException:
    """The first error of ours in a chain of causes, else the deepest one where Ray wrapped it."""
    chain = [error]
    while (cause := getattr(chain[-1], "cause", None) or chain[-1].__cause__) and cause not in chain:
        chain.append(cause)
    # Ray's wrapper of an error is an instance of that error's class too
    unwrapped = [each for each in chain if not type(each).__module__.startswith("ray.")] or chain[-1:]
    ours = [each for each in unwrapped if isinstance(each, UserError | Failure | Rejection)]
    return ours[0] if ours else unwrapped[-1] if unwrapped[0] is not error else error
