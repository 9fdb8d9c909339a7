"""Results for other programs, where this project is not installed.

  python sample.py --export=transformers  # final/custom_generate/, for model.generate()
  python sample.py --export=gguf          # model.gguf, for llama.cpp
  python sample.py --export=uno           # uno/, adapters that draft for SGLang

Of the first, the two files are no copies that someone keeps up to date: collect() writes them out
of the functions here. generate.py holds those of custom_generate.py, diffusion_lm.py what these
need.
"""
import ast
import builtins
import functools
import symtable
from pathlib import Path

from configurator import UserError, errors_as
from convert import read_record
from runs import write_whole

HERE = Path(__file__).parent
HEAD = """Written by python sample.py --export=transformers; changes here are lost. MIT License."""


@functools.cache
def read_module(module):
    """What stands at the top of a module beside this one: ({name: source of a function, class or
    constant}, {name: (module, name there or None, import line)}, the names of settings)."""
    text = (HERE / f"{module}.py").read_text()
    lines, defined, imported, settings = text.splitlines(), {}, {}, set()
    for node in ast.parse(text).body:
        names, first = [], node.lineno
        if isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.asname or alias.name.partition(".")[0]
                imported[name] = alias.name, None, ast.unparse(ast.Import([alias]))
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                line = ast.unparse(ast.ImportFrom(node.module, [alias], 0))
                imported[alias.asname or alias.name] = node.module, alias.name, line
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names, first = [node.name], min(x.lineno for x in (node, *node.decorator_list))
        elif isinstance(node, ast.Assign):
            names = [x.id for x in node.targets if isinstance(x, ast.Name)]
            settings |= {name for name in names if name.islower()}
        defined |= dict.fromkeys(names, "\n".join(lines[first - 1:node.end_lineno]))
    return defined, imported, settings if "allowed" in defined else set()  # else it is no script


def names_in(source):
    """The global names that a piece of source uses, sorted, with those of builtins."""
    tables, names = [symtable.symtable(source, "", "exec")], set()
    for table in tables:
        names |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}
        tables += table.get_children()
    return sorted(names)


def collect(roots, others=None):
    """The source of a file with the functions, classes and constants at roots [(module, name)], all
    that they need of this project's modules, and the imports for it. UserError for what cannot
    stand alone, as a function that reads a setting.

    others: a list, to which (module, name) is added of what is not to be collected, as other
    modules than those of the roots have it, but imported from diffusion_lm.py.
    """
    sources, imports, origins, seen = {}, set(), {}, set()

    def add(module, name, user):
        defined, imported, settings = read_module(module)
        origin = module
        if name in imported:
            there, original, origin = imported[name]
            if (HERE / f"{there}.py").exists():
                if original is None or others is None and original != name:
                    raise UserError(f"export: {user} uses {name} by '{origin}', which cannot be "
                                    "collected; import what it needs by its name")
                if others is None:
                    return add(there, name, user)
                others.append((there, original))
                origin = origin.replace(f"from {there} ", "from .diffusion_lm ")
            imports.add(origin)
        elif name in settings:
            raise UserError(f"export: {user} reads the setting {name}; give it as an argument")
        elif name not in defined:
            if name not in vars(builtins):
                raise UserError(f"export: {user} uses {name}, which {module}.py does not define")
            return
        if origins.setdefault(name, origin) != origin:
            raise UserError(f"export: {name} is of {origins[name]}, and for {user} of {origin}")
        if name in defined and name not in seen:
            seen.add(name)
            for used in names_in(defined[name]):
                add(module, used, name)
            sources[name] = defined[name]  # behind what it needs

    for module, name in roots:
        add(module, name, "export.py")
    lines = sorted(imports, key=lambda line: (line.startswith("from ."), line))
    return "\n".join(lines) + "".join(f"\n\n\n{source}" for source in sources.values()) + "\n"


def export_transformers(folder):
    """Write custom_generate/ into the folder of a result."""
    model = read_record(folder)["model"]  # UserError if it is none
    others = []
    entry = collect([("custom_generate", "generate")], others)
    files = {"diffusion_lm.py": collect(others), "generate.py": entry}  # which needs the other
    target = Path(folder) / "custom_generate"
    with errors_as(f"export: cannot write to {target}"):
        target.mkdir(exist_ok=True)
        for name, source in files.items():
            write_whole(target / name, f'"""{HEAD}"""\n{source}')
    modes = "diffusion, verify, ar" if model["block_size"] else "diffusion, ar"
    loaded = "the base" if model.get("lora") else "the model"
    print(f"{target}: load {loaded}, then generate(..., custom_generate={str(folder)!r}, "
          f"trust_remote_code=True, mode='diffusion'); modes: {modes}")


def prepare_export(kind, copy):
    """work(model, tokenizer, folder) of sample.py, which writes a result for another program and
    says how to use it. kind: gguf | uno. UserError if a package is missing."""
    if kind == "gguf":
        from gguf_export import export_gguf  # it needs a package of its own

        def work(model, tokenizer, folder):
            path = folder.parent / "model.gguf"
            export_gguf(model, tokenizer, path)
            print(f"{path}: llama-diffusion-cli -m {path} -p '...' -ub 64 --diffusion-steps 32 "
                  "--diffusion-eps 0.001 --temp 0.2")
        return work
    from uno_export import export_uno

    def work(model, tokenizer, folder):
        written = export_uno(model, tokenizer, folder, copy)
        print(f"{written}: its README.md says how SGLang runs it")
    return work
