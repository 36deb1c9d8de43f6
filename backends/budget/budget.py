"""Budget of an open run, and its leases."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ...configs.budget import BudgetConfig
from ..core.errors import BudgetExhaustedError, JournalError
from ..core.money import NO_PRICES, Amount, BudgetLimits, TokenPrices
from ..core.protocols import PromptCounter
from ..core.types import Json, Usage
from ..storage.journal import Journal
from ..storage.journal_file import RunIds
from ..storage.run_folder import (
    RunFolder,
    StagePlace,
    get_run_ids,
    is_part_key,
    read_raised_limits,
    read_requested_limits,
    write_raised_limits,
)
from .limits import (
    SETTING_UNITS,
    estimate_total,
    format_amount,
    list_limits,
    read_limits,
    report_limits,
)
from .reservations import AnswerLengths, BudgetBalance, ItemAccount
from .spend_log import Lease, SpendLog, SpendLogs, open_spend_logs, read_lease_clock

if TYPE_CHECKING:
    from ...configs.models import RunConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BudgetSettings:
    """Settings of a budget.

    Attributes:
        limits: The most that all sessions of a run may spend together.
        prices: Prices of tokens and nodes.
        repairs: How often an answer may be sent back.
        warn_at: Shares of a limit at which to warn.
        kept: What is kept for later stages of a pipeline; the limits are without it.
    """

    limits: BudgetLimits
    prices: TokenPrices
    repairs: int = 0
    warn_at: Sequence[float] = ()
    kept: Amount = field(default_factory=Amount)


class Budget:
    """Budget of an open run.

    Args:
        settings: The budget's settings.
        before: Spending of earlier sessions.
        log: Spend log of this session; None in a worker that writes none.
        until: Monotonic time in seconds after which nothing more is spent.

    Attributes:
        settings: As given.
        before: As given.
        balance: What is left.
        needed: Amount of the last refused reservation, or None.
        count_prompt: Counts prompts as the model does, used when the budget is short; or None.
        lengths: Lengths of answers, used when the budget is short.
    """

    def __init__(
        self,
        settings: BudgetSettings,
        before: Amount,
        log: SpendLog | None,
        until: float = float("inf"),
    ) -> None:
        self.settings, self.before = settings, before
        self.balance = BudgetBalance(
            _left(settings.limits, before), log, self.record_refusal, until
        )
        self.needed: Amount | None = None
        self.count_prompt: PromptCounter | None = None
        self.lengths = AnswerLengths()
        self._warned = set[tuple[str, float]]()

    def open_account(self) -> ItemAccount:
        """Return an account for one item."""
        prices, repairs = self.settings.prices, self.settings.repairs
        return ItemAccount(self.balance, prices, repairs, self.count_prompt, self.lengths)

    def charge_probe(self, usage: Usage) -> None:
        """Charge what a probe of an endpoint has used; no item records it."""
        self.balance.settle(Amount(), self.settings.prices.amount(usage))

    def total_spent(self) -> Amount:
        """Return what all sessions have spent, unaccounted spending included."""
        return self.before.plus(self.balance.settled).plus(self.balance.lost)

    def can_carry(self, needed: Amount) -> bool:
        """Return True if the rest covers an amount once nothing is in flight."""
        return min(self.balance.left.plus(self.balance.reserved).minus(needed)) >= 0

    def warn(self) -> None:
        """Log each passed share of a limit once; of several passed at once, the highest."""
        spent = self.total_spent()
        for name, cap in list_limits(self.settings.limits):
            value = getattr(spent, name)
            if not cap:  # later stages need all of it
                continue
            passed = {(name, share) for share in self.settings.warn_at if value >= share * cap}
            if passed - self._warned:
                self._warned |= passed
                part = f"{100 * value / cap:.0f} % of the budget"
                logger.warning(
                    "%s: %s of %s", part, format_amount(name, value), format_amount(name, cap)
                )

    def report(self) -> dict[str, Json]:
        """Return spending and limit, by limit."""
        return report_limits(self.settings.limits, self.total_spent())

    def record_refusal(self, needed: Amount) -> str:
        """Store the refused amount, and describe which limit is exhausted."""
        self.needed = needed
        spent = self.total_spent()
        short = [
            f"{format_amount(name, getattr(spent, name))} are spent of "
            f"{format_amount(name, cap)}, and the next item "
            f"may take {format_amount(name, getattr(needed, name))}"
            for name, cap in list_limits(self.settings.limits)
            if getattr(spent.plus(self.balance.reserved).plus(needed), name) > cap
        ]
        kept = [
            format_amount(name, value)
            for name, _ in list_limits(self.settings.limits)
            if (value := getattr(self.settings.kept, name))
        ]
        later = f" ({', '.join(kept)} more are kept for later stages)" if kept else ""
        return f"the budget is exhausted: {'; '.join(short)}{later}"


def _left(caps: BudgetLimits, before: Amount) -> BudgetLimits:
    pairs = zip(caps.as_tuple(), before, strict=True)
    return BudgetLimits(*(None if cap is None else max(0, cap - spent) for cap, spent in pairs))


class LeaseTable:
    """Leases of one session of a run.

    Args:
        balance: Balance that leases are lent from.
        logs: Spend logs of the run.
        earlier: What counts as spent of leases of earlier sessions that may still be returned.
    """

    def __init__(
        self, balance: BudgetBalance, logs: SpendLogs, earlier: Mapping[str, Amount]
    ) -> None:
        self._balance, self._logs = balance, logs
        self._out, self._lost = dict[str, Lease](), dict[str, Lease]()
        self._earlier = dict(earlier)
        self._kept = dict[str, Amount]()
        self._found = dict[str, float]()

    async def lend(self, name: str, lease: Lease) -> None:
        """Lend an amount; return once the spend log has the lease on disk.

        Args:
            name: Name of the lease, unique within the run.
            lease: The lease.

        Raises:
            BudgetExhaustedError: The amount is not available and none will be released.
            JournalError: The spend log cannot be written.
        """
        await self._balance.reserve(lease.amount)
        self._out[name] = lease
        await self._append_lease(name, lease)

    async def return_lease(self, name: str, used: Amount) -> None:
        """Take back what was not spent; a second return of the same lease has no effect.

        Args:
            name: Name of the lease.
            used: What was spent of it.

        Raises:
            JournalError: The spend log cannot be written.
        """
        if lease := self._out.pop(name, None):
            self._balance.settle(lease.amount, used.minimum(lease.amount))
            await self._balance.append_line({"back": name}, sync=False)
        elif lease := self._lost.pop(name, None):
            self._balance.refund(lease.amount, used.minimum(lease.amount))
            await self._balance.append_line({"back": name}, sync=False)
        elif name in self._earlier:
            counted = self._earlier.pop(name)
            used = used.minimum(counted)
            self._balance.extend_limits(counted.minus(used))
            await self._balance.append_line({"late": name, "used": used.to_json()}, sync=False)

    async def keep_spent(self, name: str, spent: Amount) -> None:
        """Lower a lease to what was spent of it, until the journal records that.

        Args:
            name: Name of a lease of this session.
            spent: What was spent of it.

        Raises:
            JournalError: The spend log cannot be written.
        """
        lease = self._out.pop(name)
        spent = spent.minimum(lease.amount)
        self._balance.keep_spent(lease.amount, spent)
        self._kept[name] = spent
        await self._append_lease(name, replace(lease, amount=spent))

    async def take_over(self, prefix: str, new: str, recorded: Amount, spent: Amount) -> None:
        """Move what was spent of leases of earlier sessions, and is not recorded, to this session.

        Args:
            prefix: Beginning of the names of these leases.
            new: Name of a lease of this session, which lasts until ``spent`` is recorded.
            recorded: What was spent of them and is recorded in the journals of earlier sessions.
            spent: What was spent beyond that.

        Raises:
            JournalError: The spend log cannot be written.
        """
        returned, extra = dict[str, Amount](), Amount()
        for name in sorted(name for name in self._earlier if name.startswith(prefix)):
            counted = self._earlier.pop(name)
            part = recorded.minimum(counted)
            recorded = recorded.minus(part)
            if part != counted:
                returned[name], extra = part, extra.plus(counted.minus(part))
        self._balance.take_over(extra, spent)
        if any(spent):
            self._kept[new] = spent
            await self._append_lease(new, Lease(spent, 0.0))
        for name, part in returned.items():
            line = {"late": name, "used": part.to_json()}
            await self._balance.append_line(line, sync=True)

    def earlier_leases(self, prefix: str) -> list[str]:
        """Return the names of earlier sessions' leases that begin so and may be returned."""
        return [name for name in self._earlier if name.startswith(prefix)]

    async def settle_kept(self, name: str) -> None:
        """Settle a lease whose spending is now in the journal.

        Raises:
            JournalError: The spend log cannot be written.
        """
        if name in self._kept:
            self._balance.settle_spent(self._kept.pop(name))
            await self._balance.append_line({"back": name}, sync=False)

    async def _append_lease(self, name: str, lease: Lease) -> None:
        line = {"amount": lease.amount.to_json(), "until": lease.until, "booked": lease.has_log}
        await self._balance.append_line({"lease": name} | line, sync=True)

    def mark_lost(self, name: str) -> None:
        """Count the lease of a lost worker as spent until its spend log proves otherwise."""
        if lease := self._out.pop(name, None):
            self._lost[name] = lease
            self._balance.write_off(lease.amount)

    async def recover_lost(self) -> None:
        """Refund what the spend logs of lost leases prove unspent.

        A holder spends nothing more once the term has passed since its receipt, by its monotonic
        clock. This process waits twice the term from when it finds the holder's spend log, by its
        own. So no lease is spent after its return, however much the clocks of the hosts differ.

        Raises:
            JournalError: A spend log is damaged or cannot be written; the others are still read.
        """
        failed: JournalError | None = None
        for name, lease in list(self._lost.items()):
            if not lease.has_log:
                continue
            waited_s = read_lease_clock() - self._found.setdefault(name, read_lease_clock())
            try:
                spent = await asyncio.to_thread(self._logs.recover, name, lease, waited_s)
            except JournalError as error:
                failed = failed or error
                continue
            if spent is not None:
                del self._found[name]
                await self.return_lease(name, spent)
        if failed is not None:
            raise failed

    def mark_all_lost(self) -> None:
        """Count all open leases as spent, at the end of the session."""
        for name in list(self._out):
            self.mark_lost(name)
        for name in list(self._kept):
            self._balance.write_off_spent(self._kept.pop(name))


