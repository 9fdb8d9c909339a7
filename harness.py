"""Tasks of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness), run by the
harness itself on a converted model, through the class that it documents for models.

  python sample.py --tasks=arc_easy                           # the AR mode; HF_HUB_OFFLINE=0
  python sample.py --tasks=arc_easy --tasks_mode=diffusion    # downloads what is not there yet
  python sample.py --tasks=mine --tasks_folder=my_tasks       # needs no hub

evaluation.py imports this module only for tasks, as they need pip install -e '.[eval]'.
"""
import contextlib
import functools
import logging
import random
import sys

import lm_eval
import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.models.utils import (
    DEFAULT_MAX_LENGTH, handle_stop_sequences, normalize_gen_kwargs)
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from configurator import RunError, UserError, did_you_mean, errors_as, first_line
from convert import generate, window_losses, with_less_memory
from corpus import end_ids, end_of, seed_for


@torch.no_grad()
def ar_log_likelihoods(model, pairs):
    """[(log p of the continuation in nats, whether greedy decoding writes it)] of the AR mode, for
    pairs (ids of a context, ids of its continuation) in one batch."""
    texts = [context + continuation for context, continuation in pairs]
    ids = torch.zeros(len(texts), max(map(len, texts)) - 1, dtype=torch.long, device=model.device)
    for row, text in zip(ids, texts, strict=True):
        row[:len(text) - 1] = torch.tensor(text[:-1])  # nothing is predicted from the last
    model.set_causal(True)  # so padding on the right is not seen
    output, states = model.hidden(ids, None)
    found = []
    for state, (context, continuation) in zip(states, pairs, strict=True):
        rows = slice(len(context) - 1, len(context) - 1 + len(continuation))
        log_p = model.head(output, state[None, rows])[0].float().log_softmax(-1)  # (N, V)
        wanted = torch.tensor(continuation, device=model.device)
        greedy = (log_p.argmax(-1) == wanted).all()
        found.append((log_p.gather(1, wanted[:, None]).sum().item(), bool(greedy)))
    return found


def diffusion_log_likelihood(model, context, continuation, samples, seed):
    """(a lower bound on log p of the continuation in nats, its standard error) of the diffusion.

    The NELBO of windows in which the context is never masked, by so many draws of the masks
    (LLaDA, https://arxiv.org/abs/2502.09992, eq. 6). Blocks start where they do in training, at
    multiples of their size; the bound is the sampler's, and what follows in the last block is
    unknown, masks. One token has one pattern of masks, so its log p is exact.
    """
    after = -(len(context) + len(continuation)) % (model.block_size or 1)
    ids = [*(~i for i in context), *continuation, *[~model.mask_id] * after]
    x0 = torch.tensor([ids] * samples)
    kind = 2 if model.block_size else 0
    work = functools.partial(window_losses, model, x0, contextlib.nullcontext(), seed,
                             only=slice(kind, kind + 1))
    losses = with_less_memory(work, {"size": 32}, model, size="size")[kind]
    nats = losses.cpu().double() * samples * len(continuation)  # they are shares of nats per token
    error = nats.std(correction=min(1, samples - 1)) / samples**0.5
    return -nats.mean().item(), error.item()


def score_pairs(model, pairs, s):
    """([(log p, whether greedy decoding writes it)] of pairs (context, continuation) of ids in the
    mode asked for, [standard errors of the log p])."""
    bar = functools.partial(tqdm, desc=f"{s.tasks_mode} log-likelihoods", disable=None, leave=False)
    scores, errors = [None] * len(pairs), []
    if s.tasks_mode == "ar":
        order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0] + pairs[i][1]))
        for start in bar(range(0, len(order), 8), unit="batches"):
            batch = order[start:start + 8]
            found = ar_log_likelihoods(model, [pairs[i] for i in batch])
            for i, score in zip(batch, found, strict=True):
                scores[i] = score
        return scores, errors
    noise_seed = seed_for(s.seed, "tasks")  # the same masks for each choice of a question
    for i, (context, continuation) in enumerate(bar(pairs, unit="texts")):
        log_p, error = diffusion_log_likelihood(
            model, context, continuation, s.tasks_draws, noise_seed)
        [text], _ = generate(model, [context], len(continuation), s.steps, order=s.order)
        scores[i] = log_p, text[len(context):] == continuation
        errors.append(error)
    return scores, errors


def continue_text(model, tokenizer, ids, n, until, sampling, s):
    """What the model writes in at most n tokens behind ids, up to a text of `until`."""
    ends = end_ids(model.lm, tokenizer)
    if s.tasks_mode == "ar":
        prompt = torch.tensor([ids], device=model.device)
        with model.original_model() as lm, torch.no_grad():
            text = lm.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n,
                do_sample=bool(sampling), eos_token_id=ends or None,
                pad_token_id=tokenizer.eos_token_id or 0, stop_strings=until, tokenizer=tokenizer,
                **sampling)[0].tolist()
    else:
        [text], _ = generate(model, [ids], n, s.steps, ends, sampling=sampling, order=s.order,
                             threshold=s.threshold, remask=s.remask)
    new = text[len(ids):]
    written = tokenizer.decode(new[:end_of(new, ends)], skip_special_tokens=True)
    for stop in until:
        written = written.split(stop)[0]
    return written


