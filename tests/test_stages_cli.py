"""The scripts as a user meets them: what is reused, what is refused, with which words and exit code."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import generate
import stage1_text_encoder
import stage2_transformer
import stage3_vae_decoder
from tests.conftest import ROOT, run_script
from tests.tiny_models import DEFAULTS, TINY, build_tiny, copy_model
from wan_common import errors
from wan_common.atomic import TEMP_PREFIX
from wan_common.denoiser import Denoiser
from wan_common.tensor_io import load_tensors, save_tensors
from wan_common.video import probe

Main = Callable[[list[str] | None], None]
SCRIPTS: dict[str, Main] = {
    "stage1_text_encoder.py": stage1_text_encoder.main, "stage2_transformer.py": stage2_transformer.main,
    "stage3_vae_decoder.py": stage3_vae_decoder.main, "generate.py": generate.main,
}  # fmt: skip
EMBEDDINGS, LATENTS, VIDEO, CONFIG = (
    "stage1_embeddings.safetensors", "stage2_latents.safetensors", "output_video.mp4", "generation_config.json"
)  # fmt: skip
PROMPT = "a red (circle) moving right"


class Cli:
    """Runs the scripts in this process, as ``python script.py`` would; ``log`` is what the last one said."""

    def __init__(self, caplog: pytest.LogCaptureFixture):
        self._caplog = caplog

    def __call__(self, script: str, *argv: str | Path) -> int:
        self._caplog.clear()
        return errors.run_command(SCRIPTS[script], [str(arg) for arg in argv])

    @property
    def log(self) -> str:
        return "\n".join(record.getMessage() for record in self._caplog.records)

    @property
    def error(self) -> str:
        """The message of the error that ended the last command."""
        (message,) = (r.getMessage() for r in self._caplog.records if r.name == "wan" and r.levelno == logging.ERROR)
        return message.removeprefix("error: ")

    def ok(self, script: str, *argv: str | Path) -> str:
        """Run what must succeed; returns its log."""
        code = self(script, *argv)
        assert code == 0, self.log
        return self.log

    def refused(self, code: int, script: str, *argv: str | Path) -> str:
        """Run what must fail with ``code``; returns the message."""
        found = self(script, *argv)
        assert found == code, self.log
        return self.error


@pytest.fixture
def cli(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Cli:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(errors, "setup_logging", lambda: None)  # it would take the root logger from pytest
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *args: one)
    return Cli(caplog)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("cli") / "tiny")


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory after all three stages."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    one, found = jax.devices()[:1], jax.devices
    jax.devices = lambda *args: one
    try:
        stage1_text_encoder.main(["--model_id", str(model), "--output_dir", str(folder), "--prompt", PROMPT, "--negative_prompt", "blurry"])
        stage2_transformer.main(["--input_dir", str(folder), "--output_dir", str(folder)])
        stage3_vae_decoder.main(["--input_dir", str(folder)])
    finally:
        jax.devices = found
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may change."""
    return shutil.copytree(finished, tmp_path / "run")


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text())


def latents(path: Path) -> np.ndarray:
    return load_tensors(path)[0]["latents"]


# ------------------------------------------------------------------------------------------- what a run leaves


def test_config_has_seed_001s_flat_keys_and_provenance(finished: Path, model: Path) -> None:
    found = config(finished)
    flat = {
        "prompt": "a red circle moving right", "negative_prompt": "blurry", "width": 32, "height": 32, "frames": 5, "fps": 8,
        "num_inference_steps": 3, "guidance_scale": 5.0, "seed": 42, "model_id": str(model), "flow_shift": 3.0, "max_sequence_length": 32,
    }  # fmt: skip
    assert {key: found[key] for key in flat} == flat
    assert set(found) == {*flat, "schema_version", "provenance"}
    assert set(found["provenance"]) == {"stage1", "stage2", "stage3"}
    for record in found["provenance"].values():
        assert {"settings", "inputs", "model", "outputs", "versions", "devices", "seconds", "finished_at"} <= set(record)
    assert found["provenance"]["stage2"]["compilations"] == 1
    assert probe(finished / VIDEO) == {"codec": "h264", "pix_fmt": "yuv420p", "size": (32, 32), "fps": 8.0, "frames": 5}
    assert sorted(path.name for path in finished.iterdir()) == sorted([CONFIG, EMBEDDINGS, LATENTS, VIDEO])


def test_generate_equals_the_three_stages(cli: Cli, finished: Path, model: Path, tmp_path: Path) -> None:
    cli.ok("generate.py", "--model_id", model, "--output_dir", tmp_path, "--prompt", PROMPT, "--negative_prompt", "blurry")
    for name in (EMBEDDINGS, LATENTS):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()
    assert probe(tmp_path / VIDEO) == probe(finished / VIDEO)
    log = cli.ok("generate.py", "--model_id", model, "--output_dir", tmp_path, "--prompt", PROMPT, "--negative_prompt", "blurry")
    assert all(f"{stage} is current" in log for stage in ("stage1", "stage2", "stage3"))


