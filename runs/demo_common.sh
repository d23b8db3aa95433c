# Shared by the two demos, which source it from the repository's root with OUT, SEQ_LEN, BATCH_TOKENS, MICRO_BATCH,
# PROCESSES, THREADS, DEVICE, DTYPE and SETTINGS (further flags of every training) set,
# and HELDOUT if it is not the held-out part of OUT/data.

# bf16 where the CPU multiplies it in hardware (elsewhere it is emulated and slow), else fp32.
best_dtype() { grep -qw avx512_bf16 /proc/cpuinfo 2>/dev/null && echo bf16 || echo fp32; }

begin() { # empties OUT, which must be an earlier demo's or not exist
    if [ -n "$(ls -A "$OUT" 2>/dev/null)" ] && [ ! -e "$OUT/.demo" ]; then
        echo "error: $OUT: exists and is not an earlier demo's; name another DEMO_OUT" >&2
        exit 2
    fi
    rm -rf "$OUT"
    mkdir -p "$OUT"
    touch "$OUT/.demo"
    began=$SECONDS
}
step() { printf '\n=== %s (%d s)\n' "$1" $((SECONDS - began)); }
train() { # command, output directory, tokens, learning rate, further flags
    local launch=(python)
    [ "$PROCESSES" = 1 ] || launch=(torchrun --nproc-per-node "$PROCESSES")
    OMP_NUM_THREADS=$THREADS "${launch[@]}" "train/$1.py" --data.path "$OUT/data" \
        --data.seq_len "$SEQ_LEN" --run.out "$OUT/$2" --run.tokens "$3" --optim.lr "$4" \
        --run.batch_tokens "$BATCH_TOKENS" --run.micro_batch $((MICRO_BATCH / PROCESSES)) --run.device "$DEVICE" \
        --run.dtype "$DTYPE" --run.save_every 0 "${SETTINGS[@]}" "${@:5}"
}
measure() { # name, checkpoint, further flags
    python eval/perplexity.py --checkpoint "$2" --data "${HELDOUT:-$OUT/data}" --context "$SEQ_LEN" --device "$DEVICE" \
        --dtype "$DTYPE" ${EVAL_TOKENS:+--max-tokens "$EVAL_TOKENS"} --json "$OUT/$1.json" "${@:3}"
}
