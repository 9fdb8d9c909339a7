# Gemma3-270M's dimensions, so that bench.py needs no hub; on top of a model file, or alone.
# python bench.py config/shapes/gemma3_270m.py --random_weights
model_config = (
    '{"model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 640, "intermediate_size": 2048, '
    '"num_hidden_layers": 18, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, '
    '"max_position_embeddings": 32768, "sliding_window": 512, "query_pre_attn_scalar": 256}'
)
tokenizer_name = "bytes"
