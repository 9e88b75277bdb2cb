"""A stock torch module as a pure JAX function, and its weights streamed from disk into device shards.

Modules are built on the meta device, so that a model costs no memory until its weights arrive. A stack of equal blocks is
replaced by one :class:`ScannedBlocks`, so that the stock ``forward`` runs unchanged while one block is traced and compiled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import mmap
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch
import torchax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from torchax.interop import jax_view, torch_view
from tqdm import tqdm

from wan_common.block_stacks import FileMaps, IntegerStack, MappedStack, integers
from wan_common.errors import ArtifactError
from wan_common.mesh import large_buffers_returned
from wan_common.sharding import Rule, weight_spec
from wan_common.tensor_io import SafetensorsReader

logger = logging.getLogger("weights")
DTYPES: dict[str, np.dtype] = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
Params = dict[str, Any]
_wide_products: ContextVar[bool] = ContextVar("wide_products", default=False)
READERS = min(8, os.cpu_count() or 1)  # threads that read weights; each holds at most one source tensor


def meta_module(build: Callable[[], torch.nn.Module]) -> Any:
    """Build a module on the meta device, in eval mode; buffers that it computes for itself stay real."""
    from accelerate import init_empty_weights

    # each parameter is made before it goes to the meta device: a whole 14B model left a kept heap of 40 GB, never touched
    with large_buffers_returned(), init_empty_weights(include_buffers=False):
        return build().eval().requires_grad_(False)


@functools.cache
def has_bfloat16_instructions() -> bool:
    """Whether XLA may multiply bfloat16 by this CPU's own instructions (Linux; elsewhere, or under xla_cpu_max_isa, the answer is no)."""
    if "--xla_cpu_max_isa" in os.environ.get("XLA_FLAGS", ""):
        return False
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return bool({"avx512_bf16", "amx_bf16"} & set(text.split()))


@contextlib.contextmanager
def products_for(mesh: Mesh) -> Iterator[None]:
    """Linear layers traced inside suit ``mesh``'s devices.

    XLA's CPU backend has bfloat16 products only with a float32 result; asked for a bfloat16 one it converts both factors and
    multiplies in float32, which takes 2.1 times as long on a CPU with bfloat16 instructions (docs/LOG.md). So there the
    result is asked for in float32, as it is accumulated anyhow, and rounded afterwards.
    """
    wide = mesh.devices.flat[0].platform == "cpu" and has_bfloat16_instructions()
    token = _wide_products.set(wide)
    try:
        yield
    finally:
        _wide_products.reset(token)


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """torch.nn.functional.linear, as torchax has it but for :func:`products_for`."""
    x, w = jax_view(input), jax_view(weight)
    wide = _wide_products.get() and x.dtype == w.dtype == jnp.bfloat16
    out = jnp.einsum("...a,ba->...b", x, w, preferred_element_type=jnp.float32 if wide else None)
    if wide:
        out = out.astype(x.dtype)
    return torch_view(out if bias is None else out + jax_view(bias))


def call_module(module: torch.nn.Module, params: Params, *args: Any, **kwargs: Any) -> Any:
    """Run ``module`` under torchax with ``params`` (JAX arrays by name) in place of its own; JAX values in, JAX values out."""
    environment = torchax.default_env()
    environment.override_op_definition(torch.nn.functional.linear, _linear)
    with environment, torch.no_grad():
        out = torch.func.functional_call(module, torch_view(params), torch_view(args), torch_view(kwargs), tie_weights=False)
        return jax_view(out)


