"""model.generate() of Hugging Face transformers for a converted model, by diffusion or verified
drafts. export.py writes this file, and what it needs of the others, to final/custom_generate/."""
import contextlib
import json
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from transformers.utils import cached_file, logging

from configurator import UserError, errors_as
from convert import DiffusionLM
from convert import generate as fill_masks
from corpus import end_of
from model_files import fingerprint, our_tensors
from verify import decode_verified, reach


# --------------------------------------------------------------------------------------------------
# Generating
def generate(inputs=None, *, model, mode="diffusion", folder=None, revision=None, steps=32,
             order="confidence", threshold=0.0, remask=0, drafts=3, branches=4, **arguments):
    """Generate with a converted model; returns ids (B, P + new) as model.generate() does.

    mode: diffusion, by unmasking, with steps, order, threshold and remask as in sample.py | verify,
    the text of the AR mode in fewer passes, by a block model, with drafts and branches | ar, the
    model's own generate(). arguments: of read_request(). folder: the result or its hub name, in
    this revision; None: what custom_generate is, or else the model's.
    """
    arguments.pop("trust_remote_code", None)
    given = arguments.pop("custom_generate", None)
    if mode == "ar":
        return type(model).generate(model, inputs, **arguments)  # the instance's may be this one
    # transformers keeps custom_generate to itself, but it stands in the frame that calls this
    given = given or sys._getframe(1).f_locals.get("custom_generate")
    folder = folder or (given if isinstance(given, str) else model.name_or_path)
    request = read_request(model, inputs, **arguments)
    with logging_as_before(), diffusion_model(model, folder, revision) as dlm:
        check_request(dlm, request, mode, drafts, steps, order)
        feed = feeder(request, dlm.mask_id)
        if mode == "verify":
            new = verified(dlm, request, feed, min(drafts, dlm.block_size - 1), branches)
        else:
            new = unmasked(dlm, request, feed, steps=steps, order=order, threshold=threshold,
                           remask=remask)
    new = [text[:end_of(text, request.ends) + 1] for text in new]
    feed(new[0], len(new[0]))
    if request.streamer:
        request.streamer.end()
    longest = max(map(len, new))
    new = [text + [request.pad] * (longest - len(text)) for text in new]
    return torch.cat([request.ids, torch.tensor(new, device=request.ids.device)], 1)


def read_request(model, inputs=None, input_ids=None, attention_mask=None, generation_config=None,
                 streamer=None, **options):
    """The arguments that model.generate() has as well, or UserError for what means nothing here.

    options: max_new_tokens (64), do_sample, temperature, top_k, top_p, eos_token_id, pad_token_id;
    where they are not given, the model's generation_config.json holds.
    """
    ids, named = inputs if input_ids is None else input_ids, {}
    for name, value in options.items():
        if name in ("max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "eos_token_id",
                    "pad_token_id"):
            named[name] = value
        elif (value is not None and value is not False
              and name not in ("use_cache", "tokenizer", "token_type_ids")):  # change no text
            raise UserError(f"{name}: is no argument here; mode='ar' takes those of generate()")
    config = model._prepare_generation_config(generation_config, **named)[0]
    if ids is None or ids.dim() != 2 or not ids.numel():
        raise UserError("input_ids: must be (batch, length), with a token in each prompt")
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask.long()
    if (mask.diff(dim=1) < 0).any() or not mask[:, -1].all():
        raise UserError("attention_mask: prompts must be padded on the left; set "
                        "tokenizer.padding_side = 'left'")
    if streamer and len(ids) > 1:
        raise UserError(f"streamer: shows one prompt, not {len(ids)}; leave it out")
    ends = config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    pad = config.pad_token_id
    return SimpleNamespace(
        ids=ids, prompts=[row[keep].tolist() for row, keep in zip(ids, mask > 0, strict=True)],
        new_tokens=config.max_new_tokens or 64, ends=ends, streamer=streamer,
        pad=(ends or [0])[0] if pad is None else pad,
        sampling={"temperature": config.temperature if config.do_sample else 0.0,
                  "top_k": config.top_k, "top_p": config.top_p})


def check_request(dlm, request, mode, drafts, steps, order):
    """Raise UserError for what this model cannot do."""
    if mode not in ("diffusion", "verify"):
        raise UserError(f"mode: must be diffusion, verify or ar, not '{mode}'")
    if mode == "verify" and not dlm.block_size:
        raise UserError("mode: verify needs a block model, this one is whole-sequence; take "
                        "diffusion or ar")
    if mode == "verify" and drafts < 1:
        raise UserError("drafts: must be 1 or more; mode='ar' drafts nothing")
    orders = "confidence", "entropy", "margin", "random", "left_to_right"
    if order not in orders:
        raise UserError(f"order: must be {' or '.join(orders)}, not '{order}'")
    if steps < 1:
        raise UserError(f"steps: must be 1 or more, not {steps}")
    beyond = reach(dlm, min(drafts, dlm.block_size - 1))  # where masks stand
    if mode == "diffusion":
        beyond = -request.new_tokens % (dlm.block_size or 1)  # whole blocks
    length = max(map(len, request.prompts)) + request.new_tokens + beyond
    if length > dlm.max_positions:
        raise UserError(f"max_new_tokens: prompt and text have {length} tokens, the model has "
                        f"{dlm.max_positions} positions")