@dataclass(frozen=True, slots=True)
class RunBudget:
    """Budget in use.

    Attributes:
        budget: What is left.
        leases: What workers hold of it.
        logs: Spend logs of the run.
    """

    budget: Budget
    leases: LeaseTable
    logs: SpendLogs


def raise_limits(folder: RunFolder, answer: Any, *, requested: bool = False) -> str | None:
    """Store the answer to a pause as new limits; return what is wrong with it, or None.

    Args:
        folder: The run's folder.
        answer: The answer.
        requested: Whether it comes from a request.

    Raises:
        JournalError: The limits cannot be read or written.
    """
    names = [key for key, _ in SETTING_UNITS.values()]
    if not isinstance(answer, Mapping) or not answer or answer.keys() - set(names):
        return f"answer with new totals, e.g. {{'usd': 20}}; names: {', '.join(names)}"
    if booleans := [key for key, value in answer.items() if isinstance(value, bool)]:
        return f"{booleans[0]}: give a number"
    try:
        asked = BudgetConfig.model_validate(dict(answer))
    except ValidationError as error:
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    checked = asked.model_dump(include=set(answer))
    before = read_requested_limits(folder.raised_limits)
    marked = before | checked.keys() if requested else before - checked.keys()
    write_raised_limits(
        folder.raised_limits, {**read_raised_limits(folder.raised_limits), **checked}, marked
    )
    return None


