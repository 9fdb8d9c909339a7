# a Llama of 1.1 B parameters, dimensions, so that bench.py needs no hub; on top of a model file, or alone.
# python bench.py config/shapes/1b.py --random_weights
model_config = (
    '{"model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, '
    '"num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4, '
    '"max_position_embeddings": 2048}'
)
tokenizer_name = "bytes"
