"""final/custom_generate/: with it, model.generate() of transformers writes what sample.py does."""
import copy
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig, TextDiffusionStreamer, TextStreamer

import convert
import export
import model_files
import verify
from configurator import UserError
from test_convert import CPU, HERE, LORA, cases, diffusion, random_lm, save_final

PROMPT = [39, 68, 75, 75, 78]  # "Hello" in bytes
GREEDY = {"do_sample": False, "max_new_tokens": 16, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def module_cache(tmp_path, monkeypatch):
    """Where transformers copies custom code to is a folder of the test."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


def trained(model):
    """The model, as if what is ours in it had been trained."""
    generator = torch.Generator().manual_seed(2)
    for p in (*model.diffusion_state().values(), *model.adapter_state().values()):
        p.data += 0.3 * torch.randn(p.shape, generator=generator)
    return model


def exported(folder, block_size=0, lora=None, family="llama", **more):
    """(a random Hugging Face model loaded as a user does, the DiffusionLM of sample.py) of a new
    result with custom_generate/. With lora the base lies beside it."""
    lm, base = random_lm(family, vocab_size=300, **more), folder / "../base"
    if lora:
        lm.save_pretrained(base)
        model_files.byte_tokenizer().save_pretrained(base)
        lm = AutoModelForCausalLM.from_pretrained(base)
    model = trained(diffusion(lm, "linear", 10, block_size=block_size, lora=lora))
    if lora:
        model.base = model_files.reference(base) | {"load_in_4bit": False}
    save_final(folder, model, lora)
    export.export_transformers(folder)
    user = AutoModelForCausalLM.from_pretrained(base if lora else folder)
    return user, convert.load_model(folder, CPU)[0].eval()


def write(user, code, mode, prompts=PROMPT, **more):
    """The ids (B, P + new) of model.generate() with the code in a folder."""
    ids = torch.tensor(prompts).view(-1, len(PROMPT))
    return user.generate(ids, custom_generate=str(code), trust_remote_code=True, mode=mode,
                         **GREEDY | more)


class Recorder(TextDiffusionStreamer):
    """A streamer that keeps what it is given."""
    def __init__(self):
        super().__init__(model_files.byte_tokenizer())
        self.tokens, self.drafts, self.ended = [], [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def put_draft(self, value):
        self.drafts.append(self.tokenizer.decode(value))

    def end(self):
        self.ended = True


@cases("block_size", [0, 4])
def test_diffusion_writes_what_our_generate_does_and_leaves_the_model_as_it_was(tmp_path,
                                                                               block_size):
    user, model = exported(tmp_path / "final", block_size)
    config, weights = user.config.to_dict(), dict(user.state_dict())
    ids = torch.tensor([PROMPT])
    before = user.generate(ids, **GREEDY)
    new = 16
    [wanted], _ = convert.generate(model, [PROMPT], new, 8, [2])
    for _ in range(2):
        found = write(user, tmp_path / "final", "diffusion", steps=8)[0].tolist()
        assert found == wanted[:len(found)] and (len(found) == len(PROMPT) + new or found[-1] == 2)
    assert found != before[0].tolist()
    assert user.generate(ids, **GREEDY).equal(before)
    assert write(user, tmp_path / "final", "ar").equal(before)
    assert user.config.to_dict() == config and user.state_dict().keys() == weights.keys()
    copy.deepcopy(user).save_pretrained(tmp_path / "again")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "again").generate(
        ids, **GREEDY).equal(before)


def test_the_weights_are_loaded_once_and_again_for_another_folder(tmp_path, monkeypatch):
    user, _ = exported(tmp_path / "final", 4)
    write(user, tmp_path / "final", "diffusion", steps=8)
    kept = vars(user)["_diffusion"]
    write(user, tmp_path / "final", "verify")
    assert vars(user)["_diffusion"] is kept
    (tmp_path / "final").rename(tmp_path / "moved")
    write(user, tmp_path / "moved", "verify")
    assert vars(user)["_diffusion"] is not kept


@pytest.mark.filterwarnings("error::FutureWarning")
@cases("family", ["llama", "gpt2", "gemma2"])
def test_verified_text_is_what_the_model_itself_generates(tmp_path, family):
    user, _ = exported(tmp_path / "final", 4, family=family)
    for prompt in (PROMPT, PROMPT[::-1]):
        wanted = user.generate(torch.tensor([prompt]), **GREEDY)
        assert write(user, tmp_path / "final", "verify", prompt).equal(wanted)
        wanted = user.generate(torch.tensor([prompt]), **GREEDY, eos_token_id=wanted[0, 9].item())
        assert len(wanted[0]) < 12
        assert write(user, tmp_path / "final", "verify", prompt, drafts=99, branches=0,
                     eos_token_id=wanted[0, -1].item()).equal(wanted)
        assert write(user, tmp_path / "final", "verify", prompt,
                     eos_token_id=wanted[0, -1].item()).equal(wanted)


@cases("mode", ["diffusion", "verify"])
def test_sampling_follows_torchs_seed_and_the_options_of_transformers(tmp_path, mode):
    user, model = exported(tmp_path / "final", 4)
    options = {"do_sample": True, "temperature": 2.0, "top_k": 5, "top_p": 0.9}
    sampling = {name: options[name] for name in ("temperature", "top_k", "top_p")}
    torch.manual_seed(3)
    found = write(user, tmp_path / "final", mode, steps=8, **options)[0, len(PROMPT):].tolist()
    torch.manual_seed(3)
    if mode == "diffusion":
        [row], _ = convert.generate(model, [PROMPT], 16, 8, [2], sampling=sampling, threshold=0.0)
        wanted = row[len(PROMPT):]
    else:
        seeds = torch.randint(2**31, (1,)).tolist()
        [wanted], _ = verify.decode_verified(model, [PROMPT], 16, 0, 0, sampling, [2], seeds)
    assert found == wanted[:len(found)] and len(set(found)) > 2
    torch.manual_seed(3)
    more = {"generation_config": GenerationConfig(**options | GREEDY | {"do_sample": True})}
    again = user.generate(torch.tensor([PROMPT]), custom_generate=str(tmp_path / "final"),
                          trust_remote_code=True, mode=mode, steps=8, **more)
    assert again[0, len(PROMPT):].tolist() == found


@cases("mode,block_size", [("diffusion", 0), ("diffusion", 4), ("verify", 4)])
def test_a_batch_padded_on_the_left_has_the_texts_of_its_prompts(tmp_path, mode, block_size):
    user, _ = exported(tmp_path / "final", block_size)
    ids, mask = torch.tensor([PROMPT, [9, 9, 39, 68, 75]]), torch.ones(2, 5)
    mask[1, :2] = 0
    both = user.generate(ids, attention_mask=mask, custom_generate=str(tmp_path / "final"),
                         trust_remote_code=True, mode=mode, steps=8, **GREEDY)
    assert both[:, :5].equal(ids)
    for row, prompt in zip(both, ([*PROMPT], [39, 68, 75]), strict=True):
        alone = user.generate(
            torch.tensor([prompt]), custom_generate=str(tmp_path / "final"),
            trust_remote_code=True, mode=mode, steps=8, **GREEDY)[0, len(prompt):]
        assert row[5:5 + len(alone)].equal(alone) and not row[5 + len(alone):].any()


@cases("mode,block_size,remask", [("diffusion", 0, 0), ("diffusion", 0, 3), ("diffusion", 4, 0),
                                  ("diffusion", 4, 3), ("verify", 4, 0), ("ar", 4, 0)])
def test_a_streamer_gets_each_token_once_in_order_and_masks_as_drafts(tmp_path, mode, block_size,
                                                                      remask, capsys):
    user, _ = exported(tmp_path / "final", block_size)
    ours = {"steps": 16, "remask": remask} if mode == "diffusion" else {}
    streamer = Recorder()
    found = write(user, tmp_path / "final", mode, streamer=streamer, **ours)[0]
    assert streamer.tokens == found.tolist() and streamer.ended
    if mode == "diffusion":
        masks = [draft.count("\u2591") for draft in streamer.drafts]
        assert max(masks) > 1 and not any(draft.startswith("H") for draft in streamer.drafts)
        assert masks == sorted(masks, reverse=True) or block_size or remask
    capsys.readouterr()
    tokenizer = model_files.byte_tokenizer()
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    write(user, tmp_path / "final", mode, streamer=streamer, **ours)
    assert capsys.readouterr().out == tokenizer.decode(found[len(PROMPT):]) + "\n"
    write(user, tmp_path / "final", mode, streamer=TextDiffusionStreamer(tokenizer), **ours)
    assert "Hello" in capsys.readouterr().out


@cases("mode", ["diffusion", "verify"])
def test_adapters_act_in_the_mode_alone_and_belong_to_their_base(tmp_path, mode):
    user, model = exported(tmp_path / "final", 4, LORA)
    before = user.generate(torch.tensor([PROMPT]), **GREEDY)
    names, config = [name for name, _ in user.named_modules()], user.config.to_dict()
    found = write(user, tmp_path / "final", mode, steps=8)
    if mode == "verify":
        assert found.equal(before)
    else:
        [wanted], _ = convert.generate(model, [PROMPT], 16, 8, [2])
        assert found[0].tolist() == wanted[:len(found[0])]
    assert write(user, tmp_path / "final", mode, steps=8).equal(found)
    assert [name for name, _ in user.named_modules()] == names
    assert "peft_config" not in vars(user)
    assert user.config.to_dict() == config, "a base knows nothing of is_causal"
    assert all(p.requires_grad for p in user.parameters())
    assert user.generate(torch.tensor([PROMPT]), **GREEDY).equal(before)

    other = random_lm("llama", vocab_size=300, hidden_act="gelu")
    other.save_pretrained(tmp_path / "other")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    with pytest.raises(Exception, match="whose weights are not those in"):
        write(other, tmp_path / "final", mode)


@cases("kernel,dtype", [("eager", torch.float32), ("flex_attention", torch.float32),
                        ("sdpa", torch.bfloat16)])
def test_a_user_chooses_the_attention_and_the_dtype(tmp_path, kernel, dtype):
    exported(tmp_path / "final", 4)
    user = AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype=dtype,
                                                attn_implementation=kernel)
    model = convert.load_model(tmp_path / "final", CPU, as_dtype=dtype)[0].eval()
    [wanted], _ = convert.generate(model, [PROMPT], 16, 8, [2])
    found = write(user, tmp_path / "final", "diffusion", steps=8)[0].tolist()
    assert found == wanted[:len(found)]
    assert user.config._attn_implementation == kernel and user.dtype == dtype


@cases("problem,arguments", [
    ("num_beams: is no argument here; mode='ar'", {"num_beams": 2}),
    ("mode: must be diffusion", {"mode": "fast"}),
    ("order: must be confidence or .*, not 'x'", {"order": "x"}),
    ("steps: must be 1 or more, not 0", {"steps": 0}),
    ("mode: verify needs a block model", {"mode": "verify"}),
    ("max_new_tokens: prompt and text have 65 tokens", {"max_new_tokens": 60}),
    ("attention_mask: prompts must be padded on the left", {"attention_mask": torch.tensor(
        [[1, 1, 1, 1, 0]])}),
    ("streamer: shows one prompt, not 2", {"prompts": [PROMPT, PROMPT], "streamer": Recorder()}),
    ("custom_generate: '.*' holds no diffusion model", {"folder": HERE / "config"})])
def test_what_cannot_be_done_is_said_in_a_line(tmp_path, problem, arguments):
    user, _ = exported(tmp_path / "final")
    with pytest.raises(Exception, match=problem) as error:
        write(user, tmp_path / "final", **{"mode": "diffusion"} | arguments)
    assert type(error.value).__name__ == "UserError" and "\n" not in str(error.value)


def test_the_folder_stays_intact_and_the_files_are_the_same_each_time(tmp_path):
    _, model = exported(tmp_path / "final")
    files = sorted((tmp_path / "final/custom_generate").iterdir())
    before = [file.read_text() for file in files]
    assert [file.name for file in files] == ["diffusion_lm.py", "generate.py"]
    export.read_module.cache_clear()
    export.export_transformers(tmp_path / "final")
    assert [file.read_text() for file in files] == before
    sums = (tmp_path / "final/SHA256SUMS").read_text().splitlines()
    assert model_files.checksums(tmp_path / "final").issuperset(sums)
    assert convert.read_record(tmp_path / "final")["model"]["block_size"] == 0
    for text in before:
        assert "sample.py --export=transformers" in text.splitlines()[0]
        for word in ("tqdm", "bitsandbytes", "datasets", "import convert", "from convert", "numpy"):
            assert word not in text
    flags = ["--isolated", "--line-length=100", "--select=E,F,W,B"]
    subprocess.run([sys.executable, "-m", "ruff", "check", *flags, *files], check=True)


def test_what_cannot_stand_alone_is_not_collected():
    with pytest.raises(UserError, match="make_optimizer reads the setting beta1"):
        export.collect([("convert", "make_optimizer")])
    with pytest.raises(UserError, match="uses processes by 'import processes'"):
        export.collect([("convert", "window_losses")])
    source = export.collect([("verify", "race_times"), ("convert", "sinusoid")])
    assert source.startswith("import functools\nimport hashlib\nimport math\nimport torch\n")
    exec(compile(source, "collected", "exec"), scope := {})
    assert scope["sinusoid"](torch.tensor([[0.5]])).equal(convert.sinusoid(torch.tensor([[0.5]])))


def test_without_this_project_a_user_generates_in_each_mode(tmp_path):
    user, model = exported(tmp_path / "run/final", 4)
    result = subprocess.run([sys.executable, HERE / "sample.py", "--export=transformers",
                             "--out_dir=run"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "mode='diffusion'" in result.stdout
    ours = [path.stem for path in HERE.glob("*.py")]
    code = f"""
        import sys
        sys.modules |= dict.fromkeys({ours}, None)  # they cannot be imported
        from transformers import AutoModelForCausalLM, AutoTokenizer
        model = AutoModelForCausalLM.from_pretrained("run/final")
        tokenizer = AutoTokenizer.from_pretrained("run/final")
        inputs = tokenizer("Hello", return_tensors="pt")
        for mode in ("diffusion", "verify", "ar"):
            print(model.generate(**inputs, custom_generate="run/final", trust_remote_code=True,
                                 mode=mode, **{GREEDY})[0].tolist())
        model = AutoModelForCausalLM.from_pretrained("run/final", trust_remote_code=True)
        print(model.generate(inputs["input_ids"], mode="verify", custom_generate="run/final",
                             trust_remote_code=True, **{GREEDY})[0].tolist())
        print(model.generate(**inputs, mode="ar", **{GREEDY})[0].tolist())
        """
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env["HF_MODULES_CACHE"] = str(tmp_path / "hf")
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, env=env,
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    [wanted], _ = convert.generate(model, [PROMPT], 16, 32, [2])
    assert rows[0] == wanted[:len(rows[0])]
    greedy = user.generate(torch.tensor([PROMPT]), **GREEDY)[0].tolist()
    assert rows[1:] == [greedy] * 4
