"""What reads and writes the folders of models: Hugging Face models and their tokenizers, adapters
on a base, and folders that are saved entirely or not at all."""
import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers import PreTrainedTokenizerFast

import processes
from configurator import RunError, UserError, did_you_mean, errors_as
from corpus import end_ids
from hub import check_hub


# ----------------------------------------------------------------------------------------------
# Loading
def byte_tokenizer():
    """A Hugging Face tokenizer of one token per byte, and an end of text: nothing to download."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def resolve_model(name):
    """(path, the arguments of from_pretrained()) of a hub name, a folder or a .gguf file. Code that
    comes with a model is not run, nor is it asked for."""
    path = Path(name)
    local = path.exists() or name[:1] in ("", ".", "/") or name.count("/") > 1
    if path.suffix == ".gguf":
        source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        return path, source | {"local_files_only": True, "trust_remote_code": False}
    source = str(path) if local else name
    return path, {"pretrained_model_name_or_path": source, "local_files_only": local,
                  "trust_remote_code": False}


def check_source(setting, name):
    """Raise UserError unless a name is a folder, a file, or what the hub or its cache has."""
    path, where = resolve_model(name)
    if not where["local_files_only"]:
        check_hub(setting, name)
    elif not path.exists():
        near = did_you_mean(str(path), [str(p) for p in path.parent.glob("*")])
        raise UserError(f"{setting}: there is no folder or file '{name}'{near}")


def load_config(name, config_json="", tokenizer=None):
    """A Hugging Face configuration, without weights; with config_json that one, for a tokenizer."""
    if not config_json:
        check_source("model_name", name)
    with errors_as(f"model_config: {config_json!r} cannot be used" if config_json else
                   f"model_name: '{name}' cannot be loaded"):
        if not config_json:
            return AutoConfig.from_pretrained(**resolve_model(name)[1])
        config = {"pad_token_id": None}
        if tokenizer:
            config |= {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
        return AutoConfig.for_model(**config | json.loads(config_json))


def base_dtype(lora, device_type, trained="float32"):
    """The dtype of the weights: that of trained ones, but bfloat16 for a frozen base on CUDA."""
    if lora:
        return torch.bfloat16 if device_type == "cuda" else torch.float32
    return getattr(torch, trained)


def load_hf(name, tokenizer_name, config_json, weights_dtype, revision=None, four_bits=None):
    """(Hugging Face model, tokenizer); UserError if they cannot be loaded or do not fit.

    four_bits: the device of a model in 4 bits (QLoRA, https://arxiv.org/abs/2305.14314).
    """
    path, where = resolve_model(name)
    if not config_json or not tokenizer_name:
        check_source("model_name", name)
    if (path / "adapter_config.json").is_file() and not (path / "config.json").exists():
        if four_bits:
            raise UserError(f"load_in_4bit: '{name}' is an adapter, to be merged into its base; "
                            "merge and save it first")
        return merge_adapter(name, tokenizer_name, weights_dtype)
    if revision:
        where["revision"] = revision
    if four_bits and (config_json or "gguf_file" in where):
        raise UserError("load_in_4bit: needs a folder or hub name of a Hugging Face model, not "
                        "a model_config or a .gguf file")
    if four_bits and "quantization_config" in vars(load_config(name)):
        raise UserError(f"load_in_4bit: '{name}' has quantised weights already; take the model "
                        "that they were made from")
    tokenizer = load_tokenizer(name, tokenizer_name, where)
    if config_json:
        config = load_config(name, config_json, tokenizer)
    with errors_as(f"model_config: {config_json!r} cannot be used" if config_json else
                   f"model_name: '{name}' cannot be loaded"):
        if config_json:
            lm = AutoModelForCausalLM.from_config(config, dtype=weights_dtype)
        else:
            if four_bits:
                where |= quantised(four_bits, weights_dtype)
            lm, report = AutoModelForCausalLM.from_pretrained(
                **where, dtype=weights_dtype, output_loading_info=True)
            missing = sorted(report["missing_keys"] or report["mismatched_keys"])
            if missing:
                raise ValueError(f"it lacks weights: {missing[:3]}")
    broken = [name for name, p in lm.named_parameters() if not p.isfinite().all()]
    if broken:
        raise UserError(f"model_name: '{name}' has weights that are not finite: {broken[:3]}")
    end_ids(lm, tokenizer)  # an error now, not after the training
    if "gguf_file" in where:  # dequantised while loading: from here on an ordinary model
        lm.hf_quantizer = None
        del lm.config.quantization_config
    if four_bits:
        keep_layout(lm)
    elif "quantization_config" in vars(lm.config):
        raise UserError(f"model_name: '{name}' has quantised weights, which cannot be trained")
    check_parts(lm, tokenizer, name)
    return lm, tokenizer


def load_tokenizer(name, tokenizer_name, where):
    """The tokenizer of load_hf(). where: the arguments of from_pretrained() for the model's own."""
    if tokenizer_name not in ("", "bytes"):
        check_source("tokenizer_name", tokenizer_name)
    with errors_as(f"tokenizer_name: '{tokenizer_name}' cannot be loaded" if tokenizer_name else
                   f"model_name: '{name}' cannot be loaded"):
        if tokenizer_name == "bytes":
            return byte_tokenizer()
        if tokenizer_name:
            where = resolve_model(tokenizer_name)[1]
        return AutoTokenizer.from_pretrained(**where)


def check_parts(lm, tokenizer, name):
    """Raise UserError for a model with an adapter beside it, or whose tokenizer is another's."""
    if "peft_config" in vars(lm):
        raise UserError(f"model_name: '{name}' has an adapter beside the model, which transformers "
                        "adds unasked; move its adapter_config.json away, or give the adapter a "
                        "folder of its own")
    vocab_size = lm.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise UserError(f"tokenizer_name: its largest id is {largest}, but the model's vocabulary "
                        f"has {vocab_size}: not the tokenizer of this model")


def quantised(device, compute_dtype):
    """Arguments of from_pretrained() for a model in 4 bits, NF4 with quantised scales."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype)
    return {"quantization_config": config, "device_map": {"": device}}


def keep_layout(lm):
    """Keep 4-bit weights as they are on a CPU with AVX-512: bitsandbytes would repack them in the
    first evaluation, for a kernel that has no gradient, and train on with it."""
    from bitsandbytes.nn import Linear4bit  # slow to import
    for module in lm.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def n_weights(p):
    """How many weights a parameter holds, also in 4 bits, of which two are in a byte."""
    return p.quant_state.shape.numel() if type(p).__name__ == "Params4bit" else p.numel()


def merge_adapter(name, tokenizer_name, weights_dtype):
    """load_hf() of a folder of peft, merged into its base."""
    from peft import PeftModel  # slow to import
    with errors_as(f"model_name: the adapter in '{name}' cannot be read"):
        config = json.loads((Path(name) / "adapter_config.json").read_text())
        base = str(config["base_model_name_or_path"])
        if (Path(base) / "adapter_config.json").is_file():
            raise ValueError(f"its base, '{base}', has an adapter too")
    if not tokenizer_name and (Path(name) / "tokenizer_config.json").exists():
        tokenizer_name = name
    lm, tokenizer = load_hf(base, tokenizer_name, "", weights_dtype)
    with errors_as(f"model_name: the adapter in '{name}' cannot be merged"):
        warnings.filterwarnings("error", "Found missing adapter keys")
        lm = PeftModel.from_pretrained(lm, name).merge_and_unload(safe_merge=True)
    print(f"model_name: the adapter in '{name}' is merged into its base, {base}")
    return lm, tokenizer


def fingerprint(path):
    """A hash of the size, and of 4 KB in about 256 places, of a model's configuration and of each
    file of its weights."""
    files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else [*path.glob("config.json"), *files]:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with open(file, "rb") as weights:
            for place in range(0, size, max(4096, size // 256)):
                weights.seek(place)
                digest.update(weights.read(4096))
    return digest.hexdigest()


def our_tensors(model):
    """{file: tensors by name} that a folder holds beside a plain Hugging Face model.

    The adapter is not beside config.json, where transformers would load it unasked.
    """
    files = {"diffusion.safetensors": model.diffusion_state()}
    if model.adapters:
        files["adapter/adapter_model.safetensors"] = model.adapter_state()
    return files


def reference(name):
    """Where a model that is not saved again is from: its path and a hash of its weights, or its hub
    name and revision."""
    path = Path(name).absolute()
    if path.exists():
        return {"name": str(path), "revision": None, "sha256": fingerprint(path)}
    cached = try_to_load_from_cache(name, "config.json")  # in a folder named after its revision
    revision = Path(cached).parent.name if isinstance(cached, str) else None
    return {"name": name, "revision": revision, "sha256": None}


def load_base(name, base, tokenizer_name, weights_dtype, device):
    """load_hf() of the model that a result with adapters refers to. UserError if it has changed."""
    of = f"model_name: '{name}' holds adapters for {base['name']}"
    if base["sha256"] and not Path(base["name"]).exists():
        raise UserError(f"{of}, which is not there any more")
    if base["sha256"] and fingerprint(Path(base["name"])) != base["sha256"]:
        raise UserError(f"{of}, but the weights there are not those that it was trained on")
    return load_hf(base["name"], tokenizer_name, "", weights_dtype, base["revision"],
                   device if base.get("load_in_4bit") else None)


# ----------------------------------------------------------------------------------------------
# Saving
def checksums(folder):
    """The lines of SHA256SUMS for the files of a folder, as sha256sum writes and checks them."""
    lines = set()
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "SHA256SUMS":
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            lines.add(f"{digest}  {path.relative_to(folder)}")
    return lines


def is_intact(folder):
    """Whether a checkpoint still holds all that was saved in it; other files do not matter."""
    try:
        saved = (folder / "SHA256SUMS").read_text().splitlines()
    except (OSError, ValueError):  # gone, or not text
        return False
    listed = any(line.endswith("  training.pt") for line in saved)  # not so in an empty one
    return listed and checksums(folder).issuperset(saved)


def whole_tensors(model):
    """{file: tensors by name} to be saved, put together from all processes if they are sharded; ""
    stands for the Hugging Face model, where it is saved."""
    tensors = our_tensors(model)
    if not model.base:
        with model.original_model() as lm:
            tensors[""] = lm.state_dict(keep_vars=True)  # which has tied weights as one
    return {file: processes.gathered(part) for file, part in tensors.items()}


def save_folder(path, model, tokenizer, record, training=None, tensors=None):
    """Save a plain Hugging Face folder, with what is ours beside it, entirely or not at all.

    training: states of optimizer and scaler. tensors: of whole_tensors(). A RunError leaves all
    earlier folders intact.
    """
    tensors = tensors or whole_tensors(model)
    temporary, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with errors_as(f"cannot save {path} (earlier ones are intact)", RunError):
            write_folder(temporary, model, tokenizer, record, training, tensors)
            for p in (*temporary.rglob("*"), temporary):
                sync(p)  # on the disk before it gets its name
            if path.exists():
                os.replace(path, old)
            os.replace(temporary, path)
            sync(path.parent)  # which holds the name
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def sync(path):
    """Wait until a file or the names in a folder are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def recover(out):
    """Undo what a kill inside save_folder() left behind: the folder that was being replaced gets
    its name back, if the new one does not have it yet."""
    for old in (*out.glob(".checkpoint_*.old"), *out.glob(".final.old")):
        path = out / old.name[1:].removesuffix(".old")
        if path.exists():
            shutil.rmtree(old)
        else:
            os.replace(old, path)


def write_folder(folder, model, tokenizer, record, training, tensors):
    """Write the files of save_folder()."""
    folder.mkdir(parents=True)
    tokenizer.save_pretrained(folder)
    for file, part in tensors.items():
        if not file:
            with model.original_model() as lm:
                lm.save_pretrained(folder, state_dict=part)
            continue
        (folder / file).parent.mkdir(exist_ok=True)
        part = {name: p.detach().contiguous() for name, p in part.items()}
        save_file(part, folder / file, {"format": "pt"})
    if model.adapters:
        if model.base:
            model.lora_config.base_model_name_or_path = model.base["name"]
        model.lora_config.save_pretrained(folder / "adapter")
    record = record | {"base": model.base}
    (folder / "diffusion.json").write_text(json.dumps(record, indent=1))
    write_index(folder)
    if training:
        torch.save(training, folder / "training.pt")
    (folder / "SHA256SUMS").write_text("\n".join(sorted(checksums(folder))) + "\n")


def write_index(folder):
    """Write which file has each weight of a Hugging Face model. Else engines as vLLM read all
    .safetensors as the model's, ours as well."""
    file = folder / "model.safetensors"
    if not file.exists():  # several files have an index
        return
    with safe_open(file, "pt") as weights:
        names = dict.fromkeys(weights.keys(), file.name)
    index = {"metadata": {}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def checkpoints(out):
    """The checkpoints of a run, newest first."""
    found = [p for p in out.glob("checkpoint_*") if p.name[11:].isdigit()]
    return sorted(found, key=lambda p: int(p.name[11:]), reverse=True)
