"""Shared set-up: 8 virtual CPU devices, the repository root as the working directory, helpers that several tests use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DEVICES = 8
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}".strip()
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing may need the network
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "wan_tpu" / "jax_tests"))


@pytest.fixture(autouse=True)
def _in_repository_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # --model_id demo_model, and seed 001's loop, are relative to it


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The embedded model's folder."""
    return ROOT / "demo_model"


def run_script(
    *args: str | Path, cwd: Path = ROOT, devices: int = 1, timeout: float = 300, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run one of the repository's scripts as a user would, in a process of its own."""
    script, *rest = (str(arg) for arg in args)
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", **(env or {})}
    command = [sys.executable, str(ROOT / script), *rest]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
