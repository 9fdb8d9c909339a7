# Phi-2 (2.78 B) into a diffusion LM on wikitext-103: whole sequence, three stages.
# python convert.py config/phi2.py config/single_a6000.py
#     needs the hub once, and one card of 40 GB or more
# Estimated, not measured: weights 4 + gradients 4 + 8-bit Adam 2 bytes, times 2.78 B = 28 GB.
# With gradient checkpointing, 1 GB of activations and 0.6 GB of logits. 17 GB of disk per
# checkpoint. Full training does not fit a 20 GB card.
model_name = "microsoft/phi-2"
max_seq_length = 512

# 2 windows x 16 = 32 windows x 512 tokens = 16,384 tokens a step
batch_size = 2
gradient_accumulation_steps = 16
learning_rate = 1e-4
noise_schedule = "linear"  # 5 % less NELBO than cosine in a small world (assets/recipe.md)

device = "cuda"
dtype = "bfloat16"  # Phi-2's attention overflows in float16
use_8bit_adam = True  # 32-bit Adam would need 17 GB more
use_gradient_checkpointing = True
