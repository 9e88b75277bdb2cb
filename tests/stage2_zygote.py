"""A process that has imported all of stage 2 and forks a child for each command: 20 killed runs cost seconds, not minutes.

Reads one JSON object a line, ``{"argv": [...], "log": path}``; answers with the child's process id, then with its exit status
(as :func:`os.waitstatus_to_exitcode` gives it). No JAX backend is initialised here, so that forking is safe.
"""

from __future__ import annotations

import json
import os
import sys

import stage2_transformer
from wan_common import denoise_run, denoiser, stages  # noqa: F401 - imported once, for every child
from wan_common.errors import run_command
from wan_common.signals import StopSignals  # noqa: F401


def main() -> None:
    """Serve until stdin ends."""
    for line in sys.stdin:
        command = json.loads(line)
        child = os.fork()
        if child == 0:
            log = os.open(command["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.exit(run_command(stage2_transformer.main, command["argv"]))
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