def test_generate_makes_batches(cli: Cli, model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# two of them\na red circle\n\ngreen grass\n")
    out = tmp_path / "out"
    cli.ok("generate.py", "--model_id", model, "--output_dir", out, "--prompts_file", prompts, "--videos_per_prompt", "2", "--seed", "5")
    videos = sorted(str(path.relative_to(out)) for path in out.rglob("*.mp4"))
    assert videos == [f"videos/prompt_{p:03d}/video_{v:03d}.mp4" for p in (1, 2) for v in (1, 2)]
    names = [f"stage2_latents_prompt{p:03d}_seed{seed}.safetensors" for p in (1, 2) for seed in (5, 6)]
    assert sorted(path.name for path in out.glob("stage2_latents*")) == names
    assert len({(out / name).read_bytes() for name in names}) == 4
    assert config(out)["provenance"]["stage2"]["compilations"] == 1 and config(out)["prompt"] == ["a red circle", "green grass"]
    # one of the four, alone
    cli.ok("generate.py", "--model_id", model, "--output_dir", tmp_path / "one", "--prompt", "green grass", "--seed", "6")
    np.testing.assert_array_equal(latents(tmp_path / "one" / LATENTS), latents(out / names[3]))


def test_warm_up_and_iterations_do_not_change_the_latents(cli: Cli, finished: Path, tmp_path: Path) -> None:
    cli.ok("stage2_transformer.py", "--input_dir", finished, "--output_dir", tmp_path / "out", "--warmup_steps", "2",
           "--num_iterations", "2", "--profile", "--profiler_output_dir", tmp_path / "profile")  # fmt: skip
    assert (tmp_path / "out" / LATENTS).read_bytes() == (finished / LATENTS).read_bytes()
    assert config(tmp_path / "out")["provenance"]["stage2"]["warmup_seconds"] > 0
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


# ------------------------------------------------------------------------------------------- reuse

SEED_001_LOOP = r"""
# 生成一次 embeddings
python stage1_text_encoder.py --model_id demo_model --prompt "A cat" --output_dir ./cat

# 用不同 seed 多次生成
for seed in 1 2 3 4 5; do
    python stage2_transformer.py --input_dir ./cat --seed $seed
    python stage3_vae_decoder.py --output_video ./cat/video_$seed.mp4
done
"""  # as written in seed 001's README, with --model_id demo_model


def test_seed_001s_loop(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bash expands the loop as it is written; each command it would run runs here (eleven imports of torch would take minutes)."""
    function = 'python() { printf "%s\\0" "$@"; printf "\\n"; }\n'
    expanded = subprocess.run(["bash", "-c", function + SEED_001_LOOP], capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    commands = [line.split("\0")[:-1] for line in expanded.splitlines()]
    assert len(commands) == 11 and commands[10] == ["stage3_vae_decoder.py", "--output_video", "./cat/video_5.mp4"]
    monkeypatch.chdir(tmp_path)
    for script, *argv in commands:
        quick = ["--num_inference_steps", "2"] if script == "stage2_transformer.py" else []
        log = cli.ok(script, *argv, *quick)
        assert "is current" not in log
        if script == "stage2_transformer.py" and argv[-1] != "1":
            assert f"seed: {int(argv[-1]) - 1} -> {argv[-1]}" in log
    defaults = json.loads((ROOT / "demo_model" / "generation_defaults.json").read_text())
    videos = [tmp_path / "cat" / f"video_{seed}.mp4" for seed in (1, 2, 3, 4, 5)]
    for video in videos:
        found = probe(video)
        assert found["size"] == (defaults["width"], defaults["height"]) and found["frames"] == defaults["frames"]
    assert len({video.read_bytes() for video in videos}) == 5
    assert sorted(path.name for path in (tmp_path / "cat").iterdir()) == sorted([CONFIG, EMBEDDINGS, *(video.name for video in videos)])
    assert config(tmp_path / "stage_outputs")["prompt"] == "A cat"


def test_three_seeds_from_one_load_and_one_compilation(
    cli: Cli, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []
    load = Denoiser.load
    monkeypatch.setattr(Denoiser, "load", lambda self, folder: loads.append(folder) or load(self, folder))
    compiled = []

    class Count(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if match := re.match(r"Finished XLA compilation of (\S+)", record.getMessage()):
                compiled.append(match[1])

    counter = Count()
    logging.getLogger("jax._src.dispatch").addHandler(counter)
    try:
        with jax.log_compiles():
            cli.ok("stage2_transformer.py", "--input_dir", finished, "--output_dir", tmp_path, "--seed", "1", "2", "3")
    finally:
        logging.getLogger("jax._src.dispatch").removeHandler(counter)
    assert compiled.count("jit(step)") == 1, compiled
    assert len(loads) == 1
    assert config(tmp_path)["provenance"]["stage2"]["compilations"] == 1 and config(tmp_path)["seed"] == [1, 2, 3]
    names = [f"stage2_latents_seed{seed}.safetensors" for seed in (1, 2, 3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, *names]
    cli.ok("stage2_transformer.py", "--input_dir", finished, "--output_dir", tmp_path / "alone", "--seed", "2")
    np.testing.assert_array_equal(latents(tmp_path / "alone" / LATENTS), latents(tmp_path / names[1]))
    # and stage 3 decodes all of them
    cli.ok("stage3_vae_decoder.py", "--input_dir", tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.mp4")) == [f"output_video_seed{seed}.mp4" for seed in (1, 2, 3)]
    assert "there are 3 latents files" in cli.refused(2, "stage3_vae_decoder.py", "--input_dir", tmp_path, "--output_video", "x.mp4")


def test_stage3_alone_with_another_speed_and_name(cli: Cli, run: Path, model: Path, tmp_path: Path) -> None:
    """Neither the text encoder nor the transformer needs to be there."""
    only_vae = tmp_path / "only_vae"
    only_vae.mkdir()
    (only_vae / "vae").symlink_to(model / "vae")
    log = cli.ok("stage3_vae_decoder.py", "--input_dir", run, "--model_id", only_vae, "--fps", "24", "--output_video", tmp_path / "b.mp4")
    assert "fps: 8 -> 24" in log and "model part" not in log
    assert probe(tmp_path / "b.mp4")["fps"] == 24 and probe(run / VIDEO)["fps"] == 8


# ------------------------------------------------------------------------------------------- currency


def again(folder: Path, model: Path) -> dict[str, list[str]]:
    return {
        "stage1_text_encoder.py": [
            "--model_id", str(model), "--output_dir", str(folder), "--prompt", PROMPT, "--negative_prompt", "blurry"
        ],
        "stage2_transformer.py": ["--input_dir", str(folder), "--output_dir", str(folder)],
        "stage3_vae_decoder.py": ["--input_dir", str(folder)],
    }


@pytest.mark.parametrize("script", list(SCRIPTS)[:3])
def test_current_outputs_need_no_model(script: str, finished: Path, model: Path) -> None:
    """Seconds of CPU, because the machine that runs the tests may be busy: importing torch alone takes more than 3."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    stamps = {path: path.stat().st_mtime_ns for path in finished.iterdir()}
    command = [sys.executable, "-X", "importtime", str(ROOT / script), *again(finished, model)[script]]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0, result.stderr
    assert re.search(rf"{script[:6]} is current: .*; --force runs it again", result.stderr)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in result.stderr.splitlines() if line.startswith("import time:")}
    assert "wan_common" in imported
    assert not imported & {"torch", "jax", "torchax", "diffusers", "transformers"}
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3
    assert {path: path.stat().st_mtime_ns for path in finished.iterdir()} == stamps


STALE: dict[str, tuple[str, list[str], str]] = {
    "guidance": ("stage2_transformer.py", ["--guidance_scale", "2"], "stage2 runs: guidance_scale: 5.0 -> 2.0"),
    "size": ("stage2_transformer.py", ["--height", "48"], "stage2 runs: height: 32 -> 48"),
    "seed": ("stage2_transformer.py", ["--seed", "9"], "stage2 runs: seed: 42 -> 9"),
    "steps": ("stage2_transformer.py", ["--num_inference_steps", "2"], "stage2 runs: num_inference_steps: 3 -> 2"),
    "shift": ("stage2_transformer.py", ["--flow_shift", "5"], "stage2 runs: flow_shift: 3.0 -> 5.0"),
    "dtype": ("stage2_transformer.py", ["--dtype", "float32"], 'stage2 runs: dtype: "bfloat16" -> "float32"'),
    "extras": ("stage2_transformer.py", ["--save_step_latents"], "stage2 runs: step_latents asked for and not kept"),
    "force": ("stage2_transformer.py", ["--force"], "stage2 runs: --force"),
    "prompt": ("stage1_text_encoder.py", ["--prompt", "grass"], f'stage1 runs: prompt: "{PROMPT}" -> "grass"'),
    "negative": ("stage1_text_encoder.py", ["--negative_prompt", ""], 'stage1 runs: negative_prompt: "blurry" -> ""'),
    "length": ("stage1_text_encoder.py", ["--max_sequence_length", "16"], "stage1 runs: max_sequence_length: 32 -> 16"),
    "fps": ("stage3_vae_decoder.py", ["--fps", "4"], "stage3 runs: fps: 8 -> 4"),
    "frames": ("stage3_vae_decoder.py", ["--save_frames"], "stage3 runs: save_frames: false -> true"),
}


@pytest.mark.parametrize("what", STALE)
def test_a_changed_flag_is_named_and_the_stage_runs(cli: Cli, run: Path, model: Path, what: str) -> None:
    script, flags, message = STALE[what]
    assert message in cli.ok(script, *again(run, model)[script], *flags)
    if what != "force":
        assert f"{script[:6]} is current" in cli.ok(script, *again(run, model)[script], *flags)


def test_changed_files_are_named(cli: Cli, run: Path, model: Path, tmp_path: Path) -> None:
    stages = again(run, model)
    (run / VIDEO).unlink()
    assert f"output {VIDEO} is missing" in cli.ok("stage3_vae_decoder.py", *stages["stage3_vae_decoder.py"])
    with open(run / VIDEO, "ab") as file:
        file.write(b"x")
    assert f"output {VIDEO} is not the file this stage wrote" in cli.ok("stage3_vae_decoder.py", *stages["stage3_vae_decoder.py"])
    # another prompt: stage 2 sees other embeddings, stage 3 other latents
    cli.ok("stage1_text_encoder.py", *stages["stage1_text_encoder.py"], "--prompt", "green grass")
    assert "stage2 runs: input embeddings changed" in cli.ok("stage2_transformer.py", *stages["stage2_transformer.py"])
    assert f"stage3 runs: input {LATENTS} changed" in cli.ok("stage3_vae_decoder.py", *stages["stage3_vae_decoder.py"])
    # other weights under the same name
    changed = copy_model(model, tmp_path / "changed", "transformer")
    change_weights(changed / "transformer", lambda name, array: array * 1.01 if name == "proj_out.weight" else array)
    log = cli.ok("stage2_transformer.py", *stages["stage2_transformer.py"], "--model_id", changed)
    assert "stage2 runs: model part transformer changed" in log
    # the same weights in another place are the same model
    moved = copy_model(changed, tmp_path / "moved", "transformer")
    assert "stage2 is current" in cli.ok("stage2_transformer.py", *stages["stage2_transformer.py"], "--model_id", moved)


def test_replaced_latents_are_made_again_and_not_signed(cli: Cli, run: Path, model: Path) -> None:
    whole = (run / LATENTS).read_bytes()
    tensors, header = load_tensors(run / LATENTS)
    save_tensors(run / LATENTS, {"latents": tensors["latents"] * 2}, header)  # its header still says it is this very clip
    log = cli.ok("stage2_transformer.py", *again(run, model)["stage2_transformer.py"])
    assert f"output {LATENTS} is not the file this stage wrote" in log and "is there already" not in log
    assert (run / LATENTS).read_bytes() == whole


def test_step_latents_that_lack_a_step_are_made_again(cli: Cli, run: Path, model: Path) -> None:
    command = [*again(run, model)["stage2_transformer.py"], "--save_step_latents"]
    cli.ok("stage2_transformer.py", *command)
    assert "stage2 is current" in cli.ok("stage2_transformer.py", *command)
    step = run / "step_latents" / "step_001.safetensors"
    whole = step.read_bytes()
    step.write_bytes(whole[:-10])
    assert "step_latents: 1 of 3 steps are there and whole" in cli.ok("stage2_transformer.py", *command)
    assert step.read_bytes() == whole


def test_every_iteration_runs_all_steps(cli: Cli, run: Path, model: Path) -> None:
    flags = ["--checkpoint_every", "1", "--num_iterations", "2", "--seed", "7"]
    log = cli.ok("stage2_transformer.py", *again(run, model)["stage2_transformer.py"], *flags)
    assert log.count("seed 7, iteration") == 2 and "going on from step" not in log


def test_preview_without_its_coefficients_is_refused_at_once(cli: Cli, run: Path, model: Path, tmp_path: Path) -> None:
    other = copy_model(model, tmp_path / "other", "transformer")
    (other / "latent_rgb.json").unlink(missing_ok=True)
    flags = ["--model_id", str(other), "--preview_every", "1", "--seed", "3"]
    message = cli.refused(3, "stage2_transformer.py", *again(run, model)["stage2_transformer.py"], *flags)
    assert message.endswith(f"no linear preview for this model; fit it: python -m wan_common.latent_rgb --model_id {other}")
    assert "transformer weights" not in cli.log


def test_a_new_prompt_keeps_the_folders_model(cli: Cli, run: Path, model: Path) -> None:
    cli.ok("stage1_text_encoder.py", "--output_dir", run, "--prompt", "grass")
    assert json.loads((run / CONFIG).read_text())["model_id"] == str(model)


def test_stage3_profile_writes_a_trace(cli: Cli, run: Path, tmp_path: Path) -> None:
    flags = ["--force", "--profile", "--profiler_output_dir", str(tmp_path / "trace")]
    assert f"profiler trace in {tmp_path / 'trace'}" in cli.ok("stage3_vae_decoder.py", "--input_dir", run, *flags)
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))


