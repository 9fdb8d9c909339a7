# LLaMA-2 7B with adapters that draft for it: the base stays as it is, in bfloat16, and so does its text. Not run yet.
# python convert.py config/llama7b_lora.py      needs the hub (a gated model) and one card of 20 GB or more
# By arithmetic, not measured: 13.5 GB of weights; adapters of rank 32 are 80 M parameters, 0.8 GB with their optimizer.
model_name = "meta-llama/Llama-2-7b-hf"

block_size = 4
use_lora = True
full_mask_share = 1.0  # drafts are all that it is for
distill_weight = 1.0
use_time_embedding = False  # drafts start fully masked: there is one time only
on_policy_tokens = 2000000  # what will be drafted is the model's own text

# 2 windows x 8 = 16 windows x 512 tokens = 8,192 tokens a step
max_seq_length = 512
batch_size = 2
gradient_accumulation_steps = 8
stage1_epochs = 0.0
stage2_epochs = 4.0
stage3_epochs = 0.0
learning_rate = 5e-4

dtype = "bfloat16"
use_gradient_checkpointing = True
