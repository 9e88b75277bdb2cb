"""Errors a user can act on, and the exit code of each (the table is in DESIGN and the README)."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

EXIT_USAGE = 2
EXIT_ARTIFACT = 3
EXIT_NUMERICAL = 4
EXIT_LOST_PROCESS = 5
EXIT_SIGINT = 130
EXIT_SIGTERM = 143

logger = logging.getLogger("wan")


class WanError(Exception):
    """Base of the errors that end a command with a message and an exit code instead of a traceback."""

    exit_code = 1


class UsageError(WanError):
    """A flag, a YAML key or a prompt that cannot be used as given (exit code 2)."""

    exit_code = EXIT_USAGE


class ArtifactError(WanError):
    """A file that is missing, truncated, foreign, stale or cannot be written (exit code 3)."""

    exit_code = EXIT_ARTIFACT


class NumericalError(WanError):
    """NaN or infinity where finite numbers are needed (exit code 4); nothing is repaired."""

    exit_code = EXIT_NUMERICAL


class Interrupted(WanError):
    """The command was asked to stop by a signal and has saved what it promised to save (exit code 128 + signal)."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.exit_code = 128 + signum


def setup_logging() -> None:
    """Log messages to stderr as ``[name] message``; stdout stays free for results."""
    logging.basicConfig(level=logging.INFO, format="[%(name)s] %(message)s", stream=sys.stderr, force=True)
    for chatty in ("jax", "absl", "transformers", "diffusers", "torch", "httpx"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def run_command(main: Callable[[list[str] | None], None], argv: list[str] | None = None) -> int:
    """Run ``main(argv)`` and turn a :class:`WanError` into its message on stderr and its exit code.

    Full disks and folders without write permission surface as :class:`OSError` from wherever they happen, so they are
    given their exit code here. Any other exception is a bug and keeps its traceback.
    """
    setup_logging()
    from wan_common import multihost

    try:
        main(argv)
    except WanError as error:
        logger.error("error: %s", error)
        return error.exit_code
    except KeyboardInterrupt:
        logger.error("error: interrupted before there was anything to save; rerun the same command")
        return EXIT_SIGINT
    except RuntimeError as error:
        if (message := multihost.lost_process(error)) is None:
            raise
        logger.error("error: %s", message)
        return EXIT_LOST_PROCESS
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        where = error.filename if error.filename is not None else "output"
        logger.error("error: %s: %s; free space or choose another folder with --output_dir, then rerun", where, error.strerror)
        return EXIT_ARTIFACT
    return 0
