#!/usr/bin/env bash
# A policy of one's own on a real model: a kitchen without sugar. Data, SFT, GRPO, evaluation before and after, report.
#
#   examples/sugar_free/run.sh        MODEL=Qwen/Qwen3-0.6B OUT=runs/mine examples/sugar_free/run.sh        ... --dry-run
#
# Without MODEL it is SmolLM2-135M-Instruct out of a Python package (requirements-real.txt). Interrupted, it goes on
# where it stopped. The settings are for a small model on a CPU.
#
# SmolLM2's template opens no thinking and the model has never thought: an answer of its is all answer, and the
# critique of a verification is a thinking that the target opens itself. PLAN=yes begins with a short SFT on its own
# answers, each with a plan of one sentence as thinking, so that there is a thinking in which a check can appear; those
# records also go along with the verifications, so that ordinary requests stay ordinary. PLAN= leaves both out.
source "$(dirname "$0")/../../recipes/common.sh"

KITCHEN=examples/sugar_free
OUT=${OUT:-runs/sugar_free}
MODEL=${MODEL:-}
SEED=${SEED:-0}
PLAN=${PLAN-yes}
PROMPTS=${PROMPTS:-$KITCHEN/prompts.jsonl}
SUITES=${SUITES:-$KITCHEN/suites}  # plain, role, story, urgent, benign
N=${N:-6}                          # own answers a prompt
TOKENS=${TOKENS:-240}              # of an answer and its thinking
PLAN_LR=${PLAN_LR:-5e-5}           # every weight
SFT_LR=${SFT_LR:-5e-4}             # LoRA
EPOCHS=${EPOCHS:-2}
RL_STEPS=${RL_STEPS:-12}           # 0: no GRPO
RL_PROMPTS=${RL_PROMPTS:-16}       # a step

if [ -z "$MODEL" ]; then
    MODEL=$OUT/smollm2
    if [ -n "$DRY" ] || [ ! -e "$MODEL" ]; then run -m bench.smollm2 --out "$MODEL"; fi
fi

dishes= tested=() trained=()
for name in plain role story urgent; do
    dishes+="own=$SUITES/$name.jsonl:metric=asr,"
    tested+=("own=$SUITES/$name.jsonl:metric=asr")
done
tested+=("own=$SUITES/benign.jsonl:metric=compliance")
label=(--guard $KITCHEN/policy.py --expert $KITCHEN/policy.py --spec $KITCHEN/policy.txt --records 0)
sample=(--temperature 0.7 --top-p 0.95 --max-tokens "$TOKENS")
sft=(--max-len 768 --tokens-per-step 3072 --micro-tokens 1536 --epochs "$EPOCHS" --seed "$SEED")

# Own answers; with PLAN the model first learns to think one sentence before them.
start=$MODEL
if [ -n "$PLAN" ]; then
    step "$OUT/own" make_data.py --model "$MODEL" --prompts "own=$PROMPTS" --n 2 "${label[@]}" "${sample[@]}" \
        --decontaminate "${tested[@]}" --seed "$SEED"
    if [ ! -e "$OUT/plan.jsonl" ]; then run -m examples.sugar_free.plan "$OUT/own" "$OUT/plan.jsonl"; fi
    step "$OUT/plan-$SEED" train_sft.py --model "$MODEL" --data "$OUT/plan.jsonl" --lora-r 0 --lr "$PLAN_LR" "${sft[@]}"
    start=$OUT/plan-$SEED/model
    trained+=("$OUT/plan-$SEED")
fi

# Held-out answers to verify, the same for every model; training data; verification SFT; GRPO.
step "$OUT/candidates" make_data.py --model "$start" --prompts "own=$SUITES/plain.jsonl:kind=harmful" --n "$N" \
    "${label[@]}" "${sample[@]}" --decontaminate none --seed 1000
step "$OUT/data" make_data.py --model "$start" --prompts "own=$PROMPTS" --n "$N" "${label[@]}" "${sample[@]}" \
    --decontaminate "${tested[@]}" --seed "$SEED"
records=$OUT/data/verify.jsonl
if [ -n "$PLAN" ]; then
    if [ -z "$DRY" ]; then cat "$OUT/data/verify.jsonl" "$OUT/plan.jsonl" >"$OUT/records.jsonl"; fi
    records=$OUT/records.jsonl
fi
step "$OUT/verification-$SEED" train_sft.py --model "$start" --data "$records" --lr "$SFT_LR" "${sft[@]}"
methods="verification"
if [ "$RL_STEPS" != 0 ]; then  # kind=benign: the reward is a recipe without sugar, and a refusal earns nothing
    step "$OUT/verification+grpo-$SEED" train_rl.py --model "$start" --adapter "$OUT/verification-$SEED/model" \
        --prompts "own=$PROMPTS:kind=benign" --guard $KITCHEN/policy.py --steps "$RL_STEPS" --group 4 \
        --prompts-per-step "$RL_PROMPTS" --max-prompt 64 --max-tokens "$TOKENS" --lr 1e-4 --micro-tokens 1536 \
        --decontaminate "${tested[@]}" --seed "$SEED"
    methods+=" verification+grpo"
fi

measure() {  # FOLDER MODEL [ADAPTER]
    step "$1" evaluate.py --model "$2" ${3:+--adapter "$3"} --judge $KITCHEN/policy.py --spec $KITCHEN/policy.txt \
        --suite "$dishes${tested[-1]},verify=$OUT/candidates/verify.jsonl" --samples 1 \
        "${sample[@]}" --seed "$SEED"
}
before=$OUT/eval-base
evaluations=("$before")
measure "$before" "$MODEL"
if [ -n "$PLAN" ]; then
    before=$OUT/eval-plan-$SEED
    evaluations+=("$before")
    measure "$before" "$start"
fi
for method in $methods; do
    trained+=("$OUT/$method-$SEED")
    evaluations+=("$OUT/eval-$method-$SEED")
    measure "$OUT/eval-$method-$SEED" "$start" "$OUT/$method-$SEED/model"
    run evaluate.py --compare "$before" "$OUT/eval-$method-$SEED"
done
run evaluate.py --report "${evaluations[@]}" --out "$OUT/report"
run -m bench.sugar_free "${evaluations[@]}" "${trained[@]}"
