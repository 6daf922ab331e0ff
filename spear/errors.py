"""Errors a user can cause or fix; every message names the value, the rule and the key or file."""


class SpearError(Exception):
    """Base of all errors that end a command with one line and exit code 1."""


class ConfigError(SpearError):
    """A recipe, corpora file or option is wrong."""


class DataError(SpearError):
    """Audio, labels or tokens break a rule.

    Args:
        message: one line naming file or cut, value and rule.
        cause: short machine-readable cause, the key under which stages count failures
            (``missing_file``, ``decode``, ``too_short``, ``not_finite``, ``length_mismatch``, ...).
    """

    def __init__(self, message: str, *, cause: str = "data") -> None:
        super().__init__(message)
        self.cause = cause


class ArtifactError(SpearError):
    """A stage's folder is unfinished, damaged, or was made from other inputs."""


class CheckpointError(SpearError):
    """A checkpoint or model folder cannot be read or does not fit."""


class StopRequested(BaseException):
    """A signal asked the run to stop; everything is saved. The command exits with code 3.

    Like KeyboardInterrupt it is no Exception: nothing that handles errors, here or in a library, may take it for one.
    """
