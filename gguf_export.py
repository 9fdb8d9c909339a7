"""Write a whole-sequence conversion as one GGUF file, with which llama.cpp generates by unmasking.

  python sample.py --export=gguf                          # the newest run under outputs/
  llama-diffusion-cli -m model.gguf -p "The capital of France is" -ub 64 --diffusion-steps 32
      --diffusion-eps 0.001 --temp 0.2      # 64 tokens with the prompt; 0 would mean temperature 1

To llama.cpp it is of the architecture "dream": the shape of Llama and Qwen2, attention to all
tokens and, as here, the token at a position read from the row before it.
"""
import json
import math
import os

import numpy as np
import torch

from configurator import RunError, UserError, errors_as
from corpus import opening
from model_files import sync

try:
    import gguf
except ImportError:
    raise UserError("export: it needs gguf; pip install -e '.[gguf]'") from None

FAMILIES = {"llama", "mistral", "qwen2"}  # those of this shape: no other norms or biases
VOCABULARY = {"token_embd.weight", "output.weight"}  # a row for each token
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
GPT2 = BYTES | {"use_regex": True}
QWEN2 = {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex":
         r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+"}}
LLAMA3 = QWEN2 | {"pattern": {"Regex": QWEN2["pattern"]["Regex"].replace("N}|", "N}{1,3}|")}}
# the ways to cut text into words that llama.cpp knows by name (src/llama-vocab.cpp)
SPLITS = {"gpt-2": [GPT2], "smollm": [{"type": "Digits", "individual_digits": True}, GPT2],
          "qwen2": [QWEN2, BYTES], "llama-bpe": [LLAMA3, BYTES]}
# without a chat template llama.cpp takes one of ChatML, which a base model has not seen
PLAIN = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def check_model(model):
    """Raise UserError for a model that llama.cpp would not run as it was trained."""
    config = model.lm.config
    if config.model_type not in FAMILIES:
        raise UserError(f"export: llama.cpp's diffusion takes {', '.join(sorted(FAMILIES))}, not "
                        f"'{config.model_type}'")
    rope = config.rope_parameters["rope_type"]
    biased = {k.split(".")[-2] for k in model.lm.state_dict() if k.endswith(".bias")}
    mistakes = {
        "a time embedding; train with --use_time_embedding=false": model.time_mlp is not None,
        "adapters at masks alone; train with --use_lora=false": model.adapters,
        "blocks, as it attends to all of a window; train with --block_size=0": model.block_size,
        "causal attention; train with --use_bidirectional_attention=true": not model.bidirectional,
        "other noise than masks; train with --noise=mask": model.noise != "mask",
        f"positions of the kind '{rope}'": rope != "default",
        f"the activation '{config.hidden_act}'": config.hidden_act != "silu",
        "a bias there": biased - {"q_proj", "k_proj", "v_proj"},
        "heads that do not share hidden_size among them":
            model.lm.model.layers[0].self_attn.q_proj.out_features != config.hidden_size,
    }
    for mistake, made in mistakes.items():
        if made:
            raise UserError(f"export: llama.cpp's diffusion does not know {mistake}")


def split_name(backend):
    """What llama.cpp calls the way in which a byte-level BPE cuts text into words; UserError if
    nothing. backend: the tokenizer, as the library tokenizers writes it in JSON."""
    bpe, split, name = backend["model"], backend["pre_tokenizer"] or {}, None
    steps = split.get("pretokenizers", [split])
    for known, wanted in SPLITS.items():
        same = [a | b == a for a, b in zip(steps, wanted, strict=False)]
        if all(same) and len(steps) == len(wanted):
            name = known
    if not bpe.get("merges"):  # no piece is longer than a byte, so it does not matter
        name = "gpt-2"
    normal = (backend["normalizer"] or {"type": "NFC"})["type"]  # llama.cpp has no NFC, so far
    if (bpe["type"] != "BPE" or steps[-1].get("type") != "ByteLevel" or not name or normal != "NFC"
            or bool(bpe.get("ignore_merges")) != (name == "llama-bpe")):
        raise UserError("export: llama.cpp has no name for this tokenizer; it has for byte-level "
                        "BPE that cuts text as GPT-2, SmolLM2, Qwen2 or Llama 3")
    return name


def add_tokenizer(writer, tokenizer, n_tokens):
    """Add the vocabulary to a file, and the mask behind its n_tokens ids."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split_name(backend))
    kinds = gguf.TokenType
    pieces = {i: (piece, kinds.NORMAL) for piece, i in backend["model"]["vocab"].items()}
    for token in backend["added_tokens"]:
        kind = kinds.CONTROL if token["special"] else kinds.USER_DEFINED
        pieces[token["id"]] = token["content"], kind
    rows = [pieces.get(i, (f"[PAD{i}]", kinds.UNUSED)) for i in range(n_tokens)]
    mask = "<|mask|>"
    while mask in tokenizer.get_vocab():
        mask = f"<{mask}>"
    rows.append((mask, kinds.CONTROL))
    writer.add_token_list([piece for piece, _ in rows])
    writer.add_token_types([kind for _, kind in rows])
    merges = [" ".join(pair) for pair in backend["model"]["merges"]]
    writer.add_token_merges(merges or [f"{mask} {mask}"])  # GGUF has no empty list
    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id,
           "padding": tokenizer.pad_token_id, "mask": n_tokens}
    for name, token_id in ids.items():
        if token_id is not None:
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token_id)
    writer.add_add_bos_token(bool(opening(tokenizer)))
    template = tokenizer.chat_template
    writer.add_chat_template(template if isinstance(template, str) else PLAIN)


def add_shape(writer, model):
    """Add what llama.cpp asks of the model before it reads the weights."""
    config = model.lm.config
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_vocab_size(model.mask_id + 1)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_causal_attention(False)
    writer.add_diffusion_shift_logits(True)  # the token at a position is read from the row before


def as_array(name, p, mask_embedding):
    """A weight as the file holds it: matrices in float16, those of the vocabulary with the mask's
    row.

    llama.cpp may draw the mask as a token. The mean of the head's rows makes its logit the mean of
    all logits, in any hidden state: never the highest, and at most 1 / V of the probability.
    """
    p = p.detach().float().cpu()
    if name in VOCABULARY:
        row = mask_embedding.detach().float().cpu() if name == "token_embd.weight" else p.mean(0)
        p = torch.cat([p, row[None]])
    array = p.numpy().astype(np.float16 if p.dim() > 1 else np.float32)
    if not np.isfinite(array).all():
        raise UserError(f"export: {name} has weights beyond the range of float16")
    return array


def write_file(path, model, tokenizer):
    """Write the file of export_gguf(), with one weight at a time in memory."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DREAM, model.lm.config.num_hidden_layers)
    weights = {names.get_name(name, (".weight", ".bias")): p  # a tied head is in it, too
               for name, p in model.lm.state_dict().items()}
    writer = gguf.GGUFWriter(path, "dream")
    add_shape(writer, model)
    add_tokenizer(writer, tokenizer, model.mask_id)
    for name, p in weights.items():
        shape = [len(p) + (name in VOCABULARY), *p.shape[1:]]
        kind = np.dtype(np.float16 if p.dim() > 1 else np.float32)
        writer.add_tensor_info(name, shape, kind, math.prod(shape) * kind.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, p in weights.items():
        writer.write_tensor_data(as_array(name, p, model.mask_embedding))
    writer.close()


def export_gguf(model, tokenizer, path):
    """Write a model (DiffusionLM) to a .gguf file, entirely or not at all. UserError if llama.cpp
    would not run it as it was trained."""
    check_model(model)
    temporary = path.with_name(f"{path.name}.new")
    try:
        with errors_as(f"export: cannot write {path}", RunError):
            write_file(temporary, model, tokenizer)
            sync(temporary)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
