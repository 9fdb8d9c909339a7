# LLaMA-2 7B with adapters that draft for it. The base, in bfloat16, and its text stay exactly as
# they are. Not run yet.
# python convert.py config/llama7b_lora.py
#     needs the hub (a gated model) and one card of 20 GB or more
# Estimated, not measured: 13.5 GB of weights. Adapters of rank 32 are 80 M parameters, 0.8 GB
# with their optimizer. Generating on-policy text takes 8.6 GB more for the cache of 32 texts at a
# time, which are halved if memory runs out.
from pathlib import Path

exec(Path(__file__).with_name("phi2_lora.py").read_text())  # the same recipe for another base model

model_name = "meta-llama/Llama-2-7b-hf"
