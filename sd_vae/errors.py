"""The one exception that means "you can mend this".

Raised for every mistake of a user, printed by the command line as a single line with exit code 2. Defects of ours are
assertions or whatever Python raises, and keep their traceback.
"""

__all__ = ["UnreachableError", "UserError"]


class UserError(ValueError):
    """A mistake the user can mend.

    The message is one line: the invariant that was broken, the value that broke it, the remedy. Lower case start,
    full stop at the end.
    """


class UnreachableError(UserError):
    """Data is there, and the network does not bring it: one picture cannot stand in for another, the run must wait."""