class ScannedBlocks(torch.nn.Module):
    """Stands for a ModuleList of equal blocks: one ``jax.lax.scan`` over their stacked weights.

    The stock forward loops ``for block in blocks: x = block(x, *args)``; with ``ModuleList([ScannedBlocks(...)])`` that
    loop has one turn and the scan inside makes the rest. ``bind`` gives the stacked weights of the call being traced.

    Args:
        block: one block on the meta device (not registered as a child: it owns no weights).
        gather: constraint put on the weights of a block before use (FSDP). The weights of block i + 1 are gathered while
            block i computes: they travel in the scan's carry.
        enter, leave: applied to the hidden states before the first and after the last block (padding, sharding).
        between: applied to the hidden states after each block (sharding).
    """

    def __init__(
        self,
        block: torch.nn.Module,
        *,
        gather: Callable[[Params], Params] | None = None,
        enter: Callable[[jax.Array], jax.Array] | None = None,
        between: Callable[[jax.Array], jax.Array] | None = None,
        leave: Callable[[jax.Array], jax.Array] | None = None,
    ):
        super().__init__()
        self._block = (block,)
        self._gather, self._enter, self._between, self._leave = gather, enter, between, leave
        self._stacked: Params | None = None
        self.collect: Callable[[], Any] | None = None  # what a block leaves behind, taken after each block
        self.collected: Any = None  # the same, stacked over blocks, after the scan

    @property
    def block(self) -> torch.nn.Module:
        """The block that every turn of the scan runs."""
        return self._block[0]

    def bind(self, stacked: Params) -> None:
        """Use ``stacked`` (names relative to a block, leading axis = blocks) in the next call."""
        self._stacked = stacked

    @staticmethod
    def _cut(stacked: Params, row: Params) -> Params:
        """One block's weights, from its row of what the scan slices."""
        return {name: w.block(row[name]) if isinstance(w, MappedStack | IntegerStack) else row[name] for name, w in stacked.items()}

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run all blocks on ``hidden_states``; the other arguments go to every block."""
        stacked, self._stacked = self._stacked, None
        assert stacked is not None, "bind() the stacked weights first"
        x, jax_args, jax_kwargs = jax_view(hidden_states), jax_view(args), jax_view(kwargs)
        if self._enter:
            x = self._enter(x)

        def run(x: jax.Array, weights: Params) -> tuple[jax.Array, Any]:
            x = call_module(self.block, weights, x, *jax_args, **jax_kwargs)
            return (self._between(x) if self._between else x), (self.collect() if self.collect else None)

        rows = {name: w.scanned if isinstance(w, MappedStack | IntegerStack) else w for name, w in stacked.items()}
        if self._gather is None:
            x, self.collected = jax.lax.scan(lambda x, row: run(x, self._cut(stacked, row)), x, rows)
        else:
            gather = self._gather

            def run_and_gather(carry: tuple[jax.Array, Params], following: jax.Array) -> tuple[tuple[jax.Array, Params], Any]:
                x, weights = carry
                row = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, following, keepdims=False), rows)
                fetched = gather(self._cut(stacked, row))
                x, left = run(x, weights)
                return (x, fetched), left

            count = next(iter(stacked.values())).shape[0]
            first = gather(self._cut(stacked, jax.tree.map(lambda w: w[0], rows)))
            (x, _), self.collected = jax.lax.scan(run_and_gather, (x, first), jnp.arange(1, count + 1) % count)
        if self._leave:
            x = self._leave(x)
        return torch_view(x)


@dataclasses.dataclass(frozen=True)
class Weight:
    """Where one parameter comes from and where it goes.

    Attributes:
        sources: names in the checkpoint; several when blocks are stacked (one a block, in order).
        stacked: whether there is a leading blocks axis.
        rows: a permutation of the first axis of each source, or None.
        value: for buffers that no checkpoint holds.
    """

    struct: jax.ShapeDtypeStruct
    sources: tuple[str, ...]
    stacked: bool = False
    rows: np.ndarray | None = None
    value: np.ndarray | None = None


def plan_weights(
    model: torch.nn.Module,
    blocks_prefix: str | None,
    rules: tuple[Rule, ...],
    mesh: Mesh,
    dtype: str,
    *,
    fsdp: bool = False,
    keep_fp32: tuple[str, ...] = (),
    skip: tuple[str, ...] = (),
    permute_rows: Callable[[str], np.ndarray | None] = lambda name: None,
    blocks: int | None = None,
) -> dict[str, Weight]:
    """What to load, as what and where: one entry a parameter or buffer; blocks under ``blocks_prefix`` stacked under ``*``.

    Args:
        model: the stock module on the meta device, its blocks not yet replaced.
        blocks_prefix: e.g. ``"blocks"``: ``blocks.7.x`` becomes row 7 of ``blocks.*.x``.
        dtype: "bfloat16" or "float32"; names with a part in ``keep_fp32`` stay float32 (diffusers' rule).
        skip: names that are not wanted (tied weights).
        permute_rows: starred name -> permutation of the first axis, or None.
        blocks: how many blocks the checkpoint has, where ``model`` was built with one.
    """
    groups: dict[str, list[tuple[str, torch.Tensor]]] = {}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in tensors:
        if name in skip:
            continue
        starred = re.sub(rf"^{re.escape(blocks_prefix)}\.\d+\.", f"{blocks_prefix}.*.", name) if blocks_prefix else name
        groups.setdefault(starred, []).append((name, tensor))
    plan = {}
    for starred, members in groups.items():
        stacked = "*" in starred
        tensor = members[0][1]
        sources = tuple(name for name, _ in members)
        if stacked and blocks is not None:
            sources = tuple(starred.replace("*", str(number)) for number in range(blocks))
        shape = ((len(sources),) if stacked else ()) + tuple(tensor.shape)
        kept = any(part in keep_fp32 for part in starred.split("."))
        spec = weight_spec(rules, starred, shape, mesh, fsdp=fsdp, stacked=stacked)
        struct = jax.ShapeDtypeStruct(
            shape, np.dtype(np.float32) if kept else DTYPES[dtype], sharding=NamedSharding(mesh, spec)
        )
        value = None if tensor.is_meta else tensor.detach().numpy()
        plan[starred] = Weight(struct, sources, stacked, permute_rows(starred), value)
    return plan


def split_blocks(params: Params, blocks_prefix: str) -> tuple[Params, Params]:
    """``(stacked weights by their name inside a block, all others)``."""
    prefix = f"{blocks_prefix}.*."
    stacked = {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}
    return stacked, {name: value for name, value in params.items() if not name.startswith(prefix)}


class Checkpoint:
    """The safetensors files of one component folder (one file, or shards with an index), opened once.

    Raises:
        ArtifactError: no weights in the folder, or a file that is missing or truncated.
    """

    def __init__(self, folder: Path):
        remedy = f"download the model again, or choose another with --model_id (its folder is {folder})"
        index = sorted(folder.glob("*.safetensors.index.json"))
        if index:
            try:
                files = sorted(set(json.loads(index[0].read_text())["weight_map"].values()))
            except (ValueError, KeyError, AttributeError) as error:
                raise ArtifactError(f"{index[0]}: not a safetensors index ({error!r}); {remedy}") from error
        else:
            files = [path.name for path in sorted(folder.glob("*.safetensors"))][:1]
            if files and "-of-" in files[0]:
                raise ArtifactError(f"{folder}: {files[0]} is one of several shards, their *.safetensors.index.json is missing; {remedy}")
        if not files:
            raise ArtifactError(f"{folder}: no *.safetensors weights found; {remedy}")
        self.folder = folder
        self.readers = [SafetensorsReader(folder / name, remedy) for name in files]
        self.maps = FileMaps()
        self.where = {name: reader for reader in self.readers for name in reader.tensors}

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        for reader in self.readers:
            reader.close()

    def reader(self, name: str, shape: tuple[int, ...]) -> SafetensorsReader:
        """The file that holds ``name``.

        Raises:
            ArtifactError: no file does, or with another shape than the model's config asks for.
        """
        if name not in self.where:
            raise ArtifactError(f"{self.folder}: the weights have no {name!r}, which the config asks for; download the model again")
        found = self.where[name].tensors[name][1]
        if found != shape:
            raise ArtifactError(
                f"{self.where[name].path}: {name} is {list(found)}, the config asks for {list(shape)}; download the model again"
            )
        return self.where[name]


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised page-aligned array in huge pages: JAX's CPU client takes it without a copy (it asks for 64 bytes).

    Huge pages: touching 1 GiB for the first time takes 0.9 s with them here, up to 5 s in pages of 4 KiB (docs/LOG.md).
    """
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8, size).view(dtype).reshape(shape)


