"""Several hosts: initialisation, who writes, and decisions that all processes must take alike."""

from __future__ import annotations

import logging
import os
from typing import Any

from wan_common.errors import UsageError

logger = logging.getLogger("multihost")
_state = {"initialized": False}  # jax.distributed can be initialised once a process


def wants_distributed(asked: bool) -> bool:
    """Whether to initialise jax.distributed: asked for, or on a TPU pod slice of several hosts."""
    hosts = [host for host in os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
    return asked or len(hosts) > 1


def initialize(asked: bool) -> None:
    """``jax.distributed.initialize`` when :func:`wants_distributed`.

    On TPU pods and under SLURM or Open MPI JAX finds coordinator and process ids itself; elsewhere they come from
    ``JAX_COORDINATOR_ADDRESS``, ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID``. CPU processes talk through gloo.
    A process that dies ends the others: heartbeats are given up after 20 seconds.
    """
    if _state["initialized"] or not wants_distributed(asked):
        return
    import jax

    if os.environ.get("JAX_PLATFORMS") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    settings: dict[str, Any] = {"heartbeat_timeout_seconds": 20, "shutdown_timeout_seconds": 20}
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        settings.update(
            coordinator_address=os.environ["JAX_COORDINATOR_ADDRESS"], num_processes=int(os.environ["JAX_NUM_PROCESSES"]),
            process_id=int(os.environ["JAX_PROCESS_ID"]),
        )  # fmt: skip
    jax.distributed.initialize(**settings)
    _state["initialized"] = True
    here, everywhere = jax.local_device_count(), jax.device_count()
    logger.info("process %d of %d, %d of %d devices here", jax.process_index(), jax.process_count(), here, everywhere)


def check_initialized() -> None:
    """Refuse to run as one of several processes that do not know of each other: each would write the same files.

    Raises:
        UsageError: the devices belong to several processes (a TPU slice of several hosts) and JAX was not told so.
    """
    import jax

    if not _state["initialized"] and jax.process_count() > 1:
        raise UsageError(f"these devices belong to {jax.process_count()} processes: add --distributed, on every host")


def lost_process(error: BaseException) -> str | None:
    """What to tell the user when a collective failed because another process of this run is gone; None for other errors.

    When the collective waits instead of failing, JAX itself ends this process with such a message once the other's heartbeats
    have stopped (20 s). It also does so while this process exits, so the exit code is then SIGABRT's and not 5.
    (``jax_enable_recoverability`` avoids that abort, but then a waiting collective waits for ever: docs/LOG.md.)
    """
    if not _state["initialized"] or type(error).__name__ != "JaxRuntimeError":
        return None
    reason = str(error).strip().splitlines()[0][:200]
    return (
        f"another process of this run is gone or unreachable ({reason}); its own log says why; "
        "rerun the same command on every host: stage 2 goes on from its last checkpoint"
    )


def is_writer() -> bool:
    """Process 0 writes; every process reads. True without importing JAX when there is one process."""
    return not _state["initialized"] or _process_index() == 0


def _process_index() -> int:
    import jax

    return jax.process_index()


def barrier(name: str) -> None:
    """Wait for the other processes: what process 0 wrote before is there after."""
    if _state["initialized"]:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)
