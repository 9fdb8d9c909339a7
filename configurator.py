"""Settings from files and flags, in order: python convert.py config/phi2.py config/a4500.py --batch_size=4 --resume

A script keeps its settings as flat lower-case globals and calls configure(globals(), argv, allowed) from its main().
A file is Python that assigns settings and may compute from those before it; a flag is --name=value, a bare --name True.
"""
import ast
import difflib
import math
import types
from pathlib import Path


class UserError(Exception):
    """A mistake that the user can mend: one line and this exit code, no traceback."""
    code = 2


def names_of(settings):
    """The settings among a module's globals: public, lower case, a bool, int, float or str."""
    return [k for k, v in settings.items() if k.islower() and k[0] != "_" and isinstance(v, (bool, int, float, str))]


def nearest(word, words):
    """What to add to a message when a word is close to one of words."""
    return "".join(f"; the nearest is '{w}'" for w in difflib.get_close_matches(word, words, 1, 0.5))


def checked(name, value, settings, rule, where):
    """value as the type of the setting's default; UserError if the name, the type, the choice or the range is wrong."""
    if name not in names_of(settings):
        raise UserError(f"{where}: there is no setting '{name}'{nearest(name, names_of(settings))}")
    kind = type(settings[name])
    if kind is float and type(value) is int or kind is int and type(value) is float and value.is_integer():  # 1e3
        value = kind(value)
    if type(value) is not kind or kind is float and not math.isfinite(value):
        wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[kind]
        raise UserError(f"{where}: {name} must be {wanted}, not {value!r}")
    if isinstance(rule, set) and value not in rule:
        raise UserError(f"{where}: {name} must be {' or '.join(sorted(rule))}, not '{value}'{nearest(value, rule)}")
    low, high = rule if isinstance(rule, tuple) else (0, 2**53 if kind is int else 1e30)  # what all of torch can hold
    if kind in (int, float) and not low <= value <= high:
        raise UserError(f"{where}: {name} must be from {low} to {high}, not {value}")
    return value


def from_flag(name, text, settings):
    """The value of --name=text: a Python literal, but where the setting is a text."""
    if isinstance(settings.get(name), str):
        return text
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError):
        return text  # of the wrong type, which checked() tells by the setting's name


def from_file(path, settings):
    """What a config file assigns. Modules, functions and names that start with _ are its own affair."""
    before = {k: settings[k] for k in names_of(settings)} | {"__file__": path}
    try:
        exec(compile(Path(path).read_text(), path, "exec"), scope := dict(before))
    except Exception as error:  # it is the user's code, and may raise anything
        raise UserError(f"{path}: {type(error).__name__}: {error}") from None
    own = (types.ModuleType, types.FunctionType, type)
    return {k: v for k, v in scope.items() if k[0] != "_" and not isinstance(v, own) and v is not before.get(k, own)}


def configure(settings, argv, allowed):
    """Override settings (a module's globals()) by files and flags, left to right; returns the files.
    allowed: {name: a set of values, or (lowest, highest)}; a number without an entry must not be negative."""
    files = [arg for arg in argv if arg.endswith(".py") and Path(arg).is_file()]
    for arg in argv:
        name, given, text = arg[2:].partition("=")
        if any("\ud800" <= c <= "\udfff" for c in arg):
            raise UserError(f"{arg!a}: not text in UTF-8")
        if arg not in files and not arg.startswith("--"):
            raise UserError(f"'{arg}' is neither a flag (--name=value) nor a config file (*.py)"
                            + nearest(arg, map(str, Path("config").glob("*.py"))))
        if not given and arg not in files and not isinstance(settings.get(name, True), bool):
            raise UserError(f"{arg}: needs a value, as {arg}=...")
        new = from_file(arg, settings) if arg in files else {name: from_flag(name, text, settings) if given else True}
        settings.update({k: checked(k, v, settings, allowed.get(k), arg.partition("=")[0]) for k, v in new.items()})
    return files
