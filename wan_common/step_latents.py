"""The step latents of a clip on disk: what stage 2 leaves of each denoising step, for ``visualize_frames.py``.

A clip's folder ``step_latents{S}/`` holds ``initial_noise.safetensors`` (x before step 0) and ``step_000.safetensors`` ...:
``latents`` is x after the step, ``predicted_x0`` the clean clip that the solver predicted in it. Each header describes the
step (``step, timestep, sigma, sigma_next``) and the clip (``num_inference_steps, seed, fingerprint, frames, height, width, fps``).
Files are written by a background thread while the device runs the next step, and read one at a time.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import queue
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import ml_dtypes
import numpy as np

from wan_common.atomic import remove_temporaries
from wan_common.errors import ArtifactError
from wan_common.tensor_io import SafetensorsReader, save_tensors

logger = logging.getLogger("step_latents")

FOLDER = "step_latents"
INITIAL_NOISE = "initial_noise.safetensors"
REMEDY = "make them with: python stage2_transformer.py --save_step_latents (and the clip's --input_dir and --output_dir)"
DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
CLIP_KEYS = ("num_inference_steps", "seed", "fingerprint", "frames", "height", "width", "fps")
_STEP_FILE = re.compile(r"step_(\d{3,})\.safetensors")
CHANNELS = 16  # of Wan 2.1's VAE
QUEUE_DEPTH = 2  # steps waiting to be written; a slower disk then slows the steps down instead of filling memory


def step_file(step: int) -> str:
    """File name of ``step`` (0-based)."""
    return f"step_{step:03d}.safetensors"


class BackgroundWriter:
    """One thread that runs calls in order behind the caller's back; its first error surfaces in the caller's next call.

    Use as a context manager: leaving waits for what was submitted. When the body fails, its error is the one that is raised.
    """

    def __init__(self, depth: int = QUEUE_DEPTH):
        self._queue: queue.Queue[Callable[[], object] | None] = queue.Queue(maxsize=depth)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="background-writer", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (call := self._queue.get()) is not None:
            try:
                if self._error is None:  # after a failure the rest is dropped, so that submit() never blocks on a dead disk
                    call()
            except BaseException as error:  # noqa: BLE001 - handed to the caller, whatever it is
                self._error = error
            finally:
                del call  # else the last step's arrays live until the next one arrives
                self._queue.task_done()
        self._queue.task_done()

    def submit(self, function: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        """Queue ``function(*args, **kwargs)``; blocks while ``depth`` calls are waiting. Raises an earlier call's error."""
        self._raise()
        self._queue.put(lambda: function(*args, **kwargs))

    def flush(self) -> None:
        """Wait until everything submitted is done. Raises an earlier call's error."""
        self._queue.join()
        self._raise()

    def close(self) -> None:
        """Wait for everything submitted and end the thread. Raises an earlier call's error; a second close does nothing."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
        self._raise()

    def _raise(self) -> None:
        if self._error is not None and threading.current_thread() is not self._thread:
            error, self._error = self._error, None
            raise error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        if exc_type is None:
            self.close()
            return
        try:
            self.close()
        except Exception as error:  # noqa: BLE001 - the body's own error is on its way up
            logger.error("while stopping: %s", error)


def snapshot(array: Any, dtype: str) -> Any:
    """A copy of ``array`` in ``dtype`` that is on its way to the host and outlives a donation of ``array`` to the next step.

    A JAX array is cast on its device, so that half the bytes travel, and nothing waits here.

    Raises:
        ValueError: a JAX array spread over several hosts; replicate it first.
    """
    target = DTYPES[dtype]
    if not type(array).__module__.startswith("jax"):
        return np.array(array, target)
    import jax.numpy as jnp

    if array.is_fully_replicated:
        array = array.addressable_data(0)
    elif not array.is_fully_addressable:
        raise ValueError(f"an array {array.shape} spread over several hosts cannot be copied by one; replicate it first")
    copy = jnp.array(array, dtype=target, copy=True)
    copy.copy_to_host_async()
    return copy


class StepLatentsWriter:
    """Writes one clip's step latents while the denoising runs; use as a context manager, or call :meth:`close`.

    Args:
        directory: ``<run>/step_latents{S}``; made when missing.
        metadata: the clip's :data:`CLIP_KEYS` (and whatever else should travel with the files); ``fingerprint`` names the
            clip: equal for a run and its continuation, different when any input differs.
        dtype: what is stored; float16 keeps 11 bits of each value, bfloat16 8 bits and fp32's range.
        first_step: where this run starts. 0 removes the files of earlier runs; k keeps steps < k, which must be there
            (ask :func:`steps_on_disk` before) and removes the rest.

    Raises:
        ArtifactError: the folder cannot be written, or a continuation lacks its earlier steps. Later calls raise what went
            wrong in the thread.
        ValueError: ``metadata`` lacks a key, or ``dtype`` is not one of :data:`DTYPES`.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        metadata: Mapping[str, Any],
        dtype: str = "float16",
        first_step: int = 0,
    ):
        if missing := [key for key in CLIP_KEYS if key not in metadata]:
            raise ValueError(f"step latents need the metadata {', '.join(missing)}")
        if dtype not in DTYPES:
            raise ValueError(f"step latents are stored as {', '.join(DTYPES)}, not {dtype}")
        self.directory = Path(directory)
        self._metadata = {key: _text(value) for key, value in metadata.items()}
        self._dtype = dtype
        self._warned = False
        if first_step > 0:
            found = steps_on_disk(self.directory, self._metadata["fingerprint"], dtype)
            if found < first_step:
                raise ArtifactError(
                    f"{self.directory}: {max(found, 0)} of the {first_step} steps before this one are there; "
                    "restart the clip from step 0 with --force --save_step_latents"
                )
        self._prepare(first_step)
        self._worker = BackgroundWriter()

    def _prepare(self, first_step: int) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            remove_temporaries(self.directory)
            for path in list(self.directory.iterdir()):
                match = _STEP_FILE.fullmatch(path.name)
                if (match and int(match[1]) >= first_step) or (path.name == INITIAL_NOISE and first_step == 0):
                    path.unlink()
        except OSError as error:
            raise ArtifactError(
                f"{self.directory}: cannot write here ({error.strerror}); choose another --output_dir, or drop --save_step_latents"
            ) from error

    def initial_noise(self, latents: Any) -> None:
        """Store x before step 0: ``latents`` [1, C, F, h, w], JAX or numpy."""
        self._worker.submit(self._write, INITIAL_NOISE, {"latents": snapshot(latents, self._dtype)}, {})

    def step(self, step: int, latents: Any, predicted_x0: Any, timestep: float, sigma: float, sigma_next: float) -> None:
        """Store step ``step`` (0-based): x after it and the x0 predicted in it, both [1, C, F, h, w], JAX or numpy.

        Returns at once: the copies are dispatched behind the step on the device and fetched by the thread, so the arrays
        may be donated to the next step.
        """
        tensors = {"latents": snapshot(latents, self._dtype), "predicted_x0": snapshot(predicted_x0, self._dtype)}
        header = {"step": step, "timestep": float(timestep), "sigma": float(sigma), "sigma_next": float(sigma_next)}
        self._worker.submit(self._write, step_file(step), tensors, header)

    def _write(self, name: str, tensors: dict[str, Any], header: Mapping[str, Any]) -> None:
        arrays = {key: np.asarray(value) for key, value in tensors.items()}
        if not self._warned and not all(np.isfinite(array).all() for array in arrays.values()):
            self._warned = True
            logger.warning("%s: not finite from here on in %s (diverged, or beyond its range)", self.directory / name, self._dtype)
        save_tensors(self.directory / name, arrays, self._metadata | {key: _text(value) for key, value in header.items()})

    def flush(self) -> None:
        """Wait until every step so far is on disk (before a checkpoint that promises them). Raises the thread's error."""
        self._worker.flush()

    def close(self) -> None:
        """Wait until every step is on disk and end the thread. Raises the thread's error."""
        self._worker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: Any) -> None:  # noqa: PYI036
        self._worker.__exit__(*exc)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else repr(value.item() if isinstance(value, np.generic) else value)