def change_weights(folder: Path, change: Callable[[str, np.ndarray], np.ndarray]) -> None:
    (path,) = folder.glob("*.safetensors")
    tensors, header = load_tensors(path)
    save_tensors(path, {name: change(name, array).astype(array.dtype) for name, array in tensors.items()}, header)


# ------------------------------------------------------------------------------------------- refusals: artifacts


def test_latents_of_another_run_are_refused(cli: Cli, run: Path, model: Path, tmp_path: Path) -> None:
    cli.ok("stage2_transformer.py", "--input_dir", run, "--output_dir", tmp_path / "other", "--seed", "9")
    shutil.copy(tmp_path / "other" / LATENTS, run / LATENTS)
    message = cli.refused(3, "stage3_vae_decoder.py", "--input_dir", run)
    assert message.startswith(f"{run / LATENTS}: not the file that {CONFIG} beside it describes; rerun stage2_transformer.py")
    assert message.endswith("or decode it as it is with --force")
    before = (run / VIDEO).read_bytes()
    cli.ok("stage3_vae_decoder.py", "--input_dir", run, "--force")
    assert (run / VIDEO).read_bytes() != before


def test_latents_from_before_a_new_prompt_are_refused(cli: Cli, run: Path, model: Path) -> None:
    cli.ok("stage1_text_encoder.py", *again(run, model)["stage1_text_encoder.py"], "--prompt", "green grass")
    message = cli.refused(3, "stage3_vae_decoder.py", "--input_dir", run)
    assert f"{LATENTS}: made from other embeddings than the folder's {EMBEDDINGS} (stage 1 ran again since)" in message


