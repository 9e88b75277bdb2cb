"""Options: flag over YAML over the model's defaults over our own; whatever cannot be used as given is named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import generate
import stage1_text_encoder
import stage2_transformer
import stage3_vae_decoder
from tests.conftest import run_script
from wan_common.config import (
    GROUPS,
    AttentionFlags,
    DecodeOptions,
    DenoiseOptions,
    InputOptions,
    MeshOptions,
    Options,
    PromptOptions,
    RunOptions,
    VideoOptions,
    check_attention,
    check_video,
    parse_options,
    read_model_defaults,
)
from wan_common.errors import ArtifactError, UsageError


def parse(*argv: str, groups: tuple[type, ...] = GROUPS) -> Options:
    return parse_options(list(argv), "test", "", groups)


# README of the project that this one grew from: flag -> default.
SEED_001 = {
    "width": 1280, "height": 720, "frames": 81, "num_inference_steps": 50, "guidance_scale": 5.0, "seed": (42,), "flow_shift": 5.0,
    "window_size": None, "use_custom_attention": True,
}  # fmt: skip


def test_defaults_are_seed_001s() -> None:
    options = parse()
    values = {**dataclasses.asdict(options.get(VideoOptions)), **dataclasses.asdict(options.get(AttentionFlags))}
    assert {name: values[name] for name in SEED_001} == SEED_001
    assert options.get(MeshOptions).use_dp and options.get(MeshOptions).use_fsdp
    assert options.get(RunOptions).dtype == "bfloat16" and options.get(InputOptions).input_dir == "stage_outputs"


def test_seed_001s_commands_parse() -> None:
    parse("--width", "1280", "--height", "720", "--frames", "81", "--num_inference_steps", "50", "--use_dp", "--use_custom_attention")
    options = parse(
        "--bqsize", "3328", "--bkvsize", "2816", "--bkvcomputesize", "256", "--sp_num", "2", "--no-use_fsdp", "--seed", "1", "2"
    )
    assert options.get(AttentionFlags).bkvcomputesize == 256
    assert options.get(MeshOptions).sp_num == 2 and not options.get(MeshOptions).use_fsdp
    assert options.get(VideoOptions).seed == (1, 2)
    assert parse("--sp", "4").get(MeshOptions).sp_num == 4


def test_flag_beats_yaml_beats_model_beats_default(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("height: 64\nwidth: 80\nguidance_scale: 3\nseed: 7\nstore_attention: true\nattention_tokens: [cat, dog]\n")
    defaults = {"width": 96, "height": 96, "frames": 17, "no_such_option": 1}
    options = parse("--config", str(config), "--height", "32")
    video = options.get(VideoOptions, defaults)
    assert (video.height, video.width, video.frames, video.num_inference_steps) == (32, 80, 17, 50)
    assert video.guidance_scale == 3.0 and isinstance(video.guidance_scale, float) and video.seed == (7,)
    assert options.get(DenoiseOptions).attention_tokens == ("cat", "dog") and options.get(DenoiseOptions).store_attention
    assert options.flags == {"height"}


def test_a_config_serves_every_stage(tmp_path: Path) -> None:
    """Keys of the other stages are known and left to them; aliases and the visualizers' keys are known too."""
    config = tmp_path / "c.yaml"
    config.write_text("prompt: a cat\nfps: 8\nsp: 2\nvisualize_frame_debug: true\nattention_analysis: {store_attention: true}\n")
    options = parse("--config", str(config), groups=(RunOptions, DecodeOptions))
    assert options.given == {}
    options = parse("--config", str(config))
    assert options.get(PromptOptions).prompt == "a cat" and options.get(DenoiseOptions).save_step_latents
    assert options.get(MeshOptions).sp_num == 2


BAD_YAML = {
    "unknown key": ("heigth: 64\n", r"--config: unknown key 'heigth'; known keys: .*height"),
    "wrong type": ("height: tall\n", r"--config: height is 'tall', wanted int"),
    "bool for int": ("height: true\n", r"height is True, wanted int"),
    "float for int": ("frames: 17.0\n", r"frames is 17.0, wanted int"),
    "choice": ("dtype: float16\n", r"dtype is 'float16', wanted one of bfloat16, float32"),
    "list for scalar": ("height: [1, 2]\n", r"height is \[1, 2\], wanted int"),
    "text in list": ("seed: [1, two]\n", r"seed is 'two', wanted int"),
    "null": ("height: null\n", r"height is None, wanted int"),
    "not a mapping": ("- 1\n- 2\n", r"found list, wanted a mapping"),
    "not yaml": ("height: [1\n", r"not YAML"),
    "runs code": ("prompt: !!python/object/apply:os.system ['true']\n", r"not YAML"),
    "number as key": ("1: 2\n", r"wanted a mapping of flag names"),
}


