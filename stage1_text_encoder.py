"""Stage 1: a prompt becomes embeddings. Loads the tokenizer and the UMT5 encoder only.

Writes stage1_embeddings.safetensors and generation_config.json into --output_dir.
"""

from __future__ import annotations

import sys

from wan_common import stages
from wan_common.config import MeshOptions, PromptOptions, RunOptions, parse_options
from wan_common.errors import run_command


def main(argv: list[str] | None = None) -> None:
    """Parse, see whether the outputs are current, else load, shard, run, save."""
    options = parse_options(argv, "stage1_text_encoder.py", __doc__, (RunOptions, PromptOptions, MeshOptions))
    plan = stages.plan_text(options)
    if plan.is_current():
        return
    plan.start_devices()
    encoder = stages.load_text_encoder(plan)
    embeddings = stages.encode(plan, encoder)
    plan.save(embeddings)


if __name__ == "__main__":
    sys.exit(run_command(main))
