# The model of tiny.py, AR pre-trained, then converted with blocks of 4 behind a clean causal
# context. The AR model stays, and sample.py --verify gives exactly its output in fewer passes.
# Downloads nothing.
# python convert.py config/tiny_block.py
#     about 6 minutes on 2 CPU cores, 1 GB of memory, 0.1 GB of disk
from pathlib import Path

exec(Path(__file__).with_name("tiny.py").read_text())  # the same model, data, batch and rate

block_size = 4
full_mask_share = 0.5  # drafting starts from blocks that are masked entirely
distill_weight = 1.0  # drafts should agree with the AR mode of the same weights
lm_loss_weight = 1.0
lm_loss_stages = "123"  # nearly free: only the head computes more
use_time_embedding = False  # the model sees how much of a block is masked
on_policy_tokens = 200000  # at decoding time the model drafts its own text; generated after stage 0
on_policy_share = 0.25  # on its own text alone, the AR model would forget

# 32 windows x 64 tokens = 2,048 tokens a step, 750 steps: AR 250, attention 50, diffusion 450
max_steps = 750
stage0_epochs = 2.5
stage1_epochs = 0.5
stage2_epochs = 4.5
stage3_epochs = 0.0  # every stage has the AR loss, so there is nothing to recover

eval_steps = 100
save_steps = 500
