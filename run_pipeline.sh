#!/usr/bin/env bash
# The whole story on the embedded demo model: a prompt becomes a video in three stages, then everything that happened is drawn.
#   ./run_pipeline.sh                                              the default prompt
#   ./run_pipeline.sh "a green square moving up on a white background"
# Other settings: OUT=folder  MODEL=folder-or-hub-id  SEED=n  ./run_pipeline.sh "..."
set -euo pipefail
cd "$(dirname "$0")"
source setup_env.sh requirements.txt

PROMPT="${1:-a (red) (circle) moving (right) on a (blue) background}"
OUT="${OUT:-stage_outputs}"
MODEL="${MODEL:-demo_model}"
SEED="${SEED:-42}"
begun=$SECONDS

step() { echo; echo "== $*"; }

step "1/5 text encoding   reads: the prompt   writes: $OUT/stage1_embeddings.safetensors, generation_config.json"
python stage1_text_encoder.py --model_id "$MODEL" --prompt "$PROMPT" --output_dir "$OUT"

step "2/5 denoising       reads: the embeddings   writes: $OUT/stage2_latents.safetensors, step_latents/, attention_maps/"
python stage2_transformer.py --model_id "$MODEL" --input_dir "$OUT" --output_dir "$OUT" --seed "$SEED" \
    --save_step_latents --store_attention

step "3/5 VAE decoding    reads: the latents   writes: $OUT/output_video.mp4"
python stage3_vae_decoder.py --model_id "$MODEL" --input_dir "$OUT"

step "4/5 the denoising   reads: step_latents/   writes: $OUT/frames/ (contact sheet, videos, plots)"
python visualize_frames.py --input_dir "$OUT" --output_dir "$OUT/frames"

step "5/5 the attention   reads: attention_maps/   writes: $OUT/attention/attention_report.html"
python visualize_attention.py --input_dir "$OUT" --output_dir "$OUT/attention" --report

step "done in $((SECONDS - begun)) s: $OUT/output_video.mp4"
