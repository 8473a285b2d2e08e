"""Finds calls that could execute what a file, a recipe or a command line says, by the syntax tree of a source."""

from __future__ import annotations

import ast
from collections.abc import Iterator

# calls that are never needed here; names as they are once the imports are followed
NEVER = {
    "pickle": "unpickles", "cPickle": "unpickles", "_pickle": "unpickles", "dill": "unpickles",
    "cloudpickle": "unpickles", "joblib": "unpickles", "shelve": "unpickles", "marshal": "reads code",
}  # fmt: skip
READERS = {"load", "loads", "Unpickler", "open", "_load", "_loads"}
FORBIDDEN = {
    "eval": "executes a text",
    "exec": "executes a text",
    "compile": "makes code of a text",
    "os.system": "runs a shell",
    "os.popen": "runs a shell",
    "subprocess.getoutput": "runs a shell",
    "subprocess.getstatusoutput": "runs a shell",
    "pandas.read_pickle": "unpickles",
    "pandas.read_hdf": "may unpickle",
    "torch.hub.load": "runs the code of a repository",
    "torch.jit.load": "runs the code of a file",
    "torch.package.PackageImporter": "runs the code of a file",
    "yaml.load": "makes objects; use yaml.safe_load",
    "yaml.load_all": "makes objects; use yaml.safe_load_all",
    "yaml.unsafe_load": "makes objects; use yaml.safe_load",
    "yaml.full_load": "makes objects; use yaml.safe_load",
    "runpy.run_path": "runs a file",
    "runpy.run_module": "runs a module",
    "importlib.util.spec_from_file_location": "loads code from a file",
}
SAFE_LOADERS = {"yaml.SafeLoader", "yaml.CSafeLoader"}
WEIGHTS_ONLY = {"torch.load"}
CHECKPOINT_METHODS = {"fit", "validate", "test", "predict"}  # of a Trainer, where they are given a ckpt_path


def dangers(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and reason of every call in a source that could execute what it is given."""
    tree = ast.parse(source)
    names = imported(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (reason := danger(node, names)):
            yield node.lineno, reason


def imported(tree: ast.AST) -> dict[str, str]:
    """Return local name -> full name of everything that a source imports."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def full_name(node: ast.expr, names: dict[str, str]) -> str:
    """Return the dotted name of what is called, imports followed; what is no name begins with a dot."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{full_name(node.value, names)}.{node.attr}"
    return ""


def danger(call: ast.Call, names: dict[str, str]) -> str:
    """Return why a call is dangerous; empty where it is not."""
    name = full_name(call.func, names)
    package, _, last = name.rpartition(".")
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if name == "yaml.load" and "Loader" in given and full_name(given["Loader"], names) in SAFE_LOADERS:
        return ""
    if name in FORBIDDEN:
        return f"{name} {FORBIDDEN[name]}"
    if package in NEVER and last in READERS:
        return f"{name} {NEVER[package]}"
    if (name in WEIGHTS_ONLY or last == "load_from_checkpoint") and not is_constant(given.get("weights_only"), True):
        return f"{name} without weights_only=True"
    if last in CHECKPOINT_METHODS and "ckpt_path" in given and not is_constant(given.get("weights_only"), True):
        return f"{last}(ckpt_path=...) without weights_only=True"
    if name in ("numpy.load", "numpy.lib.npyio.read_array", "numpy.lib.format.read_array"):
        flag = given.get("allow_pickle", ast.Constant(False))
        positional = call.args[2:3]  # numpy.load(file, mmap_mode, allow_pickle)
        if not is_constant(flag, False) or (positional and not is_constant(positional[0], False)):
            return f"{name} with allow_pickle"
    if "shell" in given and not is_constant(given["shell"], False):
        return f"{name} with shell=True"
    if "trust_remote_code" in given and not is_constant(given["trust_remote_code"], False):
        return f"{name} with trust_remote_code"
    if None in given and (name in WEIGHTS_ONLY or name == "numpy.load"):
        return f"{name} with options that the walk cannot see"
    if name in ("importlib.import_module", "__import__") and not all(
        isinstance(a, ast.Constant) for a in call.args[:1]
    ):
        return f"{name} of a name that is not written here"
    return ""


def is_constant(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value
