"""Stage 2's loop: one clip from noise to latents, resumable at any step, with what else was asked for written on the way."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from wan_common.artifacts import Job, checkpoint_name, latents_name, step_latents_name
from wan_common.attention_maps import (
    AttentionSettings,
    AttentionWriter,
    ClipInfo,
    Target,
    check_resume,
    groups_matrix,
    select_targets,
)
from wan_common.checkpoint import load_checkpoint, save_checkpoint
from wan_common.denoiser import Denoiser
from wan_common.embeddings import Embeddings
from wan_common.errors import ArtifactError, NumericalError
from wan_common.latents import draw_noise, save_latents
from wan_common.multihost import is_writer
from wan_common.scheduler import State, StepTable, initial_state
from wan_common.signals import StopSignals
from wan_common.step_latents import BackgroundWriter, StepLatentsWriter, snapshot, steps_on_disk
from wan_common.torchax_bridge import Params

logger = logging.getLogger("denoise")
PROFILED_STEPS = (3, 6)  # seed 000: skip_first_n_steps_for_profiler=3, profiler_steps=3


@dataclasses.dataclass(frozen=True)
class Clip:
    """One video to denoise: which prompt, which seed, and its names.

    Attributes:
        suffix: of its files. video_id: its folder of attention maps. job: what decides its latents.
    """

    prompt_index: int
    seed: int
    suffix: str
    video_id: str
    job: Job
    height: int
    width: int
    frames: int
    fps: int
    guidance_scale: float


@dataclasses.dataclass(frozen=True)
class Keep:
    """What to write besides the latents."""

    checkpoint_every: int = 10
    step_latents: str | None = None  # their dtype
    preview_every: int = 0
    attention: AttentionSettings = AttentionSettings()
    attention_tokens: tuple[str, ...] = ()


class ClipRunner:
    """Runs clips through one compiled step. ``compilations`` counts how often the step was compiled."""

    def __init__(
        self, denoiser: Denoiser, params: Params, table: StepTable, embeddings: Embeddings, output_dir: Path, keep: Keep,
        model_dir: Path, stop: StopSignals,
    ):  # fmt: skip
        self.denoiser, self.params, self.table, self.embeddings = denoiser, params, table, embeddings
        self.output_dir, self.keep, self.model_dir, self.stop = output_dir, keep, model_dir, stop
        self.step = denoiser.jitted()

    @property
    def compilations(self) -> int:
        """How many programs the step has been compiled to."""
        return self.step._cache_size()

    def inputs(self, clip: Clip) -> jax.Array:
        """The clip's embeddings on the devices."""
        index = clip.prompt_index
        return self.denoiser.put_embeds(self.embeddings.prompt[index : index + 1], self.embeddings.negative)

    def targets(self, clip: Clip) -> list[tuple[bool, list[Target]]]:
        """``(negative?, words)`` for each stored row of attention maps; empty when none are stored."""
        if not self.keep.attention.store_attention:
            return []
        index = clip.prompt_index
        rows = [(False, select_targets(self.embeddings.words[index], self.embeddings.num_tokens[index], self.keep.attention_tokens))]
        if self.keep.attention.store_negative:
            rows.append((True, select_targets(self.embeddings.negative_words, self.embeddings.negative_num_tokens, None)))
        return rows

    def groups(self, clip: Clip, targets: list[tuple[bool, list[Target]]]) -> jax.Array | None:
        """The token groups of each batch row, [batch, L, G]; both rows get as many columns as the larger needs."""
        if not targets:
            return None
        length = self.embeddings.prompt.shape[1]
        counts = [self.embeddings.num_tokens[clip.prompt_index], self.embeddings.negative_num_tokens]
        matrices = [groups_matrix(words, counts[negative], length) for negative, words in targets]
        while len(matrices) < (2 if self.denoiser.guidance else 1):
            matrices.append(np.zeros((length, matrices[0].shape[1]), np.float32))
        width = max(m.shape[1] for m in matrices)
        return jnp.asarray(np.stack([np.pad(m, ((0, 0), (0, width - m.shape[1]))) for m in matrices]))

    def warm_up(self, clip: Clip, steps: int) -> float:
        """Compile, and run ``steps`` steps whose result is thrown away. Returns the seconds it took."""
        begun = time.perf_counter()
        noise = draw_noise(self.denoiser.latent_shape, clip.seed)
        state = self.denoiser.put_state(initial_state(noise, self.table.order))
        groups = self.groups(clip, self.targets(clip))
        for i in tqdm(range(steps), desc="warm-up", unit="step"):
            state, info = self._step(state, clip, self.inputs(clip), i % len(self.table), groups)
            jax.block_until_ready(info["finite"])
        return time.perf_counter() - begun

    def _step(
        self, state: State, clip: Clip, embeds: jax.Array, index: int, groups: jax.Array | None
    ) -> tuple[State, dict[str, Any]]:
        return self.step(
            self.params, state, embeds, np.int32(self.table.timesteps[index]), np.float32(clip.guidance_scale),
            self.denoiser.rows(self.table, index), groups,
        )  # fmt: skip

    def run(self, clip: Clip, profile_dir: Path | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Denoise ``clip`` from its checkpoint, or from noise. Returns the latents [1, 16, F, h, w] fp32 and the timings.

        Raises:
            NumericalError: a step came out with NaN or infinity; names it. The last good checkpoint stays.
            Interrupted: stopped by a signal; a checkpoint was written.
        """
        targets = self.targets(clip)
        state, start = self._begin(clip, targets)
        fresh = start == 0
        embeds, groups = self.inputs(clip), self.groups(clip, targets)
        total, begun, first_done = len(self.table), time.perf_counter(), 0.0
        with contextlib.ExitStack() as stack:
            recorders = self._recorders(clip, targets, start, stack)
            if fresh and recorders.step_latents is not None:
                recorders.step_latents.initial_noise(state["sample"])
            bar = tqdm(total=total, initial=start, desc=f"denoising{clip.suffix}", unit="step", disable=not is_writer())
            stack.enter_context(bar)
            self.stop.working(True)
            previous: jax.Array | None = None
            for i in range(start, total):
                with self._profiled(profile_dir, i - start, total - start):
                    state, info = self._step(state, clip, embeds, i, groups)
                    recorders.take(i, state, info, self.table)
                    # Look at the step before: by now the devices work on this one.
                    self._check(previous, i - 1)
                    if i > start:
                        bar.update()
                    elif profile_dir is None:
                        jax.block_until_ready(info["finite"])
                        first_done = time.perf_counter()
                previous = info["finite"]
                due = self.keep.checkpoint_every > 0 and (i + 1) % self.keep.checkpoint_every == 0
                if i + 1 < total and (due or self.stop.received is not None):
                    self._check(previous, i)
                    recorders.flush()
                    self._save_checkpoint(clip, state, i + 1)
                    if self.stop.received is not None:
                        done = f"checkpoint written after step {i + 1} of {total}"
                        raise self.stop.error(f"{done}; rerun the same command to go on from there")
            self._check(previous, total - 1)
            bar.update(total - bar.n)
            latents = np.asarray(jax.device_get(state["sample"]))
            recorders.finish()
        ended = time.perf_counter()
        steps_after_first = total - start - 1
        seconds = {
            "total": round(ended - begun, 3), "first_step_with_compile": round(first_done - begun, 3) if first_done else None,
            "per_step": round((ended - first_done) / steps_after_first, 4) if steps_after_first > 0 and first_done else None,
        }  # fmt: skip
        return latents, {"seconds": seconds, "resumed_at_step": start}

    def forget(self, clip: Clip) -> None:
        """Drop the clip's checkpoint, so that its next run starts from step 0."""
        if is_writer():
            (self.output_dir / checkpoint_name(clip.suffix)).unlink(missing_ok=True)

    def finish(self, clip: Clip, latents: np.ndarray) -> Path:
        """Write the clip's latents and drop its checkpoint. Returns the file."""
        path = self.output_dir / latents_name(clip.suffix)
        if is_writer():
            save_latents(path, latents, clip.job, self.embeddings.prompts[clip.prompt_index], self.embeddings.negative_prompt)
            self.forget(clip)
        self.stop.working(False)
        return path

    def _begin(self, clip: Clip, targets: list[tuple[bool, list[Target]]]) -> tuple[State, int]:
        path = self.output_dir / checkpoint_name(clip.suffix)
        found = load_checkpoint(path, clip.job.fingerprint, self.denoiser.latent_shape, self.table.order)
        if found is not None:
            state, start = found
            missing = self._missing_before(clip, targets, start)
            if missing is None:
                logger.info("seed %d: going on from step %d of %d (%s)", clip.seed, start, len(self.table), path)
                return self.denoiser.put_state(state), start
            logger.warning("seed %d: the checkpoint of step %d is of no use: %s; starting from step 0", clip.seed, start, missing)
        noise = draw_noise(self.denoiser.latent_shape, clip.seed)
        return self.denoiser.put_state(initial_state(noise, self.table.order)), 0

    def _missing_before(self, clip: Clip, targets: list[tuple[bool, list[Target]]], start: int) -> str | None:
        """Why what was asked for is not there up to the checkpoint's step ``start``; None when all is there."""
        folder = self.output_dir / step_latents_name(clip.suffix)
        if self.keep.step_latents and steps_on_disk(folder, clip.job.fingerprint, self.keep.step_latents) < start:
            return "step latents of the steps before it are not there"
        for negative, words in targets:
            video_id = clip.video_id + ("_negative" if negative else "")
            try:
                info = self._clip_info(clip, negative)
                check_resume(self.output_dir / "attention_maps", video_id, words, self.keep.attention, info, start)
            except ArtifactError as error:
                return str(error).split(";")[0]
        return None

    def _save_checkpoint(self, clip: Clip, state: State, next_step: int) -> None:
        if is_writer():
            host = {name: np.asarray(jax.device_get(value)) for name, value in state.items()}
            save_checkpoint(self.output_dir / checkpoint_name(clip.suffix), host, next_step, clip.job.fingerprint)

    @staticmethod
    def _check(finite: jax.Array | None, index: int) -> None:
        if finite is not None and not bool(finite):
            raise NumericalError(
                f"denoising step {index}: the latents hold NaN or infinity; nothing was repaired; try --dtype float32, or check the weights"
            )

    @contextlib.contextmanager
    def _profiled(self, folder: Path | None, done: int, total: int) -> Any:
        begin, end = (PROFILED_STEPS[0], min(PROFILED_STEPS[1], total)) if total > PROFILED_STEPS[0] else (0, total)
        if folder is not None and done == begin:
            jax.profiler.start_trace(str(folder))
        yield
        if folder is not None and done == end - 1:
            jax.block_until_ready(jnp.zeros(()))
            jax.profiler.stop_trace()
            logger.info("profiler trace in %s", folder)

    def _recorders(self, clip: Clip, targets: list[tuple[bool, list[Target]]], start: int, stack: contextlib.ExitStack) -> Recorders:
        if not is_writer():
            return Recorders()
        recorders = Recorders(preview_every=self.keep.preview_every)
        if self.keep.step_latents:
            metadata = {
                "num_inference_steps": len(self.table), "seed": clip.seed, "fingerprint": clip.job.fingerprint, "frames": clip.frames,
                "height": clip.height, "width": clip.width, "fps": clip.fps, "prompt": self.embeddings.prompts[clip.prompt_index],
            }  # fmt: skip
            folder = self.output_dir / step_latents_name(clip.suffix)
            recorders.step_latents = stack.enter_context(StepLatentsWriter(folder, metadata, self.keep.step_latents, start))
        if self.keep.preview_every:
            from wan_common.latent_rgb import load_latent_rgb

            recorders.preview = (self.output_dir / f"preview{clip.suffix}.png", load_latent_rgb(self.model_dir))
            recorders.previewer = stack.enter_context(BackgroundWriter())
        for negative, words in targets:
            info = self._clip_info(clip, negative)
            video_id = clip.video_id + ("_negative" if negative else "")
            writer = AttentionWriter(self.output_dir / "attention_maps", video_id, words, self.keep.attention, info, start_step=start)
            recorders.attention.append(stack.enter_context(writer))
        return recorders

    def _clip_info(self, clip: Clip, negative: bool) -> ClipInfo:
        e, i = self.embeddings, clip.prompt_index
        return ClipInfo(
            width=clip.width, height=clip.height, frames=clip.frames, fps=clip.fps, grid=self.denoiser.token_grid,  # type: ignore[arg-type]
            num_inference_steps=len(self.table), num_tokens=e.negative_num_tokens if negative else e.num_tokens[i],
            text_length=e.prompt.shape[1], prompt=e.negative_prompt if negative else e.prompts[i],
            token_ids=[int(t) for t in (e.negative_token_ids[0] if negative else e.token_ids[i])],
            fingerprint=clip.job.fingerprint, suffix=clip.suffix, negative=negative,
            extra={"seed": clip.seed, "guidance_scale": clip.guidance_scale},
        )  # fmt: skip


@dataclasses.dataclass
class Recorders:
    """What is written while a clip denoises; each is given the step's results and works behind the next step."""

    step_latents: StepLatentsWriter | None = None
    attention: list[AttentionWriter] = dataclasses.field(default_factory=list)
    preview: tuple[Path, Any] | None = None
    previewer: BackgroundWriter = dataclasses.field(default=None)  # type: ignore[assignment]
    preview_every: int = 0

    def take(self, index: int, state: State, info: dict[str, Any], table: StepTable) -> None:
        """Hand over step ``index``."""
        if self.step_latents is not None:
            self.step_latents.step(
                index, state["sample"], info["predicted_x0"], float(table.timesteps[index]),
                float(table.sigmas[index]), float(table.sigmas[index + 1]),
            )  # fmt: skip
        for row, writer in enumerate(self.attention):
            writer.step(index, info["maps"][row, : len(writer.groups)], float(table.timesteps[index]))
        if self.preview is not None and ((index + 1) % self.preview_every == 0 or index + 1 == len(table)):
            from wan_common.frame_views import write_preview

            path, coefficients = self.preview
            shown = snapshot(info["predicted_x0"], "float32")
            self.previewer.submit(write_preview, path, shown, coefficients, index, len(table))

    def flush(self) -> None:
        """Wait until everything taken so far is on disk."""
        if self.step_latents is not None:
            self.step_latents.flush()
        for writer in self.attention:
            writer.flush()
        if self.preview is not None:
            self.previewer.flush()

    def finish(self) -> None:
        """Everything on disk, with the means over steps."""
        self.flush()
        for writer in self.attention:
            writer.finish()
