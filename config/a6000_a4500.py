# One 48 GB and one 20 GB card (RTX A6000 and A4500), for a model with adapters. Name it after a
# model file; the effective batch stays.
# torchrun --nproc_per_node=2 convert.py config/phi2_lora.py config/a6000_a4500.py
# Estimated, not measured: each card has the whole model and of each 8 windows takes 5 and 3, as
# bench.py --estimate --cards=48:155,20:95 proposes. Gradients of adapters are small, so the pair
# is 1.6 times as fast as the A6000 alone.
# Not for full training of Phi-2: a replica does not fit the A4500, and shares of it
# (--parallel=fsdp) barely do and move 11 GB through PCIe for each micro-batch, which may take as
# long as the second card saves. There take config/single_a6000.py.
parallel = "ddp"
rank_batch_sizes = "5,3"
gradient_accumulation_steps = max(1, batch_size * gradient_accumulation_steps // 8)
batch_size = 8  # of both together
device = "cuda"
dtype = "bfloat16"  # for Ampere and later; has float32's range, so needs no loss scaling
compile_model = True
use_8bit_adam = True
use_gradient_checkpointing = True