def lower_raised_limits(folder: RunFolder, most: Mapping[str, float]) -> None:
    """Lower limits set by requests to the totals that their graph is bound to now.

    Args:
        folder: The run's folder.
        most: The bound totals by name.

    Raises:
        JournalError: The limits cannot be read or written.
    """
    caps, requested = (
        read_raised_limits(folder.raised_limits),
        read_requested_limits(folder.raised_limits),
    )
    lowered = dict(caps)
    for key in requested & most.keys():
        cap: Any = caps[key]
        lowered[key] = most[key] if cap is None else min(cap, most[key])
    if lowered != caps:
        write_raised_limits(folder.raised_limits, lowered, requested)


def read_spent_before(folder: RunFolder, logs: SpendLogs, journal: Journal) -> Amount:
    """Return the most that all sessions so far may have spent, those of its pipeline included.

    Args:
        folder: The run's folder.
        logs: Its spend logs.
        journal: Its journal.

    Raises:
        JournalError: A spend log, or the journal of another run of the pipeline, is damaged.
    """
    return logs.total_spent(_read_recorded(folder, logs) | _sum_sessions(journal))


def _sum_sessions(journal: Journal) -> dict[int, Amount]:
    return {session: spent.amount for session, spent in journal.usage_by_session.items()}


def _read_recorded(folder: RunFolder, logs: SpendLogs) -> dict[int, Amount]:
    """Return the journal totals of the pipeline's other runs, by session, where they count.

    A settled spend log has the final amount, so that most journals need not be read.
    """
    place = folder.read_place()
    if place is None:
        return {}
    recorded = dict[int, Amount]()
    states = logs.read_sessions().values()
    for key in sorted({state.part for state in states if state.settled is None}):
        other = RunFolder(place.root / key)
        if not is_part_key(key) or key == place.key or not other.provenance.exists():
            continue
        about = other.read_provenance()
        with Journal(other.journal, get_run_ids(about), about["input"]["items"]) as journal:
            recorded |= _sum_sessions(journal)
    return recorded


