#!/usr/bin/env bash
# The whole method on the embedded world, no download: data, verification SFT, GRPO, every suite, comparison, report.
#
#   recipes/pocket.sh              OUT=runs/mine SEED=1 recipes/pocket.sh              recipes/pocket.sh --dry-run
#
# Interrupted, it goes on where it stopped. Deviations from the paper: expert, guard and judge are the pocket's exact
# oracle; learning rates are the pocket's own (--help of each script shows both); RL goes on training the SFT adapter.
# A demonstration and a test bench, not evidence about large models.
source "$(dirname "$0")/common.sh"

OUT=${OUT:-runs/pocket}
SEED=${SEED:-0}   # of everything: prompts, samples, LoRA, data order
BASE=pocket/base

step "$OUT/data" make_data.py --model $BASE --seed "$SEED"
step "$OUT/verification-$SEED" train_sft.py --model $BASE --data "$OUT/data/verify.jsonl" --evaluate false \
    --seed "$SEED"
step "$OUT/verification+grpo-$SEED" train_rl.py --model $BASE --adapter "$OUT/verification-$SEED/model" \
    --evaluate false --seed "$SEED"

step "$OUT/eval-base" evaluate.py --model $BASE --suite pocket --seed "$SEED"
evaluations=("$OUT/eval-base")
for method in verification verification+grpo; do
    evaluations+=("$OUT/eval-$method-$SEED")
    step "$OUT/eval-$method-$SEED" evaluate.py --model $BASE --adapter "$OUT/$method-$SEED/model" --suite pocket \
        --seed "$SEED"
done

run evaluate.py --compare "${evaluations[0]}" "${evaluations[1]}"
run evaluate.py --compare "${evaluations[1]}" "${evaluations[2]}"
run evaluate.py --report "${evaluations[@]}" --out "$OUT/report"
