"""The Hugging Face hub: whether it has what a name says, asked once and within seconds, so that
a machine without network is told in one line and not after minutes of retries."""
import functools
import os
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError, HfHubHTTPError, HFValidationError, HTTPError, RepositoryNotFoundError)

from configurator import UserError, did_you_mean, first_line


@functools.cache
def ask_hub(name, kind):
    """(Whether the hub has a model or dataset of this name, or None; why it did not answer)."""
    if constants.HF_HUB_OFFLINE:
        return None, "HF_HUB_OFFLINE is set"
    ask = HfApi().dataset_info if kind == "dataset" else HfApi().model_info
    try:
        ask(name, timeout=3)
    except GatedRepoError:
        return True, ""
    except (RepositoryNotFoundError, HFValidationError):
        return False, ""
    except HfHubHTTPError:  # it is there, and what it refuses is told where it is loaded
        return True, ""
    except (HTTPError, OSError, ValueError) as error:  # ValueError: a login page answers
        return None, first_line(error)
    return True, ""


def is_cached(name, kind):
    """Whether the cache of the hub, or for data sets also their own, has something of a name."""
    folders = [Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}"]
    if kind == "dataset":
        import datasets  # slow to import
        folders.append(Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___"))
    return any(folder.exists() for folder in folders)


def check_hub(setting, name, kind="model"):
    """Raise UserError for a name that neither the hub has, nor its cache while the hub does not
    answer. In that case libraries are told not to ask it either."""
    there, why = ask_hub(name, kind)
    built_in = {"dataset_name": ["pydoc", "world"], "tokenizer_name": ["bytes", "bpe"]}
    near = did_you_mean(name, [*map(str, Path(name).parent.glob("*")), *built_in.get(setting, [])])
    if there is False:
        raise UserError(f"{setting}: there is no folder and no {kind} on the hub '{name}'{near}; "
                        "for a private one: hf auth login")
    if there is None:
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"  # for what is not imported yet
        if not is_cached(name, kind):
            instead = f"--{setting}=./folder"
            if kind == "dataset":
                instead += " or --dataset_name=pydoc, which is built in"
            raise UserError(f"{setting}: '{name}' is no folder here{near} and not in the hub's "
                            f"cache, and the hub does not answer: {why}; connect, or take "
                            f"{instead}")
