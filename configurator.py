"""Settings from files and flags: python convert.py config/phi2.py config/a4500.py --batch_size=4

A script keeps its settings as flat lower-case globals and calls configure() with its globals().
A file is Python that assigns settings and may compute from earlier ones; a flag is --name=value.
Whatever goes wrong in run() ends as an error of one line and an exit code.
"""
import ast
import contextlib
import difflib
import functools
import logging
import math
import os
import re
import signal
import sys
import time
import types
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # transformers reads it when imported
import tqdm.auto
import transformers

# some miss kernels that are not used here, the hub's tells each of its retries
for library in ("bitsandbytes", "torchao", "torch.utils._pytree", "huggingface_hub"):
    logging.getLogger(library).setLevel(logging.ERROR)
# libraries show a bar for each thing they load, here only for downloads, whose bars say disable=
tqdm.auto.tqdm.__init__ = functools.partialmethod(tqdm.auto.tqdm.__init__, disable=True)
show_library_errors = False  # as the setting debug says, where a script has one: see errors_as()


class UserError(Exception):
    """A mistake that the user can mend: one line and this exit code, no traceback."""
    code = 2


def settings_in(scope):
    """{name: value} of the settings in a module's globals: a lower-case bool, int, float or str."""
    return {k: v for k, v in scope.items()
            if k.islower() and k[0] != "_" and isinstance(v, (bool, int, float, str))}


def did_you_mean(word, words):
    """What to add to a message: the nearest of some words, if one is near."""
    return "".join(f"; did you mean '{w}'?" for w in difflib.get_close_matches(word, words, 1, 0.7))


def no_such_setting(name, settings):
    """What to say of an unknown setting: what does it here, if others have it, else the nearest."""
    table = Path(__file__).with_name("assets") / "other_trainers.md"  # | `their words` | ours |
    for row in table.read_text().splitlines() if table.exists() else ():
        cells = row.split("|")
        if len(cells) == 4 and f"`{name}`" in cells[1]:
            return f"there is no setting '{name}'; here: {cells[2].strip()}"
    return f"there is no setting '{name}'{did_you_mean(name, settings_in(settings))}"


def check_value(name, value, settings, rule, where):
    """value in the type of the setting's default; UserError for a wrong name, type or value."""
    if name not in settings_in(settings):
        raise UserError(f"{where}: {no_such_setting(name, settings)}")
    kind = type(settings[name])
    whole = type(value) is float and value.is_integer()  # 1e3
    if kind is int and whole or kind is float and type(value) is int and abs(value) < 2**53:
        value = kind(value)
    if type(value) is not kind or kind is float and not math.isfinite(value):
        wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
        raise UserError(f"{where}: {name} must be {wanted[kind]}, not {value!r}")
    if rule is Path:
        return os.path.expanduser(value)  # as no shell does behind --name=
    if isinstance(rule, set) and value not in rule:
        raise UserError(f"{where}: {name} must be {' or '.join(sorted(rule - {''}))}, not '{value}'"
                        + did_you_mean(value, rule))
    low, high = rule if isinstance(rule, tuple) else (0, 2**53 if kind is int else 1e30)
    if kind in (int, float) and not low <= value <= high:
        raise UserError(f"{where}: {name} must be from {low} to {high}, not {value}")
    return value


def from_flag(name, text, settings):
    """The value of --name=text: a Python literal, unless the setting is a text."""
    if isinstance(settings.get(name), str):
        return text
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text  # of the wrong type, as check_value() then says


def from_file(path, settings):
    """What a config file assigns, but for modules, functions and names that start with _."""
    before = settings_in(settings) | {"__file__": path}
    try:
        exec(compile(Path(path).read_text("utf-8-sig"), path, "exec"), scope := dict(before))
    except (Exception, SystemExit) as error:  # it is the user's code, and may raise anything
        raise UserError(f"{path}: {type(error).__name__}: {error}") from None
    own = (types.ModuleType, types.FunctionType, type)
    return {k: v for k, v in scope.items()
            if k[0] != "_" and not isinstance(v, own) and v is not before.get(k, own)}