class Converted(TemplateLM):
    """A model as the harness wants one, in the mode that s.tasks_mode names. In AR mode it is the
    harness's own `hf` on the Hugging Face model in final/."""

    def __init__(self, model, tokenizer, s):
        super().__init__()
        self.model, self.tokenizer, self.s = model, tokenizer, s
        self.errors = []  # standard errors of log-likelihoods
        self.room = model.max_positions  # tokens behind which one can be predicted
        if self.room == sys.maxsize:
            self.room = DEFAULT_MAX_LENGTH
        if s.tasks_mode == "diffusion":  # which reads the last token too, and whole blocks
            block = model.block_size or 1
            self.room = self.room // block * block - block

    @property
    def eot_token_id(self):
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self):  # stands for an empty context
        start = self.tokenizer.bos_token_id
        return self.eot_token_id or 0 if start is None else start

    def tok_encode(self, string, add_special_tokens=None, **_):
        if add_special_tokens is None:
            opened = string.startswith(self.tokenizer.decode(self.prefix_token_id))
            add_special_tokens = not opened
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def _loglikelihood_tokens(self, requests, **_):
        longest = max((len(continuation) for *_, continuation in requests), default=0)
        if longest > self.room:
            raise UserError(f"tasks: {longest} tokens to be scored at once, the model has room for "
                            f"{self.room}")
        pairs = [(context[-max(1, self.room + 1 - len(continuation)):], continuation)
                 for _, context, continuation in requests]
        scores, errors = score_pairs(self.model, pairs, self.s)
        self.errors += errors
        return scores

    def loglikelihood_rolling(self, requests, **_):
        parts, owners = [], []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.room, 1):
                parts.append((None, *make_disjoint_window(window)))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (log_p, _) in zip(owners, self._loglikelihood_tokens(parts), strict=True):
            totals[i] += log_p
        return totals

    def generate_until(self, requests, **_):
        texts = []
        for request in tqdm(requests, "writing", unit="texts", disable=None, leave=False):
            how = normalize_gen_kwargs(request.args[1])
            until = handle_stop_sequences(how["until"], self.tokenizer.eos_token)
            ids = self.tok_encode(request.args[0])
            n = min(how["max_gen_toks"], self.room - min(len(ids), self.room // 2))
            sampling = {}
            if how.get("temperature"):
                sampling["temperature"] = how["temperature"]
            ids = ids[-(self.room - n):]  # of long prompts the end
            texts.append(continue_text(self.model, self.tokenizer, ids, n, until, sampling, self.s))
        return texts


def load_tasks(names, folder):
    """The tasks of these names, from a folder and from the harness, as it wants them."""
    with errors_as(f"tasks_folder: '{folder}' cannot be read"):
        manager = TaskManager(include_path=folder or None, include_defaults=False)
        if not set(names) <= set(manager.all_tasks):
            manager = TaskManager(include_path=folder or None)  # reads 15,000 files, for seconds
    for name in names:
        if name not in manager.all_tasks:
            raise UserError(f"tasks: there is no '{name}'" + did_you_mean(name, manager.all_tasks))
    random.seed(DEFAULT_RANDOM_SEED)  # as the harness does, so that examples are those of others
    np.random.seed(DEFAULT_OTHER_SEED)
    with errors_as(f"tasks: {','.join(names)} cannot be loaded"):
        try:
            loaded = manager.load(names)
        except ConnectionError as error:
            raise UserError(f"tasks: {','.join(names)}: {first_line(error)}; HF_HUB_OFFLINE=0 "
                            "lets data be downloaded") from None
    for name, task in loaded["tasks"].items():
        if vars(task).get("UNSAFE_CODE") or vars(task).get("MULTIMODAL"):
            raise UserError(f"tasks: '{name}' has images, or runs code that a model writes")
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    return loaded


def task_figures(model, tokenizer, s):
    """{tasks: {name: its figures}} that the harness finds, with the versions of tasks and harness.

    Its evaluate() rather than simple_evaluate(), which also asks git and the machine about
    themselves.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    names = [name.strip() for name in s.tasks.split(",")]
    with contextlib.redirect_stdout(sys.stderr):
        loaded = load_tasks(names, s.tasks_folder)
        lm = Converted(model, tokenizer, s)
        with errors_as(f"tasks: {s.tasks} failed", RunError):
            results = lm_eval.evaluate(lm, loaded, limit=s.tasks_limit or None, log_samples=False,
                                       bootstrap_iters=1000)
    found = {name: {key: value for key, value in figures.items() if not isinstance(value, str)}
             for name, figures in results["results"].items()}  # texts are names and "N/A"
    row = {"tasks": found, "tasks_mode": s.tasks_mode, "lm_eval": lm_eval.__version__,
           "tasks_versions": results["versions"], "tasks_fewshot": results["n-shot"]}
    if lm.errors:
        row["tasks_mc_se"] = float(np.mean(lm.errors))
    return row
