# LLaMA-2 13B with adapters that draft for it, on one 48 GB card. The base, in bfloat16, and its
# text stay exactly as they are. --load_in_4bit keeps it in 4 bits, on 20 GB. Not run yet.
# python convert.py config/llama13b_lora.py
#     needs the hub (a gated model) and one card of 40 GB or more
# Estimated, not measured: 29 GB, of which the base takes 26.0; with --load_in_4bit 10.5 GB.
# Generating on-policy text takes up to 13.4 GB more, see llama7b_lora.py.
# python bench.py config/llama13b_lora.py config/shapes/llama13b.py --estimate
from pathlib import Path

exec(Path(__file__).with_name("phi2_lora.py").read_text())  # the same recipe for another base model

model_name = "meta-llama/Llama-2-13b-hf"