def test_latents_without_a_config_are_refused(cli: Cli, run: Path, model: Path) -> None:
    (run / CONFIG).unlink()
    message = cli.refused(3, "stage3_vae_decoder.py", "--input_dir", run, "--model_id", model)
    assert f"{CONFIG} beside it does not know this file" in message
    cli.ok("stage3_vae_decoder.py", "--input_dir", run, "--model_id", model, "--force")


def test_missing_inputs_name_the_command_that_makes_them(cli: Cli, tmp_path: Path, finished: Path, model: Path) -> None:
    message = cli.refused(3, "stage2_transformer.py", "--input_dir", tmp_path)
    assert message == (
        f"{tmp_path / EMBEDDINGS}: not there; run stage1_text_encoder.py --prompt '...' --output_dir {tmp_path} first"
    )
    message = cli.refused(3, "stage3_vae_decoder.py", "--input_dir", tmp_path)
    assert message == f"{tmp_path / LATENTS}: not there; run stage2_transformer.py --input_dir {tmp_path} --output_dir {tmp_path} first"


def damage(path: Path, how: str) -> None:
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-10])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("this is no tensor file, whatever its name says; but it is long enough to have a header")
    elif how == "foreign":
        save_tensors(path, {"x": np.zeros(3, np.float32)})
    else:
        tensors, header = load_tensors(path)
        name = "prompt_embeds" if path.name == EMBEDDINGS else "latents"
        if how == "no tensor":
            del tensors[name]
        elif how == "NaN":
            tensors[name] = tensors[name].copy()
            tensors[name].flat[-1] = np.nan
        save_tensors(path, tensors, header)


