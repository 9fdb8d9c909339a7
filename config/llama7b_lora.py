# LLaMA-2 7B with adapters that draft for it, on one 20 GB card. The base is kept in 4 bits: this is
# the model that the drafts are checked by. --load_in_4bit=false keeps it in bfloat16, on 24 GB.
# Not run yet.
# python convert.py config/llama7b_lora.py
#     needs the hub (a gated model) and one card of 12 GB or more
# Estimated, not measured: 6.4 GB, of which the base takes 4.2. Generating on-policy text takes up
# to 8.6 GB more for the cache of 32 texts at a time, which are halved if memory runs out.
# python bench.py config/llama7b_lora.py config/shapes/llama7b.py --estimate
from pathlib import Path

exec(Path(__file__).with_name("phi2_lora.py").read_text())  # the same recipe for another base model

model_name = "meta-llama/Llama-2-7b-hf"
load_in_4bit = True
