"""The house rules: who may import whom, what stands in which room, what importing costs, what is public."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from renorm import layers
from renorm.family import stub
from renorm.layers.base import Layer
from renorm.methods.base import Method
from renorm.regularisers.base import Regulariser
from tests.every_raise import raises_in, unreached

PACKAGE = Path(__file__).parents[1] / "src" / "renorm"

# In import order: a room imports only rooms that stand before it. docs/architecture.md draws the same list.
ROOMS = (
    # words, and numbers: tensors in, tensors out
    *("errors", "said", "log", "family", "faces", "moments", "shift", "affine", "kernels"),
    # model: nn.Module, no data
    *("layers", "sites", "state", "surgery", "freeze", "split", "policy", "groups", "conventions"),
    # model + batches
    *("calls", "columns", "files", "provenance", "observation", "ranks", "observe"),
    *("evaluate", "verify", "trust", "checkpoints", "profile", "guard"),
    *(
        "methods",
        "recalibrate",
        "online",
        "stream",
        "adapt",
        "accuracy",
        "kind",
        "regularisers",
        "feed",
        "heads",
        "few",
        "choices",
        "recipe",
        "runs",
        "average",
        "lean",
        "joint",
        "events",
        "session",
    ),
    *(
        "finetune",
        "lean",
        "graph",
        "absorb",
        "labels",
        "neighbours",
        "prove",
        "fold",
        "repair",
        "export",
        "adapters",
        "serve",
        "tally",
        "loop",
    ),
    # judgement: values in, findings out
    *(
        "mend",
        "initial",
        "adjacent",
        "second_look",
        "mixture",
        "suspects",
        "units",
        "stored",
        "costs",
        "facts",
        "rules",
        "known",
        "doctor",
        "watch",
        "callbacks",
    ),
    *("curve", "timing", "recommend", "cite", "advise"),
    # edges: files, screens, users
    *(
        "preprocessing",
        "texts",
        "hub",
        "models",
        "datasets",
        "report",
        "bench",
        "cli",
        "__main__",
        "public",
        "__init__",
    ),
)
EDGES = ROOMS[ROOMS.index("preprocessing") :]
FAMILIES = ("layers", "methods", "online", "regularisers", "rules")  # folders with a base.py and a catalogue

EXTRAS = {
    *("timm", "torchvision", "PIL", "accelerate", "pandas", "pyarrow", "transformers", "datasets", "matplotlib"),
    *(
        "onnx",
        "onnxscript",
        "onnxruntime",
        "imagecorruptions",
        "cv2",
        "skimage",
        "fvcore",
        "keras",
        "lightning",
        "torch_audit",
        "torchao",
    ),
}
# Installed with the core, yet slow to import: only edges may take them at the top, and `import renorm` none of them.
HEAVY = {"sklearn", "scipy", "torchmetrics", "rich", "jsonargparse", "jinja2", "yaml"}

PUBLIC = (
    *("find_sites", "observe", "profile", "diagnose", "watch", "recalibrate_", "evaluate", "verify", "convert_"),
    *("Moments", "Observed", "Shift", "Affine", "Site", "Columns"),
    *("Observation", "Profile", "Diagnosis", "Adaptation", "Score", "Gap", "Conversion"),
    *("fold", "load_folded_", "repair_", "export"),
    *("diagnose_file", "advise", "Advice", "recommend", "Plan", "cite"),
    *(
        "freeze_",
        "unfreeze_",
        "frozen",
        "apply_policy_",
        "policies",
        "policy_table",
        "parameter_groups",
        "check_groups",
        "split",
    ),
    *("lean_", "Lean"),
    *("Freeze", "Policy", "Split"),
    *("adapt_", "Stream", "Guard"),
    *("Folded", "Repaired", "Exported"),
    *("finetune_", "FineTuned", "save_adapter", "load_adapter_", "Adapter", "serve_adapters", "Served"),
    *("Watch", "RenormError", "BatchError", "NoBatchNorm"),
)

FILES = sorted(PACKAGE.rglob("*.py"))
IDS = [file.relative_to(PACKAGE).as_posix() for file in FILES]
every_file = pytest.mark.parametrize("file", FILES, ids=IDS)


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def imports(file: Path, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything imported anywhere in `tree`, inside functions too."""
    parts = ("renorm", *file.relative_to(PACKAGE).with_suffix("").parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(parts[: len(parts) - node.level]) if node.level else ""
            module = ".".join(name for name in (base, node.module) if name)
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def at_the_top(tree: ast.Module) -> Iterator[ast.stmt]:
    """The statements that run on import: not function bodies, and not what only type checkers read."""
    waiting: list[ast.stmt] = list(tree.body)
    while waiting:
        statement = waiting.pop()
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            waiting += statement.orelse
            continue
        nested = [child for child in ast.iter_child_nodes(statement) if isinstance(child, ast.stmt)]
        if nested:
            waiting += nested
        else:
            yield statement


def used_room(name: str) -> str:
    """The room that `name`, a dotted name under renorm, stands in; the root itself is the last room."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else "__init__"


@every_file
def test_a_file_stands_in_a_room_of_the_list(file: Path) -> None:
    assert room_of(file) in ROOMS, f"{file.name}: a new room is a decision: name it in ROOMS and docs/architecture.md"
    assert not {"utils", "util", "helpers", "common", "misc"} & {p.removesuffix(".py") for p in file.parts}


@every_file
def test_a_room_imports_only_rooms_that_stand_before_it(file: Path) -> None:
    room = room_of(file)
    for line, name in imports(file, tree_of(file)):
        if name.split(".")[0] == "renorm":
            used = used_room(name)
            before = used == room or ROOMS.index(used) < ROOMS.index(room)
            assert before, f"{file.name}:{line} imports {name}: {used} does not stand before {room}"


@every_file
def test_no_extra_is_imported_at_the_top_of_a_module(file: Path) -> None:
    banned = EXTRAS if room_of(file) in EDGES else EXTRAS | HEAVY
    for statement in at_the_top(tree_of(file)):
        for line, name in imports(file, statement):
            assert name.split(".")[0] not in banned, f"{file.name}:{line} imports {name} at the top"


@every_file
def test_only_the_edges_print(file: Path) -> None:
    if room_of(file) in ("cli", "report"):
        return
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"{file.name}:{node.lineno} prints; return a value or yield an event"


NORM_CLASSES = ("BatchNorm", "_NormBase", "InstanceNorm", "GroupNorm", "LayerNorm", "RMSNorm")


@every_file
def test_only_sites_decides_what_a_norm_layer_is(file: Path) -> None:
    if room_of(file) == "sites":
        return
    for node in ast.walk(tree_of(file)):
        asked = ""
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("isinstance", "issubclass")
        ):
            asked = ast.unparse(node.args[1])
        elif isinstance(node, ast.MatchClass):
            asked = ast.unparse(node.cls)
        elif isinstance(node, ast.Compare):
            asked = ast.unparse(node) if "type(" in ast.unparse(node.left) else ""
        found = [name for name in NORM_CLASSES if name in asked]
        assert not found, f"{file.name}:{getattr(node, 'lineno', 0)} asks for {asked}; ask sites.find_sites"


@every_file
def test_files_and_functions_stay_readable(file: Path) -> None:
    lines = file.read_text(encoding="utf-8").count("\n")
    assert lines <= 400, f"{file.name} has {lines} lines: is it one idea?"
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            size = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
            assert size <= 60, f"{file.name}:{node.lineno} {node.name} has {size} lines below its docstring"


def test_the_public_names_are_these() -> None:
    renorm = importlib.import_module("renorm")
    assert sorted(renorm.__all__) == sorted(PUBLIC)
    assert all(hasattr(renorm, name) for name in PUBLIC)


def test_every_public_name_is_documented() -> None:
    renorm = importlib.import_module("renorm")
    for name in renorm.__all__:
        assert inspect.getdoc(getattr(renorm, name)), f"renorm.{name} has no docstring"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_file_of_a_family_is_in_its_catalogue(family: str) -> None:
    members = importlib.import_module(f"renorm.{family}.base").catalogue()
    files = {file.stem for file in (PACKAGE / family).glob("*.py")} - {"base", "__init__"}
    homes = {member.__module__.rpartition(".")[2] for member in members.values()}
    assert homes == files, "each file of a family holds a member, and each member has its file"


@pytest.mark.parametrize(
    ("family", "interface", "besides"),
    [("methods", Method, ()), ("layers", Layer, layers.BESIDES), ("regularisers", Regulariser, ())],
    ids=["methods", "layers", "regularisers"],
)
def test_type_checkers_are_told_what_the_folder_holds(family: str, interface: type, besides: tuple[str, ...]) -> None:
    package = importlib.import_module(f"renorm.{family}")
    told = stub(f"renorm.{family}", interface, *besides)
    assert (PACKAGE / family / "__init__.pyi").read_text(encoding="utf-8") == told, "run `make stubs`"
    for member in importlib.import_module(f"renorm.{family}.base").catalogue().values():
        assert getattr(package, member.__name__) is member
    with pytest.raises(AttributeError, match=rf"'renorm\.{family}' has no attribute 'Nothing'"):
        _ = package.Nothing


COST = """
import sys, time
import torch
start = time.process_time()
import renorm.public
print(time.process_time() - start)
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def test_the_public_names_cost_little_more_than_torch() -> None:
    # Processor time, and the least of a few runs: a busy machine makes imports slower, never faster.
    seconds = []
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    for _ in range(5):
        done = subprocess.run(
            [sys.executable, "-c", COST], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        first, names = done.stdout.splitlines()
        assert not set(names.split()) & (EXTRAS | HEAVY), (
            "the public names load a package that it could load when asked"
        )
        seconds.append(float(first))
        if seconds[-1] <= 0.3:
            return
    pytest.fail(f"importing all public names takes {min(seconds):.2f} s after torch; the limit is 0.3 s")


def test_every_pytest_raises_looks_at_the_message() -> None:
    silent = ("KeyboardInterrupt", "SystemExit")  # these carry none
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        for node in ast.walk(tree_of(file)):
            for item in node.items if isinstance(node, ast.With) else ():
                call = item.context_expr
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.raises":
                    looks = item.optional_vars or any(keyword.arg == "match" for keyword in call.keywords)
                    assert looks or ast.unparse(call.args[0]) in silent, f"{file.name}:{node.lineno}: add match="


def test_a_raise_that_no_test_reaches_is_listed(tmp_path: Path) -> None:
    (tmp_path / "room.py").write_text(
        "def f(x):\n    if x:\n        raise ValueError(\n            'one'\n        )\n    try:\n        f(1)\n"
        "    except ValueError as error:\n        raise error\n    raise KeyError('two')\n"
    )
    assert sorted(first for _, first, _, _ in raises_in(tmp_path)) == [3, 10]
    assert unreached(tmp_path, {("room.py", 4)}) == ["room.py:10: raise KeyError('two')"]
    assert unreached(tmp_path, {("room.py", 3), ("room.py", 10)}) == []