def load_weights(plan: dict[str, Weight], folder: Path, progress: str) -> Params:
    """Stream the weights of ``plan`` from ``folder`` into their device shards.

    Each process reads only what its devices hold. One CPU device gets the blocks' weights as they lie in the files, mapped
    (wan_common.block_stacks), when their dtype is the computation's. Otherwise a shard is filled in place, block by block, from
    the page cache, so that the memory above the weights themselves stays at one source tensor (plus, off the CPU, one shard on its
    way to the device).

    Raises:
        ArtifactError: missing, truncated or misfitting weights.
    """
    params: Params = {}
    with Checkpoint(folder) as checkpoint, ThreadPoolExecutor(READERS, thread_name_prefix="weights") as pool:
        for name, weight in tqdm(plan.items(), desc=progress, unit="weight", leave=False):
            params[name] = _load_one(checkpoint, weight, pool)
    return params


def _load_one(checkpoint: Checkpoint, weight: Weight, pool: ThreadPoolExecutor) -> jax.Array | MappedStack | IntegerStack:
    struct, dtype = weight.struct, np.dtype(weight.struct.dtype)
    on_cpu = weight.stacked and struct.sharding.mesh.devices.flat[0].platform == "cpu"
    if on_cpu and struct.sharding.mesh.size == 1:
        readers = [checkpoint.reader(source, struct.shape[1:]) for source in weight.sources]
        mapped = checkpoint.maps.stack(readers, weight.sources, struct.shape[1:], dtype, weight.rows)
        if mapped is not None:
            checkpoint.maps.touch(readers, weight.sources, pool)
            return mapped
    shards: dict[tuple[tuple[int, int], ...], np.ndarray] = {}
    arrays = []
    as_integers = on_cpu and dtype == jnp.bfloat16
    for device, index in struct.sharding.addressable_devices_indices_map(struct.shape).items():
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, struct.shape, strict=True))
        if bounds not in shards:
            filled = _fill_shard(checkpoint, weight, tuple(slice(*b) for b in bounds), pool)
            shards[bounds] = filled.view(integers(dtype)) if as_integers else filled
        arrays.append(jax.device_put(shards[bounds], device))
    whole = jax.make_array_from_single_device_arrays(struct.shape, struct.sharding, arrays)
    return IntegerStack(whole, dtype) if as_integers else whole


