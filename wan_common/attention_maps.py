"""Cross-attention maps: which words to follow, their exact softmax mass in JAX, the files it goes to, and reading them back.

Wan's cross-attention has no mask: the prompt's embeddings are zero past its length, but the padded positions still become
keys. So beside the chosen words three more groups are kept, and the four kinds add up to one for every image token:
``_other`` (real tokens nobody asked for), ``_eos`` and ``_pad``.

Files (storage version 1.1.0)::

    attention_maps/<video_id>/video_metadata.json                   the clip, the order of the words
    attention_maps/<video_id>/<token>/step_000.npz                  key attention_map; or step_000.pt
    attention_maps/<video_id>/<token>/step_000_metadata.json
    attention_maps/<video_id>/aggregated/<token>_aggregated.npz     the mean over the steps
    attention_maps/<video_id>/aggregated/<token>_aggregated_metadata.json
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import hashlib
import itertools
import json
import logging
import math
import os
import re
import shutil
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import numpy as np

from wan_common.atomic import atomic_path, remove_temporaries, write_json
from wan_common.errors import ArtifactError, NumericalError, UsageError

logger = logging.getLogger("attention")

STORAGE_VERSION = "1.1.0"
OTHER, EOS, PAD = "_other", "_eos", "_pad"
SPECIAL_GROUPS = (OTHER, EOS, PAD)
AGGREGATED = "aggregated"
VIDEO_METADATA = "video_metadata.json"
NEGATIVE_SUFFIX = "_negative"  # the negative prompt's maps are a sibling video id
REMEDY = "rerun stage2_transformer.py with --store_attention --force"
_FORMATS = {"numpy": ".npz", "torch": ".pt"}
_KEY = "attention_map"


# ---------------------------------------------------------------------------------------------------------------- capture


def token_attention(
    query: Any,
    key: Any,
    groups: Any,
    *,
    scale: float | None = None,
    query_chunk: int = 256,
    average_heads: bool = False,
    query_shards: int = 1,
    head_shards: int = 1,
) -> Any:
    """Exact softmax mass that each query gives to each group of keys, without the [H, S, T] matrix. JAX, fp32 inside.

    ``mass[b, h, g, s] = sum_t exp(q.k * scale - logsumexp over all keys) * groups[t, g]``, one chunk of queries at a time: as
    sums of ``exp(q.k * scale - maximum)`` over the group and over all keys, divided.

    Args:
        query: [B, H, S, D], any float dtype, after norm and projection (what the attention itself sees).
        key: [B, H, T, D].
        groups: [T, G] or one matrix a batch row [B, T, G]; 0/1 float32, see :func:`groups_matrix`.
        scale: 1/sqrt(D) when None.
        query_chunk: at most so many queries of a shard at once; the largest temporary is [B, H, query_chunk, T] fp32.
        average_heads: return the mean over heads, [B, G, S].
        query_shards: over how many devices the caller shards S. The chunks are then cut within each shard, so that no chunk
            crosses devices. S must be a multiple of it.
        head_shards: over how many devices the caller shards H. With ``average_heads`` the heads of a shard are averaged inside
            the loop and the shards after it: one all-reduce instead of one a chunk. H must be a multiple of it.

    Returns:
        [B, H, G, S] float32, or [B, G, S] with ``average_heads``.

    Raises:
        ValueError: shapes that do not fit.
    """
    import jax
    import jax.numpy as jnp

    batch, heads, length, dim = query.shape
    if key.shape[:2] != (batch, heads) or key.shape[3] != dim:
        raise ValueError(f"query is {list(query.shape)}, key {list(key.shape)}: batch, heads and head_dim must agree")
    if groups.shape[-2] != key.shape[2] or groups.ndim not in (2, 3):
        raise ValueError(f"groups is {list(groups.shape)}, wanted [T, G] or [B, T, G] with T = {key.shape[2]} keys")
    if length % query_shards or heads % head_shards:
        raise ValueError(f"{length} queries in {query_shards} shards, {heads} heads in {head_shards}: not divisible")
    scale = dim**-0.5 if scale is None else scale
    local = length // query_shards
    chunks = math.ceil(local / query_chunk)
    chunk = math.ceil(local / chunks)  # even chunks: the ragged last one is at most chunks - 1 rows of padding
    shard_heads = heads // head_shards

    # [batch, head shard, head, query shard, chunk, row in chunk, dim]
    rows = query.reshape(batch, head_shards, shard_heads, query_shards, local, dim)
    rows = jnp.pad(rows, ((0, 0),) * 4 + ((0, chunks * chunk - local), (0, 0)))
    rows = rows.reshape(batch, head_shards, shard_heads, query_shards, chunks, chunk, dim)
    keys = key.reshape(batch, head_shards, shard_heads, -1, dim)
    members = jnp.broadcast_to(groups.astype(jnp.float32), (batch, *groups.shape[-2:]))
    members = jnp.concatenate([members, jnp.ones((batch, members.shape[1], 1))], axis=2)  # the last column sums all keys

    def one_chunk(index: Any) -> Any:
        q = jax.lax.dynamic_index_in_dim(rows, index, 4, keepdims=False)
        scores = jnp.einsum("bxhpcd,bxhtd->bxhpct", q, keys, precision="highest", preferred_element_type=jnp.float32)
        scores = scores * jnp.float32(scale)
        weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
        # Groups before the division and the mean: both then work on G columns, not T. 7 times faster on CPU than the softmax first.
        sums = jnp.einsum("bxhpct,btg->bxhpcg", weights, members, precision="highest")
        mass = jnp.moveaxis(sums[..., :-1] / sums[..., -1:], -1, -3)  # [B, X, h, G, P, C]
        return mass.mean(axis=2) if average_heads else mass

    mass = jax.lax.map(one_chunk, jnp.arange(chunks))  # [chunks, B, X, (heads), G, P, C]
    mass = jnp.moveaxis(mass, 0, -2)
    mass = mass.reshape(*mass.shape[:-2], chunks * chunk)[..., :local]
    mass = mass.reshape(*mass.shape[:-2], length)
    if average_heads:
        return mass.mean(axis=1)
    return mass.reshape(batch, heads, -1, length)


# --------------------------------------------------------------------------------------------------------------- settings


@dataclasses.dataclass(frozen=True)
class VisualizationParams:
    """How videos of attention look (``visualization_params`` of the YAML block; the defaults are the user guide's)."""

    figsize: tuple[float, float] = (12, 8)  # inches, at 100 dots an inch
    colormap: str = "hot"  # a matplotlib name
    overlay_alpha: float = 0.6  # 0..1: opacity of the strongest attention over the picture
    static_duration: float = 3.0  # seconds of an aggregated (static) video
    fps: int = 10  # of step videos; overlays keep the speed of their video
    interpolation_steps: int = 2  # frames blended in between two steps; 0: none
    include_colorbar: bool = True
    video_format: str = "mp4"  # or avi

    def __post_init__(self) -> None:
        where = "visualization_params"
        if len(self.figsize) != 2 or not all(1 <= side <= 40 for side in self.figsize):
            raise UsageError(f"{where}.figsize: {list(self.figsize)}; wanted [width, height] in inches, each 1 to 40")
        if not 0 <= self.overlay_alpha <= 1:
            raise UsageError(f"{where}.overlay_alpha: {self.overlay_alpha}; wanted 0.0 to 1.0")
        if self.static_duration <= 0 or self.fps < 1 or self.interpolation_steps < 0:
            raise UsageError(f"{where}: wanted static_duration > 0, fps >= 1, interpolation_steps >= 0; found {self}")
        if self.video_format not in ("mp4", "avi"):
            raise UsageError(f"{where}.video_format: {self.video_format!r}; wanted mp4 or avi")

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> VisualizationParams:
        """From a YAML mapping; raises UsageError on an unknown key or a wrong type, naming it."""
        return cls(**_checked(cls, data, "attention_analysis.visualization_params"))


@dataclasses.dataclass(frozen=True)
class AttentionSettings:
    """The ``attention_analysis:`` YAML block. Nothing is captured unless ``store_attention`` is true."""

    store_attention: bool = False
    store_aggregated_attention: bool = True  # also the mean over steps
    storage_format: str = "numpy"  # numpy (.npz) or torch (.pt)
    aggregated_storage_format: str = "numpy"
    compress_attention: bool = True  # zlib inside the .npz
    storage_dtype: str = "float32"  # or float16: half the disk, steps of about 0.1% of a weight
    store_per_head: bool = False  # false: the mean over heads
    store_per_block: bool = False  # false: the mean over transformer blocks
    spatial_downsample_factor: int = 1  # mean over k x k cells of the token grid
    store_negative: bool = False  # also the negative prompt's maps, as <video_id>_negative
    auto_generate_videos: bool = False  # all videos at the end of the batch
    auto_generate_per_video: bool = False  # the videos of each clip as soon as it is done
    visualization_params: VisualizationParams = VisualizationParams()

    def __post_init__(self) -> None:
        for field in ("storage_format", "aggregated_storage_format"):
            if getattr(self, field) not in _FORMATS:
                raise UsageError(f"attention_analysis.{field}: {getattr(self, field)!r}; wanted {' or '.join(_FORMATS)}")
        if self.storage_dtype not in ("float32", "float16"):
            raise UsageError(f"attention_analysis.storage_dtype: {self.storage_dtype!r}; wanted float32 or float16")
        if self.spatial_downsample_factor < 1:
            raise UsageError(f"attention_analysis.spatial_downsample_factor: {self.spatial_downsample_factor}; wanted 1 or more")
        if not self.store_attention and (self.auto_generate_videos or self.auto_generate_per_video or self.store_negative):
            raise UsageError(
                "attention_analysis: auto_generate_videos, auto_generate_per_video and store_negative need store_attention: true"
            )

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> AttentionSettings:
        """From the mapping under ``attention_analysis:``.

        Raises:
            UsageError: an unknown key, a wrong type or an impossible value, by its name.
        """
        values = _checked(cls, data, "attention_analysis")
        if isinstance(values.get("visualization_params"), Mapping):
            values["visualization_params"] = VisualizationParams.from_mapping(values["visualization_params"])
        return cls(**values)

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of a stored map's axes: (block,) (head,) frame, y, x."""
        extra = ("block",) * self.store_per_block + ("head",) * self.store_per_head
        return (*extra, "frame", "y", "x")


def _checked(cls: type, data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Keys and types of ``data`` against the dataclass ``cls`` (the type of a field is that of its default)."""
    if not isinstance(data, Mapping):
        raise UsageError(f"{where}: {data!r}; wanted a mapping of settings")
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for name, value in data.items():
        if name not in defaults:
            raise UsageError(f"{where}: unknown key {name!r}; it has {', '.join(defaults)}")
        default = defaults[name]
        if isinstance(default, bool):
            fits = isinstance(value, bool)
        elif isinstance(default, float):
            fits = isinstance(value, (int, float)) and not isinstance(value, bool)
        elif isinstance(default, int):
            fits = isinstance(value, int) and not isinstance(value, bool)
        elif isinstance(default, tuple):
            fits = isinstance(value, (list, tuple)) and all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in value)
        elif isinstance(default, str):
            fits = isinstance(value, str)
        else:
            fits = isinstance(value, (Mapping, type(default)))
        if not fits:
            wanted = "mapping" if dataclasses.is_dataclass(default) else type(default).__name__.replace("tuple", "list of numbers")
            raise UsageError(f"{where}.{name}: {value!r} is a {type(value).__name__}; wanted a {wanted}")
        values[name] = tuple(value) if isinstance(default, tuple) else value
    return values


# ---------------------------------------------------------------------------------------------------------------- targets


@dataclasses.dataclass(frozen=True)
class Target:
    """A word or phrase whose attention is followed.

    Attributes:
        name: as shown: the prompt's spelling, ``word#2`` for a second occurrence.
        token_indices: its positions among the prompt's tokens.
        folder: the name of its folder, safe on every file system.
    """

    name: str
    token_indices: tuple[int, ...]
    folder: str


def select_targets(words: Sequence[Mapping[str, Any]], num_tokens: int, attention_tokens: Sequence[str] | None = None) -> list[Target]:
    """The words to follow: those marked ``(so)`` in the prompt, then ``attention_tokens``; all words if there are neither.

    Args:
        words: stage 1's list for this prompt: ``{"word", "span": [start, end], "tokens": [...], "target": bool}``.
        num_tokens: real tokens with EOS.
        attention_tokens: words, phrases of adjacent words, or ``word#2`` for a second occurrence; upper and lower case are one.

    Raises:
        UsageError: a string that is not in the prompt (the message lists the words that are), or whose tokens were cut off.
    """
    named = _name_occurrences(words)
    chosen: list[tuple[str, tuple[int, ...]]] = []
    for (name, tokens), word in zip(named, words, strict=True):
        if word.get("target"):
            if not tokens:
                raise UsageError(f"({word['word']}) is beyond the prompt's length limit; raise --max_sequence_length in stage 1")
            chosen.append((name, tokens))
    for text in attention_tokens or ():
        chosen.append(_find(text, words, named))
    if not chosen:
        dropped = [name for name, tokens in named if not tokens]
        if dropped:
            logger.warning("words beyond the prompt's length limit have no attention: %s", ", ".join(dropped))
        chosen = [(name, tokens) for name, tokens in _name_occurrences(_merge_shared(words)) if tokens]
    for name, tokens in chosen:
        if any(not 0 <= index < num_tokens - 1 for index in tokens):
            raise ArtifactError(
                f"stage1_embeddings.safetensors: {name!r} has tokens {list(tokens)}, the prompt has {num_tokens} with EOS; "
                "rerun stage1_text_encoder.py --force"
            )
    targets: dict[str, Target] = {}
    folders: set[str] = set()
    for name, tokens in chosen:
        if name in targets:
            continue
        folder = _safe_folder(name)
        number = 2
        while folder.casefold() in folders:
            folder, number = f"{_safe_folder(name)}-{number}", number + 1
        folders.add(folder.casefold())
        targets[name] = Target(name, tokens, folder)
    return list(targets.values())


def _name_occurrences(words: Sequence[Mapping[str, Any]]) -> list[tuple[str, tuple[int, ...]]]:
    seen: collections.Counter[str] = collections.Counter()
    named = []
    for word in words:
        key = _normal(word["word"])
        seen[key] += 1
        name = word["word"] if seen[key] == 1 else f"{word['word']}#{seen[key]}"
        named.append((name, tuple(int(index) for index in word["tokens"])))
    return named


def _merge_shared(words: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Join neighbours that share a token (in scripts without spaces a token may span several words): no weight counts twice."""
    merged: list[Mapping[str, Any]] = []
    for word in words:
        if merged and set(merged[-1]["tokens"]) & set(word["tokens"]):
            both = [merged[-1], word]
            tokens = list(dict.fromkeys([*both[0]["tokens"], *both[1]["tokens"]]))
            merged[-1] = {"word": _joined(both), "span": [both[0]["span"][0], word["span"][1]], "tokens": tokens}
        else:
            merged.append(word)
    return merged


def _normal(text: str) -> str:
    """Compare without case, Unicode form, outer punctuation and runs of white space."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    start, end = 0, len(text)
    while start < end and unicodedata.category(text[start])[0] == "P":
        start += 1
    while end > start and unicodedata.category(text[end - 1])[0] == "P":
        end -= 1
    return text[start:end] or text


def _find(text: str, words: Sequence[Mapping[str, Any]], named: Sequence[tuple[str, tuple[int, ...]]]) -> tuple[str, tuple[int, ...]]:
    """The run of adjacent words that spells ``text``: its name and tokens."""
    runs = _runs(text, words)
    occurrence = 1
    match = re.fullmatch(r"(.+)#([1-9][0-9]*)", text.strip(), re.DOTALL)
    if not runs and match:  # a literal "c#2" in the prompt wins over the second "c"
        runs, occurrence = _runs(match[1], words), int(match[2])
    if len(runs) < occurrence:
        listed = ", ".join(name for name, _ in named) or "(none: the prompt is empty)"
        times = f"occurs {len(runs)} times in the prompt" if runs else "is not in the prompt"
        raise UsageError(f"--attention_tokens: {text!r} {times}; its words are: {listed}")
    if len(runs) > 1 and match is None:
        logger.info("%r occurs %d times; taking the first (ask for %s#2 for the second)", text, len(runs), text)
    first, last = runs[occurrence - 1]
    tokens = tuple(dict.fromkeys(index for _, part in named[first:last] for index in part))
    if not tokens:
        raise UsageError(f"--attention_tokens: {text!r} is beyond the prompt's length limit; raise --max_sequence_length in stage 1")
    if last - first == 1:
        return named[first][0], tokens
    name = _joined(words[first:last])
    return (name if occurrence == 1 else f"{name}#{occurrence}"), tokens


def _joined(words: Sequence[Mapping[str, Any]]) -> str:
    """Words as one string: a space where the prompt has anything between them (scripts without spaces have nothing)."""
    text = words[0]["word"]
    for before, word in itertools.pairwise(words):
        text += ("" if before["span"][1] >= word["span"][0] else " ") + word["word"]
    return text


def _runs(text: str, words: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    wanted = _normal(text)
    runs, first = [], 0
    while first < len(words):
        length = 0
        for last in range(first + 1, len(words) + 1):
            spelled = _normal(_joined(words[first:last]))
            if spelled == wanted:
                length = last - first
                break
            if len(spelled) > len(wanted) + 8:  # punctuation inside may make it longer for a while
                break
        if length:
            runs.append((first, first + length))
        first += max(length, 1)
    return runs


def _safe_folder(name: str) -> str:
    """A folder name from a display name: letters and digits of any script, ``#`` and ``-``; never hidden, reserved or long."""
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    text = re.sub(r"[^\w#-]+", "_", unicodedata.normalize("NFC", name)).strip("_-")
    if not text.strip("#"):
        return f"token-{digest}"
    if len(text.encode()) > 100:  # file systems take 255 bytes, and names get suffixes
        text = text.encode()[:88].decode("utf-8", "ignore") + f"-{digest}"
    if text.casefold() in {AGGREGATED, "con", "prn", "aux", "nul"}:
        text += "-word"
    return text


def groups_matrix(targets: Sequence[Target], num_tokens: int, length: int) -> np.ndarray:
    """Which keys make up each group: [length, len(targets) + 3] float32 of 0 and 1.

    Columns: the targets in order, then ``_other`` (real tokens of no target), ``_eos`` (position num_tokens - 1) and ``_pad``
    (everything after it). Unless targets overlap (a phrase and a word of it), each row has exactly one 1.
    """
    if not 1 <= num_tokens <= length:
        raise ValueError(f"{num_tokens} tokens do not fit {length} keys")
    matrix = np.zeros((length, len(targets) + 3), np.float32)
    for column, target in enumerate(targets):
        matrix[list(target.token_indices), column] = 1
    matrix[: num_tokens - 1, -3] = 1 - matrix[: num_tokens - 1, : len(targets)].max(axis=1, initial=0)
    matrix[num_tokens - 1, -2] = 1
    matrix[num_tokens:, -1] = 1
    return matrix


def special_targets(targets: Sequence[Target], num_tokens: int, length: int) -> list[Target]:
    """``targets`` and the three special groups as targets, in the column order of :func:`groups_matrix`."""
    matrix = groups_matrix(targets, num_tokens, length)
    special = [
        Target(name, tuple(int(index) for index in np.flatnonzero(matrix[:, column])), name)
        for column, name in enumerate(SPECIAL_GROUPS, start=len(targets))
    ]
    return [*targets, *special]


# ---------------------------------------------------------------------------------------------------------------- storage


@dataclasses.dataclass(frozen=True)
class ClipInfo:
    """What the maps of one clip belong to; goes into their metadata.

    Attributes:
        width, height, frames, fps: of the video.
        grid: (F, H, W) of the transformer's tokens, (latent frames, height / 16, width / 16).
        num_inference_steps: steps of the whole run.
        num_tokens: real tokens of the prompt with EOS.
        text_length: keys in all (``max_sequence_length``).
        prompt: cleaned, markers stripped.
        token_ids: the tokenizer's ids, at least ``num_tokens`` of them.
        fingerprint: of the run; files of another run are never mixed in on a resume.
        suffix: the clip's file suffix (``output_video{suffix}.mp4``).
        negative: these are the negative prompt's maps.
        extra: anything else worth keeping (seed, model_id, guidance_scale); JSON types.
    """

    width: int
    height: int
    frames: int
    fps: float
    grid: tuple[int, int, int]
    num_inference_steps: int
    num_tokens: int
    text_length: int
    prompt: str
    token_ids: Sequence[int]
    fingerprint: str = ""
    suffix: str = ""
    negative: bool = False
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _describe(video_id: str, groups: Sequence[Target], settings: AttentionSettings, clip: ClipInfo) -> dict[str, Any]:
    info = dataclasses.asdict(clip)
    info.update(token_ids=[int(i) for i in clip.token_ids][: clip.num_tokens], grid=list(clip.grid))
    info["extra"] = dict(clip.extra)
    tokens = [{"name": g.name, "folder": g.folder, "token_indices": list(g.token_indices)} for g in groups[: -len(SPECIAL_GROUPS)]]
    keep = ("storage_format", "storage_dtype", "store_per_head", "store_per_block", "spatial_downsample_factor")
    return {
        "attention_storage_version": STORAGE_VERSION, "video_id": video_id, "tokens": tokens, "clip": info,
        "settings": {name: getattr(settings, name) for name in keep},
    }  # fmt: skip


def _step_file(folder: Path, group: Target, step: int, settings: AttentionSettings) -> Path:
    return folder / group.folder / f"step_{step:03d}{_FORMATS[settings.storage_format]}"


def check_resume(
    root: str | os.PathLike[str], video_id: str, targets: Sequence[Target], settings: AttentionSettings, info: ClipInfo, start_step: int
) -> None:
    """Whether a clip's maps on disk can be gone on with at ``start_step``; arguments as :class:`AttentionWriter`'s.

    Raises:
        ArtifactError: they are of other words, settings or another clip, or steps are missing; says what.
    """
    folder, groups = Path(root) / video_id, special_targets(targets, info.num_tokens, info.text_length)
    found, description = _read_json(folder / VIDEO_METADATA), _describe(video_id, groups, settings, info)
    for part in ("tokens", "clip", "settings"):
        if found.get(part) != json.loads(json.dumps(description[part])):
            raise ArtifactError(f"{folder}: the stored maps are of another run ({part} differ); {REMEDY}")
    for group in groups:
        for step in range(start_step):
            path = _step_file(folder, group, step, settings)
            for wanted in (path, _metadata_path(path)):
                if not wanted.is_file():
                    raise ArtifactError(f"{wanted}: missing, and the run resumes at step {start_step}; {REMEDY}")


class AttentionWriter:
    """Write one clip's maps, step by step, on a background thread (at most two steps wait, then ``step`` does).

    Args:
        root: the ``attention_maps`` folder.
        video_id: ``prompt_001_vid_001``.
        targets: from :func:`select_targets`.
        settings: what to store and how.
        info: the clip.
        start_step: 0 deletes what an older run left for this ``video_id``; on a resume, the first step that will come.

    Raises:
        ArtifactError: the earlier steps of a resume are missing or of another run; or the disk is full (from a later call).
        NumericalError: a map that is not finite, naming the step.

    Call ``flush()`` before saving a checkpoint that promises these steps, and ``finish()`` after the last one.
    """

    def __init__(
        self, root: str | os.PathLike[str], video_id: str, targets: Sequence[Target], settings: AttentionSettings,
        info: ClipInfo, *, start_step: int = 0,
    ):  # fmt: skip
        if not re.fullmatch(r"[\w-]+", video_id):
            raise ValueError(f"video_id {video_id!r}: letters, digits, '_' and '-' only")
        self.path = Path(root) / video_id
        self.video_id, self.settings, self.info = video_id, settings, info
        self.targets = list(targets)
        self.groups = special_targets(targets, info.num_tokens, info.text_length)
        self._description = _describe(video_id, self.groups, settings, info)
        if start_step == 0:
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            check_resume(root, video_id, targets, settings, info, start_step)
        try:
            for group in self.groups:
                (self.path / group.folder).mkdir(parents=True, exist_ok=True)
                remove_temporaries(self.path / group.folder)
            for folder in (self.path, self.path / AGGREGATED):
                remove_temporaries(folder)
            write_json(self.path / VIDEO_METADATA, self._description)
        except OSError as error:
            raise ArtifactError(f"{self.path}: cannot write here ({error.strerror}); choose another --output_dir") from error
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="attention-writer")
        self._pending: collections.deque[Future[None]] = collections.deque()

    def _step_path(self, group: Target, step: int) -> Path:
        return _step_file(self.path, group, step, self.settings)

    def step(self, index: int, maps: Any, timestep: float) -> None:
        """Queue step ``index``: ``maps`` [G, (block,) (head,) F, H, W], G as in :func:`groups_matrix`; JAX array or numpy."""
        want = (len(self.groups), *self.info.grid)
        if (maps.shape[0], *maps.shape[-3:]) != want or maps.ndim != 1 + len(self.settings.axes):
            raise ValueError(
                f"maps are {list(maps.shape)}, wanted [{len(self.groups)}, {', '.join(self.settings.axes)}] with grid {self.info.grid}"
            )
        while len(self._pending) >= 2:
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(self._write_step, index, maps, float(timestep)))

    def _write_step(self, index: int, maps: Any, timestep: float) -> None:
        # Waits for the device here, on this thread: the main one has already dispatched the next step.
        array = np.asarray(maps, dtype=np.float32)
        if not np.isfinite(array).all():
            raise NumericalError(f"{self.path}: attention of step {index} is not finite; rerun with --dtype float32, or report it")
        array = pool_mean(array, self.settings.spatial_downsample_factor)
        for group, values in zip(self.groups, array, strict=True):
            values = values.astype(self.settings.storage_dtype)
            path = self._step_path(group, index)
            _save_array(path, values, self.settings.storage_format, self.settings.compress_attention)
            write_json(_metadata_path(path), self._metadata(group, values, [index], "none", timestep))

    def _metadata(self, group: Target, values: np.ndarray, steps: list[int], method: str, timestep: float | None) -> dict[str, Any]:
        info = self.info
        indices = () if group.folder == PAD else group.token_indices  # the pads are all positions from num_tokens on
        return {
            "shape": list(values.shape),
            "dtype": str(values.dtype),
            "num_steps": len(steps),
            "steps_used": steps,
            "aggregation_method": method,
            "token_word": group.name,
            "video_dimensions": {"width": info.width, "height": info.height, "fps": info.fps, "frames": info.frames},
            "storage_timestamp": datetime.datetime.now(datetime.UTC).replace(tzinfo=None).isoformat(timespec="seconds"),
            "attention_storage_version": STORAGE_VERSION,
            "axes": list(self.settings.axes),
            "latent_grid": list(info.grid),
            "spatial_downsample_factor": self.settings.spatial_downsample_factor,
            "averaged_over": [name for name in ("block", "head") if name not in self.settings.axes] + ["step"] * (method == "mean"),
            "num_inference_steps": info.num_inference_steps,
            "timestep": timestep,
            "token_indices": list(indices),
            "token_ids": [int(info.token_ids[i]) for i in indices],
            "num_tokens": info.num_tokens,
            "text_length": info.text_length,
            "negative": info.negative,
            "fingerprint": info.fingerprint,
        }  # fmt: skip

    def flush(self) -> None:
        """Wait until every queued step is on disk; raises what went wrong."""
        while self._pending:
            self._pending.popleft().result()

    def finish(self) -> Path:
        """Write the rest and, if asked, the means over all steps (read back one file at a time); returns the clip's folder."""
        try:
            self.flush()
            if self.settings.store_aggregated_attention:
                (self.path / AGGREGATED).mkdir(exist_ok=True)
                for group in self.groups:
                    self._aggregate(group)
        finally:
            self.close()
        return self.path

    def _aggregate(self, group: Target) -> None:
        steps = list(range(self.info.num_inference_steps))
        total: np.ndarray | None = None
        for step in steps:
            values = _load_array(self._step_path(group, step)).astype(np.float64)
            total = values if total is None else total + values
        assert total is not None
        mean = (total / len(steps)).astype(self.settings.storage_dtype)
        form = self.settings.aggregated_storage_format
        path = self.path / AGGREGATED / f"{group.folder}_aggregated{_FORMATS[form]}"
        _save_array(path, mean, form, self.settings.compress_attention)
        write_json(_metadata_path(path), self._metadata(group, mean, steps, "mean", None))

    def close(self) -> None:
        """Stop the thread; queued steps are still written, their errors dropped (``flush`` raises them)."""
        self._pool.shutdown(wait=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def pool_mean(array: np.ndarray, factor: int) -> np.ndarray:
    """Mean over ``factor`` x ``factor`` cells of the last two axes; cells cut by the edge average what they have."""
    if factor == 1:
        return array
    rows, columns = (np.arange(0, size, factor) for size in array.shape[-2:])
    total = np.add.reduceat(np.add.reduceat(array, rows, axis=-2), columns, axis=-1)
    counts = np.outer(np.diff(np.append(rows, array.shape[-2])), np.diff(np.append(columns, array.shape[-1])))
    return (total / counts).astype(array.dtype)


def _metadata_path(path: Path) -> Path:
    return path.with_name(path.stem + "_metadata.json")


def _save_array(path: Path, values: np.ndarray, form: str, compress: bool) -> None:
    with atomic_path(path) as temporary:
        if form == "torch":
            import torch

            torch.save({_KEY: torch.from_numpy(np.ascontiguousarray(values))}, temporary)
        else:
            (np.savez_compressed if compress else np.savez)(temporary, attention_map=values)


def _load_array(path: Path) -> np.ndarray:
    """A stored map; nothing in the file can run code."""
    try:
        if path.suffix == ".pt":
            import torch

            values = torch.load(path, map_location="cpu", weights_only=True)[_KEY].numpy()
        else:
            with np.load(path, allow_pickle=False) as archive:
                values = archive[_KEY]
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: missing; {REMEDY}") from error
    except Exception as error:  # zipfile, zlib, pickle, numpy and torch raise a dozen kinds for a damaged file
        raise ArtifactError(f"{path}: damaged or foreign ({type(error).__name__}: {str(error)[:120]}); {REMEDY}") from error
    if not isinstance(values, np.ndarray) or values.dtype.kind != "f":
        raise ArtifactError(f"{path}: holds {getattr(values, 'dtype', type(values))}, wanted floats; {REMEDY}")
    if not np.isfinite(values).all():
        raise NumericalError(f"{path}: the map is not finite; {REMEDY}")
    return values


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: missing; {REMEDY}") from error
    except (ValueError, OSError) as error:
        raise ArtifactError(f"{path}: not readable JSON ({error}); {REMEDY}") from error
    if not isinstance(data, dict):
        raise ArtifactError(f"{path}: holds a {type(data).__name__}, wanted an object; {REMEDY}")
    return data


# --------------------------------------------------------------------------------------------------------------- analyzer


@dataclasses.dataclass(frozen=True)
class AttentionMetadata:
    """A map's ``*_metadata.json``; the first nine fields are the published ones, ``extra`` what this version does not know."""

    shape: list[int]
    dtype: str
    num_steps: int
    steps_used: list[int]
    aggregation_method: str
    token_word: str
    video_dimensions: dict[str, Any]
    storage_timestamp: str
    attention_storage_version: str
    axes: list[str] = dataclasses.field(default_factory=lambda: ["frame", "y", "x"])
    latent_grid: list[int] = dataclasses.field(default_factory=list)
    spatial_downsample_factor: int = 1
    averaged_over: list[str] = dataclasses.field(default_factory=list)
    num_inference_steps: int = 0
    timestep: float | None = None
    token_indices: list[int] = dataclasses.field(default_factory=list)
    token_ids: list[int] = dataclasses.field(default_factory=list)
    num_tokens: int = 0
    text_length: int = 0
    negative: bool = False
    fingerprint: str = ""
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> AttentionMetadata:
        """From a JSON file; raises ArtifactError naming a missing field."""
        data = _read_json(path)
        known = {field.name for field in dataclasses.fields(cls)} - {"extra"}
        try:
            return cls(**{k: v for k, v in data.items() if k in known}, extra={k: v for k, v in data.items() if k not in known})
        except TypeError as error:
            raise ArtifactError(f"{path}: {error}".replace("AttentionMetadata.__init__() ", "") + f"; {REMEDY}") from error


@dataclasses.dataclass(frozen=True)
class AttentionMap:
    """One stored map: ``attention_map`` with axes ``metadata.axes``, weights 0..1 in the stored dtype."""

    attention_map: np.ndarray
    metadata: AttentionMetadata


class AttentionAnalyzer:
    """Find and load stored attention maps.

    Args:
        attention_dir: the ``attention_maps`` folder of a run.

    Raises:
        ArtifactError: no such folder; names the remedy.
    """

    def __init__(self, attention_dir: str | os.PathLike[str]):
        self.attention_dir = Path(attention_dir)
        if not self.attention_dir.is_dir():
            raise ArtifactError(
                f"{self.attention_dir}: no attention maps here; run stage2_transformer.py with --store_attention "
                "(or store_attention: true under attention_analysis: in the --config file)"
            )

    # -- what is there

    def get_available_videos(self) -> list[str]:
        """Video ids, sorted."""
        return sorted(
            entry.name for entry in self.attention_dir.iterdir()
            if entry.is_dir() and not entry.name.startswith(".") and any(child.is_dir() for child in entry.iterdir())
        )  # fmt: skip

    def get_available_tokens(self, video_id: str, include_special: bool = False) -> list[str]:
        """Words in prompt order, as shown; with ``include_special`` also ``_other``, ``_eos`` and ``_pad``."""
        folders = self._folders(video_id)
        return [name for name, folder in folders.items() if include_special or folder not in SPECIAL_GROUPS]

    def get_available_steps(self, video_id: str, token_word: str) -> list[int]:
        """Indices of the stored steps, ascending."""
        folder = self._video(video_id) / self.get_token_folder(video_id, token_word)
        found = (re.fullmatch(r"step_(\d+)\.(npz|pt)", path.name) for path in folder.iterdir()) if folder.is_dir() else ()
        return sorted({int(match[1]) for match in found if match})

    def has_aggregated(self, video_id: str, token_word: str) -> bool:
        """Whether the mean over steps is stored."""
        return self._aggregated_path(video_id, token_word) is not None

    def get_video_metadata(self, video_id: str) -> dict[str, Any]:
        """``video_metadata.json`` (prompt, settings, clip), or {} when an older writer left none."""
        path = self._video(video_id) / VIDEO_METADATA
        return _read_json(path) if path.exists() else {}

    def _video(self, video_id: str) -> Path:
        videos = self.get_available_videos()
        if video_id not in videos:
            raise UsageError(f"--video-id {video_id!r} is not in {self.attention_dir}; it has: {', '.join(videos) or '(none)'}")
        return self.attention_dir / video_id

    def _folders(self, video_id: str) -> dict[str, str]:
        """Display name -> folder, in prompt order, special groups last."""
        path = self._video(video_id)
        listed = self.get_video_metadata(video_id).get("tokens", [])
        try:
            folders = {str(entry["name"]): str(entry["folder"]) for entry in listed}
        except (TypeError, KeyError) as error:
            raise ArtifactError(f"{path / VIDEO_METADATA}: tokens want name and folder ({error!r}); {REMEDY}") from error
        if any(Path(folder).name != folder or folder in ("", ".", "..") for folder in folders.values()):
            raise ArtifactError(f"{path / VIDEO_METADATA}: a token's folder leaves the clip's own; {REMEDY}")
        known = set(folders.values())
        present = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and entry.name != AGGREGATED)
        folders.update({name: name for name in present if name not in known and name not in SPECIAL_GROUPS})
        folders.update({name: name for name in SPECIAL_GROUPS if name in present})
        return folders

    def get_token_folder(self, video_id: str, token_word: str) -> str:
        """The folder of a word, asked for by its name in any case or by the folder itself.

        Raises:
            UsageError: no such word; lists those there are.
        """
        folders = self._folders(video_id)
        if token_word in folders:
            return folders[token_word]
        for name, folder in folders.items():
            if token_word == folder or _normal(name) == _normal(token_word):
                return folder
        words = [name for name, folder in folders.items() if folder not in SPECIAL_GROUPS]
        raise UsageError(f"--token {token_word!r} was not stored for {video_id}; there are: {', '.join(words) or '(none)'}")

    def _aggregated_path(self, video_id: str, token_word: str) -> Path | None:
        folder = self.get_token_folder(video_id, token_word)
        for suffix in _FORMATS.values():
            path = self._video(video_id) / AGGREGATED / f"{folder}_aggregated{suffix}"
            if path.exists():
                return path
        return None

    # -- loading

    def load_step(self, video_id: str, token_word: str, step: int) -> AttentionMap:
        """One step's map.

        Raises:
            UsageError: no such video or token (lists those there are).
            ArtifactError: the step's file is missing, damaged, or does not fit its metadata.
        """
        folder = self._video(video_id) / self.get_token_folder(video_id, token_word)
        paths = [folder / f"step_{step:03d}{suffix}" for suffix in _FORMATS.values()]
        path = next((path for path in paths if path.exists()), None)
        if path is None:
            steps = self.get_available_steps(video_id, token_word)
            span = f"steps {steps[0]} to {steps[-1]} are there" if steps else "no step is there"
            raise ArtifactError(f"{paths[0]}: missing ({span}); {REMEDY}")
        return self._load(path)

    @staticmethod
    def _load(path: Path) -> AttentionMap:
        metadata = AttentionMetadata.read(_metadata_path(path))
        values = _load_array(path)
        if list(values.shape) != list(metadata.shape) or str(values.dtype) != metadata.dtype:
            raise ArtifactError(f"{path}: {values.dtype}{list(values.shape)}, its metadata says {metadata.dtype}{metadata.shape}; {REMEDY}")
        return AttentionMap(values, metadata)

    def iter_steps(self, video_id: str, token_word: str) -> Iterator[tuple[int, AttentionMap]]:
        """(step, map) in order, one in memory at a time.

        Raises:
            ArtifactError: no step, or one in the middle missing (a run that still goes on lacks only its last steps).
        """
        steps = self.get_available_steps(video_id, token_word)
        if not steps:
            raise ArtifactError(f"{self.attention_dir / video_id / self.get_token_folder(video_id, token_word)}: no steps stored; {REMEDY}")
        for expected, step in enumerate(steps):
            if expected != step:
                self.load_step(video_id, token_word, expected)  # raises, naming the file
        for step in steps:
            loaded = self.load_step(video_id, token_word, step)
            yield step, loaded

    def load_all_steps(self, video_id: str, token_word: str) -> dict[int, AttentionMap]:
        """step -> map, all in memory (``iter_steps`` holds one)."""
        return dict(self.iter_steps(video_id, token_word))

    def load_aggregated(self, video_id: str, token_word: str) -> AttentionMap:
        """The mean over steps: the stored one, or computed from the steps when there is none."""
        path = self._aggregated_path(video_id, token_word)
        if path is not None:
            return self._load(path)
        total: np.ndarray | None = None
        steps: list[int] = []
        for step, loaded in self.iter_steps(video_id, token_word):
            total = loaded.attention_map.astype(np.float64) + (0 if total is None else total)
            steps.append(step)
        assert total is not None
        mean = (total / len(steps)).astype(loaded.attention_map.dtype)
        metadata = dataclasses.replace(
            loaded.metadata, num_steps=len(steps), steps_used=steps, aggregation_method="mean", timestep=None,
            averaged_over=[*loaded.metadata.averaged_over, "step"],
        )  # fmt: skip
        return AttentionMap(mean, metadata)