def make_budget_settings(
    folder: RunFolder, config: RunConfig, price: TokenPrices
) -> BudgetSettings:
    """Return the settings of a run's budget."""
    repairs = 0 if config.task.graph else config.task.repairs
    caps = read_limits(folder, config.budget.limits)
    return BudgetSettings(caps, price, repairs, tuple(config.budget.warn_at))


@asynccontextmanager
async def open_budget(
    folder: RunFolder, config: RunConfig, price: TokenPrices, journal: Journal, run: RunIds
) -> AsyncIterator[RunBudget | None]:
    """Open a run's budget; yield None when it has no limits.

    Raises:
        JournalError: A spend log is damaged or cannot be written.
    """
    settings, place = await asyncio.to_thread(
        lambda: (make_budget_settings(folder, config, price), folder.read_place())
    )
    if not settings.limits.has_any and not (place is not None and place.limits):
        yield None
        return
    opened = await asyncio.to_thread(_open_run_budget, folder, settings, journal, run)
    try:
        yield opened
    finally:
        opened.leases.mark_all_lost()
        await opened.budget.balance.aclose()


def _open_run_budget(
    folder: RunFolder, settings: BudgetSettings, journal: Journal, run: RunIds
) -> RunBudget:
    logs = open_spend_logs(folder, run)
    before = read_spent_before(folder, logs, journal)
    earlier = logs.unreturned_leases(own=True)
    settings = _limit_stage(folder, settings, logs, journal, before)
    budget = Budget(settings, before, logs.create(logs.session_path(journal.session_number)))
    return RunBudget(budget, LeaseTable(budget.balance, logs, earlier), logs)


