"""What is written for llama.cpp, read back by gguf and run by llama.cpp itself, in cyllama."""
import json

import pytest
import tokenizers
import torch
from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import convert
import model_files
from configurator import UserError
from test_convert import LORA, cases, diffusion, random_lm

gguf = pytest.importorskip("gguf")
import gguf_export  # noqa: E402  it imports gguf

TEXT = ("It's 12,345 o'clock; they'll SAY'VE \t\n\n naïve  Größe 東京   def f(x):\r\n\treturn x_1  "
        "<|endoftext|>  end ")


def exported(folder, family="llama", tokenizer=None, tied=True, steps=0):
    """(a tiny model, its file). No weight is what it is initialised to, and all are numbers of
    float16, so that the same is computed from both. steps: of training, to count up and down."""
    tokenizer = tokenizer or model_files.byte_tokenizer()
    lm = random_lm(family, vocab_size=len(tokenizer) + 3, tie_word_embeddings=tied)
    model = diffusion(lm, time_embedding=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    model.set_causal(False)
    for _ in range(steps):
        first = torch.randint(80, 140, (32, 1), generator=generator)
        stride = torch.randint(1, 4, (32, 1), generator=generator) * (-1) ** (first % 2)
        ids = first + stride * torch.arange(24)
        masked = torch.rand(ids.shape, generator=generator) < 0.5
        masked[:, 0] = False
        logits = model(ids.masked_fill(masked, model.mask_id))
        loss = torch.nn.functional.cross_entropy(logits[:, :-1][masked[:, 1:]], ids[masked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.half())
    gguf_export.export_gguf(model, tokenizer, folder / "model.gguf")
    return model, folder / "model.gguf"


def byte_level(steps, merges=True, template=None, bos=False, **more):
    """A byte-level BPE that cuts text by these steps, trained on TEXT."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(**more))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<s>", "<|mask|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([TEXT] * 9, trainer)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<s>" if bos else None,
        chat_template=template)


def tokenizer_of(name, **more):
    """A tokenizer that cuts text as llama.cpp's of this name does."""
    def step(wanted):
        if wanted["type"] == "Split":
            return pre_tokenizers.Split(Regex(wanted["pattern"]["Regex"]), "isolated")
        if wanted["type"] == "Digits":
            return pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=wanted["use_regex"])

    return byte_level([step(wanted) for wanted in gguf_export.SPLITS[name]],
                      ignore_merges=name == "llama-bpe", **more)


# ----------------------------------------------------------------------------------------------
# llama.cpp itself
@pytest.fixture
def llama_cpp():
    module = pytest.importorskip("cyllama.llama.llama_cpp")
    module.disable_logging()
    return module


def load(llama_cpp, path):
    """(llama.cpp's model, function: ids -> logits (L, V + 1) with attention to all of them)."""
    class Model(llama_cpp.LlamaModel):
        @property
        def n_vocab(self):  # which cyllama 0.2.18 asks for, but does not define
            return self.get_vocab().n_vocab

    options = llama_cpp.LlamaModelParams()
    options.n_gpu_layers = 0
    model = Model(str(path), options)
    options = llama_cpp.LlamaContextParams()
    options.n_ctx = options.n_batch = options.n_ubatch = 64
    options.n_threads = options.n_threads_batch = 1
    context = llama_cpp.LlamaContext(model, options)

    def logits(ids):
        batch = llama_cpp.LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1)
        for position, token in enumerate(ids):
            batch.add(token, position, [0], True)
        context.decode(batch)
        return torch.tensor([list(context.get_logits_ith(i)) for i in range(len(ids))])
    return model, logits


@cases("family, tied", [(family, True) for family in sorted(gguf_export.FAMILIES)]
       + [("llama", False)])
def test_llama_cpp_sets_the_same_tokens_as_the_sampler(llama_cpp, tmp_path, family, tied):
    model, path = exported(tmp_path, family, tied=tied, steps=150)
    _, logits = load(llama_cpp, path)
    ids = torch.arange(90, 114)
    ids[[3, 4, 9, 22, 23]] = model.mask_id
    model.set_causal(False)
    with torch.no_grad():
        ours = model(ids[None])[0]
    theirs = logits(ids.tolist())
    scale = ours.abs().max()
    assert (theirs[:, :model.mask_id] - ours).abs().max() < 5e-3 * scale
    assert (theirs[:, model.mask_id] - ours.mean(1)).abs().max() < 5e-3 * scale

    def predict(ids, n_masked, rows, cols):
        return logits(ids[0].tolist())[cols - 1]  # the mask may win here, as in llama.cpp

    for prompt in ([101, 103, 105, 107, 109], [130, 127, 124]):
        masked = torch.tensor([prompt + [model.mask_id] * 12])
        for steps, order in ((4, "confidence"), (12, "confidence"), (12, "left_to_right")):
            [text], passes = convert.generate(model, [prompt], 12, steps, order=order)
            found, theirs = convert.unmask(predict, masked, model.mask_id, steps, order=order)
            assert found[0].tolist() == text and passes == theirs == steps


