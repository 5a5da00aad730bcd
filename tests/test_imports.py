"""Imports run one way (DESIGN 5): factors know nothing, rules and recording never meet, applications see public names only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import samplewise

SOURCE = Path(samplewise.__file__).parent
CORE = (
    "errors",
    "factors",
    "registry",
    "contractions",
    "axes",
    "collecting",
    "taps",
    "alignment",
    "movement",
    "sample_axis",
    "by_rule",
    "mixing",
    "recording",
)
APPLICATIONS = ("attribution", "privacy", "noise_scale", "cli")
ALLOWED = {
    "errors": set(),
    "buffers": set(),
    "kernels": set(),
    "products": {"buffers", "factors", "kernels", "running"},
    "strategy": {"errors", "products", "running"},
    "running": set(),
    "factors": set(),
    "joined": {"factors", "outer", "sums"},
    "outer": {"buffers", "factors", "products", "strategy"},
    "pixels": {"buffers", "factors", "products"},
    "convolution_costs": {"outer", "pixels", "strategy"},
    "convolutional": {"buffers", "convolution_costs", "factors", "outer", "pixels", "products", "strategy"},
    "sums": {"factors", "outer", "products", "strategy"},
    "recurrence": {"products", "registry", "running"},
    "rules": {
        "axes",
        "buffers",
        "convolutional",
        "factors",
        "outer",
        "products",
        "recurrence",
        "registry",
        "running",
        "strategy",
        "contractions",
        "errors",
        "rules",
    },
    "projections": {"errors"},
    "registry": {"errors"},
    "contractions": {"errors"},
    "collecting": {"errors", "factors", "outer", "sums"},
    "taps": {"errors", "factors", "collecting"},
}


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def dotted(path: Path) -> list[str]:
    return list(path.relative_to(SOURCE).with_suffix("").parts)


def name_of(path: Path) -> str:
    return ".".join(dotted(path)).removesuffix("__init__").rstrip(".")


NAMES = {name_of(path): path for path in modules()}


def imported(path: Path, *, for_types: bool = True) -> dict[str, set[str]]:
    """samplewise module -> the names taken from it, `{"*"}` for the module itself; imports inside functions included."""
    tree, found = ast.parse(path.read_text()), dict[str, set[str]]()
    guards = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    skipped = set() if for_types else {id(inner) for node in guards for inner in ast.walk(node)}
    for node in (node for node in ast.walk(tree) if id(node) not in skipped):
        if isinstance(node, ast.Import):
            names = [alias.name.partition(".") for alias in node.names]
            found |= {rest: {"*"} for top, _, rest in names if top == "samplewise"}
        elif isinstance(node, ast.ImportFrom):
            parts = (
                [*dotted(path)[: -node.level], *filter(None, [node.module])] if node.level else (node.module or "").split(".")
            )
            if not node.level and parts[0] != "samplewise":
                continue
            target = ".".join(parts if node.level else parts[1:])
            for alias in node.names:
                inner = f"{target}.{alias.name}".lstrip(".")
                is_module = inner in NAMES
                found.setdefault(inner if is_module else target, set()).add("*" if is_module else alias.name)
    return found


def first(module: str) -> str:
    return module.split(".", maxsplit=1)[0]


@pytest.mark.parametrize("name", ALLOWED)
def test_a_module_imports_only_what_is_below_it(name: str) -> None:
    paths = [path for path in modules() if dotted(path)[0] == name]
    assert paths
    for path in paths:
        assert {first(module) for module in imported(path)} <= ALLOWED[name], path


@pytest.mark.parametrize("name", [name for name in CORE if name != "errors"])
def test_the_engine_never_imports_rules_or_what_is_built_on_it(name: str) -> None:
    above = {"rules", "quantities", "verification", "testing", "coverage", "expanded_weights", *APPLICATIONS}
    for path in modules():
        if dotted(path)[0] == name:
            assert not {first(module) for module in imported(path)} & above, path


def test_there_is_no_cycle() -> None:
    graph = {name: imported(path, for_types=False) for name, path in NAMES.items() if name}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for target in graph.get(module, ()):
                visit(target, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("name", APPLICATIONS)
def test_applications_import_public_names_only(name: str) -> None:
    public = set(samplewise.__all__)
    for path in modules():
        if dotted(path)[0] != name:
            continue
        for module, names in imported(path).items():
            if first(module) in APPLICATIONS:
                continue
            assert module in {"", "errors", "testing"} or names <= public, f"{path} takes {names} from samplewise.{module}"
            assert module != "" or names <= public | {"*", "__version__"}, f"{path} takes {names} from samplewise"


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, samplewise, samplewise.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_exists() -> None:
    for name in samplewise.__all__:
        assert getattr(samplewise, name) is not None
    assert set(dir(samplewise)) >= set(samplewise.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        samplewise.nothing  # noqa: B018