@pytest.mark.parametrize(("how", "code", "what"), [
    ("truncated", 3, "truncated"), ("empty", 3, "not a safetensors file, or truncated (0 bytes)"), ("text", 3, "not a safetensors file"),
    ("foreign", 3, "not a"), ("no tensor", 3, "not a"), ("NaN", 4, "NaN or infinity"),
])  # fmt: skip
@pytest.mark.parametrize(("script", "name", "remedy"), [
    ("stage2_transformer.py", EMBEDDINGS, "rerun stage1_text_encoder.py"),
    ("stage3_vae_decoder.py", LATENTS, "rerun stage2_transformer.py"),
])  # fmt: skip
def test_damaged_inputs(cli: Cli, run: Path, script: str, name: str, remedy: str, how: str, code: int, what: str) -> None:
    damage(run / name, how)
    before = {path: path.read_bytes() for path in run.iterdir()}
    message = cli.refused(code, script, "--input_dir", run, "--output_dir", run)
    assert message.startswith(f"{run / name}: ") and what in message and remedy in message
    if how == "NaN" and name == LATENTS:
        assert "in latent frame 1" in message
    if how == "NaN" and name == EMBEDDINGS:
        assert "prompt_embeds holds NaN" in message
    assert {path: path.read_bytes() for path in run.iterdir()} == before
    # --force accepts what does not match, never what is damaged
    assert cli(script, "--input_dir", run, "--output_dir", run, "--force") == code


def test_embeddings_that_changed_on_disk(cli: Cli, run: Path) -> None:
    tensors, header = load_tensors(run / EMBEDDINGS)
    save_tensors(run / EMBEDDINGS, {**tensors, "prompt_embeds": tensors["prompt_embeds"] * 2}, header)
    message = cli.refused(3, "stage2_transformer.py", "--input_dir", run, "--output_dir", run)
    assert f"{EMBEDDINGS}: not the file that {CONFIG} beside it describes; rerun stage1_text_encoder.py" in message
    cli.ok("stage2_transformer.py", "--input_dir", run, "--output_dir", run, "--force")


