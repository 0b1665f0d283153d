"""The rooms of the package and the direction of their imports, read from the source."""

import ast
from pathlib import Path

import pytest

from mia_utils import paths

PACKAGE = paths.PACKAGE_ROOT / "mia_utils"
# a room imports itself and what stands before it; names in one entry stand side by side
ORDER = [
    {"seeds", "paths"},
    {"datasets"},
    {"models"},
    {"pretrain", "protocol"},
    {"attacks"},
    {"runner"},
    {"results", "calls", "lab", "defenses"},
    {"plots", "say", "course", "findings", "page", "replay", "audit"},
]
FLOOR = {name: floor for floor, names in enumerate(ORDER) for name in names}
FLOOR["plots"] = FLOOR["protocol"]  # drawing needs rows, never the lab that made them
MODULES = sorted(PACKAGE.rglob("*.py"))


def name_room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def find_imports(path: Path):
    """(module imported, line, whether inside a function, whether only for type checking)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guarded = {
        id(n)
        for g in ast.walk(tree)
        if isinstance(g, ast.If) and "TYPE_CHECKING" in ast.dump(g.test)
        for n in ast.walk(g)
    }
    inner = {
        id(n) for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef)) for n in ast.walk(f)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mia_utils"):
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno, id(node) in inner, id(node) in guarded


def rooms_of(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else ""


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows_point_down(path):
    room = name_room(path)
    if room == "__init__":
        return
    for name, line, _, typing_only in find_imports(path):
        other = rooms_of(name)
        if other in FLOOR and not typing_only and other != room:
            # the command line stands in the runner's folder and starts what is above it as processes
            assert FLOOR[other] <= FLOOR[room], f"{path.name}:{line}: {room} imports {other}, which stands above it"


def test_no_circle():
    graph: dict[str, set[str]] = {}
    known = {".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__") for p in MODULES}
    for path in MODULES:
        own = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        for name, _, _, typing_only in find_imports(path):
            target = name if name in known else name.rpartition(".")[0]
            if target in known and target != own and not typing_only and not own.startswith(f"{target}."):
                graph.setdefault(own, set()).add(target)
    done: set[str] = set()

    def walk(node: str, trail: tuple[str, ...]) -> None:
        assert node not in trail, f"import circle: {' -> '.join([*trail[trail.index(node) :], node])}"
        if node not in done:
            for other in sorted(graph.get(node, ())):
                walk(other, (*trail, node))
            done.add(node)

    for node in sorted(graph):
        walk(node, ())


def test_files_are_short_and_the_package_is_thin():
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert [f"{p.name} {n}" for p, n in lines.items() if n > 400] == []


def test_public_names_go_on_working():
    from mia_utils import attacks, datasets, defenses, encoders, metrics, pretrain, segmenters, splits, views

    names = [
        attacks.register,
        attacks.evaluate,
        attacks.table,
        datasets.load,
        splits.draw,
        encoders.open,
        encoders.wrap,
    ]
    names += [segmenters.wrap, pretrain.fit, pretrain.register, defenses.perturb, metrics.evaluate, views.make_views]
    assert all(callable(name) for name in names)