@cases("name", [*gguf_export.SPLITS, "bytes"])
def test_llama_cpp_encodes_a_text_to_the_same_ids(llama_cpp, tmp_path, name):
    bos = name == "qwen2"
    tokenizer = model_files.byte_tokenizer() if name == "bytes" else tokenizer_of(name, bos=bos)
    model, path = exported(tmp_path, tokenizer=tokenizer)
    loaded = load(llama_cpp, path)[0]  # kept, as the vocabulary is part of it
    vocab, ids = loaded.get_vocab(), tokenizer(TEXT)["input_ids"]
    assert vocab.tokenize(TEXT, True, True) == ids
    assert vocab.get_add_bos() == bos and vocab.token_eos() == tokenizer.eos_token_id
    assert vocab.n_vocab == model.mask_id + 1 and vocab.is_control(model.mask_id)


# ----------------------------------------------------------------------------------------------
# The file
@cases("tied", [True, False])
def test_the_file_holds_the_weights_and_a_mask_that_cannot_win(tmp_path, tied):
    tokenizer = tokenizer_of("smollm", template="{{ messages[0]['content'] }}")
    model, path = exported(tmp_path, "qwen2", tokenizer, tied)
    reader = gguf.GGUFReader(path)
    found = {t.name: torch.tensor(t.data) for t in reader.tensors}
    V, state = model.mask_id, model.lm.state_dict()
    assert len(found) == len(state)
    for ours, theirs in {"self_attn.k_proj.weight": "attn_k.weight", "mlp.up_proj": "ffn_up",
                         "self_attn.q_proj.bias": "attn_q.bias"}.items():
        ours, theirs = (x.removesuffix(".weight") + ".weight" * (not x.endswith(".bias"))
                        for x in (ours, theirs))
        assert found[f"blk.1.{theirs}"].float().equal(state[f"model.layers.1.{ours}"])
    assert found["token_embd.weight"].dtype == torch.float16
    assert found["output_norm.weight"].dtype == torch.float32
    assert found["token_embd.weight"][:V].float().equal(state["model.embed_tokens.weight"])
    assert found["token_embd.weight"][V].float().equal(model.mask_embedding.data)
    logits = torch.randn(1000, 32) @ found["output.weight"].float().T  # of any hidden states
    assert (logits[:, V] < logits[:, :V].amax(1)).all()
    assert (logits.softmax(1)[:, V] < 1 / V).all()

    values = {name: field.contents() for name, field in reader.fields.items()}
    assert values["general.architecture"] == "dream" and values["diffusion.shift_logits"] is True
    assert values["dream.attention.causal"] is False
    assert values["dream.vocab_size"] == V + 1 == len(values["tokenizer.ggml.tokens"])
    assert values["tokenizer.ggml.mask_token_id"] == V
    assert values["tokenizer.ggml.tokens"][V] == "<<|mask|>>", "the tokenizer has the usual name"
    assert values["tokenizer.ggml.pre"] == "smollm"
    assert values["tokenizer.chat_template"] == tokenizer.chat_template
    assert not [*tmp_path.glob("*.new")]


def test_what_llama_cpp_would_run_otherwise_is_refused_in_one_line(tmp_path):
    llama, path = random_lm("llama", vocab_size=300), tmp_path / "model.gguf"
    path.write_text("an earlier one")
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    uniform = diffusion(llama, time_embedding=False)
    uniform.noise = "uniform"
    wrong = {
        "llama, mistral, qwen2, not 'gpt2'": diffusion(random_lm("gpt2"), time_embedding=False),
        "use_time_embedding=false": diffusion(llama),
        "block_size=0": diffusion(llama, time_embedding=False, block_size=4),
        "noise=mask": uniform,
        "causal": diffusion(llama, time_embedding=False, bidirectional=False),
        "'linear'": diffusion(random_lm("llama", rope_parameters=rope), time_embedding=False),
        "a bias": diffusion(random_lm("llama", attention_bias=True), time_embedding=False),
        "'gelu'": diffusion(random_lm("llama", hidden_act="gelu"), time_embedding=False),
        "heads": diffusion(random_lm("llama", head_dim=16), time_embedding=False),
        "use_lora=false": diffusion(random_lm("llama"), time_embedding=False, lora=LORA),
    }
    for message, model in wrong.items():
        with pytest.raises(UserError, match=message) as error:
            gguf_export.export_gguf(model, model_files.byte_tokenizer(), path)
        assert "\n" not in str(error.value)
    model = diffusion(random_lm("llama", vocab_size=500), time_embedding=False)
    whitespace = tokenizer_of("gpt-2")
    whitespace.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    lower = tokenizer_of("gpt-2")
    lower.backend_tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    for tokenizer in (whitespace, lower, byte_level([pre_tokenizers.ByteLevel(use_regex=False)])):
        with pytest.raises(UserError, match="no name for this tokenizer"):
            gguf_export.export_gguf(model, tokenizer, path)
    with torch.no_grad():
        model.lm.lm_head.weight[0] = 1e6
    with pytest.raises(UserError, match="output.weight has weights beyond"):
        gguf_export.export_gguf(model, model_files.byte_tokenizer(), path)
    assert path.read_text() == "an earlier one" and [*tmp_path.iterdir()] == [path]


def test_a_tokenizer_of_bytes_needs_a_merge_that_never_applies(tmp_path):
    _, path = exported(tmp_path)
    fields = gguf.GGUFReader(path).fields
    assert fields["tokenizer.ggml.merges"].contents() == ["<|mask|> <|mask|>"]
    backend = json.loads(model_files.byte_tokenizer().backend_tokenizer.to_str())
    assert backend["model"]["merges"] == [] and gguf_export.split_name(backend) == "gpt-2"
