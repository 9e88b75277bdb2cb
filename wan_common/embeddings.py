"""``stage1_embeddings.safetensors``: what stage 1 hands to stage 2, self-describing, and checked when it is read."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np

from wan_common.artifacts import CONFIG_NAME, EMBEDDINGS_NAME, STAGE1, Job, Model, RunDir, sha256_file
from wan_common.errors import ArtifactError, NumericalError
from wan_common.tensor_io import load_tensors, save_tensors

REMEDY = "rerun stage1_text_encoder.py"


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """N prompts, encoded.

    Attributes:
        prompt: [N, L, D] bf16 or fp32; zero past each prompt's length. negative: [1, L, D], shared by all prompts.
        token_ids: [N, L] int32. negative_token_ids: [1, L] int32.
        prompts: cleaned texts, markers stripped. words: a list a prompt of ``{"word", "span", "tokens", "target"}``.
        num_tokens: real tokens a prompt, EOS included. negative_num_tokens, negative_words: the same of the negative prompt.
        model: identity of tokenizer and text encoder.
    """

    prompt: np.ndarray
    negative: np.ndarray
    token_ids: np.ndarray
    negative_token_ids: np.ndarray
    prompts: list[str]
    negative_prompt: str
    words: list[list[dict[str, Any]]]
    negative_words: list[dict[str, Any]]
    num_tokens: list[int]
    negative_num_tokens: int
    model: dict[str, Any]
    sha256: str = ""

    def save(self, path: Path, job: Job) -> None:
        """Write the file, atomically."""
        tensors = {
            "prompt_embeds": self.prompt, "negative_prompt_embeds": self.negative,
            "token_ids": self.token_ids, "negative_token_ids": self.negative_token_ids,
        }  # fmt: skip
        described = {
            "prompts": self.prompts, "negative_prompt": self.negative_prompt, "words": self.words, "negative_words": self.negative_words,
            "num_tokens": self.num_tokens, "negative_num_tokens": self.negative_num_tokens, "model": self.model,
        }  # fmt: skip
        header = {key: json.dumps(value, ensure_ascii=False) for key, value in described.items()}
        save_tensors(path, tensors, {"format": "wan_tpu.embeddings", "fingerprint": job.fingerprint, **header})


def load_embeddings(run: RunDir, force: bool = False) -> Embeddings:
    """Read and check the embeddings of a run directory.

    Raises:
        ArtifactError: missing, truncated or foreign; or not the file that the folder's config describes (unless ``force``).
        NumericalError: NaN or infinity in them.
    """
    path = run / EMBEDDINGS_NAME
    tensors, header = load_tensors(path, REMEDY)
    try:
        if header.get("format") != "wan_tpu.embeddings":
            raise ValueError(f"format is {header.get('format')!r}")
        described = {key: json.loads(header[key]) for key in (
            "prompts", "negative_prompt", "words", "negative_words", "num_tokens", "negative_num_tokens", "model")}  # fmt: skip
        loaded = Embeddings(
            tensors["prompt_embeds"], tensors["negative_prompt_embeds"], tensors["token_ids"], tensors["negative_token_ids"],
            **described, sha256=sha256_file(path),
        )  # fmt: skip
        n, length, _ = loaded.prompt.shape
        if loaded.negative.shape != (1, *loaded.prompt.shape[1:]) or loaded.token_ids.shape != (n, length) or len(loaded.words) != n:
            raise ValueError(f"shapes {loaded.prompt.shape}, {loaded.negative.shape}, {loaded.token_ids.shape} do not fit")
    except (KeyError, ValueError) as error:
        raise ArtifactError(f"{path}: not an embeddings file of stage 1 ({error}); {REMEDY}") from error
    for name, array in (("prompt_embeds", loaded.prompt), ("negative_prompt_embeds", loaded.negative)):
        if not np.isfinite(array.astype(np.float32)).all():
            raise NumericalError(f"{path}: {name} holds NaN or infinity; {REMEDY} --force")
    recorded = run.record(STAGE1)
    entry = recorded.get("outputs", {}).get(EMBEDDINGS_NAME)
    if entry and "read_from" not in recorded and entry["sha256"] != loaded.sha256 and not force:
        raise ArtifactError(f"{path}: not the file that {CONFIG_NAME} beside it describes; {REMEDY}, or use it as it is with --force")
    return loaded


def check_fits(embeddings: Embeddings, run: RunDir, model: Model, text_dim: int, force: bool = False) -> None:
    """Refuse embeddings that this transformer does not understand.

    Raises:
        ArtifactError: another width than ``text_dim``, or made by another text encoder than the one in the model's folder.
    """
    path = run / EMBEDDINGS_NAME
    typed = run.record(STAGE1).get("settings", {}).get("prompt", embeddings.prompts[0])  # with its (marks)
    prompts = f"--prompt {shlex.quote(typed)}" if isinstance(typed, str) and len(embeddings.prompts) == 1 else "--prompts_file FILE"
    again = f"rerun stage1_text_encoder.py --model_id {model.model_id} {prompts} --output_dir {run.path}"
    if embeddings.prompt.shape[2] != text_dim:
        raise ArtifactError(
            f"{path}: prompt_embeds is {list(embeddings.prompt.shape)}, the transformer of {model.model_id} wants "
            f"text_dim {text_dim}; {again}"
        )
    if (model.path / "text_encoder").is_dir() and not force:
        found = embeddings.model.get("text_encoder", {})
        wanted = model.identity("text_encoder")["text_encoder"]
        if found.get("sha256") != wanted["sha256"]:
            raise ArtifactError(
                f"{path}: made by the text encoder of {found.get('model_id')}, which differs from that of {model.model_id}; "
                f"{again}, or use them with --force"
            )
