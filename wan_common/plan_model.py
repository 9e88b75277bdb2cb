"""The model to plan for: one of the published two, a local diffusers folder, or the configs of a hub id."""

from __future__ import annotations

import json
from pathlib import Path

from wan_common.errors import ArtifactError
from wan_common.published import PUBLISHED, SHORT_NAMES, ModelConfigs

COMPONENTS = {"transformer": "transformer", "text_encoder": "text_encoder", "vae": "vae"}


def model_configs(model_id: str) -> ModelConfigs:
    """The configs of ``model_id``; weights are not needed.

    Raises:
        ArtifactError: neither published, a folder with the three configs, nor to be had from the hub.
    """
    model_id = SHORT_NAMES.get(model_id, model_id)
    if model_id in PUBLISHED:
        return PUBLISHED[model_id]
    folder = Path(model_id)
    if not folder.is_dir():
        folder = _download(model_id)
    configs = {}
    for name, component in COMPONENTS.items():
        path = folder / component / "config.json"
        try:
            configs[name] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{path}: not readable ({error}); choose a Wan 2.1 diffusers folder with --model_id") from error
    return ModelConfigs(model_id, configs["transformer"], configs["text_encoder"], configs["vae"])


def _download(model_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model_id, allow_patterns=[f"{part}/config.json" for part in COMPONENTS.values()]))
    except Exception as error:  # the hub's client raises its own, requests' and the OS's errors alike
        known = ", ".join(PUBLISHED)
        raise ArtifactError(
            f"{model_id}: no such folder, and its configs cannot be had from the hub ({type(error).__name__}); "
            f"choose one of {known} (built in), or a local folder, such as demo_model, with --model_id"
        ) from error
