# One 20 GB card (RTX A4500, RTX 4000 Ada), on top of a model file; the effective batch stays as that file set it.
# python convert.py config/gpt2.py config/a4500.py
# By arithmetic, not measured: 10 bytes a parameter and activations, so models up to about 1.3 B in full; Phi-2 not.
gradient_accumulation_steps = max(1, batch_size * gradient_accumulation_steps // 4)
batch_size = 4  # halved if memory runs out
max_memory_gb = 17.0  # a cap: 3 GB stay for the screen and the driver
dtype = "bfloat16"  # Ampere and later; float32's range, so no loss scaling
compile_model = True
use_8bit_adam = True
use_gradient_checkpointing = True
