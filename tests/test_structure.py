"""The house's own rules, read from its files: no circle of imports, rooms in their order, no Ray where none belongs."""

import ast
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mu2llm"
MOST_LINES = 450

MAY_IMPORT = {
    "ct": set(),
    "cases": {"ct"},
    "model": {"ct"},
    "green": set(),
    "tracking": set(),
    "engine": {"ct", "cases", "model"},
    "evaluation": {"ct", "cases", "model", "green", "engine", "tracking"},
    "stages": {"ct", "cases", "model", "green", "engine", "evaluation", "tracking"},
    "sweeps": {"cases", "model", "green", "engine", "evaluation", "stages", "tracking"},
    "serving": {"ct", "model", "green", "engine", "evaluation", "tracking"},
}
"""The table of rooms: what each may import beyond itself, the settings and the files at the root, which are for all."""
FOR_ALL = {"settings"}
OVER_ALL = {"pipeline", "summary", "cleaning", "cluster", "cli"}
"""What may import every room, and what no room imports."""
WITHOUT_RAY = ("ct", "model", "green", "settings", "tracking")
PRIVATE = "private_apis"
"""The one file for what other packages do not promise."""

# These lists only shrink: each entry is to be mended, not added to.
KNOWN_CIRCLES: set[frozenset[str]] = set()
KNOWN_PRIVATE = {
    "model/memory.py": {
        *("torch._subclasses.fake_tensor", "torch.utils._python_dispatch", "torch.utils._pytree"),
        *("_parameters", "_buffers"),
    },
    "model/summary.py": {"torch._subclasses.fake_tensor", "_scaled_dot_product_flash_attention_for_cpu", "_base"},
}
KNOWN_ROOMS: set[tuple[str, str]] = set()


def name_of(path: Path) -> str:
    """`evaluation/report/page.py` → evaluation.report.page; a folder's `__init__` has the folder's name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py")) if "node_modules" not in path.parts}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


def imports(module: str) -> Iterator[tuple[str, str | None]]:
    """(module, name) of every import, at whatever depth: within functions and under TYPE_CHECKING too."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{module}: relative imports hide what is imported"
            yield from ((node.module, alias.name) for alias in node.names)


def defined_in(package: str, name: str | None) -> str | None:
    """The file behind `from mu2llm.package import name`: the submodule of that name, where the face has it from, or
    the module itself. None for what is not of this package."""
    module = package.removeprefix("mu2llm").removeprefix(".") if package.split(".")[0] == "mu2llm" else None
    if module is None:
        return None
    below = f"{module}.{name}" if module else str(name)
    if name and below in FILES:
        return below
    for node in ast.walk(tree(module)) if module in FILES and FILES[module].name == "__init__.py" else ():
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return defined_in(node.module, alias.name)
    return module if module in FILES else None


@cache
def imported_by(module: str) -> frozenset[str]:
    found = {defined_in(package, name) for package, name in imports(module)}
    return frozenset(each for each in found if each is not None and each != module)


def circles() -> set[frozenset[str]]:
    """Files that import each other, directly or by others: the strongly connected components (Tarjan 1972)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: set[frozenset[str]] = set()

    def visit(module: str) -> None:
        order[module] = lowest[module] = len(order)
        stack.append(module)
        for other in imported_by(module):
            if other not in order:
                visit(other)
                lowest[module] = min(lowest[module], lowest[other])
            elif other in stack:
                lowest[module] = min(lowest[module], order[other])
        if lowest[module] == order[module]:
            members = [stack.pop()]
            while members[-1] != module:
                members.append(stack.pop())
            if len(members) > 1:
                found.add(frozenset(members))

    for module in FILES:
        if module not in order:
            visit(module)
    return found


def room(module: str) -> str:
    return module.split(".")[0]


def test_the_walk_sees_lazy_typed_and_re_exported_imports():
    assert "evaluation.report.charts" in imported_by("evaluation.report.page")  # within a function
    assert "evaluation.report.page" in imported_by("evaluation.evaluate")  # by the face of evaluation.report
    assert "model.summary" in imported_by("cluster.capacity")  # under TYPE_CHECKING
    assert {"errors", "object_storage"} <= imported_by("storage")  # `from mu2llm import …`


def test_no_files_import_each_other_in_a_circle():
    assert circles() == KNOWN_CIRCLES


def test_rooms_import_only_what_their_table_allows():
    rooms = {room(module) for module in FILES if "." in module} - FOR_ALL
    assert rooms - OVER_ALL <= set(MAY_IMPORT), "a new room stands in the table of rooms"
    wrong = {
        (module, other)
        for module in FILES
        for other in imported_by(module)
        if room(module) not in OVER_ALL
        and room(other) in rooms | OVER_ALL
        and room(other) not in {room(module)} | MAY_IMPORT.get(room(module), set())
    }
    assert wrong == KNOWN_ROOMS


def test_nothing_imports_the_command_line():
    others = [module for module in FILES if room(module) != "cli"]
    assert [module for module in others if "cli" in {room(other) for other in imported_by(module)}] == []


@pytest.mark.parametrize("name", WITHOUT_RAY)
def test_rooms_that_know_nothing_of_ray_do_not_import_it(name):
    own = [module for module in FILES if room(module) == name]
    assert own and [m for m in own for package, _ in imports(m) if package.split(".")[0] == "ray"] == []


def test_no_file_is_longer_than_a_few_screens():
    lengths = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in FILES.items()}
    assert {module: length for module, length in lengths.items() if length > MOST_LINES} == {}


def test_a_wheel_has_every_file_that_is_no_code():
    """Templates, lexicons, presets: what no pattern names is missing where the package is installed."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["mu2llm"]
    held = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    viewer, code = PACKAGE / "serving" / "viewer", {".py", ".pyc"}
    others = {path for path in PACKAGE.rglob("*") if path.is_file() and viewer not in path.parents}
    assert {path for path in others if path.suffix not in code} - held == set()
    assert PACKAGE / "green" / "lexicon.yaml" in held and PACKAGE / "evaluation/exports/algorithm/inference.py" in held


def private_names(module: str) -> set[str]:
    """Private modules and attributes of other packages that a file uses. What a file defines itself is its own."""
    own = {node.name for node in ast.walk(tree(module)) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.attr for node in ast.walk(tree(module)) if isinstance(node, ast.Attribute) and _of_self(node)}
    used = {
        node.attr
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Attribute) and _is_private(node.attr) and node.attr not in own
    }
    for package, name in imports(module):
        if package.split(".")[0] not in ("mu2llm", "__future__") and any(
            map(_is_private, [*package.split("."), name or ""])
        ):
            used.add(package)
    return used - {"_replace", "_exit"}  # public: of named tuples, and of os


def _of_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_what_other_packages_do_not_promise_stands_in_one_file():
    assert {"ray.data._internal.execution.execution_callback", "_private"} <= private_names(PRIVATE)
    used = {str(FILES[module].relative_to(PACKAGE)): private_names(module) for module in FILES if module != PRIVATE}
    assert {path: names for path, names in used.items() if names} == KNOWN_PRIVATE
