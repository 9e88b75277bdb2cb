"""Weights streamed from disk are those that stock code loads, whole or in shards, and misfits are named."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from transformers import UMT5EncoderModel

from tests.tiny_models import TINY, build_tiny, copy_model
from wan_common.denoiser import build_denoiser, halves_permutation, read_config
from wan_common.errors import ArtifactError
from wan_common.mesh import MeshShape, make_mesh
from wan_common.tensor_io import to_numpy
from wan_common.text_encoder import build_text_encoder, load_text_weights, read_text_config
from wan_common.torchax_bridge import Checkpoint, Params, load_weights
from wan_common.vae import load_vae_decoder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("loading") / "tiny")


def mesh_of(devices: int) -> jax.sharding.Mesh:
    return make_mesh(MeshShape(sp=1) if devices == 1 else MeshShape(2, 2, 2), jax.devices()[:devices])


def load_transformer(folder: Path, devices: int = 1, dtype: str = "bfloat16") -> Params:
    config = read_config(folder, "WanTransformer3DModel")
    denoiser = build_denoiser(
        config, mesh_of(devices), height=32, width=32, frames=5, text_length=8, dtype=dtype, fsdp=devices > 1
    )  # fmt: skip
    return denoiser.load(folder)


def shard(folder: Path, files: int) -> None:
    """Split the weights of ``folder`` as the hub does: several files and an index."""
    (whole,) = folder.glob("*.safetensors")
    tensors = load_file(whole)
    names = [f"{whole.stem}-{i + 1:05d}-of-{files:05d}.safetensors" for i in range(files)]
    placed = {name: names[i % files] for i, name in enumerate(sorted(tensors))}
    for file in names:
        save_file({name: tensors[name] for name in placed if placed[name] == file}, folder / file)
    whole.unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": placed}
    (folder / f"{whole.name}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("devices", [1, 8])
def test_transformer_equals_stock_loading(model: Path, devices: int, dtype: str) -> None:
    """Every tensor of from_pretrained, bit for bit: blocks stacked, rows of q and k in RoPE's halves, fp32 where diffusers keeps it."""
    stock = WanTransformer3DModel.from_pretrained(model / "transformer", torch_dtype=getattr(torch, dtype))
    params = load_transformer(model / "transformer", devices, dtype)
    permutation = halves_permutation(TINY.heads, TINY.head_dim)
    seen = set()
    for name, tensor in stock.state_dict().items():
        parts = name.split(".")
        starred, row = (".".join(["blocks", "*", *parts[2:]]), int(parts[1])) if parts[0] == "blocks" else (name, None)
        ours = np.asarray(params[starred]) if row is None else np.asarray(params[starred])[row]
        theirs = to_numpy(tensor)
        if ".attn1." in name and any(f".{part}." in name for part in ("to_q", "to_k", "norm_q", "norm_k")):
            theirs = theirs[permutation]
        assert ours.dtype == theirs.dtype, name
        np.testing.assert_array_equal(ours, theirs, err_msg=name)
        seen.add(starred)
    kept = {name.split(".")[-2] if "norm" in name else name.split(".")[-1] for name in seen if params[name].dtype == np.float32}
    if dtype == "bfloat16":
        assert {"scale_shift_table", "norm2"} <= kept and params["blocks.*.attn1.to_q.weight"].dtype == ml_dtypes.bfloat16
    assert set(params) - seen == {"rope.freqs_cos", "rope.freqs_sin"}
    if devices == 8:
        assert params["blocks.*.ffn.net.2.weight"].sharding.shard_shape((3, 144, 160)) == (3, 36, 80)


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
@pytest.mark.parametrize("devices", [1, 8])
def test_sharded_checkpoints_load_alike(model: Path, tmp_path: Path, part: str, devices: int) -> None:
    split = copy_model(model, tmp_path / "split", part)
    shard(split / part, 3)

    def load(folder: Path) -> Params:
        if part == "transformer":
            return load_transformer(folder / part, devices)
        if part == "vae":
            params = load_vae_decoder(folder, "float32", mesh_of(devices)).params
            assert params is not None
            return params
        return load_text_weights(build_text_encoder(read_text_config(folder), mesh_of(devices), fsdp=devices > 1), folder)

    whole, sharded = load(model), load(split)
    assert whole.keys() == sharded.keys() and len(whole) > 5
    for name in whole:
        np.testing.assert_array_equal(np.asarray(whole[name]), np.asarray(sharded[name]), err_msg=name)


def test_text_encoder_and_vae_equal_stock_loading(model: Path) -> None:
    stock = UMT5EncoderModel.from_pretrained(model / "text_encoder", dtype=torch.float32).state_dict()
    ours = load_text_weights(build_text_encoder(read_text_config(model), mesh_of(1), "float32"), model)
    for name, tensor in stock.items():
        parts = name.split(".")
        if name == "encoder.embed_tokens.weight":  # tied to shared.weight
            continue
        stacked = name.startswith("encoder.block.")
        found = np.asarray(ours[".".join([*parts[:2], "*", *parts[3:]])])[int(parts[2])] if stacked else np.asarray(ours[name])
        np.testing.assert_array_equal(found, tensor.numpy(), err_msg=name)
    vae = AutoencoderKLWan.from_pretrained(model / "vae").state_dict()
    decoder = load_vae_decoder(model, "float32", mesh_of(1)).params
    assert decoder is not None
    assert set(decoder) == {name for name in vae if name.startswith(("decoder.", "post_quant_conv."))}
    for name, array in decoder.items():
        np.testing.assert_array_equal(np.asarray(array), vae[name].numpy(), err_msg=name)


