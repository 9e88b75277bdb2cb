"""The pipeline as a Python object, with seed 002's calls: generate, and see the attention while at it.

    from wan_common.pipeline import WanT2V

    model = WanT2V.from_pretrained("demo_model")
    video, timing_info = model.generate_with_attention_visualization("a red circle moving right", num_frames=17)

It runs generate.py's own functions on a run directory, so everything that the scripts write is there afterwards.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np

from wan_common.artifacts import video_name
from wan_common.config import DEFAULT_MODEL

logger = logging.getLogger("pipeline")


class WanT2V:
    """A text-to-video model by its hub id or folder. Nothing is loaded until :meth:`generate`, and only for as long as needed.

    Args:
        model_id: hub id or local diffusers folder.
        dtype: "bfloat16" or "float32".
        device_flags: mesh flags for generate.py, e.g. ``["--tp", "4"]``.
    """

    def __init__(self, model_id: str = DEFAULT_MODEL, dtype: str = "bfloat16", device_flags: list[str] | None = None):
        self.model_id, self.dtype, self.device_flags = model_id, dtype, list(device_flags or [])
        self.attention_dir: Path | None = None

    @classmethod
    def from_pretrained(cls, model_id: str, torch_dtype: Any = "bfloat16", device_map: str | None = None) -> WanT2V:
        """As in diffusers; ``torch_dtype`` may be a torch dtype. ``device_map`` has no effect: JAX places the weights."""
        if device_map is not None:
            logger.warning("device_map=%r has no effect: weights are sharded over the devices that JAX finds", device_map)
        return cls(model_id, str(torch_dtype).removeprefix("torch."))

    def enable_attention_visualization(self, output_dir: str | Path = "attention_outputs") -> None:
        """From now on :meth:`generate` also stores attention maps, and draws them into ``output_dir``."""
        self.attention_dir = Path(output_dir)

    def disable_attention_visualization(self) -> None:
        """Stop storing attention maps."""
        self.attention_dir = None

    def generate(
        self, prompt: str, *, num_frames: int = 81, height: int = 720, width: int = 1280, num_inference_steps: int = 50,
        guidance_scale: float = 5.0, seed: int = 42, negative_prompt: str = "", flow_shift: float | None = None,
        output_dir: str | Path = "stage_outputs",
    ) -> tuple[np.ndarray, dict[str, Any]]:  # fmt: skip
        """Generate one clip.

        Args:
            prompt: ``(word)`` marks a word whose attention is drawn; without marks all are.
            num_frames: 4n + 1; another number goes down to the next such one with a warning, as in diffusers.
            output_dir: the run directory.

        Returns:
            The frames, uint8 [F, H, W, 3], and ``{"total_seconds", "stages": {stage: seconds}, "output_dir", "video"}``.

        Raises:
            WanError: see the scripts; the message says what to do.
        """
        import imageio.v3 as iio

        import generate

        if num_frames % 4 != 1:
            logger.warning("num_frames %d is not 4n + 1; %d are made", num_frames, max(1, num_frames // 4 * 4 + 1))
            num_frames = max(1, num_frames // 4 * 4 + 1)
        begun = time.perf_counter()
        settings = {
            "model_id": self.model_id, "dtype": self.dtype, "prompt": prompt, "negative_prompt": negative_prompt, "frames": num_frames,
            "height": height, "width": width, "num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale,
            "seed": seed, "flow_shift": flow_shift, "output_dir": output_dir,
        }  # fmt: skip
        argv = [text for name, value in settings.items() if value is not None for text in (f"--{name}", str(value))]
        argv += ["--save_frames", *self.device_flags, *(["--store_attention"] if self.attention_dir else [])]
        generate.main(argv)
        video = Path(output_dir) / video_name("")
        frames = np.stack([iio.imread(path) for path in sorted(video.with_name(f"{video.stem}_frames").glob("frame_*.png"))])
        if self.attention_dir is not None:
            from wan_common.attention_visualizer import visualize_run

            visualize_run(output_dir, self.attention_dir)
        provenance = json.loads((Path(output_dir) / "generation_config.json").read_text())["provenance"]
        stages = {stage: record["seconds"]["stage"] for stage, record in provenance.items()}
        timing = {"total_seconds": time.perf_counter() - begun, "stages": stages, "output_dir": str(output_dir), "video": str(video)}
        return frames, timing

    def generate_with_attention_visualization(
        self, prompt: str, num_frames: int = 16, height: int = 256, width: int = 256, num_inference_steps: int = 25,
        guidance_scale: float = 7.5, output_dir: str | Path = "attention_outputs", **options: Any,
    ) -> tuple[np.ndarray, dict[str, Any]]:  # fmt: skip
        """Seed 002's one call, with its defaults: generate, and draw the attention into ``output_dir``.

        The run's own files go to ``output_dir/run``; ``options`` are :meth:`generate`'s others (seed, negative_prompt ...).
        """
        before = self.attention_dir
        self.enable_attention_visualization(output_dir)
        try:
            return self.generate(
                prompt, num_frames=num_frames, height=height, width=width, num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale, output_dir=Path(output_dir) / "run", **options,
            )  # fmt: skip
        finally:
            self.attention_dir = before
