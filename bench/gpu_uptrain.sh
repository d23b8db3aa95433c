#!/usr/bin/env bash
# A short uptraining on one GPU, for its speed: bench/gpu_uptrain.sh MODEL OUT [DEVICE]
# Folds MODEL's layers in two loops with LoRA and trains 1,000,000 tokens of this Python's standard library, with the
# base as teacher, on one process. OUT/metrics.jsonl, all that is left of it, has tokens/s, MFU and memory.
set -euo pipefail
cd "$(dirname "$0")/.."
model=$1 out=$2 device=${3:-cuda}
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'cp "$work/run/metrics.jsonl" "$out" || true; rm -rf "$work"' EXIT
trap 'exit 143' TERM # so that the metrics so far are kept
mkdir -p "$out"
"$python" train/prepare_data.py --input python-stdlib --tokenizer "$model" --out "$work/data"
"$python" -m rrt.convert --base "$model" --out "$work/relaxed" --num-loops 2 --init stepwise \
    --lora-rank "${GPU_LORA_RANK:-64}" --lora-init svd
"$python" train/uptrain.py --checkpoint.path "$work/relaxed" --distill.teacher "$model" --distill.weight 0.9 \
    --data.path "$work/data" --data.seq_len "${GPU_SEQ_LEN:-1024}" --run.out "$work/run" \
    --run.tokens "${GPU_TOKENS:-1048576}" --run.batch_tokens "${GPU_BATCH_TOKENS:-16384}" \
    --run.micro_batch "${GPU_MICRO_BATCH:-8}" --run.device "$device" --run.dtype bf16 --run.lora merged \
    --run.save_every 0 --run.log_every 4 --optim.lr 5e-4 --optim.warmup_steps 4 --guard.loss_spike inf