def verified(dlm, request, feed, drafts, branches):
    """The new ids of each prompt, by verified drafts."""
    seeds = torch.randint(2**31, (len(request.prompts),)).tolist()  # so torch's seed decides
    return decode_verified(
        dlm, request.prompts, request.new_tokens, drafts, branches, request.sampling, request.ends,
        seeds, lambda new: feed(new[0], len(new[0])))[0]


def unmasked(dlm, request, feed, **options):
    """The new ids of each prompt, by unmasking; options: steps, order, threshold, remask."""
    start, not_final = len(request.prompts[0]), 0
    if options["remask"]:  # which may mask all of a text, or of a block, again
        not_final = dlm.block_size or sys.maxsize

    def show(ids, confidence):
        feed(ids[0, start:].tolist(), ids.shape[1] - start - not_final)

    rows, _ = fill_masks(
        dlm, request.prompts, request.new_tokens, ends=request.ends,
        watch=show if request.streamer else None, sampling=request.sampling, **options)
    return [row[len(prompt):] for row, prompt in zip(rows, request.prompts, strict=True)]


def feeder(request, mask_id):
    """feed(new ids, how many of them are final if they are no masks): a function that gives a
    streamer each final token, from the left, and the others as a draft if it takes drafts."""
    streamer, n_put = request.streamer, 0
    if streamer:
        streamer.put(request.ids.cpu())

    def feed(new, n_final):
        nonlocal n_put
        if not streamer:
            return
        new = new[:request.new_tokens]
        new = new[:end_of(new, request.ends) + 1]
        final = new[:max(n_put, min(n_final, end_of(new, [mask_id])))]
        for token in final[n_put:]:
            streamer.put(torch.tensor([token]))
        n_put = len(final)
        if len(new) > n_put and hasattr(streamer, "put_draft"):  # a TextDiffusionStreamer
            block = streamer.tokenizer.encode("\u2591", add_special_tokens=False)
            draft = [block if token == mask_id else [token] for token in new[n_put:]]
            streamer.put_draft(torch.tensor(sum(draft, [])))
    return feed


# --------------------------------------------------------------------------------------------------
# The model
@contextlib.contextmanager
def logging_as_before():
    """What errors_as() switches off of a user's logging is on again afterwards."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".past_key_values. is deprecated", FutureWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def diffusion_model(model, folder, revision):
    """The DiffusionLM around a Hugging Face model, loaded once; afterwards the model is what it
    was."""
    kept, key = vars(model), (str(folder), revision, model.device)
    if kept.get("_diffusion_key") != key:
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # new layers draw weights, and a seed may be set
            dlm = load_around(model, folder, revision)
        kept |= {"_diffusion": dlm, "_diffusion_key": key}  # an attribute would be a submodule
    dlm = kept["_diffusion"]
    kernel = model.config._attn_implementation
    try:
        for parent, name, adapter in dlm.adapters:
            setattr(parent, name, adapter)
        with dlm.attention("eager" if kernel == "eager" else "sdpa"):  # flash takes no mask
            yield dlm
    finally:
        take_off(dlm)


def take_off(dlm):
    """Leave the Hugging Face model in a DiffusionLM as it was: causal, without adapters."""
    dlm.set_causal(True)
    for owner, name in dlm.added:
        delattr(owner, name)
    for parent, name, adapter in dlm.adapters:
        setattr(parent, name, adapter.base_layer)


def load_around(model, folder, revision):
    """The DiffusionLM of a folder or hub repository, around a Hugging Face model. UserError if it
    cannot be read or does not fit."""
    if len(set(vars(model).get("hf_device_map", {}).values())) > 1:
        raise UserError("device_map: the model is on several devices; load it on one")
    with errors_as(f"custom_generate: '{folder}' holds no diffusion model"):
        path = cached_file(folder, "diffusion.json", revision=revision)
        record = json.loads(Path(path).read_text())
        ours, base = record["model"], record.get("base")
    ours.pop("logit_shift", None)  # of an older version
    source = Path(model.name_or_path)
    if base and base["sha256"] and source.exists() and fingerprint(source) != base["sha256"]:
        raise UserError(f"custom_generate: '{folder}' holds adapters for {base['name']}, whose "
                        f"weights are not those in '{source}'")
    before, trained = dict(vars(model)), [p for p in model.parameters() if p.requires_grad]
    dlm = DiffusionLM(model, **ours)
    dlm.added = [(owner, name) for owner, name, *_ in dlm.switches if name not in vars(owner)]
    tensors = our_tensors(dlm)
    take_off(dlm)
    for p in trained:
        p.requires_grad_(True)  # peft freezes the base
    for name in vars(model).keys() - before.keys():
        delattr(model, name)  # and leaves its configuration
    for file, wanted in tensors.items():
        with errors_as(f"custom_generate: {file} of '{folder}' does not fit the model"):
            found = load_file(cached_file(folder, file, revision=revision))
            if {k: v.shape for k, v in found.items()} != {k: v.shape for k, v in wanted.items()}:
                raise ValueError("its tensors have other names or shapes")
            for name, tensor in found.items():
                wanted[name].data.copy_(tensor)
    if dlm.time_mlp is not None:
        dlm.time_mlp.to(dlm.device)
    for _, _, adapter in dlm.adapters:
        adapter.eval()
    return dlm
