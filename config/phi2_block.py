# Phi-2 (2.78 B) as a block-diffusion model that keeps its AR mode: blocks of 4, all weights
# train. Not run yet.
# python convert.py config/phi2_block.py config/single_a6000.py
#     needs the hub once, and one card of 48 GB
# Estimated, not measured: 28 GB of weights, gradients and 8-bit Adam. A step runs on twice its
# tokens, a clean and a noisy copy.
model_name = "microsoft/phi-2"

block_size = 4
noise_schedule = "linear"  # as in tiny_block.py, whose blocks are measured
full_mask_share = 0.5  # drafting starts from blocks that are masked entirely
distill_weight = 1.0
lm_loss_weight = 1.0
lm_loss_stages = "123"  # nearly free: only the head computes more
use_time_embedding = False  # the model sees how much of a block is masked
on_policy_tokens = 2000000  # at decoding time the model drafts its own text
on_policy_share = 0.25  # on its own text alone, the AR model would forget
stage3_epochs = 0.0  # every stage has the AR loss, so there is nothing to recover

# 1 window x 32 = 32 windows x 512 tokens = 16,384 tokens a step
max_seq_length = 512
batch_size = 1
gradient_accumulation_steps = 32
learning_rate = 5e-5

device = "cuda"
dtype = "bfloat16"  # Phi-2's attention overflows in float16
use_8bit_adam = True
use_gradient_checkpointing = True
