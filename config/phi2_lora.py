# Phi-2 with adapters that draft for it. The base, in bfloat16, and its output stay exactly as
# they are. Not run yet.
# python convert.py config/phi2_lora.py config/a4500.py
#     needs the hub once, and one card of 16 GB or more
# Estimated, not measured: 5.6 GB of weights. Adapters of rank 32 are 47 M parameters, 0.5 GB with
# their optimizer.
model_name = "microsoft/phi-2"

block_size = 4
use_lora = True
full_mask_share = 1.0  # the adapters are used for drafting only
distill_weight = 1.0
noise = "uniform"  # drafts start from random tokens,
causal_blocks = True  # and see what is before them: as engines run them, with no special mask
use_time_embedding = False  # drafting starts fully masked, so the noise level is always the same
on_policy_tokens = 2000000  # at decoding time the model drafts its own text

# 2 windows x 8 = 16 windows x 512 tokens = 8,192 tokens a step
max_seq_length = 512
batch_size = 2
gradient_accumulation_steps = 8
stage1_epochs = 0.0
stage2_epochs = 4.0
stage3_epochs = 0.0
learning_rate = 5e-4

device = "cuda"
dtype = "bfloat16"  # Phi-2's attention overflows in float16
use_gradient_checkpointing = True
