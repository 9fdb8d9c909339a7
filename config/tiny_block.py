# The model of tiny.py, AR pre-trained, then converted in blocks of 4 behind a clean causal context: the AR model stays,
# and python sample.py --verify writes its very output in fewer passes. Downloads nothing.
# python convert.py config/tiny_block.py      about 6 minutes on 2 CPU cores, 1 GB of memory, 0.1 GB of disk
from pathlib import Path

exec(Path(__file__).with_name("tiny.py").read_text())  # the model, the data, the batch, the rate

block_size = 4
full_mask_share = 0.5  # what drafts start from
distill_weight = 1.0  # drafts are to agree with the AR model, which is there in the same run
lm_loss_weight = 1.0
lm_loss_stages = "123"  # costs only its rows of the head
use_time_embedding = False  # the block itself shows how much of it is masked
on_policy_tokens = 200000  # what will be drafted is the model's own text, as it writes after stage 0 ...
on_policy_share = 0.25  # ... which, taken alone, would cost it what it knows

# 8 windows x 256 bytes = 2,048 bytes a step, 950 steps: AR 500, attention 50, diffusion 400
max_steps = 950
stage0_epochs = 5.0
stage1_epochs = 0.5
stage2_epochs = 4.0
stage3_epochs = 0.0  # the causal loss is there all along, so there is nothing to recover

eval_steps = 100
save_steps = 500
