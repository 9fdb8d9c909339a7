"""A tokenizer trained on the data of a run: byte-level BPE, for models with random weights."""
import os
import shutil
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import processes
from configurator import errors_as
from corpus import read_corpus, seed_for

BPE_SIZE = 1024  # pieces


def tokenizer_of(s):
    """The tokenizer_name of settings s; "bpe" is trained on the data and kept in cache_dir."""
    if s.tokenizer_name != "bpe":
        return s.tokenizer_name
    return processes.from_rank_0(trained_tokenizer, s)


def trained_tokenizer(s):
    """The folder of a BPE tokenizer of the data, trained if it is not there."""
    corpus = read_corpus(s.dataset_name, s.dataset_config, s.dataset_split, s.text_column,
                         s.cache_dir)
    folder = Path(s.cache_dir) / f"bpe_{seed_for(s.dataset_name, corpus['key'], BPE_SIZE):x}"
    if not folder.exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=BPE_SIZE, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False)
        tokenizer.train_from_iterator((text or "" for text in corpus["train"]), trainer)
        temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
        with errors_as(f"cache_dir: cannot write to '{s.cache_dir}'"):
            PreTrainedTokenizerFast(tokenizer_object=tokenizer,
                                    eos_token="<|endoftext|>").save_pretrained(temporary)
            if not folder.exists():  # else another run was faster
                os.replace(temporary, folder)
        shutil.rmtree(temporary, ignore_errors=True)
    return str(folder.absolute())
