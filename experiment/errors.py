"""The one exception that means "the user can mend this"."""


class UserError(Exception):
    """A mistake in a configuration, a path or the surroundings of a run.

    The message is one line: what is wrong, and how to mend it. The command line prints `error: MESSAGE` and
    exits with code 2, without a traceback.
    """
