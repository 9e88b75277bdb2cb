"""The run directory: file names, provenance, what is stale and why, and which model the files came from.

Imports nothing heavy: a stage whose outputs are current ends before torch or JAX are loaded.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import logging
import os
from pathlib import Path
from typing import Any

from wan_common.atomic import make_output_dir, remove_temporaries, write_json
from wan_common.errors import ArtifactError

logger = logging.getLogger("artifacts")
SCHEMA_VERSION = 2  # 1: seed 001's flat keys alone
CONFIG_NAME = "generation_config.json"
EMBEDDINGS_NAME = "stage1_embeddings.safetensors"
STAGE1, STAGE2, STAGE3 = "stage1", "stage2", "stage3"
SCRIPTS = {STAGE1: "stage1_text_encoder.py", STAGE2: "stage2_transformer.py", STAGE3: "stage3_vae_decoder.py"}
FULL_HASH_BYTES = 256 * 2**20  # weights beyond this are identified by samples: hashing 28 GB at each start takes a minute
_PACKAGES = ("torch", "torchax", "jax", "libtpu", "diffusers", "transformers", "safetensors")


def clip_suffix(prompt_index: int | None, seed: int | None) -> str:
    """``""``, ``"_seed3"``, ``"_prompt002"`` or ``"_prompt002_seed3"``: only what tells a clip from its siblings."""
    prompt = "" if prompt_index is None else f"_prompt{prompt_index + 1:03d}"
    return prompt + ("" if seed is None else f"_seed{seed}")


def latents_name(suffix: str) -> str:
    """File name of a clip's latents."""
    return f"stage2_latents{suffix}.safetensors"


def checkpoint_name(suffix: str) -> str:
    """File name of a clip's checkpoint."""
    return f"stage2_checkpoint{suffix}.safetensors"


def step_latents_name(suffix: str) -> str:
    """Folder name of a clip's step latents."""
    return f"step_latents{suffix}"


def video_name(suffix: str) -> str:
    """File name of a clip's video."""
    return f"output_video{suffix}.mp4"


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(*parts: Any) -> str:
    """SHA-256 of JSON-able ``parts`` in canonical form."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Job:
    """What decides a stage's outputs: flags and other settings, input files by role with their hashes, model identities."""

    settings: dict[str, Any]
    inputs: dict[str, str]
    model: dict[str, Any]

    def as_record(self) -> dict[str, Any]:
        """As stored in provenance, read back from JSON (tuples become lists)."""
        return json.loads(json.dumps({"settings": self.settings, "inputs": self.inputs, "model": self.model}))

    @property
    def fingerprint(self) -> str:
        """Identifies the job; model ids and revisions are names, their hashes count."""
        record = self.as_record()
        return fingerprint(record["settings"], record["inputs"], _hashes_only(record["model"]))


def _hashes_only(model: dict[str, Any]) -> dict[str, Any]:
    return {part: {k: v for k, v in entry.items() if k.endswith("sha256")} for part, entry in model.items()}