def test_tied_embedding_under_either_name(model: Path, tmp_path: Path) -> None:
    other = copy_model(model, tmp_path / "other", "text_encoder")
    (path,) = (other / "text_encoder").glob("*.safetensors")
    tensors = load_file(path)
    tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    save_file(tensors, path)

    def load(folder: Path) -> np.ndarray:
        return np.asarray(load_text_weights(build_text_encoder(read_text_config(folder), mesh_of(1)), folder)["shared.weight"])

    np.testing.assert_array_equal(load(other), load(model))


def test_dtype_on_disk_does_not_matter(model: Path, tmp_path: Path) -> None:
    """fp32 on disk, bf16 in memory: rounded once, as torch does (to nearest even)."""
    narrow = copy_model(model, tmp_path / "narrow", "transformer")
    (path,) = (narrow / "transformer").glob("*.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    wide, rounded = load_transformer(model / "transformer"), load_transformer(narrow / "transformer")
    name = "blocks.*.attn1.to_v.weight"
    np.testing.assert_array_equal(np.asarray(wide[name]), np.asarray(rounded[name]))
    assert wide["scale_shift_table"].dtype == rounded["scale_shift_table"].dtype == np.float32


def test_misfits_are_named(model: Path, tmp_path: Path) -> None:
    name = "blocks.2.ffn.net.0.proj.weight"
    broken = copy_model(model, tmp_path / "broken", "transformer") / "transformer"
    (path,) = broken.glob("*.safetensors")
    tensors = load_file(path)
    save_file({n: t for n, t in tensors.items() if n != name}, path)
    with pytest.raises(ArtifactError, match=rf"{broken}: the weights have no '{name}', which the config asks for"):
        load_transformer(broken)
    save_file({**tensors, name: tensors[name][:, :-2].contiguous()}, path)
    with pytest.raises(ArtifactError, match=rf"{path}: {name} is \[160, 142\], the config asks for \[160, 144\]"):
        load_transformer(broken)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=rf"{path}: truncated"):
        load_transformer(broken)
    path.unlink()
    with pytest.raises(ArtifactError, match=rf"{broken}: no \*\.safetensors weights found; download the model again"):
        load_transformer(broken)


def test_broken_shards_are_named(model: Path, tmp_path: Path) -> None:
    broken = copy_model(model, tmp_path / "broken", "transformer") / "transformer"
    shard(broken, 3)
    second = sorted(broken.glob("*.safetensors"))[1]
    second.rename(tmp_path / "away")
    with pytest.raises(ArtifactError, match=rf"{second}: No such file or directory; download the model again"):
        load_transformer(broken)
    (tmp_path / "away").rename(second)
    (index,) = broken.glob("*.index.json")
    index.write_text("{}")
    with pytest.raises(ArtifactError, match=rf"{index}: not a safetensors index"):
        load_transformer(broken)


def test_image_to_video_models_are_refused(model: Path) -> None:
    config = {**read_config(model / "transformer", "WanTransformer3DModel"), "image_dim": 1280, "added_kv_proj_dim": 5120}
    with pytest.raises(ArtifactError, match="an image-to-video model"):
        build_denoiser(config, mesh_of(1), height=32, width=32, frames=1, text_length=8)


def test_each_process_reads_only_what_its_devices_hold(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row-sharded weight is read by ranges of rows, straight into its shards; nothing is read twice."""
    config = read_config(model / "transformer", "WanTransformer3DModel")
    denoiser = build_denoiser(config, make_mesh(MeshShape(tp=8)), height=32, width=32, frames=1, text_length=8, dtype="float32")
    name = "blocks.*.ffn.net.0.proj.weight"
    plan = {name: denoiser.plan[name]}
    read: list[tuple[str, tuple[slice, ...] | None]] = []
    from wan_common.tensor_io import SafetensorsReader

    original = SafetensorsReader.read_into
    monkeypatch.setattr(
        SafetensorsReader, "read_into",
        lambda self, name, out, index=None: read.append((name, index)) or original(self, name, out, index),
    )  # fmt: skip
    loaded = load_weights(plan, model / "transformer", "test")[name]
    assert loaded.shape == (3, 160, 144) and len(read) == 3 * 8
    rows = sorted((source, index[0].start, index[0].stop) for source, index in read if index)
    assert rows == [(f"blocks.{b}.ffn.net.0.proj.weight", 20 * i, 20 * i + 20) for b in range(3) for i in range(8)]
    with Checkpoint(model / "transformer") as checkpoint:
        whole = np.stack([checkpoint.readers[0].read(f"blocks.{b}.ffn.net.0.proj.weight") for b in range(3)])
    np.testing.assert_array_equal(np.asarray(loaded), whole)