def frame_map(loaded: AttentionMap, block: int | None = None, head: int | None = None) -> np.ndarray:
    """[F, H, W] float32 on the map's own grid: one block or head picked, the others averaged.

    Raises:
        UsageError: a block or head that was not stored apart, or out of range.
        ArtifactError: axes that do not fit the array.
    """
    values, axes = loaded.attention_map, list(loaded.metadata.axes)
    if values.ndim == 2 and len(axes) == 3:  # maps of one picture, as the user guide's example shows them
        values = values[None]
    if values.ndim != len(axes) or axes[-3:] != ["frame", "y", "x"]:
        raise ArtifactError(f"a map of {loaded.metadata.token_word!r} is {list(values.shape)} with axes {axes}; {REMEDY}")
    values = values.astype(np.float32)
    for name, index in (("block", block), ("head", head)):
        if name in axes:
            axis = axes.index(name)
            if index is not None and not 0 <= index < values.shape[axis]:
                raise UsageError(f"--{name} {index}: there are {values.shape[axis]}, counted from 0")
            values = values.mean(axis=axis) if index is None else values.take(index, axis=axis)
            axes.remove(name)
        elif index is not None:
            raise UsageError(f"--{name} {index}: the maps are means over {name}s; store them apart with store_per_{name}: true")
    return values
