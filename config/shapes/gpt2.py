# GPT-2's dimensions, so that bench.py needs no hub; on top of a model file, or alone.
# python bench.py config/shapes/gpt2.py --random_weights
model_config = '{"model_type": "gpt2", "vocab_size": 50257}'
tokenizer_name = "bytes"
