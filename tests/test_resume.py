"""Stage 2 stopped anywhere goes on bit for bit, and no file is ever half-written."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import stage1_text_encoder
from tests.conftest import ROOT
from tests.tiny_models import build_tiny
from wan_common.atomic import TEMP_PREFIX
from wan_common.checkpoint import load_checkpoint, save_checkpoint
from wan_common.scheduler import initial_state
from wan_common.tensor_io import SafetensorsReader, load_tensors, save_tensors

STEPS = 80
EXTRA_STEPS = 20  # with step latents and attention maps: 24 files a step
LATENTS, CHECKPOINT = "stage2_latents.safetensors", "stage2_checkpoint.safetensors"
EXTRAS = ("--save_step_latents", "--store_attention")
logger = logging.getLogger("test_resume")


def steps_of(flags: tuple[str, ...]) -> int:
    return EXTRA_STEPS if EXTRAS[0] in flags else STEPS


class Zygote:
    """Runs stage 2 in forked children (see stage2_zygote.py)."""

    def __init__(self, source: Path):
        self.source = source
        environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "tests.stage2_zygote"]
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(self, folder: Path, *flags: str) -> int:
        """Start stage 2 on ``folder``; returns its process id."""
        argv = ["--input_dir", str(self.source), "--output_dir", str(folder), "--num_inference_steps", str(steps_of(flags))]
        argv += ["--checkpoint_every", "1", *flags]
        assert self.process.stdin is not None
        self.log(folder).write_text("")  # the child may be slower than a reader
        print(json.dumps({"argv": argv, "log": str(self.log(folder))}), file=self.process.stdin, flush=True)
        return self._read()

    def wait(self) -> int:
        """The exit code of what was started; minus the signal that killed it."""
        return self._read()

    def run(self, folder: Path, *flags: str) -> str:
        """Run to the end; returns the log."""
        self.start(folder, *flags)
        code = self.wait()
        log = self.log(folder).read_text()
        assert code == 0, log
        return log

    @staticmethod
    def log(folder: Path) -> Path:
        """Where the last run on ``folder`` logged."""
        return folder.with_suffix(".log")

    def _read(self) -> int:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the zygote died"
        return int(line)

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    folder = tmp_path_factory.mktemp("resume")
    model = build_tiny(folder / "tiny")
    stage1_text_encoder.main(["--model_id", str(model), "--output_dir", str(folder / "text"), "--prompt", "a red (circle) moving (right)"])
    zygote = Zygote(folder / "text")
    yield zygote
    zygote.close()


@pytest.fixture(scope="module")
def uninterrupted(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    zygote.run(folder)
    return folder


@pytest.fixture(scope="module")
def with_extras(zygote: Zygote, memory: Path) -> Path:
    zygote.run(memory / "whole", *EXTRAS)
    return memory / "whole"


@pytest.fixture(scope="module")
def memory() -> Iterator[Path]:
    """A folder in memory where there is one: a thousand small files, each with its fsync, take minutes on a busy disk."""
    with tempfile.TemporaryDirectory(prefix="wan-tests-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as name:
        yield Path(name)


def bits(folder: Path) -> bytes:
    return load_tensors(folder / LATENTS)[0]["latents"].tobytes()


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(f"{TEMP_PREFIX}*") if path.is_file()]


def check_whole(folder: Path) -> None:
    """Every file that has its final name is whole."""
    for path in folder.rglob("*"):
        if path.name.startswith(TEMP_PREFIX) or path.is_dir():
            continue
        if path.suffix == ".safetensors":
            with SafetensorsReader(path) as reader:
                for name in reader.tensors:
                    assert np.isfinite(reader.read(name).astype(np.float32)).all(), path
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix in (".npy", ".npz"):
            np.load(path, allow_pickle=False)
        else:
            raise AssertionError(f"{path}: an unexpected file")


def kill_at(pid: int, folder: Path, how: str, rng: random.Random, duration: float) -> None:
    """``kill -9`` the run: after a random time, at a random moment of denoising, or in the middle of writing a file."""
    begun = time.monotonic()
    if how == "any time":
        time.sleep(rng.uniform(0, 0.8 * duration))
    elif how == "denoising":
        before = stamp(folder / CHECKPOINT)
        while stamp(folder / CHECKPOINT) == before and time.monotonic() < begun + 30 and running(pid):
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.1))
    else:
        skip = rng.randrange(12)  # which of its writes
        while time.monotonic() < begun + 30 and running(pid):
            if not leftovers(folder):
                continue
            os.kill(pid, signal.SIGSTOP)  # hold it: is it still writing?
            while state(pid) not in "TZ":
                pass
            if skip == 0 and leftovers(folder):
                break
            skip = max(0, skip - 1)
            os.kill(pid, signal.SIGCONT)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def stamp(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def state(pid: int) -> str:
    """R, S, D, T (stopped) or Z (ended); Z too when there is no such process any more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def running(pid: int) -> bool:
    return state(pid) != "Z"