class RunDir:
    """A folder with one generation's artifacts and its ``generation_config.json``."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def prepare(self) -> RunDir:
        """Create the folder, prove that it can be written, clear what killed writers left.

        Raises:
            ArtifactError: it cannot be written.
        """
        make_output_dir(self.path)
        remove_temporaries(self.path)
        return self

    def read_config(self) -> dict[str, Any]:
        """``generation_config.json``; {} when there is none.

        Raises:
            ArtifactError: not JSON, not an object, or of a newer schema.
        """
        path = self / CONFIG_NAME
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{path}: not readable ({error}); delete it and rerun stage1_text_encoder.py") from error
        if not isinstance(config, dict) or not isinstance(config.get("provenance", {}), dict):
            raise ArtifactError(f"{path}: found {type(config).__name__}, wanted an object; delete it and rerun stage1_text_encoder.py")
        if config.get("schema_version", 1) > SCHEMA_VERSION:
            raise ArtifactError(
                f"{path}: schema_version {config['schema_version']}, this version reads up to {SCHEMA_VERSION}; update the repository"
            )
        return config

    def record(self, stage: str) -> dict[str, Any]:
        """The provenance of ``stage``; {} when it has not run here."""
        found = self.read_config().get("provenance", {}).get(stage, {})
        return found if isinstance(found, dict) else {}

    def stale_reasons(self, stage: str, job: Job) -> list[str]:
        """Why ``stage`` has to run: what changed, by name; empty when its outputs are current."""
        record = self.record(stage)
        if not record:
            return ["it has not run in this folder"]
        wanted = job.as_record()
        reasons = []
        for name in sorted({*record.get("settings", {}), *wanted["settings"]}):
            old, new = record.get("settings", {}).get(name), wanted["settings"].get(name)
            if old != new:
                reasons.append(f"{name}: {_short(old)} -> {_short(new)}")
        for name in sorted({*record.get("inputs", {}), *wanted["inputs"]}):
            if record.get("inputs", {}).get(name) != wanted["inputs"].get(name):
                reasons.append(f"input {name} changed")
        old_model, new_model = _hashes_only(record.get("model", {})), _hashes_only(wanted["model"])
        reasons += [f"model part {part} changed" for part in sorted({*old_model, *new_model}) if old_model.get(part) != new_model.get(part)]
        for name, entry in record.get("outputs", {}).items():
            path = self.path / name
            if not path.is_file():
                reasons.append(f"output {name} is missing")
            elif path.stat().st_size != entry["bytes"] or sha256_file(path) != entry["sha256"]:
                reasons.append(f"output {name} is not the file this stage wrote")
        return reasons

    def save(self, stage: str, job: Job, outputs: list[Path], flat: dict[str, Any], **details: Any) -> None:
        """Write the provenance of ``stage`` and seed 001's flat keys, atomically.

        Args:
            outputs: files the stage wrote (absolute, or relative to the folder).
            flat: keys for the top level.
            details: more for the provenance (mesh, seconds ...).
        """
        config = self.read_config()
        provenance = config.get("provenance", {})
        config.update(flat)
        config["schema_version"] = SCHEMA_VERSION
        provenance[stage] = {
            **job.as_record(),
            "outputs": {
                self.name_of(path): {"sha256": sha256_file(path), "bytes": path.stat().st_size} for path in outputs
            },
            "versions": {name: _version(name) for name in _PACKAGES},
            "finished_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **details,
        }
        config["provenance"] = provenance
        write_json(self / CONFIG_NAME, config)

    def adopt(self, other: RunDir, stage: str) -> None:
        """Take over flat keys and the provenance of ``stage`` from another run directory that this one reads from."""
        if other.path.resolve() == self.path.resolve():
            return
        theirs, ours = other.read_config(), self.read_config()
        if not theirs:
            return
        mine = ours.get("provenance", {})
        taken = theirs.get("provenance", {}).get(stage)
        if taken:
            mine[stage] = {**taken, "read_from": str(other.path)}
        merged = {**ours, **{k: v for k, v in theirs.items() if k != "provenance"}, "provenance": mine}
        write_json(self / CONFIG_NAME, merged)

    def name_of(self, path: Path) -> str:
        """``path`` relative to the folder when it is inside, else absolute."""
        try:
            return str(path.resolve().relative_to(self.path.resolve()))
        except ValueError:
            return str(path.resolve())


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@dataclasses.dataclass(frozen=True)
class Model:
    """A diffusers model folder on this machine.

    Attributes:
        revision: the hub commit, when it was downloaded.
    """

    model_id: str
    path: Path
    revision: str | None = None

    def identity(self, *parts: str) -> dict[str, Any]:
        """Hashes of the component folders ``parts``: every small file whole; weights beyond FULL_HASH_BYTES by samples."""
        return {part: {"model_id": self.model_id, "revision": self.revision, **_hash_folder(self.path / part)} for part in parts}


def _hash_folder(folder: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    files = sorted(p for p in folder.glob("*") if p.is_file() and p.suffix in (".json", ".safetensors", ".model"))
    sampled = False
    for path in files:
        digest.update(f"{path.name}:{path.stat().st_size}:".encode())
        if path.stat().st_size <= FULL_HASH_BYTES:
            digest.update(bytes.fromhex(sha256_file(path)))
        else:
            sampled = True
            with open(path, "rb") as file:  # header, and 64 KiB from each of 256 places
                for i in range(256):
                    file.seek(i * (path.stat().st_size - 65536) // 255)
                    digest.update(file.read(65536))
    return {"sha256": digest.hexdigest(), "hashed": "sampled" if sampled else "whole"}


def find_model(model_id: str, parts: tuple[str, ...]) -> Model:
    """The folder of ``model_id`` (a local diffusers folder, or a hub id), with ``parts`` present.

    A hub id is looked for in the local cache first and downloaded otherwise, only the parts asked for.

    Raises:
        ArtifactError: no such folder or hub model, no network, or a part is missing; names ``--model_id demo_model``.
    """
    local = next((p for p in (Path(model_id), Path(__file__).parent.parent / model_id) if p.is_dir()), None)
    if local is not None:
        model = Model(model_id, local)
    elif model_id.count("/") == 1 and not model_id.startswith((".", "/")):
        model = _from_hub(model_id, parts)
    else:
        raise ArtifactError(f"--model_id {model_id}: no such folder, nor a hub id (owner/name); the embedded one is --model_id demo_model")
    for part in parts:
        if not (model.path / part).is_dir():
            present = ", ".join(sorted(p.name for p in model.path.iterdir() if p.is_dir())) or "no folder"
            raise ArtifactError(
                f"--model_id {model_id}: no {part}/ in it (it has {present}); choose a Wan 2.1 diffusers folder, or --model_id demo_model"
            )
    return model


def _from_hub(model_id: str, parts: tuple[str, ...]) -> Model:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["model_index.json", *(f"{part}/*" for part in parts)]
    try:
        try:
            path = Path(snapshot_download(model_id, allow_patterns=patterns, local_files_only=True))
            if not all((path / part).is_dir() for part in parts):
                raise LocalEntryNotFoundError("some parts are not in the cache")
        except LocalEntryNotFoundError:
            logger.info("downloading %s of %s", ", ".join(parts), model_id)
            path = Path(snapshot_download(model_id, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ArtifactError(
            f"--model_id {model_id}: not in the local cache and the hub cannot be reached ({reason}); "
            "give a local diffusers folder, or the embedded model: --model_id demo_model"
        ) from error
    return Model(model_id, path, revision=path.name)
