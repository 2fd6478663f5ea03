"""What "nothing but" means for a module's direct imports; indirect ones are import-linter's."""

from __future__ import annotations

import sys

import grimp
import pytest

_CONTRACTS = (
    "actor",
    "allocation_mode",
    "atomic_file",
    "budget_tables",
    "errors",
    "model_identity",
    "npz_file",
    "predicted_loss",
    "shared_table",
    "standard_streams",
)
_STANDARD_LIBRARY = sys.stdlib_module_names | {"__future__"}


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph(
        *("sglang_alloc", "sglang_alloc_kernels", "sglang_alloc_controller"),
        include_external_packages=True,
        cache_dir=None,
    )


def _is_contract(module: str) -> bool:
    package, _, name = module.partition(".")
    return package == "sglang_alloc" and (not name or name.startswith(_CONTRACTS))


def _imports(graph: grimp.ImportGraph, module: str) -> set[str]:
    """Return what a module imports beside the standard library."""
    return graph.find_modules_directly_imported_by(module) - _STANDARD_LIBRARY


def _modules(graph: grimp.ImportGraph, package: str) -> set[str]:
    return {package, *graph.find_descendants(package)}


def test_a_contract_imports_nothing_but_numpy_and_contracts(graph: grimp.ImportGraph) -> None:
    contracts = {module for module in _modules(graph, "sglang_alloc") if _is_contract(module)}
    assert len(contracts) >= 8
    for module in contracts:
        foreign = {name for name in _imports(graph, module) if not _is_contract(name)}
        assert foreign <= {"numpy"}, module


def test_a_kernel_imports_nothing_but_torch_and_triton(graph: grimp.ImportGraph) -> None:
    kernels = _modules(graph, "sglang_alloc_kernels")
    for module in kernels:
        assert _imports(graph, module) - kernels <= {"torch", "triton"}, module


def test_the_controller_knows_the_worker_only_through_the_contracts(
    graph: grimp.ImportGraph,
) -> None:
    for module in _modules(graph, "sglang_alloc_controller"):
        ours = {name for name in _imports(graph, module) if name.startswith("sglang_alloc.")}
        assert all(_is_contract(name) for name in ours), module


def test_only_the_plugins_files_import_sglang(graph: grimp.ImportGraph) -> None:
    assert graph.find_modules_that_directly_import("sglang") == {
        f"sglang_alloc.{name}"
        for name in ("plugin", "plugin_facts", "plugin_proof", "plugin_records", "plugin_routing")
    }