def same_files(folder: Path, wanted: Path, part: str) -> None:
    names = sorted(str(path.relative_to(wanted)) for path in (wanted / part).rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(folder)) for path in (folder / part).rglob("*") if path.is_file())
    assert len(names) > EXTRA_STEPS
    for name in names:
        assert content(folder / name) == content(wanted / name), name


def content(path: Path) -> bytes:
    """Its bytes, without the time at which seed 003's metadata was written."""
    return re.sub(rb'"storage_timestamp": "[^"]*"', b"", path.read_bytes())


@pytest.mark.parametrize(("kills", "flags"), [(21, ()), (9, EXTRAS)], ids=["latents", "step latents and attention maps"])
def test_kill_9(
    zygote: Zygote, uninterrupted: Path, with_extras: Path, tmp_path: Path, memory: Path, kills: int, flags: tuple[str, ...]
) -> None:
    if flags:
        uninterrupted, tmp_path = with_extras, memory / "killed"
        tmp_path.mkdir()
    rng = random.Random(kills)
    begun = time.monotonic()
    zygote.run(tmp_path / "timed", *flags)
    duration = time.monotonic() - begun
    assert bits(tmp_path / "timed") == bits(uninterrupted)

    killed = {"any time": 0, "denoising": 0, "writing": 0}
    found, resumed, runs = 0, [0], 0
    folder = tmp_path / "run0"
    while sum(killed.values()) < kills:
        how = min(killed, key=lambda name: killed[name])
        pid = zygote.start(folder, *flags)
        kill_at(pid, folder, how, rng, duration)
        code = zygote.wait()
        resumed += [int(n) for n in re.findall(r"going on from step (\d+)", zygote.log(folder).read_text())]
        if code == 0:  # it was done before the kill
            assert bits(folder) == bits(uninterrupted)
            runs += 1
            folder = tmp_path / f"run{runs}"
            continue
        assert code == -signal.SIGKILL, zygote.log(folder).read_text()
        killed[how] += 1
        found += bool(folder.exists() and leftovers(folder))
        check_whole(folder)
    log = zygote.run(folder, *flags)
    resumed += [int(n) for n in re.findall(r"going on from step (\d+)", log)]
    logger.info("killed %s, %d in the middle of a write, resumed at steps %s, %d runs ended before", killed, found, resumed[1:], runs)
    assert found >= killed["writing"] and len(set(resumed)) > kills // 4  # the kills did hit, at many places
    assert bits(folder) == bits(uninterrupted)
    assert not leftovers(folder) and not (folder / CHECKPOINT).exists()
    check_whole(folder)
    for part in ("step_latents", "attention_maps") if flags else ():
        same_files(folder, uninterrupted, part)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_while_denoising(zygote: Zygote, uninterrupted: Path, tmp_path: Path, signum: signal.Signals, code: int) -> None:
    folder = tmp_path / "run"
    pid = zygote.start(folder, "--checkpoint_every", "0")
    while "denoising:" not in zygote.log(folder).read_text():
        assert running(pid), zygote.log(folder).read_text()
        time.sleep(0.005)
    time.sleep(0.05)  # the bar is drawn just before signals are held back
    os.kill(pid, signum)
    assert zygote.wait() == code
    message = re.search(rf"stopped by {signum.name}: checkpoint written after step (\d+) of {STEPS}", zygote.log(folder).read_text())
    assert message, zygote.log(folder).read_text()
    assert not (folder / LATENTS).exists()
    check_whole(folder)
    log = zygote.run(folder, "--checkpoint_every", "0")
    assert f"seed 42: going on from step {message[1]} of {STEPS}" in log
    assert bits(folder) == bits(uninterrupted)


