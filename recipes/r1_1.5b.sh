#!/usr/bin/env bash
# The same lines for R1-Distill-Qwen-1.5B on one GPU of 24 GB (LoRA in RL) or, with RL_LORA_R=0 RL_LR=1e-6, of 80 GB.
#
#   recipes/r1_1.5b.sh --dry-run                       EXPERT=endpoint=MODEL@URL recipes/r1_1.5b.sh
#
# No line of this has been run on a GPU. Interrupted, it goes on where it stopped.
#
# Deviations from the paper
#   1. The model: the paper's are of 7B, 8B and 14B. Nothing here can be compared with its figures.
#   2. RL trains the SFT adapter on unless RL_LORA_R=0: every weight takes 32 GB of state, before samples and guard.
#   3. The small guard (0.6B) is the reward, since it shares the GPU.
#   4. The expert is whatever EXPERT names; own wording of rules and prompts; JailBreak-R1 and Trotter are left out.
#   5. Sampling and RL are cut off earlier (4096 and 2048 tokens), for time.
# Fixed by the paper, in real.sh: see r1_7b_paper.sh, where the reasons of what is the same here stand too.
source "$(dirname "$0")/common.sh"

MODEL=${MODEL:-deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B}
OUT=${OUT:-runs/r1-1.5b}
SEED=${SEED:-0}
METHODS=${METHODS:-verification star1}  # two arms, for time
RL_METHODS=${RL_METHODS:-verification}

# What the paper leaves open
EXPERT=${EXPERT:-endpoint=expert@http://localhost:8000/v1}
EXPERT_FREE=${EXPERT_FREE:-}  # yes: RL on verification alone, without critiques
SPEC=${SPEC:-star}
PROMPTS=${PROMPTS:-safechain:vanilla}
CANDIDATE_PROMPTS=${CANDIDATE_PROMPTS:-safechain:vanilla}
CANDIDATES=${CANDIDATES:-600}
REWARD_GUARD=${REWARD_GUARD:-qwen3guard=Qwen/Qwen3Guard-Gen-0.6B}  # deviation 3; two points below 8B on responses
CONTROVERSIAL=${CONTROVERSIAL:-unsafe}
SAMPLE_TEMPERATURE=${SAMPLE_TEMPERATURE:-0.6}
SAMPLE_TOP_P=${SAMPLE_TOP_P:-0.95}
SAMPLE_TOKENS=${SAMPLE_TOKENS:-4096}  # deviation 5
WARMUP=${WARMUP:-0.05}
SFT_MAX_LEN=${SFT_MAX_LEN:-4096}  # as the samples
SFT_TOKENS_PER_STEP=${SFT_TOKENS_PER_STEP:-65536}
MICRO_TOKENS=${MICRO_TOKENS:-8192}
RL_PROMPTS=${RL_PROMPTS:-"safechain:vanilla@2#2000 dapo@3#3000"}
RL_STEPS=${RL_STEPS:-78}
RL_LORA_R=${RL_LORA_R:-16}  # deviation 2; 0 trains every weight
RL_LR=${RL_LR:-1e-5}  # 1e-6 with RL_LORA_R=0
RL_TEMPERATURE=${RL_TEMPERATURE:-1.0}
RL_TOKENS=${RL_TOKENS:-2048}  # deviation 5
CLIP_LOW=${CLIP_LOW:-0.2}
CLIP_HIGH=${CLIP_HIGH:-0.28}
SUITES=${SUITES:-strongreject,fortress,wildjailbreak:250,hcot,xstest,math500}  # AIME is beyond this model
JUDGES=${JUDGES:-wildguard,qwen3guard=Qwen/Qwen3Guard-Gen-0.6B}
VERIFY_OWN=${VERIFY_OWN:-500}
source "$(dirname "$0")/real.sh"
