"""The one exception that means: the user's input is at fault."""


class UserError(Exception):
    """Input, configuration or data that the user can mend.

    The message is a sentence that says what was given, what is accepted and what to do. The command line prints it
    without a traceback and exits with status 2; every other exception is a fault of ours.
    """
