#!/usr/bin/env bash
# The whole path on a laptop from nothing, without network or GPU: make demo-scratch
#
# Trains a tokenizer and a small Llama on Python's standard library, folds the model into one block that runs twice,
# uptrains it plain, relaxed and distilled from the base, trains it to exit after its first loop, and measures
# everything on packages that training never saw.
# Results: runs/out/demo-scratch/{report.html,report.md,report.json,curves.png,*.json}. Settings are the variables below,
# from the environment; DEMO_EVAL_TOKENS and DEMO_FEWSHOT_LIMIT (documents of a task) limit the measurements, by default
# not.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
source runs/demo_common.sh

OUT=${DEMO_OUT:-runs/out/demo-scratch}
BASE_TOKENS=${DEMO_BASE_TOKENS:-1966080}
UPTRAIN_TOKENS=${DEMO_UPTRAIN_TOKENS:-491520}
EXIT_TOKENS=${DEMO_EXIT_TOKENS:-245760}
LORA_RANK=${DEMO_LORA_RANK:-16}
PROCESSES=${DEMO_PROCESSES:-2}
DEVICE=${DEMO_DEVICE:-cpu}
DTYPE=${DEMO_DTYPE:-$(best_dtype)}
EVAL_TOKENS=${DEMO_EVAL_TOKENS:-}
SEQ_LEN=256 BATCH_TOKENS=4096 MICRO_BATCH=16 THREADS=1
SETTINGS=(--run.lora plain --run.log_every 20 --optim.warmup_steps 20)

begin

step "tokenizer and corpus: the standard library of this Python"
python -m rrt.tokenizer train --input python-stdlib --vocab-size 512 --out "$OUT/tokenizer"
python train/prepare_data.py --input python-stdlib --tokenizer "$OUT/tokenizer" --out "$OUT/data"
python eval/bigram.py --train "$OUT/data" --data "$OUT/data" --json "$OUT/bigram.json"

step "base: a Llama of 6 layers, trained from scratch"
train pretrain base "$BASE_TOKENS" 1e-2 \
    --model.config runs/demo_scratch_base.json --model.tokenizer "$OUT/tokenizer"
measure base "$OUT/base/final"

step "reduced-size baseline: 3 layers, no loop, from scratch on as many tokens as uptraining gets"
train pretrain reduced "$UPTRAIN_TOKENS" 1e-2 \
    --model.config runs/demo_scratch_base.json --model.num_layers 3 --model.tokenizer "$OUT/tokenizer"
measure reduced "$OUT/reduced/final"

step "recursive: 3 shared layers run twice, initialised stepwise"
python -m rrt.convert --base "$OUT/base/final" --out "$OUT/recursive" --num-loops 2 --init stepwise
measure recursive-before "$OUT/recursive"
train uptrain recursive-uptrained "$UPTRAIN_TOKENS" 4e-3 --checkpoint.path "$OUT/recursive"
measure recursive-after "$OUT/recursive-uptrained/final"

step "relaxed: averaged layers and a LoRA of rank $LORA_RANK per depth, from the SVD"
python -m rrt.convert --base "$OUT/base/final" --out "$OUT/relaxed" --num-loops 2 --init average --lora-rank "$LORA_RANK" \
    --lora-init svd
measure relaxed-before "$OUT/relaxed"
train uptrain relaxed-uptrained "$UPTRAIN_TOKENS" 4e-3 --checkpoint.path "$OUT/relaxed"
measure relaxed-after "$OUT/relaxed-uptrained/final"

step "relaxed again, distilled from the base"
train uptrain distilled-uptrained "$UPTRAIN_TOKENS" 4e-3 \
    --checkpoint.path "$OUT/relaxed" --distill.teacher "$OUT/base/final"
measure distilled-after "$OUT/distilled-uptrained/final"

step "exits: the recursive model learns to exit after its first loop, from its last"
train early_exit exits-trained "$EXIT_TOKENS" 1e-3 --checkpoint.path "$OUT/recursive-uptrained/final" --exits.distill last
measure exits-after "$OUT/exits-trained/final"

step "export: the relaxed model as an ordinary HF Llama of 6 layers"
python -m rrt.export --checkpoint "$OUT/relaxed-uptrained/final" --out "$OUT/relaxed-hf"

step "early exits: agreement of that model's first loop with its second"
python eval/exits.py --checkpoint "$OUT/exits-trained/final" --data "$OUT/data" --context 256 --device "$DEVICE" \
    --dtype "$DTYPE" --out "$OUT/exits" --json "$OUT/exits.json"

step "few-shot: two tasks made up of held-out code (no benchmark)"
python runs/demo_scratch_tasks.py "$OUT/tasks"
for model in base recursive-uptrained relaxed-uptrained; do
    python eval/fewshot.py --checkpoint "$OUT/$model/final" --data-dir "$OUT/tasks" --tasks lambada_openai,hellaswag \
        --device "$DEVICE" --dtype "$DTYPE" ${DEMO_FEWSHOT_LIMIT:+--limit "$DEMO_FEWSHOT_LIMIT"} --cache "$OUT/tasks/cache" \
        --json "$OUT/fewshot-$model.json"
done

step "report"
python eval/report.py \
    "$OUT"/{bigram,base,reduced,recursive-before,recursive-after,relaxed-before,relaxed-after,distilled-after}.json \
    "$OUT"/{exits-after,exits}.json "$OUT"/fewshot-*.json \
    "$OUT"/{base,reduced,recursive-uptrained,relaxed-uptrained,distilled-uptrained,exits-trained} --out "$OUT/report.html"
python runs/demo_scratch_report.py "$OUT"
printf '\nDone in %d s. Table: %s/report.md  page: %s/report.html\n' $((SECONDS - began)) "$OUT" "$OUT"
