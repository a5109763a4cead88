"""Failures that a user can mend, each said in one line."""


class StudyError(Exception):
    """What went wrong, the usual cause, and what to do instead, in one line for the terminal."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a run as Ctrl-C does; a note on either says where the run can go on."""


class UsageError(StudyError):
    """What was asked for cannot be: an option, a name or a path that was typed."""
