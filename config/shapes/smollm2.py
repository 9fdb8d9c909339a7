# SmolLM2-135M's dimensions, so that bench.py needs no hub; on top of a model file, or alone.
# python bench.py config/shapes/smollm2.py --random_weights
model_config = (
    '{"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, '
    '"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, '
    '"max_position_embeddings": 8192, "tie_word_embeddings": true}'
)
tokenizer_name = "bytes"
