"""Settings from files and flags, in order: python convert.py config/phi2.py config/a4500.py --batch_size=4 --resume

A script keeps its settings as flat lower-case globals and calls configure(globals(), argv, allowed) from its main().
A file is Python that assigns settings and may compute from those before it; a flag is --name=value, a bare --name True.
"""
import ast
import difflib
import inspect
import math
import re
import sys
import types
from pathlib import Path

WANTED = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


class UserError(Exception):
    """The run cannot go on: one line for the user, and the exit code (2: a mistake to mend, 1: a failure)."""

    def __init__(self, message, code=2):
        super().__init__(message)
        self.code = code


def out_of_memory(error):
    """Whether a RuntimeError says so, for a GPU or a CPU (torch has a type of its own for the former only)."""
    return "out of memory" in str(error) or "can't allocate memory" in str(error)


def run(main):
    """Call main(argv). What a user can mend, or a machine fails at, ends as one line on stderr and an exit code."""
    sys.stdout.reconfigure(line_buffering=True)  # so that a log in a file can be followed
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not out_of_memory(error):
            raise
        print(f"error: {' '.join(str(error).split())[:500] or type(error).__name__}", file=sys.stderr)
        sys.exit(error.code if isinstance(error, UserError) else 1)


def names_of(settings):
    """The settings among a module's globals: public, lower case, a bool, int, float or str."""
    return [k for k, v in settings.items() if k.islower() and k[0] != "_" and isinstance(v, (bool, int, float, str))]


def nearest(word, words):
    return "".join(f"; the nearest is '{w}'" for w in difflib.get_close_matches(word, words, 1, 0.5))


def checked(name, value, settings, rule, where):
    """value as the type of the setting's default; UserError if the name, the type, the choice or the range is wrong."""
    if name not in names_of(settings):
        raise UserError(f"{where}: there is no setting '{name}'{nearest(name, names_of(settings))}")
    kind = type(settings[name])
    if kind is int and type(value) is float and value.is_integer():  # 1e3
        value = int(value)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or kind is float and not math.isfinite(value):
        raise UserError(f"{where}: {name} must be {WANTED[kind]}, not {value!r}")
    if isinstance(rule, set) and value not in rule:
        known = ", ".join(sorted(rule))
        raise UserError(f"{where}: {name} must be one of {known}, not '{value}'{nearest(value, rule)}")
    low, high = rule if isinstance(rule, tuple) else (0, math.inf)
    if kind in (int, float) and not low <= value <= high:
        raise UserError(f"{where}: {name} must be from {low} to {high}, not {value}")
    return value


def from_flag(arg, settings):
    """--name=value as {name: value}; the value is a Python literal but where the setting is a text."""
    name, given, value = arg[2:].partition("=")
    if not given:
        return {name: True}
    if not isinstance(settings.get(name), str):
        try:
            value = ast.literal_eval(value.capitalize() if value.lower() in ("true", "false") else value)
        except (ValueError, SyntaxError, MemoryError):
            pass  # stays a text, which checked() refuses by the setting's name
    return {name: value}


def from_file(path, settings):
    """What a config file assigns. Modules, functions and names that start with _ are its own affair."""
    scope = {k: settings[k] for k in names_of(settings)} | {"__file__": path}
    before = dict(scope)
    try:
        exec(compile(Path(path).read_text(), path, "exec"), scope)
    except (SyntaxError, NameError, TypeError, ValueError, LookupError, ArithmeticError, ImportError, AttributeError,
            OSError) as error:
        raise UserError(f"{path}: {type(error).__name__}: {error}") from None
    own = (types.ModuleType, types.FunctionType, type)
    return {k: v for k, v in scope.items()
            if k[0] != "_" and not isinstance(v, own) and (k not in before or v is not before[k])}


def configure(settings, argv, allowed):
    """Override settings (a module's globals()) by files and flags, left to right; returns the paths of the files.

    allowed: {name: a set of values, or (lowest, highest)}; a number without an entry must not be negative. Raises
    UserError for what is no setting or not allowed.
    """
    files = []
    for arg in argv:
        if arg in ("-h", "--help"):
            source = inspect.getsource(sys.modules[settings["__name__"]])
            print(settings["__doc__"], *re.findall(r"^[a-z]\w* = .*#.*$", source, re.M), sep="\n")
            sys.exit()
        if arg.startswith("--"):
            new = from_flag(arg, settings)
        elif Path(arg).is_file() and arg.endswith(".py"):
            new = from_file(arg, settings)
            files.append(arg)
        else:
            found = [str(p) for p in Path("config").glob("*.py")]
            raise UserError(f"'{arg}' is neither a flag (--name=value) nor a config file (*.py){nearest(arg, found)}")
        where = arg if arg in files else "--" + arg[2:].split("=")[0]
        settings.update({k: checked(k, v, settings, allowed.get(k), where) for k, v in new.items()})
    return files