def test_embeddings_of_another_model(cli: Cli, run: Path, tmp_path: Path) -> None:
    import dataclasses

    other = build_tiny(tmp_path / "other", seed=1)
    message = cli.refused(3, "stage2_transformer.py", "--input_dir", run, "--model_id", other)
    assert f"{EMBEDDINGS}: made by the text encoder of" in message and f"differs from that of {other}" in message
    assert f"rerun stage1_text_encoder.py --model_id {other} --prompt '{PROMPT}' --output_dir {run}" in message
    wider = build_tiny(tmp_path / "wider", sizes=dataclasses.replace(TINY, text_dim=64))
    message = cli.refused(3, "stage2_transformer.py", "--input_dir", run, "--model_id", wider)
    length = DEFAULTS["max_sequence_length"]
    assert f"{EMBEDDINGS}: prompt_embeds is [1, {length}, 48], the transformer of {wider} wants text_dim 64; rerun stage1" in message


@pytest.mark.parametrize("text", ["{", "[]", '{"provenance": 3}', '{"schema_version": 99}'])
def test_damaged_config(cli: Cli, run: Path, text: str) -> None:
    (run / CONFIG).write_text(text)
    for script in ("stage2_transformer.py", "stage3_vae_decoder.py"):
        message = cli.refused(3, script, "--input_dir", run, "--output_dir", run)
        assert message.startswith(f"{run / CONFIG}: ")


# ------------------------------------------------------------------------------------------- refusals: models


PARTS = {"stage1_text_encoder.py": "text_encoder", "stage2_transformer.py": "transformer", "stage3_vae_decoder.py": "vae"}
A_WEIGHT = {
    "text_encoder": "encoder.block.1.layer.0.SelfAttention.q.weight", "transformer": "blocks.1.attn1.to_q.weight",
    "vae": "decoder.conv_in.weight",
}  # fmt: skip


def inputs(script: str, run: Path, output: Path) -> list[str | Path]:
    return ["--prompt", "a", "--output_dir", output] if script.startswith("stage1") else ["--input_dir", run, "--output_dir", run]


def test_models_that_cannot_be_used(cli: Cli, run: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = cli.refused(3, "stage1_text_encoder.py", "--prompt", "a", "--model_id", "no_such_folder", "--output_dir", tmp_path / "o")
    assert message == "--model_id no_such_folder: no such folder, nor a hub id (owner/name); the embedded one is --model_id demo_model"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    message = cli.refused(3, "stage1_text_encoder.py", "--prompt", "a", "--output_dir", tmp_path / "o")
    assert message.startswith("--model_id Wan-AI/Wan2.1-T2V-14B-Diffusers: not in the local cache") and "--model_id demo_model" in message
    for script, part in PARTS.items():
        without = tmp_path / f"without_{part}"
        without.mkdir()
        for path in model.iterdir():
            if path.name != part:
                (without / path.name).symlink_to(path)
        message = cli.refused(3, script, *inputs(script, run, tmp_path / "o"), "--model_id", without)
        assert message.startswith(f"--model_id {without}: no {part}/ in it (it has ") and "choose a Wan 2.1 diffusers folder" in message
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(("script", "part"), PARTS.items())
@pytest.mark.parametrize("how", ["no weights", "truncated", "a tensor less", "another shape", "no config", "another class"])
def test_broken_model_folders(cli: Cli, run: Path, model: Path, tmp_path: Path, script: str, part: str, how: str) -> None:
    broken = copy_model(model, tmp_path / "broken", part)
    (weights,) = (broken / part).glob("*.safetensors")
    name = A_WEIGHT[part]
    tensors, header = load_tensors(weights)
    if how == "no weights":
        weights.unlink()
        wanted = "no *.safetensors weights found"
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1])
        wanted = "truncated"
    elif how == "a tensor less":
        save_tensors(weights, {n: t for n, t in tensors.items() if n != name}, header)
        wanted = f"the weights have no '{name}', which the config asks for"
    elif how == "another shape":
        save_tensors(weights, {**tensors, name: tensors[name][:-1]}, header)
        wanted = f"{name} is [{tensors[name].shape[0] - 1}, "
    elif how == "no config":
        (broken / part / "config.json").unlink()
        wanted = "config.json: not readable"
    else:
        (broken / part / "config.json").write_text('{"_class_name": "Other", "model_type": "t5", "text_dim": 48}')
        wanted = "config.json: found "
    message = cli.refused(3, script, *inputs(script, run, tmp_path / "o"), "--force", "--model_id", broken)
    assert str(broken / part) in message and wanted in message and ("--model_id" in message or "download the model again" in message)


# ------------------------------------------------------------------------------------------- refusals: usage


