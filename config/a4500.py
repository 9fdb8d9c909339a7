# One 20 GB card (RTX A4500, RTX 4000 Ada). Name it after a model file; the effective batch stays.
# python convert.py config/gpt2.py config/a4500.py
# Estimated, not measured: 10 bytes per parameter and the activations, so full training of models
# up to about 1.3 B parameters. Phi-2 does not fit.
gradient_accumulation_steps = max(1, batch_size * gradient_accumulation_steps // 4)
batch_size = 4  # halved if memory runs out
max_memory_gb = 17.0  # a cap that leaves 3 GB for the screen and the driver
device = "cuda"
dtype = "bfloat16"  # for Ampere and later; has float32's range, so needs no loss scaling
compile_model = True
use_8bit_adam = True
use_gradient_checkpointing = True
