# Llama-3.2 3B's dimensions, so that bench.py needs no hub; on top of a model file, or alone.
# python bench.py config/shapes/llama3b.py --random_weights
model_config = (
    '{"model_type": "llama", "vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192, '
    '"num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8, '
    '"head_dim": 128, "max_position_embeddings": 4096, "tie_word_embeddings": true}'
)
tokenizer_name = "bytes"
