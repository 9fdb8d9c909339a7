# LLaMA-2 13B's dimensions, so that bench.py needs no hub; on top of a model file, or alone.
# python bench.py config/shapes/llama13b.py --random_weights
model_config = (
    '{"model_type": "llama", "vocab_size": 32000, "hidden_size": 5120, "intermediate_size": 13824, '
    '"num_hidden_layers": 40, "num_attention_heads": 40, "max_position_embeddings": 4096}'
)
tokenizer_name = "bytes"
