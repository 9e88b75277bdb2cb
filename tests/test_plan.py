"""The planner: reading scheduled programs, slices and their links, the command line; a few compile for a TPU (tpu_aot)."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from conftest import run_script

import custom_splash_attention
from wan_common.errors import ArtifactError, UsageError
from wan_common.hlo import Collective, Kernel, expensive, parse, replica_groups, schedule, total
from wan_common.mesh import MeshShape
from wan_common.plan import (
    Request,
    StageCompileError,
    StagePlan,
    assumptions,
    clip_seconds,
    compiled_stage,
    count_flops,
    needed_bytes,
    program_key,
)
from wan_common.plan_model import model_configs
from wan_common.published import PUBLISHED, WAN_14B
from wan_common.tpu_topology import Network, known_names, larger, topology

PROGRAM = """\
HloModule jit_step, is_scheduled=true

%body (p: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %p = (s32[], bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %start = (bf16[8,128], bf16[32,128], u32[]) all-gather-start(%x), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
  %hot = bf16[8,128]{1,0} fusion(%x), kind=kOutput, calls=%f, metadata={op_name="jit(step)/dot"}, backend_config={"estimated_cycles":"1000"}
  %done = bf16[32,128]{1,0} all-gather-done(%start)
  %sum = bf16[8,128]{1,0} all-reduce(%hot), channel_id=2, replica_groups=[1,4]<=[4], to_apply=%add
  %kern.1 = bf16[8,128]{1,0} custom-call(%sum, %done), custom_call_target="tpu_custom_call", metadata={op_name="a/pallas_call"}
  ROOT %t = (s32[], bf16[8,128]{1,0}) tuple(%x, %kern.1)
}

ENTRY %main (a: bf16[8,128]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0} parameter(0)
  %first = bf16[8,128]{1,0} fusion(%a), kind=kLoop, calls=%g, backend_config={"estimated_cycles":"500"}
  %loop = (s32[], bf16[8,128]{1,0}) while(%first), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"10"}}
  ROOT %out = bf16[8,128]{1,0} get-tuple-element(%loop), index=1
}
"""
FUSED = """\
%started (p: bf16[8]) -> bf16[8] {
  %ag = bf16[64] all-gather(%p), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
  ROOT %c = bf16[64] custom-call(%ag), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (p: bf16[8]) -> bf16[8] {
  %ag.1 = bf16[64] all-gather(%p), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
  ROOT %t = bf16[64] tuple(%ag.1)
}

%ended (p: bf16[8]) -> bf16[8] {
  %ag.2 = bf16[64] all-gather(%p), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
  ROOT %c = bf16[64] custom-call(%p, %ag.2), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (a: bf16[8]) -> bf16[64] {
  %a = bf16[8]{0} parameter(0)
  %s = bf16[64]{0} fusion(%a), kind=kCustom, calls=%started
  %work = bf16[64]{0} fusion(%s), kind=kOutput, calls=%async_collective_fusion.1, backend_config={"estimated_cycles":"1000"}
  ROOT %d = bf16[64]{0} fusion(%work), kind=kCustom, calls=%ended
}
"""


def test_a_loops_fusions_kernels_and_collectives_are_counted_each_turn() -> None:
    found = total(schedule(PROGRAM), 1000.0, lambda kernel: 2.0, lambda collective: 0.5)
    assert found.fusion_cycles == 500 + 10 * 1000
    assert found.kernel_seconds == {"kern": 20.0}
    assert found.collectives == {"all-gather": [10, 10 * 32 * 128 * 2], "all-reduce": [10, 10 * 8 * 128 * 2]}
    # The gather (0.5 s) hides behind the fusion (1 s); the synchronous reduction does not hide.
    assert found.exposed_seconds == pytest.approx(10 * 0.5)
    assert found.seconds == pytest.approx(0.5 + 10 * (1.0 + 0.5 + 2.0))


def test_what_a_schedule_does_not_hide_is_the_rest_of_the_collective() -> None:
    found = total(schedule(PROGRAM), 1000.0, lambda kernel: 0.0, lambda collective: 3.0 if collective.kind == "all-gather" else 0.0)
    assert found.exposed_seconds == pytest.approx(10 * 2.0)
    assert found.collective_seconds == pytest.approx(10 * 3.0)


def test_a_collective_fused_with_computation_is_counted_once_and_hidden() -> None:
    seen: list[Collective] = []
    found = total(schedule(FUSED), 1000.0, lambda kernel: 0.0, lambda collective: seen.append(collective) or 0.75)
    assert seen == [Collective("all-gather", 128, ((0, 1, 2, 3), (4, 5, 6, 7)))]
    assert found.exposed_seconds == 0 and found.seconds == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("replica_groups={{0,2},{1,3}}, x", ((0, 2), (1, 3))),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", ((0, 2), (1, 3))),
        ("replica_groups=[2,2]<=[4], x", ((0, 1), (2, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", ((0, 2), (1, 3))),
        ("source_target_pairs={{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("replica_groups={}", ()),
    ],
)
def test_replica_groups_in_every_notation(text: str, wanted: tuple[tuple[int, ...], ...]) -> None:
    assert replica_groups(text) == wanted


def test_the_most_expensive_fusions_are_named_with_their_operation() -> None:
    assert expensive(schedule(PROGRAM), 1) == [(10_000, "hot", "jit(step)/dot")]


def test_text_that_is_no_program_is_refused() -> None:
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("hello")


@pytest.mark.parametrize(
    ("name", "libtpu", "chips", "devices"),
    [
        ("v6e-8", "v6e:2x4", 8, 8), ("v6e-4", "v6e:2x2", 4, 4), ("v6e-16", "v6e:4x4", 16, 16), ("v5e-16", "v5e:4x4", 16, 16),
        ("v5litepod-8", "v5e:2x4", 8, 8), ("v5p-8", "v5p:2x2x1", 4, 4), ("v4-16", "v4:2x2x2", 8, 8), ("v4-8", "v4:2x2x1", 4, 4),
        ("tpu7x-8", "tpu7x:2x2x1", 4, 8), ("v6e:2x4", "v6e:2x4", 8, 8),
    ],
)  # fmt: skip
def test_slice_names(name: str, libtpu: str, chips: int, devices: int) -> None:
    found = topology(name)
    assert (found.libtpu, found.chips, found.devices) == (libtpu, chips, devices)


def test_every_known_name_is_a_slice_and_others_say_which_are() -> None:
    assert [topology(name).name for name in known_names()] == known_names()
    for wrong in ("v6e-7", "v3-8", "v5p-4x", "v5p-7", "v6e:4x2"):
        with pytest.raises(UsageError, match="v6e-8"):
            topology(wrong)
    assert [t.name for t in larger(topology("v6e-64"))] == ["v6e-128", "v6e-256"]


def line_of(count: int) -> list[SimpleNamespace]:
    return [SimpleNamespace(coords=(0, y, 0), core_on_chip=0) for y in range(count)]


def test_collectives_take_what_the_links_allow() -> None:
    everyone = ((0, 1, 2, 3),)
    line = Network(topology("v6e-8"), line_of(4))
    square = Network(topology("v6e-8"), [SimpleNamespace(coords=(x, y, 0), core_on_chip=0) for x in (0, 1) for y in (0, 1)])
    gb = 10**9
    # The end of the line has one link of 100 GB/s: three quarters of the result come through it.
    assert line.seconds("all-gather", 4 * gb, everyone) == pytest.approx(0.03)
    assert square.seconds("all-gather", 4 * gb, everyone) == pytest.approx(0.015)
    assert line.seconds("all-reduce", 4 * gb, everyone) == pytest.approx(0.06)
    # Two send a quarter each to the two across: the middle link passes as much as one device holds.
    assert line.seconds("all-to-all", 4 * gb, everyone) == pytest.approx(0.04)
    assert square.seconds("all-to-all", 4 * gb, everyone) == pytest.approx(0.02)
    assert line.seconds("collective-permute", gb, ((0, 1),)) == pytest.approx(0.01)
    assert line.seconds("all-gather", gb, ((0,), (1,))) == 0


def test_flops_of_matmuls_in_loops_and_convolutions() -> None:
    def run(x: jax.Array, w: jax.Array, k: jax.Array, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, _ = jax.lax.scan(lambda c, m: (c @ m, None), x, w)
        return y, jax.lax.conv(image, k, (1, 1), "SAME")

    traced = jax.make_jaxpr(run)(jnp.zeros((4, 8)), jnp.zeros((5, 8, 8)), jnp.zeros((6, 3, 3, 3)), jnp.zeros((1, 3, 10, 10)))
    assert count_flops(traced.jaxpr, 1) == 5 * 2 * 4 * 8 * 8 + 2 * (6 * 10 * 10) * (3 * 3 * 3)


def test_a_published_model_has_its_published_size() -> None:
    from diffusers import WanTransformer3DModel

    from wan_common.torchax_bridge import meta_module

    for name, billions in (("Wan-AI/Wan2.1-T2V-14B-Diffusers", 14.3), ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", 1.42)):
        config = PUBLISHED[name].transformer
        one = {**config, "num_layers": 1}
        sizes = [sum(p.numel() for p in meta_module(lambda c=c: WanTransformer3DModel.from_config(c)).parameters())
                 for c in (one, {**config, "num_layers": 2})]  # fmt: skip
        whole = sizes[0] + (config["num_layers"] - 1) * (sizes[1] - sizes[0])
        assert whole / 1e9 == pytest.approx(billions, rel=0.01)


def test_models_by_short_name_and_folder(demo_model: Path, tmp_path: Path) -> None:
    assert model_configs("14B") is WAN_14B
    assert model_configs(str(demo_model)).transformer["_class_name"] == "WanTransformer3DModel"
    with pytest.raises(ArtifactError, match=r"transformer/config\.json"):
        model_configs(str(tmp_path))


def test_the_cache_key_depends_on_what_decides_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    request = Request(topology("v6e-8"), WAN_14B)
    assert program_key(request, "denoise_step") == program_key(dataclasses.replace(request, steps=7), "denoise_step")
    for change in ({"height": 480}, {"mesh": MeshShape(2, 1, 4)}, {"store_words": 2}, {"topology": topology("v6e-16")}):
        assert program_key(request, "denoise_step") != program_key(dataclasses.replace(request, **change), "denoise_step")
    assert program_key(request, "vae_decode") == program_key(dataclasses.replace(request, frames=17), "vae_decode")
    keys = [program_key(dataclasses.replace(request, topology=topology(name)), "denoise_step") for name in ("v6e-8", "v5p-8")]
    monkeypatch.setitem(custom_splash_attention._TABLE, "v5p", custom_splash_attention.BlockSizes(128, 128, 128, 128))
    after = [program_key(dataclasses.replace(request, topology=topology(name)), "denoise_step") for name in ("v6e-8", "v5p-8")]
    assert after[0] == keys[0] and after[1] != keys[1]


def test_a_clip_is_its_calls() -> None:
    request = Request(topology("v6e-8"), WAN_14B, frames=81, steps=50)
    stages = {name: SimpleNamespace(predicted_seconds=s) for name, s in (("text_encoder", 1.0), ("denoise_step", 3.0), ("vae_decode", 0.1))}
    assert clip_seconds(request, stages) == pytest.approx(1 + 150 + 2.1)
    assert clip_seconds(request, {"denoise_step": stages["denoise_step"]}) is None
    assert any("1.75 GHz" in line for line in assumptions(request))


def test_the_compilers_refusal_is_read() -> None:
    assert needed_bytes("RESOURCE_EXHAUSTED: Used 40.50G of 31.25G hbm. Exceeded by 9.25G.") == int(40.5 * 2**30)
    # 14B at 720p on v5e-8 without FSDP
    message = "Ran out of memory on HBM, the total memory required for HLO temporaries (28.51G) exceeds available HBM (15.75G)."
    assert needed_bytes(message) == int(28.51 * 2**30)


def stage_plan(request: Request, gib: float, capacity: float = 31.25) -> StagePlan:
    return StagePlan(
        mesh=str(request.mesh_shape), hbm_args_bytes=0, hbm_temp_bytes=0, hbm_peak_bytes=int(gib * 2**30),
        hbm_capacity_bytes=int(capacity * 2**30), fits=gib <= capacity, flops=1e15, predicted_seconds=1.0 if gib <= capacity else None,
        lower_seconds=1.0, compile_seconds=1.0, collectives={}, fusion_cycles=1, kernel_seconds={}, collective_seconds=0.0,
        exposed_collective_seconds=0.0, error="" if gib <= capacity else f"Used {gib}G of {capacity}G hbm.",
    )  # fmt: skip


def test_a_program_the_compiler_fails_on_names_mesh_and_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise jax.errors.JaxRuntimeError("INTERNAL: Bitcast cannot have different shape sizes")

    lowered = SimpleNamespace(compile=fails)
    traced = SimpleNamespace(lower=lambda: lowered, jaxpr=jax.make_jaxpr(lambda x: x)(1.0))
    monkeypatch.setattr("wan_common.plan.stage_program", lambda *args: (SimpleNamespace(trace=lambda: traced), ()))
    monkeypatch.setattr("wan_common.plan.stage_mesh", lambda *args: jax.sharding.Mesh(jax.devices()[:1], "x"))
    request = Request(topology("v6e-16"), WAN_14B, 720, 1280, mesh=MeshShape(2, 4, 2))
    with pytest.raises(StageCompileError, match=r"denoise_step on v6e-16 as dp 2 x sp 4 x tp 2: the TPU compiler fails.*Bitcast.*--sp_num"):
        compiled_stage(request, "denoise_step", use_cache=False)


@pytest.mark.parametrize(
    ("flags", "single", "wanted"),
    [
        ((), 200.0, "It fits v6e-8 as dp 2 x sp 4 x tp 1: 25.00 of 31.25 GiB"),  # FSDP and a larger slice
        (("--no-use_fsdp",), 90.0, "It fits v6e-4 with --use_fsdp as dp 2 x sp 2 x tp 1: 22.50 of 31.25 GiB"),
        (("--tp", "4", "--dp", "1"), 60.0, "It fits v6e-4 as dp 2 x sp 2 x tp 1: 15.00 of 31.25 GiB"),
        ((), 9000.0, "No larger slice of this chip that is planned for fits it either."),
    ],
)
def test_what_does_not_fit_names_what_does(
    flags: tuple[str, ...], single: float, wanted: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sizes are given here; what is tested is which requests are tried, and what is said. ``single``: GiB on one device."""
    import plan_tpu

    def planned(request: Request, stage: str, use_cache: bool = True) -> StagePlan:
        split = request.topology.devices if request.fsdp and request.mesh_shape.tp == 1 else 1
        return stage_plan(request, single / split)

    monkeypatch.setattr("wan_common.plan.fill_cache", lambda *args: None)
    monkeypatch.setattr("wan_common.plan.plan_stage", planned)
    command = ["--topology", "v6e-4", "--stages", "denoise_step", *flags]
    plan_tpu.main(command)
    said = capsys.readouterr().out
    assert wanted in said and "denoise_step does not fit: it needs " in said and "of 31.25 GiB a device" in said
    with pytest.raises(plan_tpu.DoesNotFit, match="denoise_step: does not fit v6e-4") as caught:
        plan_tpu.main([*command, "--require_fit"])
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--topology", "v6e-7"), "no slice of that size"), (("--height", "100"), "multiple of 16"), (("--bqsize", "512"), "go together"),
        (("--sp_num", "3"), "does not divide"),
        (("--dp", "2", "--no-use_dp"), "contradict each other"),
        (("--store_attention", "-1"), "from 0 up"), (("--colour", "red"), "unrecognized"),
    ],
)  # fmt: skip
def test_wrong_flags_are_usage_errors(flags: tuple[str, ...], message: str) -> None:
    from plan_tpu import build_parser, make_request

    with pytest.raises(UsageError, match=message):
        make_request(build_parser().parse_args(list(flags)))