USAGE: dict[str, tuple[str, list[str], str]] = {
    "frames": (
        "stage2_transformer.py", ["--frames", "16"], "--frames 16: wanted 4n + 1 (the VAE packs 4 frames into one); nearest: 13 and 17"
    ),
    "height": ("stage2_transformer.py", ["--height", "40"], "--height 40: wanted a multiple of 16 (VAE 8 x patch 2); nearest: 32 and 48"),
    "width": ("stage2_transformer.py", ["--width", "100"], "--width 100: wanted a multiple of 16 (VAE 8 x patch 2); nearest: 96 and 112"),
    "steps": ("stage2_transformer.py", ["--num_inference_steps", "0"], "--num_inference_steps 0: wanted at least 1"),
    "fps": ("stage3_vae_decoder.py", ["--fps", "0"], "--fps 0: wanted at least 1"),
    "mesh": ("stage2_transformer.py", ["--tp", "3", "--force"], "--tp 3: does not divide the 1 devices found"),
    "blocks": (
        "stage2_transformer.py", ["--bqsize", "128"], "--bqsize --bkvsize --bkvcomputesize: found (128, None, None), wanted all three"
    ),
    "no effect: dtype of what is not kept": (
        "stage2_transformer.py", ["--step_latents_dtype", "bfloat16"],
        "--step_latents_dtype has no effect without --save_step_latents; add it",
    ),
    "no effect: tokens": (
        "stage2_transformer.py", ["--attention_tokens", "cat"], "--attention_tokens has no effect without --store_attention; add it"
    ),
    "no effect: profile": (
        "stage2_transformer.py", ["--profiler_output_dir", "x"], "--profiler_output_dir has no effect without --profile; add it"
    ),
    "checkpoints": ("stage2_transformer.py", ["--checkpoint_every", "-1"], "--checkpoint_every -1: wanted 0 (never) or a number of steps"),
    "iterations": ("stage3_vae_decoder.py", ["--num_iterations", "0"], "--warmup_steps 0 --num_iterations 0: wanted at least 0 and 1"),
    "foreign flag": ("stage3_vae_decoder.py", ["--height", "32"], "stage3_vae_decoder.py: unrecognized arguments: --height 32; see --help"),
}  # fmt: skip


@pytest.mark.parametrize("what", USAGE)
def test_usage_errors(cli: Cli, finished: Path, tmp_path: Path, what: str) -> None:
    script, flags, wanted = USAGE[what]
    message = cli.refused(2, script, "--input_dir", finished, "--output_dir", tmp_path / "out", *flags)
    assert message.startswith(wanted)
    assert not (tmp_path / "out").exists()  # nothing was begun


@pytest.mark.parametrize(("argv", "message"), [
    (["--prompt", ""], "--prompt: empty; describe the video"), (["--prompt", "  "], "--prompt: empty"),
    (["--prompt", "()"], "--prompt: empty"),
    ([], "--prompt: give one of --prompt 'text' and --prompts_file FILE"),
    (["--prompt", "a", "--prompts_file", "b"], "--prompt: give one of"),
    (["--prompts_file", "/no/such/file"], "--prompts_file /no/such/file: not readable"),
    (["--prompt", "a", "--max_sequence_length", "1"], "--max_sequence_length 1: wanted at least 2"),
])  # fmt: skip
def test_prompts_that_cannot_be_used(cli: Cli, model: Path, tmp_path: Path, argv: list[str], message: str) -> None:
    assert cli.refused(2, "stage1_text_encoder.py", "--model_id", model, "--output_dir", tmp_path / "o", *argv).startswith(message)
    assert not (tmp_path / "o" / EMBEDDINGS).exists()


