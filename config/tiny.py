# A Llama of 1.4 M parameters and a small world of stories: AR pre-training from scratch (stage 0),
# then the three stages. Downloads nothing.
# python convert.py config/tiny.py
#     about 4 minutes on 2 CPU cores, 1 GB of memory, 0.1 GB of disk
# initializer_range: with the usual 0.02, the heads that copy a word from further up form late
model_config = """{"model_type": "llama", "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 3,
                  "num_attention_heads": 6, "num_key_value_heads": 6, "max_position_embeddings": 512,
                  "tie_word_embeddings": true, "initializer_range": 0.06}"""
tokenizer_name = "bpe"  # trained on the data; each word of this world becomes one token
dataset_name = "world"
max_seq_length = 64  # a story is as long
eval_samples = 64

# 32 windows x 64 tokens = 2,048 tokens a step
# 1000 steps: AR 250, attention 30, diffusion 600, recovery 120
batch_size = 32
gradient_accumulation_steps = 1
max_steps = 1000
stage0_epochs = 2.5
stage1_epochs = 0.3
stage2_epochs = 6.0
stage3_epochs = 1.2
lm_loss_stages = "23"  # AR loss beside the diffusion loss, or stage 2 costs the model its AR mode
noise_schedule = "linear"
learning_rate = 1.5e-3
stage0_lr_scale = 1.6  # random weights can take a higher rate than trained ones
warmup_steps = 30

dtype = "float32"  # bfloat16 is slow on many CPUs
compile_model = False  # compiling takes longer than it saves here
use_8bit_adam = False  # not needed for 1.4 M parameters
use_gradient_checkpointing = False
eval_steps = 100
save_steps = 500
sample_prompt = "Today Mia has two red balls."