@pytest.mark.parametrize("what", BAD_YAML)
def test_bad_yaml(tmp_path: Path, what: str) -> None:
    text, message = BAD_YAML[what]
    config = tmp_path / "c.yaml"
    config.write_text(text)
    with pytest.raises(UsageError, match=message):
        parse("--config", str(config))


def test_yaml_that_is_not_there_or_empty(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--config .*gone\.yaml: No such file or directory"):
        parse("--config", str(tmp_path / "gone.yaml"))
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert parse("--config", str(tmp_path / "empty.yaml")).given == {}
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not YAML"):
        parse("--config", str(tmp_path / "binary.yaml"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--heigth", "64"], "unrecognized arguments: --heigth 64"), (["--height", "x"], "invalid int value: 'x'"),
        (["--dtype", "fp16"], "invalid choice: 'fp16'"),
        (["--heigh", "64"], "unrecognized arguments"), (["--seed"], "expected at least one"),
    ],
)  # fmt: skip
def test_bad_flags(argv: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(*argv)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": 16}, r"--frames 16: .*nearest: 13 and 17"), ({"frames": 18}, r"nearest: 17 and 21"),
        ({"frames": 3}, r"nearest: 1 and 5"),
        ({"frames": 0}, r"--frames 0: .*nearest: 1 and 5"), ({"frames": -3}, r"nearest: 1 and 5"),
        ({"height": 700}, r"--height 700: wanted a multiple of 16 .*nearest: 688 and 704"),
        ({"width": 8}, r"--width 8: .*nearest: 16 and 32"),
        ({"width": 0}, r"--width 0"), ({"num_inference_steps": 0}, r"--num_inference_steps 0: wanted at least 1"),
        ({"flow_shift": 0.0}, r"--flow_shift 0.0: wanted more than 0"), ({"flow_shift": float("nan")}, r"--flow_shift nan"),
        ({"guidance_scale": -1.0}, r"--guidance_scale -1.0"), ({"guidance_scale": float("nan")}, r"--guidance_scale nan"),
        ({"guidance_scale": float("inf")}, r"--guidance_scale inf"), ({"seed": (1, 1)}, r"--seed 1 1: wanted different"),
        ({"seed": (-1,)}, r"--seed -1"), ({"seed": (2**63,)}, r"--seed 9223372036854775808"),
    ],
)  # fmt: skip
def test_impossible_videos(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_video(dataclasses.replace(VideoOptions(), **change))


@pytest.mark.parametrize(
    "change", [{}, {"frames": 1}, {"frames": 5}, {"height": 16, "width": 16}, {"guidance_scale": 0.0}, {"seed": (0, 2**63 - 1)}]
)
def test_possible_videos(change: dict[str, Any]) -> None:
    check_video(dataclasses.replace(VideoOptions(), **change))


def test_attention_blocks_come_in_threes() -> None:
    check_attention(AttentionFlags())
    check_attention(AttentionFlags(3328, 2816, 256))
    with pytest.raises(UsageError, match=r"found \(3328, None, None\), wanted all three"):
        check_attention(AttentionFlags(bqsize=3328))
    with pytest.raises(UsageError, match="--window_size 0"):
        check_attention(AttentionFlags(window_size=0))
    for flags, message in (
        ((1000, 2816, 256), "--bqsize 1000: wanted a multiple of 128"),
        ((3328, 2816, 200), "--bkvsize 2816: wanted a multiple of --bkvcomputesize 200"),
        ((3328, 2800, 200), "--bkvcomputesize 200: wanted a multiple of 128"),
    ):
        with pytest.raises(UsageError, match=message):
            check_attention(AttentionFlags(*flags))


def test_model_defaults(demo_model: Path, tmp_path: Path) -> None:
    defaults = read_model_defaults(demo_model)
    check_video(parse().get(VideoOptions, defaults))
    assert read_model_defaults(tmp_path) == {} and read_model_defaults(None) == {}
    path = tmp_path / "generation_defaults.json"
    path.write_text("[]")
    with pytest.raises(ArtifactError, match="found list, wanted an object"):
        read_model_defaults(tmp_path)
    path.write_text("{")
    with pytest.raises(ArtifactError, match="not JSON"):
        read_model_defaults(tmp_path)
    path.write_text(json.dumps({"height": "tall"}))
    with pytest.raises(UsageError, match="the model's defaults: height is 'tall', wanted int"):
        parse().get(VideoOptions, read_model_defaults(tmp_path))


@pytest.mark.parametrize("module", [stage1_text_encoder, stage2_transformer, stage3_vae_decoder, generate])
def test_help_names_each_flag(module: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        module.main(["--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--config", "--model_id", "--output_dir", "--dtype", "--force"):
        assert flag in text


def test_usage_errors_exit_with_2() -> None:
    result = run_script("stage2_transformer.py", "--no_such_flag")
    assert result.returncode == 2
    assert "error: stage2_transformer.py: unrecognized arguments: --no_such_flag; see --help" in result.stderr
    assert "Traceback" not in result.stderr and result.stdout == ""
