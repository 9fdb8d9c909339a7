"""The Hugging Face hub: whether it has what a name says, asked once and within seconds, so that a
machine without network is told in one line and not after minutes of retries."""
import functools
import os
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError, HfHubHTTPError, HFValidationError, HTTPError, RepositoryNotFoundError)

from configurator import UserError, did_you_mean, first_line


@functools.cache
def ask_hub(name, kind):
    """(Whether the hub has a model or data set of this name, or None, why it did not answer)."""
    if constants.HF_HUB_OFFLINE:
        return None, "HF_HUB_OFFLINE is set"
    ask = HfApi().dataset_info if kind == "dataset" else HfApi().model_info
    try:
        ask(name, timeout=3)
    except GatedRepoError:
        return True, ""
    except (RepositoryNotFoundError, HFValidationError):
        return False, ""
    except HfHubHTTPError:
        return True, ""  # it is there, and what it refuses is told where it is loaded
    except (HTTPError, OSError, ValueError) as error:  # ValueError: a login page answers instead
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
    """Raise UserError if a name is nothing that can be loaded: not on the hub, or not in the cache
    while the hub does not answer. Then libraries are told not to ask it either."""
    there, why = ask_hub(name, kind)
    what = "model" if kind == "model" else "data set"
    near = did_you_mean(name, [str(p) for p in Path(name).parent.glob("*")])
    if there is False:
        raise UserError(f"{setting}: there is no folder and no hub {what} '{name}'{near}; for a "
                        "private one, hf auth login first")
    if there is None:
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"  # for what is not imported yet
        if not is_cached(name, kind):
            offline = "" if kind == "model" else ", or --dataset_name=pydoc, which is built in"
            raise UserError(
                f"{setting}: '{name}' is no folder here{near} and not in the hub's cache, and the "
                f"hub does not answer: {why}; connect, or take a folder, as "
                f"--{setting}=./folder{offline}")
