# One 48 GB card (RTX A6000, A40, L40), on top of a model file; the effective batch stays as that file set it.
# python convert.py config/phi2.py config/single_a6000.py
gradient_accumulation_steps = max(1, batch_size * gradient_accumulation_steps // 8)
batch_size = 8  # by arithmetic, not measured: Phi-2 28 GB + 8 windows of 512 tokens, 5 GB; halved if memory runs out
max_memory_gb = 45.0  # a cap: 3 GB stay for the screen and the driver
dtype = "bfloat16"  # Ampere and later; float32's range, so no loss scaling
compile_model = True
use_8bit_adam = True
use_gradient_checkpointing = True
