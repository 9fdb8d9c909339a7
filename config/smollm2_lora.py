# Adapters for SmolLM2-135M-Instruct, trained on its own answers to 922 questions (48 more are
# held out) and to 599 that it asks itself. It drafts for itself, 1.49 tokens per forward, 1.67 with
# --tree=8, and its answers stay exactly the same.
# python convert.py config/smollm2_lora.py
#     62 minutes of one thread of a busy CPU, with --dtype=bfloat16, which is faster on some;
#     4 GB of memory, 3 GB of disk
# python sample.py --out_dir=outputs/smollm2_lora_diffusion --chat --verify --compare \
#     --prompt="Why is the sky blue?"
from pathlib import Path

exec(Path(__file__).with_name("smollm2.py").read_text())  # the same model, batch and CPU settings

dataset_name = str(Path(__file__).resolve().parent.parent / "assets/chat_prompts.jsonl")
own_prompts = 900  # more questions, which the model asks itself; 599 had an end
on_policy_tokens = 250000  # more than all answers together, 117,000

block_size = 4
full_mask_share = 1.0  # the adapters are used for drafting only
distill_weight = 1.0
use_lora = True
noise = "uniform"  # drafts start from random tokens,
causal_blocks = True  # and see what is before them: as engines run them, with no special mask
use_time_embedding = False  # drafting starts fully masked, so the noise level is always the same
use_gradient_checkpointing = False  # faster, and memory suffices

# 4 windows x 128 tokens = 512 tokens a step
max_steps = 400
stage1_epochs = 0.0
stage2_epochs = 1.0
stage3_epochs = 0.0
learning_rate = 1e-3
warmup_steps = 20

eval_samples = 16
eval_steps = 125
log_steps = 5
save_steps = 100
