"""`sglang-alloc serve`: the table that the server will follow, and the environment that says so."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from sglang_alloc.allocation_mode import default_mode
from sglang_alloc.budget_tables import ARRAYS, BudgetTables, load_budget_tables
from sglang_alloc.errors import ConfigurationError
from sglang_alloc.plugin_entry import TABLE_VARIABLE
from sglang_alloc.priority_floors import PRIORITY_FLOORS_VARIABLE
from sglang_alloc.serving_rules import TableFacts, mode_to_serve
from sglang_alloc.shared_table import SharedTable, TableShape, publish_shared_table
from sglang_alloc.table_path import default_shared_path, require_folder
from sglang_alloc.worker_settings import (
    CORRECT_DRIFT_VARIABLE,
    FALLBACK_VARIABLE,
    MODE_VARIABLE,
    PROTECTED_PRIORITY_VARIABLE,
    REQUEST_BUDGETS_VARIABLE,
    ROUTING_VARIABLE,
    STALE_AFTER_VARIABLE,
    WorkerSettings,
    settings_from_environment,
)

_NPZ_MAGIC = b"PK"


class TableSource(NamedTuple):
    """A table that is published at `shared_path`, or will be if `tables` are given."""

    shared_path: Path
    tables: BudgetTables | None
    model_id: str
    fingerprint: str
    shape: TableShape
    sections: frozenset[str]
    mode_note: str

    def facts(self) -> TableFacts:
        """Return what the rules of serving ask of a table."""
        return TableFacts(
            *(self.shared_path, self.model_id, self.mode_note, self.sections.__contains__),
            *(self.shape.budget_min, self.shape.budget_max),
        )


def read_source(table: Path, shared_path: Path | None) -> TableSource:
    """Read and check `table`, budget tables or a shared table, without publishing anything.

    Raises:
        TableFormatError: the budget tables are missing or damaged.
        SharedTableError: the shared table is missing, foreign or damaged, or the folder to publish
            in is missing.
        ConfigurationError: a path to publish at was given for a table that is published already.
    """
    if _is_npz(table):
        tables = load_budget_tables(table)
        path = shared_path or default_shared_path(tables.model_id)
        require_folder(path)
        return TableSource(
            path,
            tables,
            tables.model_id,
            tables.fingerprint,
            TableShape(
                tables.num_layers,
                tables.top_k,
                tables.num_experts,
                tables.budget_min,
                tables.budget_max,
            ),
            frozenset(tables.arrays()),
            "",
        )
    if shared_path is not None and shared_path != table:
        raise ConfigurationError(
            f"--shared-path {shared_path} says where to publish a .npz, but --table {table} is a "
            "shared table already. Leave --shared-path out, or give the .npz."
        )
    with SharedTable.open(table) as opened:
        return TableSource(
            table,
            None,
            opened.model_id,
            opened.fingerprint,
            opened.shape,
            frozenset(name for name in ARRAYS if opened.has_section(name)),
            opened.mode_note,
        )


class WorkerOptions(NamedTuple):
    """What `serve` was told about the workers, as in `WorkerSettings`."""

    mode: str | None
    fallback: str
    stale_after_seconds: float
    request_budgets: str
    protected_priority: int | None
    priority_floors: str
    correct_drift: bool
    routing: str


def worker_environment(source: TableSource, options: WorkerOptions) -> dict[str, str]:
    """Return the variables that the plugin reads in every SGLang process.

    Raises:
        ConfigurationError: a setting is malformed, or the table cannot serve it.
    """
    priority = options.protected_priority
    environment = {
        TABLE_VARIABLE: str(source.shared_path.absolute()),
        MODE_VARIABLE: options.mode or "",
        FALLBACK_VARIABLE: options.fallback,
        STALE_AFTER_VARIABLE: f"{options.stale_after_seconds:g}",
        REQUEST_BUDGETS_VARIABLE: options.request_budgets,
        PROTECTED_PRIORITY_VARIABLE: "" if priority is None else str(priority),
        PRIORITY_FLOORS_VARIABLE: options.priority_floors,
        **({CORRECT_DRIFT_VARIABLE: "1"} if options.correct_drift else {}),
        ROUTING_VARIABLE: "" if options.routing == "engine" else options.routing,
    }
    mode_to_serve(_parsed(environment), source.facts())
    return environment


def publish_source(source: TableSource, mode: str | None) -> None:
    """Publish the budget tables of `source`, if it has any, for `mode` or the best they support."""
    if source.tables is not None:
        note = mode or default_mode(source.sections.__contains__)
        publish_shared_table(source.shared_path, source.tables, mode_note=note)


def _is_npz(path: Path) -> bool:
    if path.suffix == ".npz":
        return True
    try:
        with path.open("rb") as stream:
            return stream.read(len(_NPZ_MAGIC)) == _NPZ_MAGIC
    except OSError:
        return False


def _parsed(environment: Mapping[str, str]) -> WorkerSettings:
    settings = settings_from_environment(environment)
    assert settings is not None, "the table is always named"
    return settings
