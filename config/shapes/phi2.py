# Phi-2's dimensions, so that bench.py needs no hub; on top of a model file, or alone.
# python bench.py config/shapes/phi2.py --random_weights
model_config = (
    '{"model_type": "phi", "vocab_size": 51200, "hidden_size": 2560, "intermediate_size": 10240, '
    '"num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 2048, '
    '"partial_rotary_factor": 0.4, "resid_pdrop": 0.1}'
)
tokenizer_name = "bytes"
