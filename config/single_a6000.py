# One 48 GB card (RTX A6000, A40, L40). Name it after a model file; the effective batch stays.
# python convert.py config/phi2.py config/single_a6000.py
gradient_accumulation_steps = max(1, batch_size * gradient_accumulation_steps // 8)
# Estimated, not measured: Phi-2 takes 28 GB, and 8 windows of 512 tokens another 5 GB
batch_size = 8  # halved if memory runs out
max_memory_gb = 45.0  # a cap that leaves 3 GB for the screen and the driver
device = "cuda"
dtype = "bfloat16"  # for Ampere and later; has float32's range, so needs no loss scaling
compile_model = True
use_8bit_adam = True
use_gradient_checkpointing = True