def steps_on_disk(directory: str | os.PathLike[str], fingerprint: str, dtype: str = "float16") -> int:
    """How many leading steps of the clip ``fingerprint`` are on disk, whole and in ``dtype``; -1 without its initial noise."""
    directory = Path(directory)

    def matches(name: str) -> bool:
        try:
            with SafetensorsReader(directory / name) as reader:
                return reader.metadata.get("fingerprint") == fingerprint and all(
                    kind == DTYPES[dtype] for kind, _, _ in reader.tensors.values()
                )
        except ArtifactError:
            return False

    if not matches(INITIAL_NOISE):
        return -1
    count = 0
    while matches(step_file(count)):
        count += 1
    return count


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a clip: 0-based ``index``, the transformer's ``timestep``, the noise level before it and after it."""

    index: int
    timestep: float
    sigma: float
    sigma_next: float
    path: Path


@dataclasses.dataclass(frozen=True)
class StepLatents:
    """One clip's step latents; headers are checked when it is opened, tensors are read one step at a time.

    Attributes:
        shape: [1, C, F, h, w] of every tensor.
        dtype: what the tensors are stored as.
        steps: what is there, in order; fewer than ``num_inference_steps`` only when opened as partial.
    """

    directory: Path
    num_inference_steps: int
    seed: int
    fingerprint: str
    frames: int
    height: int
    width: int
    fps: float
    shape: tuple[int, ...]
    dtype: np.dtype
    steps: tuple[Step, ...]

    @classmethod
    def open(cls, directory: str | os.PathLike[str], partial: bool = False) -> StepLatents:
        """Check every header of a clip's folder. ``partial`` accepts a clip whose last steps are not there yet.

        Raises:
            ArtifactError: a file is missing, truncated, of another clip, or not what its name says.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise ArtifactError(f"{directory}: no such folder of step latents; {REMEDY}")
        noise = directory / INITIAL_NOISE
        with SafetensorsReader(noise, REMEDY) as reader:
            clip = _Header(noise, reader, ("latents",))
        shape, dtype = clip.shape, clip.dtype
        count = clip.integer("num_inference_steps")
        frames, height, width = clip.integer("frames"), clip.integer("height"), clip.integer("width")
        if len(shape) != 5 or shape[:2] != (1, CHANNELS) or shape[2:] != ((frames - 1) // 4 + 1, height // 8, width // 8):
            raise clip.error(f"latents are {list(shape)}, which is not a clip of {frames} frames {width}x{height}")
        names = sorted(int(m[1]) for path in directory.iterdir() if (m := _STEP_FILE.fullmatch(path.name)))
        present = len(names) if partial else count
        if names[-1:] and names[-1] >= count:
            raise ArtifactError(f"{directory / step_file(names[-1])}: a clip of {count} steps has no such step; {REMEDY}")
        steps = []
        for index in range(present):
            path = directory / step_file(index)
            if not path.exists():
                hint = " (--partial shows the steps that are there)" if len(names) and names[-1] < index else ""
                raise ArtifactError(f"{path}: missing; {len(names)} of {count} steps are there{hint}; {REMEDY}")
            with SafetensorsReader(path, REMEDY) as reader:
                header = _Header(path, reader, ("latents", "predicted_x0"))
            for key in CLIP_KEYS:
                if header.text(key) != clip.text(key):
                    raise header.error(f"{key} is {header.text(key)}, {noise.name} has {clip.text(key)}: not one clip")
            if (header.shape, header.dtype) != (shape, dtype):
                found, wanted = f"{header.dtype}{list(header.shape)}", f"{dtype}{list(shape)}"
                raise header.error(f"tensors are {found}, {noise.name} has {wanted}: not one clip")
            if header.integer("step") != index:
                raise header.error(f"holds step {header.text('step')}")
            steps.append(Step(index, header.number("timestep"), header.number("sigma"), header.number("sigma_next"), path))
        if not steps:
            raise ArtifactError(f"{directory}: no step has been written; {REMEDY}")
        return cls(
            directory, count, clip.integer("seed"), clip.text("fingerprint"), frames, height, width, clip.number("fps"),
            shape, dtype, tuple(steps),
        )  # fmt: skip

    def initial_noise(self) -> np.ndarray:
        """x before step 0, [1, C, F, h, w] as stored."""
        with SafetensorsReader(self.directory / INITIAL_NOISE, REMEDY) as reader:
            return reader.read("latents")

    def read(self, step: Step) -> tuple[np.ndarray, np.ndarray]:
        """``(x after the step, predicted x0)``, both [1, C, F, h, w] as stored."""
        with SafetensorsReader(step.path, REMEDY) as reader:
            return reader.read("latents"), reader.read("predicted_x0")


class _Header:
    """The checked header of one file: its tensors agree in shape and dtype, its metadata parse."""

    def __init__(self, path: Path, reader: SafetensorsReader, wanted: Iterable[str]):
        self.path, self._metadata = path, reader.metadata
        if missing := sorted(set(wanted) - set(reader.tensors)):
            raise self.error(f"no tensor {missing[0]!r} (it has {', '.join(sorted(reader.tensors)[:8]) or 'none'}): not step latents")
        kinds = {reader.tensors[name][:2] for name in wanted}
        if len(kinds) != 1:
            raise self.error(f"tensors differ: {', '.join(f'{dtype}{list(shape)}' for dtype, shape in sorted(kinds, key=str))}")
        ((self.dtype, self.shape),) = kinds
        if self.dtype not in DTYPES.values() or 0 in self.shape:
            raise self.error(f"tensors are {self.dtype}{list(self.shape)}: not step latents")

    def error(self, what: str) -> ArtifactError:
        return ArtifactError(f"{self.path}: {what}; {REMEDY}")

    def text(self, key: str) -> str:
        if key not in self._metadata:
            raise self.error(f"its header has no {key!r}: not step latents")
        return self._metadata[key]

    def number(self, key: str) -> float:
        try:
            value = float(self.text(key))
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise self.error(f"{key} is {self.text(key)!r}, not a number")
        return value

    def integer(self, key: str) -> int:
        value = self.number(key)
        if value != int(value):
            raise self.error(f"{key} is {self.text(key)!r}, not a whole number")
        return int(value)


def find_clips(run: str | os.PathLike[str]) -> list[Path]:
    """The folders of step latents in the run directory ``run``, by name.

    Raises:
        ArtifactError: there is none.
    """
    run = Path(run)
    found = sorted(path for path in run.glob(f"{FOLDER}*") if path.is_dir())
    if not found:
        raise ArtifactError(f"{run}: no {FOLDER} folder in it; {REMEDY}")
    return found
