# GPT-2 (124 M) into a diffusion LM on wikitext-103: whole sequence, three stages,
# 205 M tokens in all.
# python convert.py config/gpt2.py      needs the hub once and any GPU of 6 GB or more
# Estimated, not measured: 124 M x 10 bytes = 1.3 GB, activations of 16 windows about 4 GB, and
# 0.8 GB of disk per checkpoint.
model_name = "openai-community/gpt2"
max_seq_length = 512

# 16 windows x 2 = 32 windows x 512 tokens = 16,384 tokens a step
batch_size = 16
gradient_accumulation_steps = 2
learning_rate = 3e-4
noise_schedule = "linear"  # 5 % less NELBO than cosine in a small world (assets/recipe.md)

dtype = "bfloat16"  # fast on a GPU; has float32's range, so needs no loss scaling
use_gradient_checkpointing = False  # not needed to fit
