"""Writing and reading video through ffmpeg (imageio), and pixels from decoded tensors."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from wan_common.atomic import atomic_path
from wan_common.errors import ArtifactError

QUALITY = 8  # imageio's 0..10 scale for libx264; seed 000's value


def pad_to_even(frame: np.ndarray) -> np.ndarray:
    """Pad ``frame`` [H, W, C] by at most one row and column (edge repeated): yuv420p needs even sizes; never resizes."""
    return np.pad(frame, ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)), mode="edge")


class VideoWriter:
    """Stream uint8 RGB frames to an H.264 yuv420p mp4 with faststart; the file appears whole when the writer closes.

    Use as a context manager. Leaving it by an exception leaves no file and keeps an old one.

    Args:
        path: the mp4 to write; its folder must exist.
        fps: frames a second.
        quality: imageio's 0..10.
        preset: libx264's; "veryfast" takes about a third of the time of "medium" for plots, at the same quality scale.
        metadata: embedded as JSON in the mp4's ``comment`` tag; ``prompt`` also becomes the title.

    Raises:
        ArtifactError: ffmpeg could not write (full disk, no permission).
        ValueError: a frame of another size or dtype than the first.
    """

    def __init__(
        self, path: str | os.PathLike[str], fps: float, quality: float = QUALITY, preset: str = "medium",
        metadata: dict[str, Any] | None = None,
    ):  # fmt: skip
        self.path = Path(path)
        self.frames = 0
        self._fps, self._quality, self._preset, self._metadata = fps, quality, preset, metadata
        self._stack = contextlib.ExitStack()
        self._shape: tuple[int, ...] | None = None

    def __enter__(self) -> VideoWriter:
        import imageio

        temporary = self._stack.enter_context(atomic_path(self.path))
        # ffmpeg writes the moov atom at the end and then moves it to the front: players can start before the download ends.
        params = ["-preset", self._preset, "-movflags", "+faststart+use_metadata_tags"]
        if self._metadata is not None:
            params += ["-metadata", f"comment={json.dumps(self._metadata, ensure_ascii=False)}"]
            if self._metadata.get("prompt"):
                params += ["-metadata", f"title={self._metadata['prompt']}"]
        self._writer = imageio.get_writer(
            temporary, format="FFMPEG", mode="I", fps=self._fps, codec="libx264", quality=self._quality,
            pixelformat="yuv420p", macro_block_size=1, output_params=params, ffmpeg_log_level="error",
        )  # fmt: skip
        # imageio-ffmpeg forks with a preexec_fn that only calls setpgrp; JAX warns of any fork.
        warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called", category=RuntimeWarning)
        self._stack.push(self._finish)
        return self

    def append(self, frame: np.ndarray) -> None:
        """Add one frame, uint8 [H, W, 3]; odd sizes are padded to even ones."""
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            raise ValueError(f"{self.path}: a frame is uint8 [H, W, 3], not {frame.dtype} {list(frame.shape)}")
        if self._shape is not None and frame.shape != self._shape:
            raise ValueError(f"{self.path}: frame {self.frames} is {list(frame.shape)}, the first was {list(self._shape)}")
        self._shape = frame.shape
        try:
            self._writer.append_data(pad_to_even(frame))
        except OSError as error:
            raise ArtifactError(f"{self.path}: ffmpeg could not write the video ({error}); free space and rerun") from error
        self.frames += 1

    def _finish(self, exc_type: type[BaseException] | None, *_: object) -> None:
        try:
            self._writer.close()
        except OSError as error:
            if exc_type is None:
                raise ArtifactError(f"{self.path}: ffmpeg could not write the video ({error}); free space and rerun") from error
        if exc_type is None:
            self._verify()

    def _verify(self) -> None:
        """ffmpeg reports a full disk only by its exit status, which imageio drops: count what is readable instead."""
        if self.frames == 0:
            raise ValueError(f"{self.path}: no frame was written")
        temporary = self._writer.request.filename
        with contextlib.suppress(OSError, RuntimeError, IndexError):
            from imageio_ffmpeg import count_frames_and_secs

            if count_frames_and_secs(temporary)[0] == self.frames:
                return
        raise ArtifactError(f"{self.path}: the video could not be written whole (disk full?); free space and rerun")

    def __exit__(self, *exc: Any) -> None:
        self._stack.__exit__(*exc)


def write_video(path: str | os.PathLike[str], frames: Any, fps: float, **options: Any) -> Path:
    """Write an iterable of uint8 [H, W, 3] frames; see :class:`VideoWriter` for the options. Returns the path."""
    with VideoWriter(path, fps, **options) as writer:
        for frame in frames:
            writer.append(frame)
    return Path(path)


def probe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """``{"codec", "pix_fmt", "size": (w, h), "fps", "frames"}`` of a video.

    Raises:
        ArtifactError: missing or not a video.
    """
    import imageio_ffmpeg

    try:
        reader = imageio_ffmpeg.read_frames(str(path))
        info = next(reader)
        reader.close()
        frames, _ = imageio_ffmpeg.count_frames_and_secs(str(path))
    except (OSError, RuntimeError, StopIteration) as error:
        raise ArtifactError(f"{path}: not a readable video ({error}); rerun stage3_vae_decoder.py") from error
    return {
        "codec": info["codec"], "pix_fmt": info["pix_fmt"].split("(")[0], "size": tuple(info["source_size"]),
        "fps": info["fps"], "frames": frames,
    }  # fmt: skip


def read_video(path: str | os.PathLike[str]) -> Iterator[np.ndarray]:
    """Yield the frames of a video as uint8 [H, W, 3].

    Raises:
        ArtifactError: missing or not a video.
    """
    import imageio

    try:
        reader: Any
        with imageio.get_reader(Path(path), format="FFMPEG") as reader:  # type: ignore[arg-type]
            yield from (np.asarray(frame) for frame in reader)
    except (OSError, RuntimeError, IndexError, ValueError) as error:
        raise ArtifactError(f"{path}: not a readable video ({error}); rerun stage3_vae_decoder.py") from error