def configure(settings, argv, allowed):
    """Override settings (a module's globals()) by files and flags, left to right; the files.

    allowed: {name: a set of values, (lowest, highest) or Path}; other numbers must not be negative.
    """
    global show_library_errors
    argv = [os.path.expanduser(arg) for arg in argv]
    files = [arg for arg in argv if arg.endswith(".py") and Path(arg).is_file()]
    for arg in argv:
        name, given, text = arg[2:].partition("=")
        if any("\ud800" <= c <= "\udfff" for c in arg):
            raise UserError(f"{arg!a}: not text in UTF-8")
        if arg in files:
            new = from_file(arg, settings)
        elif not arg.startswith("--"):
            raise UserError(f"'{arg}' is neither a flag (--name=value) nor a config file (*.py)"
                            + did_you_mean(arg, [str(p) for p in Path("config").glob("*.py")]))
        elif not given and not isinstance(settings.get(name, True), bool):
            raise UserError(f"{arg}: needs a value, as {arg}=...")
        else:
            new = {name: from_flag(name, text, settings) if given else True}
        for key, value in new.items():
            where = arg.partition("=")[0]
            settings[key] = check_value(key, value, settings, allowed.get(key), where)
    show_library_errors = settings.get("debug", False)
    return files


def print_help(script, argv):
    """Print a script's docstring and its settings in groups, with the values that argv gives."""
    configure(script, [arg for arg in argv if arg not in ("--help", "-h")], script["allowed"])
    print(script["__doc__"])
    source = Path(script["__file__"]).read_text()
    for group, name, why in re.findall(r"^(# [a-z ]+)$|^([a-z]\w*) = .*?(  # .*)$", source, re.M):
        print(f"\n{group}" if group else f"  {name} = {script[name]!r}{why}")


# ----------------------------------------------------------------------------------------------
# Errors: one line and an exit code for whatever goes wrong
class RunError(UserError):
    """An error the user did not cause, as a full disk or a run that diverged: exit code 1."""
    code = 1


def out_of_memory(error):
    """Whether an error of torch, on a GPU or a CPU, says that memory ran out."""
    texts = "out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED"
    return any(text in str(error) for text in texts)


def first_line(error):
    """The first line of a library's error, shortened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].endswith(":"):  # a list follows
        lines[0] = " ".join(lines)
    return (lines[0] if lines else type(error).__name__)[:300]


@contextlib.contextmanager
def errors_as(prefix, kind=UserError, trial=False):
    """At the border to libraries: whatever they raise becomes a UserError that starts with prefix,
    or a RunError.

    The broad except is on purpose: broken files and odd models raise dozens of types. --debug
    shows them, but not those of a trial, for which there is another way.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("past_key_values", "gradient_checkpointing_enable", "is_gradient_checkpointing"):
        warnings.filterwarnings("ignore", f".{name}. is deprecated", FutureWarning)
    try:
        yield
    except Exception as error:
        if (isinstance(error, UserError) or out_of_memory(error)
                or show_library_errors and not trial):
            raise
        if "while generating the dataset" in str(error):  # says nothing, but its cause does
            error = error.__cause__ or error
        advice = ""
        if re.search(r"gated|private repo|\b40[13]\b", str(error)):
            advice = " (accept its licence on its hub page, then hf auth login)"
        raise kind(f"{prefix}: {first_line(error)}{advice}") from None


def run(main, rank=0, lost=lambda error: None, end=sys.exit, scope=None):
    """Call main(argv); an error ends as one line on stderr and an exit code. --help prints the
    settings in scope, by default those of main's module. lost(error): which other process of the
    run has died, if that is what error means. end(code): how to end after an error."""
    if sys.stdout:  # not closed
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # for logs
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # cleans up; training has its own
    stderr = sys.stderr  # main() silences those of all processes but the first
    try:
        if {"--help", "-h"} & set(sys.argv):
            return print_help(scope or main.__globals__, sys.argv[1:])
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        text = " ".join(str(error).split())[:500] or type(error).__name__
        if out_of_memory(error):
            text += ("; shorter or fewer windows, a smaller model, --use_8bit_adam, "
                     "--use_gradient_checkpointing need less")
        elif isinstance(error, RuntimeError):
            text = lost(error)
            if not text:
                raise  # a bug: its traceback is wanted
        if rank:  # the same mistake is told by the first process, and torchrun ends this one
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(20)  # on a busy machine that takes a while
            text += f" (rank {rank})"
        print(f"error: {text}", file=stderr)
        end(error.code if isinstance(error, UserError) else RunError.code)
    finally:
        sys.stderr = stderr  # a bug's traceback is told by every process
