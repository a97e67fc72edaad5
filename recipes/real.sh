# The lines of the recipes for real models; sourced by them, which set every variable that is used here.

# EXPERT_FREE=yes: no critiques; verification is learnt by RL from the guard's labels, and no answer is trained.
if [ -n "$EXPERT_FREE" ]; then EXPERT=none METHODS=verify-rl RL_METHODS=verify-rl; fi

# Frozen answers to judge, the same for every checkpoint, from prompts that training leaves out.
label=(--guard "$REWARD_GUARD" --controversial "$CONTROVERSIAL" --expert "$EXPERT" --spec "$SPEC")
sample=(--n 8 --temperature "$SAMPLE_TEMPERATURE" --top-p "$SAMPLE_TOP_P" --max-tokens "$SAMPLE_TOKENS")

step "$OUT/candidates" make_data.py --model "$MODEL" --prompts $CANDIDATE_PROMPTS --records "$CANDIDATES" \
    "${sample[@]}" "${label[@]}" --decontaminate all --seed 1000

step "$OUT/data" make_data.py --model "$MODEL" --prompts $PROMPTS --records 6000 "${sample[@]}" "${label[@]}" \
    --decontaminate all "verify=$OUT/candidates/verify.jsonl" --baseline star1:published safechain --seed "$SEED"

if [ -n "$EXPERT_FREE" ]; then
    step "$OUT/verify-rl-$SEED" train_rl.py --model "$MODEL" --prompts "verify=$OUT/data/verify.jsonl" --lora-r 16 \
        --lr 1e-5 --steps "$RL_STEPS" --prompts-per-step 64 --group 8 --advantage std --max-prompt "$SFT_MAX_LEN" \
        --temperature "$RL_TEMPERATURE" --max-tokens "$RL_TOKENS" --micro-tokens "$MICRO_TOKENS" --seed "$SEED"
fi

declare -A records=([verification]=verify.jsonl [star1]=star.jsonl [safechain]=safechain.jsonl)
for method in ${METHODS/verify-rl/}; do
    step "$OUT/$method-$SEED" train_sft.py --model "$MODEL" --data "$OUT/data/${records[$method]}" --target both \
        --lora-r 16 --lora-alpha 32 --lr 2e-4 --epochs 2 --warmup "$WARMUP" --max-len "$SFT_MAX_LEN" \
        --tokens-per-step "$SFT_TOKENS_PER_STEP" --micro-tokens "$MICRO_TOKENS" --seed "$SEED"
done

for method in $RL_METHODS; do
    step "$OUT/$method+grpo-$SEED" train_rl.py --model "$MODEL" --adapter "$OUT/$method-$SEED/model" \
        --lora-r "$RL_LORA_R" --lr "$RL_LR" --prompts $RL_PROMPTS --guard "$REWARD_GUARD" \
        --controversial "$CONTROVERSIAL" --steps "$RL_STEPS" --prompts-per-step 64 --group 8 --advantage std \
        --temperature "$RL_TEMPERATURE" --max-tokens "$RL_TOKENS" --clip-low "$CLIP_LOW" --clip-high "$CLIP_HIGH" \
        --micro-tokens "$MICRO_TOKENS" --seed "$SEED"
done

# measure METHOD FOLDER: METHOD is base or a training run of $OUT, which holds an adapter or a whole model
measure() {
    local where=(--model "$MODEL")
    if [ "$1" != base ]; then where=(--model "$MODEL" --adapter "$OUT/$1-$SEED/model"); fi
    if [ "$1" != base ] && [ -e "$OUT/$1-$SEED/model/config.json" ]; then where=(--model "$OUT/$1-$SEED/model"); fi
    step "$2" evaluate.py "${where[@]}" --suite "$SUITES,verify=$OUT/candidates/verify.jsonl" --judge "$JUDGES" \
        --controversial "$CONTROVERSIAL" --verify-own "$VERIFY_OWN" --spec "$SPEC" --seed "$SEED"
}

evaluations=("$OUT/eval-base")
measure base "$OUT/eval-base"
for method in $METHODS $(printf '%s+grpo ' $RL_METHODS); do
    measure "$method" "$OUT/eval-$method-$SEED"
    run evaluate.py --compare "$OUT/eval-base" "$OUT/eval-$method-$SEED"
    evaluations+=("$OUT/eval-$method-$SEED")
done
run evaluate.py --report "${evaluations[@]}" --out "$OUT/report"