def test_signal_while_loading(zygote: Zygote, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    pid = zygote.start(folder)
    while "device(s) of kind" not in (zygote.log(folder).read_text() if zygote.log(folder).exists() else ""):
        time.sleep(0.001)
    os.kill(pid, signal.SIGTERM)
    assert zygote.wait() == 143
    log = zygote.log(folder).read_text()
    assert "stopped by SIGTERM" in log and "Traceback" not in log


def test_checkpoint_of_other_settings_is_not_used(zygote: Zygote, uninterrupted: Path, tmp_path: Path) -> None:
    folder, other = tmp_path / "run", ("--guidance_scale", "2.0")
    pid = zygote.start(folder)
    kill_at(pid, folder, "denoising", random.Random(0), 0)
    assert zygote.wait() == -signal.SIGKILL and (folder / CHECKPOINT).exists()
    shutil.copytree(folder, tmp_path / "same")
    log = zygote.run(folder, *other)
    assert f"{CHECKPOINT}: of other settings or inputs; not used, this run starts from step 0" in log and "going on" not in log
    zygote.run(tmp_path / "fresh", *other)
    assert bits(folder) == bits(tmp_path / "fresh") != bits(uninterrupted)
    assert "going on from step" in zygote.run(tmp_path / "same") and bits(tmp_path / "same") == bits(uninterrupted)


def test_checkpoint_without_what_is_asked_for_now(zygote: Zygote, with_extras: Path, memory: Path) -> None:
    """Step latents are asked for after the kill: those of the steps done are missing, so the run starts anew and says so."""
    folder = memory / "later"
    pid = zygote.start(folder, "--num_inference_steps", str(EXTRA_STEPS))
    kill_at(pid, folder, "denoising", random.Random(1), 0)
    assert zygote.wait() == -signal.SIGKILL and (folder / CHECKPOINT).exists()
    log = zygote.run(folder, *EXTRAS)
    assert re.search(r"seed 42: the checkpoint of step \d+ is of no use: step latents .* are not there; starting from step 0", log)
    for part in ("step_latents", "attention_maps"):
        same_files(folder, with_extras, part)


def test_checkpoint_with_maps_of_other_settings(zygote: Zygote, memory: Path) -> None:
    """A stopped run that stored its maps otherwise is no error with a remedy that leads back to it: the clip starts anew."""
    folder = memory / "other_settings"
    pid = zygote.start(folder, *EXTRAS)
    kill_at(pid, folder, "denoising", random.Random(1), 0)
    assert zygote.wait() == -signal.SIGKILL and (folder / CHECKPOINT).exists()
    log = zygote.run(folder, *EXTRAS, "--attention_tokens", "red")
    assert re.search(r"seed 42: the checkpoint of step \d+ is of no use: .*stored maps are of another run \(tokens differ\)", log)


SHAPE = (1, 16, 2, 4, 4)


def damage(path: Path, what: str) -> None:
    tensors, header = load_tensors(path)
    tensors = {name: array.copy() for name, array in tensors.items()}
    if what == "truncated":
        path.write_bytes(path.read_bytes()[:-4])
        return
    if what == "not finite":
        tensors["sample"][0, 0, 0, 0, 0] = np.nan
    elif what == "another shape":
        tensors["sample"] = tensors["sample"][..., :2]
    elif what == "bf16":
        tensors["last_sample"] = tensors["last_sample"].astype(np.float16)
    elif what == "no step":
        del header["next_step"]
    elif what == "foreign":
        header["format"] = "something else"
    save_tensors(path, tensors, header)


@pytest.mark.parametrize("what", ["truncated", "not finite", "another shape", "bf16", "no step", "foreign"])
def test_damaged_checkpoints_are_left_out_aloud(tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / CHECKPOINT
    state = initial_state(np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32), 2)
    save_checkpoint(path, state, 7, "f")
    loaded = load_checkpoint(path, "f", SHAPE, 2)
    assert loaded is not None and loaded[1] == 7
    assert all(np.array_equal(loaded[0][name], state[name]) for name in state)
    assert load_checkpoint(path, "another", SHAPE, 2) is None
    assert "of other settings or inputs; not used" in caplog.text
    caplog.clear()
    damage(path, what)
    assert load_checkpoint(path, "f", SHAPE, 2) is None
    assert str(path) in caplog.text


def test_no_checkpoint_is_no_message(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load_checkpoint(tmp_path / CHECKPOINT, "f", SHAPE, 2) is None
    assert caplog.text == ""
