"""The probe: no table of families. What attention does is measured on the model at hand, and
whether it runs in the parts that diffusion needs."""
import torch
import torch.nn as nn
from transformers.pytorch_utils import Conv1D

from configurator import UserError, errors_as


@torch.no_grad()
def probe(model, max_seq_length):
    """How far position 0's hidden state moves, relative to the largest, if the last token
    changes: (when causal, when bidirectional). UserError if the model is not causal, or cannot
    be switched, or has too few positions."""
    check_length(model, max_seq_length)
    length = min(max_seq_length, max(8, (model.window or 0) + 2))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.mask_id, (1, length), generator=generator).to(model.device)
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % model.mask_id
    kind, training, moved = model.lm.config.model_type, model.training, {}
    model.eval()  # dropout would move everything
    for causal in (None, False, True):  # None, as loaded: an encoder must not pass for a decoder
        if causal is not None:
            model.set_causal(causal)
        with errors_as(f"architecture '{kind}' does not run from embeddings alone"):
            a, b = (model.hidden(x, None)[1][0] for x in (ids, changed))  # (T, C)
            model(torch.full_like(ids, model.mask_id), t=ids[:, :1], rows=0 * ids[0, :1])  # masks
        moved[causal] = ((a[0] - b[0]).abs().max() / a.abs().max()).item()
    if not max(moved[None], moved[True]) < 1e-4:
        raise UserError(f"architecture '{kind}' is no AR decoder: position 0 sees the last token")
    if model.bidirectional and not moved[False] > 10 * moved[True] + 1e-6:
        raise UserError(f"architecture '{kind}' cannot be made bidirectional, its attention stays "
                        "causal; --use_bidirectional_attention=false trains it as it is")
    probe_logits(model, ids[:, :8])
    if model.block_size:
        probe_blocks(model, ids, a)  # of the last pass, the causal one
    if model.bidirectional:
        with errors_as(f"architecture '{kind}' does not run layer by layer"):
            turned = turned_layers(model, ids)
        if not all(turned):
            print(f"probe: in {sum(turned)} of {len(turned)} layers position 0 can see the last "
                  "token, the others stay left-to-right")
    model.train(training)
    return moved[True], moved[False]


def check_length(model, length):
    """UserError if windows are longer than the model has positions."""
    if length > model.max_positions:
        raise UserError(f"max_seq_length: {length}, but the model has {model.max_positions} "
                        "positions")


def rounding(dtype):
    """How far results may be off, relative to the largest: sums of another order differ in the
    last bits, of which bfloat16 has 8."""
    return 1e-4 if dtype == torch.float32 else 0.05


def probe_logits(model, ids):
    """Check that embeddings, decoder and gathered head give the logits that the Hugging Face
    model gives for ids (1, T), all of them and some. Else UserError: there are families whose
    layers look ids up once more, or that have no decoder of their own."""
    model.set_causal(True)
    rows = torch.tensor([0, ids.shape[1] - 1], device=ids.device)
    with errors_as(f"architecture '{model.lm.config.model_type}' does not run in parts"):
        expected = model.lm(input_ids=ids, use_cache=False).logits[0]  # (T, V)
        for found, wanted in ((model(ids)[0], expected), (model(ids, None, rows), expected[rows])):
            off = (found - wanted).abs().max() / wanted.abs().max()
            if not off < rounding(wanted.dtype):
                raise ValueError(f"logits from embeddings are off by {off:.0e} of those from ids")


def decoder_layers(lm):
    """The layers of a decoder: its first ModuleList."""
    return next(m for m in lm.get_decoder().modules() if isinstance(m, nn.ModuleList))


def attention_modules(module):
    """[(name, module)] of attention: of classes named ...Attention, in every family."""
    return [(k, m) for k, m in module.named_modules() if type(m).__name__.endswith("Attention")]


def layers_to_adapt(lm, targets):
    """The names that peft is given for a setting of lora_targets, sorted. UserError for one that no
    layer has."""
    wanted = set(targets.replace(" ", "").split(","))
    if targets in ("auto", "attention"):  # peft's "all-linear" takes fused experts, too
        wanted = set()
        for layer in decoder_layers(lm):
            inside = tuple(f"{name}." for name, _ in attention_modules(layer))
            wanted |= {name for name, m in layer.named_modules()
                       if isinstance(m, (nn.Linear, Conv1D))
                       and (targets == "auto" or name.startswith(inside))}
    there = [f".{name}" for name, _ in lm.named_modules()]
    for name in wanted:  # peft is content if one of them fits
        if not any(path.endswith(f".{name}") for path in there):
            raise UserError(f"lora_targets: '{name}' is no layer of this model; use auto, "
                            "attention, or names of layers")
    return sorted(wanted)


def turned_layers(model, ids):
    """For each layer of the bidirectional decoder, whether its output at position 0 depends on
    its own input at the last position: recurrent layers and convolutions stay causal."""
    turned = []

    def run_again(layer, args, kwargs, output):
        first = output[0] if isinstance(output, tuple) else output  # (1, T, C)
        states, *args = args or [kwargs.pop("hidden_states")]
        changed = states.clone()
        changed[:, -1] *= -1
        again = layer.forward(changed, *args, **kwargs)
        again = again[0] if isinstance(again, tuple) else again
        moved = (first[:, 0] - again[:, 0]).abs().max() / first.abs().max()
        turned.append(moved.item() > 1e-6)

    hooks = [layer.register_forward_hook(run_again, with_kwargs=True)
             for layer in decoder_layers(model.lm)]
    try:
        model.set_causal(False)
        model.hidden(ids, None)
    finally:
        for hook in hooks:
            hook.remove()
    return turned


def probe_blocks(model, ids, expected):
    """Check [clean | noisy] in one pass, in blocks of one token and without masks: both copies
    must have the hidden states (T, C) of the causal model, past a sliding window too, and the
    clean copy even with adapters that act. Two rows: some families want a mask each. Else
    UserError."""
    kind, T = model.lm.config.model_type, ids.shape[1]
    weights = [m.lora_B["default"].weight for _, _, m in model.adapters]
    saved = [p.detach().clone() for p in weights]
    block_size, model.block_size = model.block_size, 1
    checks = [("block_size", 0.0, 2 * T, "--block_size=0 works")]
    if model.adapters:
        checks.append(("use_lora", 1.0, T, "try --lora_targets=attention"))
    for setting, fill, n_rows, advice in checks:
        for p in weights:
            p.data.fill_(fill)
        with errors_as(f"{setting}: architecture '{kind}' does not take it"):
            states = model.hidden_of_blocks(ids.repeat(2, 2), ids.new_zeros(2, 2))[1][0]
        for p, old in zip(weights, saved, strict=True):
            p.data.copy_(old)
        off = (states - expected.repeat(2, 1))[:n_rows].abs().max() / expected.abs().max()
        if not off < rounding(expected.dtype):  # NaN fails, too
            raise UserError(f"{setting}: architecture '{kind}' cannot keep its clean copy apart, "
                            f"it is off by {off:.0e}; {advice}")
    model.block_size = block_size