def test_unknown_yaml_key(cli: Cli, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("heigth: 64\n")
    message = cli.refused(2, "stage2_transformer.py", "--input_dir", finished, "--config", tmp_path / "c.yaml")
    assert message.startswith("--config: unknown key 'heigth'; known keys: ")


def test_a_long_prompt_is_cut_aloud(cli: Cli, model: Path, tmp_path: Path) -> None:
    log = cli.ok("stage1_text_encoder.py", "--model_id", model, "--output_dir", tmp_path, "--prompt", "a red circle moving right",
                 "--max_sequence_length", "4")  # fmt: skip
    assert "the prompt has 6 tokens, the encoder takes 4: 'moving right' is cut off" in log


def test_kernel_blocks_on_a_cpu_warn(cli: Cli, finished: Path, tmp_path: Path) -> None:
    log = cli.ok("stage2_transformer.py", "--input_dir", finished, "--output_dir", tmp_path, "--bqsize", "128", "--bkvsize", "128",
                 "--bkvcomputesize", "128")  # fmt: skip
    assert "--bqsize --bkvsize --bkvcomputesize have no effect: XLA's attention runs on cpu" in log


def test_a_negative_prompt_without_guidance_warns(cli: Cli, finished: Path, tmp_path: Path) -> None:
    log = cli.ok("stage2_transformer.py", "--input_dir", finished, "--output_dir", tmp_path, "--guidance_scale", "1")
    assert "--guidance_scale 1.0 means no guidance: the negative prompt has no effect" in log


# ------------------------------------------------------------------------------------------- refusals: numbers and disks


@pytest.mark.parametrize(("script", "part", "weight", "message"), [
    ("stage1_text_encoder.py", "text_encoder", "encoder.final_layer_norm.weight", "text encoder: row 0 came out with NaN or infinity"),
    ("stage2_transformer.py", "transformer", "blocks.1.ffn.net.0.proj.bias", "denoising step 0: the latents hold NaN or infinity"),
    ("stage3_vae_decoder.py", "vae", "decoder.conv_out.bias", "VAE: latent frame 0 decoded to NaN or infinity"),
])  # fmt: skip
def test_nan_is_an_error_that_names_the_step(
    cli: Cli, run: Path, model: Path, tmp_path: Path, script: str, part: str, weight: str, message: str
) -> None:
    poisoned = copy_model(model, tmp_path / "poisoned", part)

    def poison(name: str, array: np.ndarray) -> np.ndarray:
        return np.where(np.arange(array.size).reshape(array.shape) == 1, np.nan, array) if name == weight else array

    change_weights(poisoned / part, poison)
    before = {path: path.read_bytes() for path in run.iterdir()}
    assert cli.refused(4, script, *again(run, poisoned)[script], "--model_id", poisoned).startswith(message)
    assert {path: path.read_bytes() for path in run.iterdir()} == before  # nothing was written


@pytest.mark.parametrize("where", ["a file", "below a file", "/proc"])
@pytest.mark.parametrize("script", list(SCRIPTS)[:3])
def test_unwritable_output_folder(cli: Cli, finished: Path, model: Path, tmp_path: Path, script: str, where: str) -> None:
    (tmp_path / "file").write_text("")
    folder = {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "x", "/proc": Path("/proc/no_such_folder")}[where]
    message = cli.refused(3, script, *again(finished, model)[script], "--output_dir", folder)
    assert re.fullmatch(re.escape(str(folder)) + r": cannot write here \([^)]+\); choose another folder with --output_dir", message)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KB, where we may mount one (a tmpfs); elsewhere an ordinary folder."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    yield folder
    if mounted:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path) -> None:
    """Leave no room on the disk of ``folder``."""
    with pytest.raises(OSError) as full, open(folder / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    assert full.value.errno == errno.ENOSPC


def run_where_no_file_may_grow(script: str, *argv: str) -> str:
    """Run the script where each file ends at 512 bytes, as on a disk with no more room. Returns the message; exit code 3."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    command = [sys.executable, str(ROOT / script), *argv]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, preexec_fn=limit)
    assert result.returncode == 3, result.stderr
    return result.stderr.rpartition("[wan] error: ")[2].strip()


@pytest.mark.parametrize("script", list(SCRIPTS)[:3])
def test_full_disk(cli: Cli, finished: Path, model: Path, small_disk: Path, script: str) -> None:
    """The old files stay as they were, nothing half-written stays beside them."""
    folder = small_disk / "run"
    shutil.copytree(finished, folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    argv = [*again(folder, model)[script], "--force", *(["--fps", "4"] if script.startswith("stage3") else [])]
    if os.path.ismount(small_disk):
        fill(small_disk)
        message = cli.refused(3, script, *argv)
    else:
        message = run_where_no_file_may_grow(script, *argv)
    assert str(folder) in message and any(reason in message for reason in ("No space left on device", "File too large", "disk full"))
    assert "free space" in message and "rerun" in message
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


# ------------------------------------------------------------------------------------------- as real processes


def test_exit_codes_of_real_processes(finished: Path, tmp_path: Path) -> None:
    begun = time.monotonic()
    result = run_script("stage2_transformer.py", "--input_dir", tmp_path / "none")
    assert result.returncode == 3 and result.stdout == ""
    assert result.stderr.startswith("[wan] error: ") and "Traceback" not in result.stderr
    result = run_script("stage2_transformer.py", "--input_dir", finished, "--output_dir", tmp_path / "out", "--frames", "6")
    assert result.returncode == 2 and "nearest: 5 and 9" in result.stderr
    damaged = shutil.copytree(finished, tmp_path / "damaged")
    damage(damaged / LATENTS, "NaN")
    result = run_script("stage3_vae_decoder.py", "--input_dir", damaged)
    assert result.returncode == 4 and "NaN or infinity in latent frame 1" in result.stderr
    assert time.monotonic() - begun < 120


def test_a_moved_folder_is_current(cli: Cli, run: Path, model: Path) -> None:
    for script, argv in again(run, model).items():
        assert f"{script[:6]} is current" in cli.ok(script, *argv)


def test_no_temporaries_stay_behind(finished: Path) -> None:
    assert not list(finished.rglob(f"{TEMP_PREFIX}*"))


def test_leftovers_of_killed_runs_are_cleared(cli: Cli, run: Path) -> None:
    (run / f"{TEMP_PREFIX}stage2_latents-abc.safetensors").write_bytes(b"half")
    cli.ok("stage2_transformer.py", "--input_dir", run, "--output_dir", run, "--force")
    assert not list(run.rglob(f"{TEMP_PREFIX}*"))