def _fill_shard(checkpoint: Checkpoint, weight: Weight, index: tuple[slice, ...], pool: ThreadPoolExecutor) -> np.ndarray:
    struct = weight.struct
    out = _aligned_empty(tuple(s.stop - s.start for s in index), np.dtype(struct.dtype))
    if weight.value is not None:
        out[...] = weight.value[index]
        return out
    shape, inner = (struct.shape[1:], index[1:]) if weight.stacked else (struct.shape, index)

    def read(row: int) -> None:
        source = weight.sources[row]
        reader = checkpoint.reader(source, tuple(shape))
        target = out[row] if weight.stacked else out
        if weight.rows is None:
            reader.read_into(source, target, inner)
        else:
            target[...] = reader.read(source)[weight.rows[inner[0]]][(slice(None), *inner[1:])].astype(out.dtype, copy=False)

    list(pool.map(read, range(len(weight.sources))))  # preadv lets go of the interpreter; list() raises what a thread raised
    return out


def abstract_params(plan: dict[str, Weight]) -> Params:
    """The weights of ``plan`` as ShapeDtypeStructs with their shardings, for compiling without loading."""
    return {name: weight.struct for name, weight in plan.items()}


def gather_constraint(plan: dict[str, Weight], blocks_prefix: str, mesh: Mesh) -> Callable[[Params], Params]:
    """The constraint that undoes FSDP on one block's weights: each as its rule says without the fsdp axes."""
    prefix = f"{blocks_prefix}.*."
    shardings = {}
    for name, weight in plan.items():
        if name.startswith(prefix):
            entries = [tuple(a for a in (e if isinstance(e, tuple) else (e,)) if a == "tp") or None
                       for e in (*weight.struct.sharding.spec,)[1:]]  # fmt: skip
            shardings[name.removeprefix(prefix)] = NamedSharding(mesh, PartitionSpec(*entries))

    def gather(weights: Params) -> Params:
        return {name: jax.lax.with_sharding_constraint(w, shardings[name]) for name, w in weights.items()}

    return gather
