# LLaMA-2 7B's dimensions, so that bench.py needs no hub; on top of a model file, or alone.
# python bench.py config/shapes/llama7b.py --random_weights
model_config = (
    '{"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, '
    '"num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 4096}'
)
tokenizer_name = "bytes"
