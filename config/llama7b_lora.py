# LLaMA-2 7B with adapters that draft for it: the base stays as it is, in bfloat16, and so does its text. Not run yet.
# python convert.py config/llama7b_lora.py      needs the hub (a gated model) and one card of 20 GB or more
# By arithmetic, not measured: 13.5 GB of weights; adapters of rank 32 are 80 M parameters, 0.8 GB with their optimizer;
# writing its own text takes 8.6 GB more for the cache of 32 texts at once, which is halved if memory runs out.
from pathlib import Path

exec(Path(__file__).with_name("phi2_lora.py").read_text())  # the recipe; the base alone is another

model_name = "meta-llama/Llama-2-7b-hf"