def _limit_stage(
    folder: RunFolder,
    settings: BudgetSettings,
    logs: SpendLogs,
    journal: Journal,
    before: Amount,
) -> BudgetSettings:
    """Return the settings without what later stages need and what exceeds the stage's own limits.

    Args:
        folder: The run's folder.
        settings: The budget of the whole pipeline.
        logs: Its spend logs.
        journal: The run's journal.
        before: What the pipeline has spent.
    """
    place = folder.read_place()
    if place is None:
        return settings
    given: dict[str, Any] = dict(place.limits)
    own = BudgetLimits.from_settings(**given)
    spent = Amount()
    if own.has_any:
        spent = _read_stage_spending(folder, place, logs, journal)
    kept = Amount.from_json(place.kept)
    limits = list[int | None]()
    for cap, stage_cap, all_before, stage_before, later in zip(
        settings.limits.as_tuple(), own.as_tuple(), before, spent, kept, strict=True
    ):
        most = [] if cap is None else [max(0, cap - later)]
        most += [] if stage_cap is None else [all_before + max(0, stage_cap - stage_before)]
        limits.append(min(most, default=None))
    return replace(settings, limits=BudgetLimits(*limits), kept=kept)


def _read_stage_spending(
    folder: RunFolder, place: StagePlace, logs: SpendLogs, journal: Journal
) -> Amount:
    """Return the most that all runs of the stage may have spent."""
    recorded = _read_recorded(folder, logs) | _sum_sessions(journal)
    stage, total = f"stages/{place.stage}", Amount()
    for key in {state.part for state in logs.read_sessions().values()}:
        if key == stage or key.startswith(f"{stage}/"):
            total = total.plus(logs.of_part(key).total_spent(recorded, own=True))
    return total


def budget_gap(
    folder: RunFolder, config: RunConfig, needed: Amount, live: Budget | None
) -> dict[str, Json] | None:
    """Return the question for the user while the budget does not cover an amount, or None.

    Args:
        folder: The run's folder.
        config: The run's settings.
        needed: Amount that could not be reserved.
        live: The run's open budget, if any; after a refusal it counts as exhausted.

    Raises:
        BudgetExhaustedError: ``budget.on_limit`` is ``stop``.
        JournalError: Spend logs or journal cannot be read.
    """
    about = folder.read_provenance()
    with Journal(folder.journal, get_run_ids(about), about["input"]["items"]) as journal:
        counts, usage, budget = journal.count_items(), journal.total_usage(), live
        if budget is None:
            logs = open_spend_logs(folder, get_run_ids(about))
            before = read_spent_before(folder, logs, journal)
            settings = _read_budget_settings(folder, config, about)
            settings = _limit_stage(folder, settings, logs, journal, before)
            budget = Budget(settings, before, None)
    if not (live is not None and live.needed) and budget.can_carry(needed):
        return None
    refusal, spent = budget.record_refusal(needed), budget.total_spent()
    settled = usage.amount.plus(budget.settings.prices.node_amount(spent.node_ms))
    if config.budget.on_limit == "stop":
        raise BudgetExhaustedError(refusal)
    return {
        "question": f"{refusal}. Answer with a higher total, e.g. {_example(budget)}.",
        "why": refusal,
        "budget": budget.report(),
        "items": {"done": counts.done, "failed": counts.failed, "open": counts.open},
        "total_to_finish": estimate_total(spent, settled, budget.settings.limits, counts),
    }


def _read_budget_settings(
    folder: RunFolder, config: RunConfig, about: Mapping[str, Any]
) -> BudgetSettings:
    from .pricing import find_token_prices  # noqa: PLC0415 - commands that only read need no fleet

    price = find_token_prices(config, about["model"], about["simulated"])
    return make_budget_settings(folder, config, price or NO_PRICES)


def _example(budget: Budget) -> str:
    """Return a sufficient answer as a user writes it."""
    return "{" + ", ".join(f'"{k}": {2 * v["cap"]:g}' for k, v in budget.report().items()) + "}"
