"""Errors that a user can correct, each reported in one line."""


class StudyError(Exception):
    """What went wrong, the usual cause, and what to do instead, in one line for the terminal."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a run as Ctrl-C does; a note on either says where the run can go on."""


class UsageError(StudyError):
    """An invalid option, name or path on the command line."""
