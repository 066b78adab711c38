"""What `import fedeat` gives, what it costs, and which rooms may import which."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import fedeat

SOURCE = Path(fedeat.__file__).parent

# From the ground up. A room, a package or a module beside them, imports from the rows below its own and from itself.
ALGORITHM = (
    {"errors", "seeding", "updates"},
    {"protocols", "geometry", "hooks"},
    {"objective", "aggregation"},
    {"perturbation"},
    {"passes", "tally", "embeddings"},
    {"variants", "algorithm", "privacy"},
)
LAYERS = (
    *ALGORITHM,
    {"data", "records"},
    {"model", "config"},
    {"engine", "evaluation", "secure_aggregation"},
    {"attacks"},
    {"experiment", "report", "demo"},
    {"flower"},
    {"terminal"},
    {"cli"},
    {"__main__"},
)

FILES = [path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py"]


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def module(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(path) for path in FILES}


def imported(path: Path) -> set[str]:
    """Names of the modules a file imports, `fedeat.x.y` for the package's own."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in full}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    height = {name: index for index, layer in enumerate(LAYERS) for name in layer}
    rooms = {name.split(".")[1] for name in imported(path) if name.startswith("fedeat.")} - {room(path)}
    assert {room(path), *rooms} <= height.keys(), "a new room: give it its place in LAYERS"
    assert not {name for name in rooms if height[name] >= height[room(path)]}


def test_no_room_imports_in_a_circle() -> None:
    graph = {module(path): imported(path) for path in FILES}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


ALGORITHM_FILES = [path for path in FILES if room(path) in set().union(*ALGORITHM)]


@pytest.mark.parametrize("path", ALGORITHM_FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_the_algorithm_knows_torch_and_numpy_alone(path: Path) -> None:
    known = {"fedeat", "torch", "numpy", *sys.stdlib_module_names}
    foreign = {name.split(".")[0] for name in imported(path)} - known
    assert not foreign


def test_flower_is_imported_by_its_own_room_alone() -> None:
    foreign = {path for path in FILES if any(name.split(".")[0] == "flwr" for name in imported(path))}
    assert {room(path) for path in foreign} == {"flower"}


def test_every_public_name_exists_and_the_list_is_sorted() -> None:
    assert all(hasattr(fedeat, name) for name in fedeat.__all__)
    constants_then_classes_then_functions = sorted(
        fedeat.__all__, key=lambda name: (0 if name.isupper() else 1 if name[0].isupper() else 2, name)
    )
    assert fedeat.__all__ == constants_then_classes_then_functions


@pytest.mark.parametrize("name", ["fedeat", "fedeat.data", "fedeat.evaluation"])
def test_importing_a_light_room_loads_no_heavy_library(name: str) -> None:
    heavy = "transformers", "peft", "flwr", "datasets", "pyarrow", "pydantic", "matplotlib"
    code = f"import sys, {name}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_loads_neither_torch_nor_a_model_library() -> None:
    code = (
        "import sys; sys.argv = ['fedeat', '--help']\n"
        "from fedeat import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "print([name for name in ('transformers', 'peft', 'datasets', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")


def test_errors_are_one_family() -> None:
    errors = [getattr(fedeat, name) for name in fedeat.__all__ if name.endswith("Error")]
    assert errors
    assert all(issubclass(error, fedeat.FedeatError) for error in errors)
