"""The command ``cost``: what a run has cost, in all or by what."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from rich.table import Table
from rich.text import Text

from ...backends.budget.cost import (
    Cost,
    budget_so_far,
    cost_so_far,
    doubts,
    figure,
    grouped,
    tokens_json,
)
from ...backends.core.errors import ConfigurationError
from ...backends.core.money import HOUR_MS, NANO, Amount
from ...backends.core.types import Json
from ...backends.storage.journal import Spent
from ...backends.storage.run_folder import open_folder, run_ids
from ..campaign import campaign
from ..live import short
from ..saying import Terminal, print_json
from .options import COST_BY
from .report import cell
from .usage import show_use

_NO_PRICE: Final = "-"


def show(path: Path, by: str | None, as_json: bool) -> None:
    """Show what a run has cost over all its lives, whatever became of them.

    Raises:
        ConfigurationError: No run folder, or no such grouping.
        LedgerError: Journal or books are damaged.
    """
    if by is not None and by not in COST_BY:
        raise ConfigurationError(f"--by {by}: there are {', '.join(COST_BY)}")
    folder = open_folder(path)
    about = folder.read_provenance()
    run, items, model = run_ids(about), about["input"]["items"], about["model"]
    groups = grouped(folder.journal, run, items, by, model)
    cost = cost_so_far(folder, run, groups.lives)
    rows = sorted(groups.by.items(), key=lambda one: (by != "day" and -one[1].tokens, one[0]))
    jobs = campaign(path, shares=True)
    if as_json:
        print_json(
            {
                "run": about["run"],
                "simulated": about["simulated"],
                "running": folder.in_use(),
                "requests": cost.spent.requests,
                **cost.to_json(),
                "budget": budget_so_far(folder, cost),
            }
            | ({by: [_row_json(name, spent, cost.priced) for name, spent in rows]} if by else {})
            | ({} if jobs is None else {"chain": jobs})
        )
        return
    console = Terminal()
    if about["simulated"]:
        console.print(Text("simulated: true", style="bold"))
    if by is not None:
        console.print(_grouped_table(by, [*rows, ("total", cost.spent)], cost.priced))
    else:
        console.print(_total_table(cost, folder.in_use()))
    if jobs is not None:
        show_use(jobs, console)


def _row_json(name: str, spent: Spent, priced: bool) -> dict[str, Json]:
    return {
        "name": name,
        "requests": spent.requests,
        "tokens": tokens_json(spent),
        "usd": spent.nano_usd / NANO if priced else None,
        "wasted_usd": spent.wasted_nano_usd / NANO if priced else None,
    }


def _grouped_table(by: str, rows: list[tuple[str, Spent]], priced: bool) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(by, overflow="fold")
    for head in ("requests", "prompt", "cached", "completion", "wasted", "USD"):
        table.add_column(head, justify="right", no_wrap=True)
    largest = max(spent.nano_usd for _, spent in rows)
    for name, spent in rows:
        numbers = (
            spent.requests,
            spent.prompt_tokens,
            spent.cached_tokens,
            spent.completion_tokens,
            spent.wasted_tokens,
        )
        usd = figure(spent.nano_usd, largest) if priced else _NO_PRICE
        table.add_row(cell(name), *map(short, numbers), usd)
    return table


def _total_table(cost: Cost, running: bool) -> Table:
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, justify="right")
    table.add_column(no_wrap=True, justify="right")
    for name, amount, nano in _lines(cost, running):
        priced = cost.nano_usd is not None and nano is not None
        usd = f"{figure(nano or 0, cost.nano_usd or 0)} USD" if priced else ""
        table.add_row(name, amount, usd)
    return table


def _lines(cost: Cost, running: bool) -> Iterator[tuple[str, str, int | None]]:
    """Yield what is shown of a total: name, amount, and nano-dollars."""
    spent, held, doubt = cost.spent, cost.held, cost.doubt
    tokens = spent.nano_usd if cost.priced else None
    yield "requests", f"{spent.requests:,}", None
    yield "prompt tokens", f"{spent.prompt_tokens:,}", None
    yield "  of them cached", f"{spent.cached_tokens:,}", None
    yield "completion tokens", f"{spent.completion_tokens:,}", None
    yield "lost with their answers, at most", f"{spent.lost_tokens:,}", None
    yield "all tokens", f"{spent.tokens:,}", tokens
    yield "  useful", f"{spent.useful_tokens:,}", tokens and spent.useful_nano_usd
    wasted = spent.wasted_nano_usd if cost.priced else None
    yield "  wasted", f"{spent.wasted_tokens:,}", wasted
    price = held.nano_usd or None
    yield "node-hours held", f"{held.node_ms / HOUR_MS:,.3f}", price
    yield "  idle", f"{held.idle_ms / HOUR_MS:,.3f}", price and held.idle_nano_usd
    if cost.nano_usd is not None:
        yield "tokens and nodes", "", cost.nano_usd
    if doubt != Amount():
        yield ("reserved or in doubt" if running else "in doubt"), doubts(cost), None
