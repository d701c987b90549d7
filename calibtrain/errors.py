"""What ends a command in order: a mistake that a user can mend (exit code 2), and a run that was asked to stop (75)."""


class UserError(Exception):
    """A mistake in a config, a file or a call; the message names the place and says how to mend it."""


class Unreachable(UserError):
    """A server that does not answer, or not yet: what was asked of it may be asked again once it does."""


class EngineFailure(UserError):
    """The engine that samples for a training run is lost; the same on every rank, so that what was learnt can be kept."""


PREEMPTED = 75
"""Exit code of a run that stopped as it was asked to: EX_TEMPFAIL, try again."""


class Preempted(Exception):
    """The run was asked to stop (SIGTERM) after `step` and has kept its state; the message says how to go on."""

    def __init__(self, step: int, message: str) -> None:
        super().__init__(message)
        self.step = step
