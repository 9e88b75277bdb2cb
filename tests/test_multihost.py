"""Two real processes of four virtual devices each, beside one process with eight; and what happens when one of them dies."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest
from conftest import ROOT, run_script

from wan_common import multihost
from wan_common.errors import UsageError
from wan_common.tensor_io import load_tensors

STEPS = ["--num_inference_steps", "3", "--frames", "5", "--height", "64", "--width", "64", "--dtype", "float32"]


def start_pair(script: str, *args: str | Path) -> list[subprocess.Popen[str]]:
    """Process 0 and process 1 of the same command, joined through a free local port."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    command = [sys.executable, str(ROOT / script), *map(str, args), "--distributed"]
    common = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_COORDINATOR_ADDRESS": address}
    common["JAX_NUM_PROCESSES"] = "2"
    # One cache folder a process: two would race for the same entries.
    cache = os.environ["JAX_COMPILATION_CACHE_DIR"]
    return [
        subprocess.Popen(
            command, cwd=ROOT, env={**common, "JAX_PROCESS_ID": str(i), "JAX_COMPILATION_CACHE_DIR": f"{cache}_process{i}"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in range(2)
    ]  # fmt: skip


def finish(pair: list[subprocess.Popen[str]]) -> None:
    """Both processes end well."""
    outputs = [process.communicate(timeout=300)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with stage 1's outputs."""
    folder = tmp_path_factory.mktemp("encoded")
    done = run_script("stage1_text_encoder.py", "--model_id", "demo_model", "--prompt", "a red circle", "--output_dir", folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_two_processes_equal_one(encoded: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for script, args in (("stage2_transformer.py", ["--input_dir", encoded, *STEPS]), ("stage3_vae_decoder.py", ["--save_frames"])):
        flags = args if script.startswith("stage2") else [*args, "--dtype", "float32"]
        where = ["--output_dir"] if script.startswith("stage2") else ["--input_dir"]
        done = run_script(script, *flags, *where, one, devices=8)
        assert done.returncode == 0, done.stderr
        finish(start_pair(script, *flags, *where, two))
    latents = [load_tensors(folder / "stage2_latents.safetensors")[0]["latents"] for folder in (one, two)]
    assert np.abs(latents[0] - latents[1]).max() <= 1e-5 * np.abs(latents[0]).max()  # observed 2e-6
    for frame in sorted((one / "output_video_frames").iterdir()):
        pictures = [cv2.imread(str(folder / "output_video_frames" / frame.name)).astype(int) for folder in (one, two)]
        assert np.abs(pictures[0] - pictures[1]).max() <= 1  # a level of 255, where rounding falls either way


def test_a_dead_process_ends_the_other_with_a_message(encoded: Path, tmp_path: Path) -> None:
    flags = ["--input_dir", encoded, "--output_dir", tmp_path, *STEPS, "--num_inference_steps", "500", "--checkpoint_every", "1"]
    pair = start_pair("stage2_transformer.py", *flags)
    try:
        deadline = time.monotonic() + 240
        while not (tmp_path / "stage2_checkpoint.safetensors").is_file():  # denoising has begun
            assert time.monotonic() < deadline and pair[0].poll() is None
            time.sleep(0.1)
        pair[1].send_signal(signal.SIGKILL)
        begun = time.monotonic()
        output = pair[0].communicate(timeout=120)[0]
        assert time.monotonic() - begun < 60
        assert pair[0].returncode in (5, -signal.SIGABRT), output  # see multihost.lost_process
        assert "another process of this run is gone" in output or "another task died" in output
    finally:
        for process in pair:
            process.kill()


def test_a_slice_of_several_hosts_without_distributed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    multihost.check_initialized()  # one process
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(UsageError, match="these devices belong to 4 processes: add --distributed, on every host"):
        multihost.check_initialized()
    monkeypatch.setitem(multihost._state, "initialized", True)
    multihost.check_initialized()
