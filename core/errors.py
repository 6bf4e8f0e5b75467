"""The errors that a user can mend.

Everything a user can get wrong ends as a `UserError`: one line that says what is wrong and where, and one that says
what to do. `cli.py` prints both and exits with code 2; no traceback. Anything else is a bug of ours and keeps its
traceback.
"""


class UserError(ValueError):
    """A mistake in the input, the configuration or the machine's set-up.

    Args:
        what: what is wrong and where (file, line, field), in one line.
        hint: what to do about it, in one line.
    """

    def __init__(self, what: str, *, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint

    def __str__(self) -> str:
        return self.what if self.hint is None else f"{self.what}\n       {self.hint}"


class OutOfMemoryError(UserError):
    """The device could not hold the step. Backends give no hint: `workflow` says which setting to lower."""


class NonFiniteLossError(UserError):
    """A loss or a gradient norm became NaN or infinite."""
