#!/usr/bin/env bash
# The paper's settings on R1-Distill-Qwen-7B, as far as they are known (second-hand), on one GPU of 80 GB.
#
#   recipes/r1_7b_paper.sh --dry-run
#   EXPERT=endpoint=MODEL@URL recipes/r1_7b_paper.sh
#
# No line of this has been run on a GPU. Interrupted, it goes on where it stopped.
#
# Deviations from the paper
#   1. RL trains the SFT adapter on, not every weight: full state is 16 to 18 bytes a parameter, 122 GB and more.
#   2. The expert is whatever EXPERT names; the paper's is a commercial model.
#   3. Own wording of the rules, of the verification prompt and of the expert's prompt; the paper's are not known.
#   4. JailBreak-R1 and Trotter are left out: no public copy. Yours: SUITES="...,own=FILE".
# Fixed by the paper, in real.sh: 8 samples, one safe and one unsafe answer a harmful prompt, one a benign one, 6000
# records, LoRA r16 alpha 32, 2 epochs, lr 2e-4; GRPO with 64 prompts x 8, std-normalised advantage, no KL; 3000 DAPO
# problems; Qwen3Guard as the reward.
source "$(dirname "$0")/common.sh"

MODEL=${MODEL:-deepseek-ai/DeepSeek-R1-Distill-Qwen-7B}
OUT=${OUT:-runs/r1-7b}
SEED=${SEED:-0}  # a claim about a method takes several: run again with another
METHODS=${METHODS:-verification star1 safechain}  # SFT arms, of equal supervised tokens
RL_METHODS=${RL_METHODS:-verification star1}  # the paper's two

# What the paper leaves open
EXPERT=${EXPERT:-endpoint=expert@http://localhost:8000/v1}  # any OpenAI-compatible server; the key is in OPENAI_API_KEY
EXPERT_FREE=${EXPERT_FREE:-}  # yes: RL on verification alone, without critiques
SPEC=${SPEC:-star}  # eight categories, as in STAR-1's policy; another file: SPEC=PATH
PROMPTS=${PROMPTS:-safechain:vanilla}  # the paper names no pool; this one has harmful and benign requests, not gated
CANDIDATE_PROMPTS=${CANDIDATE_PROMPTS:-safechain:vanilla}  # the same kind; training leaves those prompts out
CANDIDATES=${CANDIDATES:-600}  # frozen answers to judge: F1 to about 4 points
REWARD_GUARD=${REWARD_GUARD:-qwen3guard=Qwen/Qwen3Guard-Gen-4B}  # the size is open; 4B is within a point of 8B
CONTROVERSIAL=${CONTROVERSIAL:-unsafe}  # the guard's strict mode, which its authors use as a reward
SAMPLE_TEMPERATURE=${SAMPLE_TEMPERATURE:-0.6}  # the model card's advice
SAMPLE_TOP_P=${SAMPLE_TOP_P:-0.95}  # the same
SAMPLE_TOKENS=${SAMPLE_TOKENS:-8192}  # what comparable work allows for safety prompts
WARMUP=${WARMUP:-0.05}  # customary
SFT_MAX_LEN=${SFT_MAX_LEN:-8192}  # longer records are rare
SFT_TOKENS_PER_STEP=${SFT_TOKENS_PER_STEP:-65536}  # about 64 records a step
MICRO_TOKENS=${MICRO_TOKENS:-8192}  # memory alone; no result depends on it
RL_PROMPTS=${RL_PROMPTS:-"safechain:vanilla@2#2000 dapo@3#3000"}  # the paper's 3000 problems; 2000 requests as in RECAP
RL_STEPS=${RL_STEPS:-78}  # one pass over 5000 prompts
RL_LORA_R=${RL_LORA_R:-16}  # deviation 1; the rank of the adapter
RL_LR=${RL_LR:-1e-5}  # the paper's 1e-6 is for every weight; LoRA takes about ten times that
RL_TEMPERATURE=${RL_TEMPERATURE:-1.0}  # GRPO's custom; the ratio is exact at any
RL_TOKENS=${RL_TOKENS:-4096}  # time and memory; one that reaches it earns 0. RECAP has 8000
CLIP_LOW=${CLIP_LOW:-0.2}  # customary
CLIP_HIGH=${CLIP_HIGH:-0.28}  # as DAPO; 0.2 for symmetric clipping
SUITES=${SUITES:-strongreject,fortress,wildjailbreak:250,hcot,xstest,math500,aime24}  # the paper's, as reconstructed
JUDGES=${JUDGES:-wildguard,qwen3guard=Qwen/Qwen3Guard-Gen-4B}  # the first was no reward; the second shows what it hides
VERIFY_OWN=${VERIFY_OWN:-500}  # fresh own answers to judge
source "$(dirname "$0")/real.sh"