@pytest.mark.tpu_aot
def test_the_demo_model_is_planned_and_a_repeat_is_read_from_the_cache(tmp_path: Path) -> None:
    flags = ("--topology", "v6e-4", "--model_id", "demo_model", "--height", "64", "--width", "64", "--frames", "9")
    command = ("plan_tpu.py", *flags, "--json", tmp_path / "plan.json")
    env = {"WAN_TPU_PLAN_CACHE": str(tmp_path / "cache")}
    done = run_script(*command, timeout=1200, env=env)
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert set(plan) == {"topology", "chips", "model", "height", "width", "frames", "stages", "clip", "assumptions"}
    wanted = {"hbm_args_bytes", "hbm_temp_bytes", "hbm_peak_bytes", "hbm_capacity_bytes", "fits", "flops", "predicted_seconds",
              "lower_seconds", "compile_seconds", "collectives"}  # fmt: skip
    for stage in ("text_encoder", "denoise_step", "vae_decode"):
        assert wanted <= set(plan["stages"][stage])
        assert plan["stages"][stage]["fits"] and plan["stages"][stage]["predicted_seconds"] > 0
    assert plan["clip"]["predicted_seconds"] > 0
    again = run_script(*command, timeout=120, env=env)
    assert again.returncode == 0 and "compiling" not in again.stderr
    assert json.loads((tmp_path / "plan.json").read_text()) == plan


def test_kernels_are_hashable_by_name_and_shape() -> None:
    one = Kernel("splash_attention", (("bf16", (1, 8, 128)),), ("bf16", (1, 8, 128)))
    assert {one: 1}[Kernel("splash_attention", (("bf16", (1, 8, 128)),), ("bf16", (1, 8, 128)))] == 1
