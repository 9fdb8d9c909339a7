# The model of tiny.py, AR pre-trained, then converted in blocks of 4 behind a clean causal context: the AR model stays,
# and python sample.py --verify writes its very output in fewer passes. Downloads nothing.
# python convert.py config/tiny_block.py      about 7 minutes on 2 CPU cores, 1 GB of memory, 0.1 GB of disk
model_config = """{"model_type": "llama", "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4,
                  "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512,
                  "tie_word_embeddings": true}"""
tokenizer_name = "bytes"
dataset_name = "pydoc"
max_seq_length = 256
eval_samples = 64

block_size = 4
full_mask_share = 0.5  # what drafts start from
distill_weight = 1.0  # drafts are to agree with the AR model, which is there in the same run
lm_loss_weight = 1.0
lm_loss_stages = "123"  # costs only its rows of the head

# 8 windows x 256 bytes = 2,048 bytes a step, 1,000 steps: AR 500, attention 50, diffusion 400, recovery 50
batch_size = 8
gradient_accumulation_steps = 1
max_steps = 1000
stage0_epochs = 5.0
stage1_epochs = 0.5
stage2_epochs = 4.0
stage3_epochs = 0.5
learning_rate = 1.2e-3
stage0_lr_scale = 1.6  # random weights take more than trained ones
warmup_steps = 30

dtype = "float32"  # bfloat16 is slow on many CPUs
compile_model = False  # would cost more seconds than it saves here
use_8bit_adam = False  # 1.8 M parameters need no saving
use_gradient_checkpointing = False
eval_steps = 100
save_steps = 500
sample_prompt = "The statement "
