"""Requests by batches: collect them in files, submit, poll, and give each its answer."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence, Set
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Protocol

from ...configs.backend import BackendConfig
from ..budget.budget import RunBudget
from ..budget.spend_log import Lease
from ..core.errors import (
    AuthenticationError,
    BudgetExhaustedError,
    ConfigurationError,
    EndpointError,
    EndpointLostError,
    FanfoldError,
    PromptTooLongError,
    RunStoppedError,
)
from ..core.money import Amount, TokenPrices
from ..core.protocols import CURRENT_CALLS, CallLog
from ..core.terminal import count_nouns
from ..core.types import Usage
from ..discovery.connect import ReadyEndpoints
from ..fleet import transport as completions
from ..fleet.endpoint import Endpoint, EndpointSpec
from ..fleet.failures import Failure, HTTPAnswer, RetryAction, RetryRule, may_have_used
from ..fleet.fleet import Fleet
from ..fleet.request import RequestCharge, count_template, max_usage, read_max_tokens
from ..fleet.transport import Transport
from .files import (
    BatchFolder,
    BatchOutput,
    BatchRecord,
    LineKey,
    LineRecord,
    check_batch_settings,
    digest_body,
    encode_request,
    make_custom_id,
    read_output,
    write_requests,
)
from .service import BatchService

logger = logging.getLogger(__name__)

event_logger = logging.getLogger(f"{__name__}.events")
"""Logs what happens to batches; the command line always shows it."""

_ROUNDS: Final = 2
"""Batches in which a request may stay without an answer, before it is a leftover."""
_VOID: Final = 2
"""Batches in a row without any answer, after which the run stops."""
_LISTS: Final = 2
"""Lists without a batch after which it is not known whether it was submitted."""
_RESERVED_S: Final = 7 * 86400.0
"""Seconds after which the service gives up a batch."""
_READ_AGAIN_S: Final = 30.0
"""Seconds until the output is read once more, if lines are missing: file systems may lag."""
_READS: Final = 3
"""How often the output is read before a batch without any counts as such."""
_RECENT: Final = 200
"""Number of recent items for the share of those that failed in every batch."""
_SLOWER: Final = 1.5
"""Factor of the pauses between two questions for a state."""
_CLOSE_S: Final = 30.0
"""Seconds to wait for a submission in progress at the end of a session."""
_OK: Final = 200
_LEASE: Final = "batch-"
"""Beginning of the names of the leases of batches."""
_NOTHING: Final = Amount()
_LOST_RULE: Final = RetryRule(EndpointLostError, RetryAction.OTHER)


class ItemStates(Protocol):
    """What the journal knows of items."""

    def is_finished(self, index: int) -> bool:
        """Return True if an item has ended."""
        ...

    def get_last_session(self, index: int) -> int:
        """Return the session of an item's record, also of one that is reopened; 0 without one."""
        ...


@dataclass(frozen=True, slots=True)
class BatchRun:
    """The run that a transport belongs to.

    Attributes:
        runs: Its ids, the current one first.
        session: The session number.
        model: The model's name at the service.
        folder: Folder of the records of batches.
        items: What its journal knows of items.
        prices: Prices of tokens.
        budget: Its budget, or None.
        is_stopping: Returns True if nothing more is to be submitted.
        body_bytes: Longest line of output that is read.
        attempts: Failures of a request after which its item fails.
    """

    runs: Sequence[str]
    session: int
    model: str
    folder: Path
    items: ItemStates
    prices: TokenPrices
    budget: RunBudget | None
    is_stopping: Callable[[], bool]
    body_bytes: int
    attempts: int


@dataclass(slots=True, eq=False)
class _Line:
    """One request, in a file or waiting for one.

    Attributes:
        record: What the run folder keeps of it.
        body: The request as it is sent; None after it was written, or if an earlier session did.
        outcome: Status and body of its answer; None: there is none; ``void``: the whole batch
            brought none, so it does not count.
        since: Monotonic time in seconds from which an item waits for it.
        is_awaited: Whether an item waits for it.
        is_counted: Whether the tokens of its prompt have been counted, if they can be.
    """

    record: LineRecord
    body: Mapping[str, Any] | None
    outcome: asyncio.Future[tuple[int, bytes] | str | None]
    since: float = field(default_factory=time.monotonic)
    is_awaited: bool = False
    is_counted: bool = False

    @property
    def key(self) -> LineKey:
        return self.record.index, self.record.attempt


@dataclass(slots=True, eq=False)
class _Batch:
    """A batch in work.

    Attributes:
        record: What the run folder keeps of it.
        lines: Its requests that items of this session may ask for.
        all_lines: All of its requests.
        state: What happens to it, in words.
        since: Monotonic time in seconds since when.
        lease: Name of its lease, or None.
    """

    record: BatchRecord
    lines: dict[LineKey, _Line]
    all_lines: Sequence[LineRecord]
    state: str = "being written"
    since: float = field(default_factory=time.monotonic)
    lease: str | None = None

    def set_state(self, state: str) -> None:
        if state != self.state:
            self.state, self.since = state, time.monotonic()


@dataclass(frozen=True, slots=True)
class BatchProgress:
    """The batches of a session at one moment.

    Attributes:
        waiting: Requests that wait for a file.
        batches: Number, requests, state in words, and seconds in this state, of each batch in work.
        collected: Batches whose answers this session has read.
    """

    waiting: int
    batches: tuple[tuple[int, int, str, float], ...]
    collected: int


class BatchTransport:
    """Answers requests of items by batches; the route of a fleet.

    A request that an earlier session submitted is not submitted again: the item waits for the
    answer that the service has or will have. The run folder tells by index and digest of the body.

    Args:
        config: The settings.
        run: The run.
        fleet: Its fleet, for leftovers and statistics.
        service: The service.
    """

    has_endpoint = False
    """As an endpoint queue: an item that waits for a batch need not be waited for at a stop."""
    is_deadlocked = False

    def __init__(
        self, config: BackendConfig, run: BatchRun, fleet: Fleet, service: BatchService
    ) -> None:
        self._config, self._run, self._fleet, self._service = config, run, fleet, service
        self._endpoint = fleet.endpoints[0]
        self._dir = Path(config.dir or "")
        self._folder = BatchFolder(run.folder)
        self._known = defaultdict[tuple[int, bytes], deque[_Line]](deque)
        self._attempts = Counter[int]()
        self._awaited = Counter[int]()  # requests that wait for a batch, by item
        self._queue = dict[_Line, None]()
        self._arrived = 0.0
        self._batches = dict[int, _Batch]()
        self._kept = list[_Batch]()
        self._next_number = 1
        self._collected = self._void = self._answered = self._refused = 0
        self._ended = deque[bool](maxlen=_RECENT)
        self._changed = asyncio.Event()
        self._tasks = set[asyncio.Task[None]]()
        self._submissions = set[asyncio.Task[Any]]()
        self._error: FanfoldError | None = None

    def report(self) -> BatchProgress:
        """Return the batches at this moment."""
        now = time.monotonic()
        batches = tuple(
            (number, batch.record.lines, batch.state, now - batch.since)
            for number, batch in self._batches.items()
        )
        return BatchProgress(len(self._queue), batches, self._collected)

    # -- requests of items -----------------------------------------------------------------

    async def post(self, body: Mapping[str, Any]) -> tuple[dict[str, Any], Endpoint]:
        """Return the answer to one request, and the deployment that gave it.

        Raises:
            EndpointError: Neither the batches nor a request of its own brought an answer.
            RunStoppedError: The run cannot go on.
        """
        log = CURRENT_CALLS.get()
        if log is None or log.index is None:
            raise ConfigurationError("backend.kind batch answers requests of a run's items only")
        body = {**body, "model": self._run.model}
        digest, rounds = digest_body(body), 0
        while True:
            line = self._find_line(log.index, digest, body)
            outcome = await self._wait(line, log)
            if isinstance(outcome, str):
                continue
            result = self._record(outcome, line, body, log)
            if not isinstance(result, Failure):
                self._answered += 1
                self._ended.append(False)
                return result, self._endpoint
            rounds += 1
            if result.rule.action is RetryAction.STOP:
                raise RunStoppedError(result.error.message)
            refused = result.rule.action is RetryAction.FAIL
            if self._config.leftovers == "interactive" and (refused or rounds >= _ROUNDS):
                return await self._fleet.post_now(body)
            if refused or rounds >= self._run.attempts:
                self._count_failed(result)
                raise result.error

    def _count_failed(self, failure: Failure) -> None:
        """Count an item that batches failed; stop the run if it looks like an outage.

        Raises:
            RunStoppedError: Too many of the recent items failed, or no request was ever accepted.
        """
        retry, told = self._fleet.policy.retry, failure.error.message
        if isinstance(failure.error, PromptTooLongError):
            return
        if failure.rule.action is RetryAction.FAIL:
            self._refused += 1
            if self._answered or self._refused < retry.hopeless_after:
                return
            why = f"no request was accepted; the last answer: {told}"
        else:
            self._ended.append(True)
            failed = sum(self._ended)
            if failed <= retry.refused_share * _RECENT:
                return
            why = (
                f"{failed} of the last {len(self._ended)} items failed in every batch; more than "
                f"{retry.refused_share:.0%} of {_RECENT} look like an outage: check the service "
                f"and the items, then resume the run; the last answer: {told}"
            )
        self._fleet.stop(why)
        raise RunStoppedError(why) from failure.error

    def _find_line(self, index: int, digest: bytes, body: Mapping[str, Any]) -> _Line:
        """Return the line of an earlier session, or queue a new one."""
        if self._error is not None:
            raise self._error
        known = self._known.get((index, digest))
        if known:
            line = known.popleft()
            line.since = time.monotonic()
            return line
        if self._run.budget is not None and not read_max_tokens(body):
            msg = (
                "a budget is set, but a request has no max_tokens, so its cost is unlimited; set "
                "model.max_tokens"
            )
            raise ConfigurationError(msg)
        self._attempts[index] += 1
        record = LineRecord(index, self._attempts[index], digest, max_usage(body))
        line = _Line(record, body, asyncio.get_running_loop().create_future())
        self._queue[line] = None
        self._arrived = time.monotonic()
        if len(self._queue) == 1 or len(self._queue) >= self._config.lines:
            self._changed.set()
        return line

    async def _wait(self, line: _Line, log: CallLog) -> tuple[int, bytes] | str | None:
        index, log.queue = line.record.index, self
        line.is_awaited = True
        self._awaited[index] += 1
        self._endpoint.flight.begin()
        try:
            return await line.outcome
        finally:
            self._endpoint.flight.end()
            self._awaited[index] -= 1
            if not self._awaited[index]:  # else other pieces of the item wait for a batch, too
                del self._awaited[index]
                log.queue = None
            self._queue.pop(line, None)

    def _record(
        self, outcome: tuple[int, bytes] | None, line: _Line, body: Mapping[str, Any], log: CallLog
    ) -> dict[str, Any] | Failure:
        """Record the end of a request with its item and its endpoint; return what it brought."""
        endpoint, charge = self._endpoint, RequestCharge(log, body)
        charge.record_sent(endpoint)
        charge.sent_at = line.since
        seconds = time.monotonic() - line.since
        if charge.attempt is not None:
            charge.attempt["start"] = round(time.time() - seconds, 3)
        result = self._read_outcome(outcome)
        if isinstance(result, Failure):
            endpoint.stats.add_failure(type(result.error).__name__)
            endpoint.stats.add_lost(charge.settle_failed(result))
            return result
        usage, model = completions.read_usage(result), result.get("model")
        charge.settle_answered(usage, model if isinstance(model, str) else None)
        endpoint.stats.add_answer(seconds, usage)
        log.endpoint, log.simulated = endpoint.label, completions.is_simulated(result)
        log.max_tokens = read_max_tokens(body)
        if completions.is_empty(result):
            msg = f"{endpoint.label}: the answer in a batch is empty"
            return Failure(EndpointError(msg, endpoint.label), _LOST_RULE)
        return result

    def _read_outcome(self, outcome: tuple[int, bytes] | None) -> dict[str, Any] | Failure:
        label = self._endpoint.label
        if outcome is None:
            msg = f"{label}: the output of a batch has no line for this request"
            return Failure(EndpointLostError(msg, label), _LOST_RULE)
        status, data = outcome
        result = completions.read_completion(HTTPAnswer(status, {}, data), label)
        return self._fleet.check_simulated(result, self._endpoint)

    # -- earlier sessions ------------------------------------------------------------------

    async def load(self) -> None:
        """Read what earlier sessions submitted; ask for what is not collected.

        Raises:
            JournalError: A record is damaged.
            RunStoppedError: The output of a collected batch is gone.
        """
        records = await asyncio.to_thread(self._folder.read)
        self._next_number = await asyncio.to_thread(self._folder.next_number)
        for record in records:
            if record.state == "refused":
                await asyncio.to_thread(self._folder.discard, record, self._dir, self._run.runs[0])
                continue
            lines = await asyncio.to_thread(self._folder.read_lines, record)
            batch = _Batch(record, self._list_open(record, lines), lines)
            batch.set_state("submitted" if record.state == "submitted" else "in doubt")
            if record.is_open:
                self._batches[record.number] = batch
                follow = self._follow if record.state == "submitted" else self._look_up
                self._start(follow(batch))
            elif batch.lines and not record.is_void:
                output = await self._read(batch)
                if not output.files:
                    raise RunStoppedError(self._explain_gone(record))
                await self._finish(batch, output, record)
            elif self._run.budget is not None and record.spent is not None:
                spent = Amount.from_json(dict(record.spent))
                prefix, name = self._lease_prefix(batch), self._lease_name(batch)
                await self._run.budget.leases.take_over(prefix, name, spent, _NOTHING)
        await self._return_unused(
            {record.number for record in records if record.state != "refused"}
        )
        self._start(self._collect_files())

    async def _return_unused(self, numbers: Set[int]) -> None:
        """Return the leases of batches that were never submitted."""
        if self._run.budget is None:
            return
        leases = self._run.budget.leases
        for name in leases.earlier_leases(_LEASE):
            number = name.removeprefix(_LEASE).partition("-")[0]
            if not (number.isdigit() and int(number) in numbers):
                await leases.take_over(name, "", _NOTHING, _NOTHING)

    def _explain_gone(self, record: BatchRecord) -> str:
        path = self._folder.state_path(record.number)
        return (
            f"batch {record.number}: {record.output_folder} with its "
            f"{count_nouns(record.answered, 'answer')} "
            "is gone, and items of the run are not recorded yet; restore it and resume, or delete "
            f"{path} to submit their requests again"
        )

    def _list_open(self, record: BatchRecord, lines: Sequence[LineRecord]) -> dict[LineKey, _Line]:
        """Return the requests of a batch that items may ask for again.

        An item that failed and is tried again asks anew: only requests after its record count.
        """
        loop, items, found = asyncio.get_running_loop(), self._run.items, dict[LineKey, _Line]()
        for one in lines:
            if items.is_finished(one.index):
                continue
            self._attempts[one.index] = max(self._attempts[one.index], one.attempt)
            if record.session > items.get_last_session(one.index) and not record.is_void:
                line = _Line(one, None, loop.create_future())
                found[line.key] = line
                self._known[one.index, one.digest].append(line)
        return found

    # -- files -----------------------------------------------------------------------------

    async def _collect_files(self) -> None:
        """Submit a file when it is full, or when no further request has come for a while."""
        while True:
            self._changed.clear()
            pause = await self._submit_ready()
            if pause is None:
                await self._changed.wait()
                continue
            try:
                async with asyncio.timeout(pause):
                    await self._changed.wait()
            except TimeoutError:
                await asyncio.sleep(0)

    async def _submit_ready(self) -> float | None:
        """Submit a file if one is ready; return the seconds until the next check, or None."""
        if self._kept:
            await self._settle_kept()
        pause = 1.0 if self._kept else None
        if not self._queue or len(self._batches) >= self._config.active or self._run.is_stopping():
            return pause
        quiet = self._arrived + self._config.gather_s - time.monotonic()
        if len(self._queue) < self._config.lines and quiet > 0:
            return quiet
        lines = await self._take_lines()
        if not lines:
            return self._wait_for_budget()
        await self._begin(lines)
        return 0.0

    async def _take_lines(self) -> list[_Line]:
        """Return the next requests that a file has room for and the budget covers.

        If it does not cover all by the bound of a byte per token, their prompts are counted.
        """
        wanted = [line for line, _ in zip(self._queue, range(self._config.lines), strict=False)]
        if self._run.budget is None:
            return wanted
        covered = self._count_covered(wanted)
        if covered < len(wanted):
            await self._count_prompts(wanted)
            wanted = [line for line in wanted if line in self._queue]
            covered = self._count_covered(wanted)
        return [] if covered < len(wanted) and self._batches else wanted[:covered]

    def _count_covered(self, lines: Sequence[_Line]) -> int:
        """Return how many of the requests, from the first one, the budget covers."""
        assert self._run.budget is not None
        left, total = self._run.budget.budget.balance.left, _NOTHING
        for count, line in enumerate(lines):
            total = total.plus(self._run.prices.amount(line.record.most))
            if min(left.minus(total)) < 0:
                return count
        return len(lines)

    async def _count_prompts(self, lines: Sequence[_Line]) -> None:
        """Replace the bounds of prompts by counts, as far as the budget reaches."""
        assert self._run.budget is not None
        count_prompt = self._run.budget.budget.count_prompt
        if count_prompt is None:
            return
        left, total = self._run.budget.budget.balance.left, _NOTHING
        for line in lines:
            if not line.is_counted and line.body is not None:
                line.is_counted = True
                tokens, most = await count_prompt(line.body), line.record.most
                if tokens is not None:
                    prompt = min(tokens + count_template(line.body), most.prompt or 0)
                    line.record = replace(line.record, most=replace(most, prompt=prompt))
            total = total.plus(self._run.prices.amount(line.record.most))
            if min(left.minus(total)) < 0:
                return

    def _wait_for_budget(self) -> float:
        """Return the seconds until the budget is checked again; refuse if nothing comes back."""
        assert self._run.budget is not None
        budget = self._run.budget.budget
        if not self._batches and not any(budget.balance.returnable):
            first = next(iter(self._queue))
            needed = self._run.prices.amount(first.record.most)
            self._refuse(list(self._queue), BudgetExhaustedError(budget.record_refusal(needed)))
        return 0.5

    def _refuse(self, lines: Iterable[_Line], error: FanfoldError) -> None:
        for line in lines:
            self._queue.pop(line, None)
            if not line.outcome.done():
                line.outcome.set_exception(error)

    async def _begin(self, lines: Sequence[_Line]) -> None:
        """Write a file and the record of it, and start to submit it.

        Raises:
            JournalError: A record cannot be written.
            ConfigurationError: The file cannot be written.
        """
        for line in lines:
            del self._queue[line]
        number, self._next_number = self._next_number, self._next_number + 1
        records = [line.record for line in lines]
        run = self._run.runs[0]
        encoded = (
            encode_request(make_custom_id(run, *line.key), line.body or {}) for line in lines
        )
        file = await asyncio.to_thread(write_requests, self._dir, run, number, encoded)
        await asyncio.to_thread(self._folder.write_lines, number, records)
        for line in lines:
            line.body = None
        record = BatchRecord(
            number,
            self._run.session,
            str(file.path),
            str(file.output_folder),
            file.sha256,
            len(lines),
            sum(one.most.tokens for one in records),
        )
        batch = _Batch(record, {line.key: line for line in lines}, records)
        self._batches[number] = batch
        self._start(self._submit(batch))

    async def _submit(self, batch: _Batch) -> None:
        """Submit a batch until the service accepts it, then follow it.

        Raises:
            RunStoppedError: The service refuses it for good.
        """
        if not await self._reserve(batch):
            return None
        pause = self._config.poll_s
        while not self._run.is_stopping():
            await self._write(batch, state="posting")
            batch.set_state("being submitted")
            task = asyncio.create_task(self._post(batch))
            self._submissions.add(task)
            task.add_done_callback(self._submissions.discard)
            wait = await asyncio.shield(task)
            if batch.record.state == "submitted":
                return await self._follow(batch)
            if batch.record.state == "posting":
                return await self._look_up(batch)
            batch.set_state(f"not accepted yet ({wait})")
            event_logger.info("batch %d: not accepted yet: %s", batch.record.number, wait)
            await asyncio.sleep(pause)
            pause = min(pause * _SLOWER, self._config.poll_most_s)
        return None

    async def _reserve(self, batch: _Batch) -> bool:
        """Reserve what a batch may cost; return False if the budget does not cover it."""
        if self._run.budget is None:
            return True
        amount = _sum_all(self._run.prices.amount(one.most) for one in batch.all_lines)
        name = self._lease_name(batch)
        try:
            lease = Lease(amount, time.time() + _RESERVED_S)
            await self._run.budget.leases.lend(name, lease)
        except BudgetExhaustedError as error:
            del self._batches[batch.record.number]
            self._refuse(batch.lines.values(), error)
            self._changed.set()
            return False
        batch.lease = name
        return True

    def _lease_prefix(self, batch: _Batch) -> str:
        return f"{_LEASE}{batch.record.number:04}-"

    def _lease_name(self, batch: _Batch) -> str:
        return f"{self._lease_prefix(batch)}{self._run.session:04}"

    async def _post(self, batch: _Batch) -> str:
        """Submit a batch once, and record what came of it; return why it was refused.

        Raises:
            RunStoppedError: It is refused for good.
        """
        record = batch.record
        try:
            found = await self._service.submit(
                self._run.model, record.input_file, record.output_folder
            )
        except RunStoppedError as error:
            await self._write(batch, state="refused", reason=error.message)
            raise
        if found.batch_id is not None:
            await self._write_submitted(batch, found.batch_id)
            return ""
        if found.refusal is None:
            logger.warning(
                "batch %d: its submission was not answered (%s); looking it up",
                record.number,
                found.problem,
            )
            return ""
        await self._write(batch, state="refused", reason=found.refusal)
        if found.is_final:
            msg = (
                f"{self._service.label}: the service refuses batch {record.number} "
                f"({record.input_file}): {found.refusal}; fix that, or set backend.kind: local for "
                "requests one by one; then resume"
            )
            raise RunStoppedError(msg)
        return found.refusal

    async def _write(self, batch: _Batch, **changes: Any) -> None:
        batch.record = replace(batch.record, **changes)
        await asyncio.to_thread(self._folder.write, batch.record)

    async def _write_submitted(self, batch: _Batch, batch_id: str) -> None:
        await self._write(
            batch, state="submitted", batch_id=batch_id, submitted_at=time.time(), reason=None
        )
        event_logger.info(
            "batch %d submitted: %d requests, %s, id %s",
            batch.record.number,
            batch.record.lines,
            batch.record.input_file,
            batch_id,
        )

    async def _look_up(self, batch: _Batch) -> None:
        """Look for a batch that may have been submitted, and never submit it again.

        Raises:
            RunStoppedError: The token is refused.
        """
        record, absent, pause, warned = batch.record, 0, self._config.poll_s, False
        batch.set_state("looked up")
        while True:
            try:
                found = await self._service.find(record.input_file)
            except EndpointError as error:
                self._check_access(error)
                logger.info("batch %d: %s", record.number, error.message)
            else:
                if found is not None:
                    await self._write_submitted(batch, found)
                    return await self._follow(batch)
                absent += 1
            if absent >= _LISTS:
                batch.set_state("in doubt")
                if not warned:
                    logger.warning("%s", self._explain_doubt(record))
                warned = True
            await asyncio.sleep(pause)
            pause = min(pause * _SLOWER, self._config.poll_most_s)

    def _explain_doubt(self, record: BatchRecord) -> str:
        path = self._folder.state_path(record.number)
        return (
            f"batch {record.number}: it is not known whether the service has it: the run ended "
            f"while it was submitted, and the service does not list {record.input_file}. fanfold "
            "waits for it and does not submit it again. If you are sure that the service never "
            f"accepted it, stop the run, delete {path}, and resume: its "
            f"{count_nouns(record.lines, 'request')} "
            "are then submitted in a new batch"
        )

    def _check_access(self, error: EndpointError) -> None:
        """Stop the run if the service will not answer a question later either."""
        if isinstance(error, AuthenticationError):
            msg = f"{error.message}; the batches of this run belong to another user"
            raise RunStoppedError(msg) from error

    async def _follow(self, batch: _Batch) -> None:
        """Ask for the state of a submitted batch until it has ended, then read its answers.

        Raises:
            RunStoppedError: Its answers cannot be read, or two batches in a row brought none.
        """
        batch_id, pause, problem = batch.record.batch_id or "", self._config.poll_s, ""
        batch.set_state("submitted")
        while True:
            try:
                status = await self._service.get_status(batch_id)
            except EndpointError as error:
                self._check_access(error)
                if error.message != problem:
                    logger.warning(
                        "batch %d: its state is unknown (%s); asking again",
                        batch.record.number,
                        error.message,
                    )
                problem = error.message
            else:
                if status in ("completed", "failed"):
                    break
                problem = ""
                batch.set_state(status if status in ("pending", "running") else "submitted")
            await asyncio.sleep(pause)
            pause = min(pause * _SLOWER, self._config.poll_most_s)
        reason = await self._service.describe_result(batch_id)
        await self._collect(batch, status, reason)

    # -- answers ---------------------------------------------------------------------------

    async def _collect(self, batch: _Batch, status: str, reason: str) -> None:
        """Read the answers of a batch that has ended, and give them to their items."""
        batch.set_state("being read")
        record, output = batch.record, await self._read(batch)
        for _ in range(_READS - 1):
            if len(output.answers) == record.lines or (status == "failed" and output.files):
                break
            await asyncio.sleep(min(self._config.poll_s, _READ_AGAIN_S))
            again = await self._read(batch)
            settled = again.files and len(again.answers) == len(output.answers)
            output = again
            if settled:
                break
        if status == "completed" and not output.files:
            msg = (
                f"batch {record.number} is completed, but {record.output_folder} has no output "
                f"here; the service says: {reason}. Check that backend.dir is on the cluster's "
                "file system and mounted here under the same path, then resume: nothing is "
                "submitted again"
            )
            raise RunStoppedError(msg)
        good = sum(status == _OK for status, _ in output.answers.values())
        record = replace(
            record,
            state="collected",
            answered=good,
            failed=len(output.answers) - good,
            missing=record.lines - len(output.answers),
            foreign=output.foreign,
            reason=reason if status == "failed" else None,
        )
        self._log_collected(record, status)
        await self._finish(batch, output, record)
        self._void = self._void + 1 if record.is_void else 0
        if self._void >= _VOID:
            msg = (
                f"{self._void} batches in a row brought no answer; the service says: {reason}. "
                "Fix the cause, then resume"
            )
            raise RunStoppedError(msg)

    def _log_collected(self, record: BatchRecord, status: str) -> None:
        lost = record.failed + record.missing
        level = logging.WARNING if lost or record.foreign or status == "failed" else logging.INFO
        event_logger.log(
            level,
            "batch %d %s: %d answers, %d failed, %d missing%s%s",
            record.number,
            status,
            record.answered,
            record.failed,
            record.missing,
            f", {count_nouns(record.foreign, 'line')} of others ignored" if record.foreign else "",
            f" ({record.reason})" if record.reason else "",
        )

    async def _read(self, batch: _Batch) -> BatchOutput:
        wanted = {(one.index, one.attempt): None for one in batch.all_lines}
        folder = Path(batch.record.output_folder)
        try:
            return await asyncio.to_thread(
                read_output, folder, self._run.runs, wanted, self._run.body_bytes
            )
        except OSError as error:
            msg = (
                f"batch {batch.record.number}: its answers in {folder} cannot be read: "
                f"{error.strerror}; fix that, then resume: nothing is submitted again"
            )
            raise RunStoppedError(msg) from error

    async def _finish(self, batch: _Batch, output: BatchOutput, record: BatchRecord) -> None:
        """Settle a batch, and give its answers to the items that wait for them."""
        spent = await asyncio.to_thread(self._list_spent, batch, output)
        total = _sum_all(spent.values())
        if spent:
            record = replace(record, spent=total._asdict())
        if batch.record != record:
            batch.record = record
            await asyncio.to_thread(self._folder.write, record)
        if self._run.budget is not None:
            if batch.lease is not None:
                await self._run.budget.leases.keep_spent(batch.lease, total)
            else:
                await self._take_over(batch, spent)
            self._kept.append(batch)
        self._batches.pop(record.number, None)
        self._collected += 1
        for key, line in batch.lines.items():
            if not line.outcome.done():
                outcome = "void" if record.is_void else output.answers.get(key)
                line.outcome.set_result(outcome)
        self._arrived = time.monotonic()  # items that end make room for others
        self._changed.set()

    def _list_spent(self, batch: _Batch, output: BatchOutput) -> dict[LineKey, Amount]:
        """Return the most that each request of a batch has used; blocks."""
        found, prices = dict[LineKey, Amount](), self._run.prices
        if self._run.budget is None:
            return found
        for one in batch.all_lines:
            key = (one.index, one.attempt)
            found[key] = prices.amount(self._read_spent(one, output.answers.get(key)))
        return found

    def _read_spent(self, line: LineRecord, outcome: tuple[int, bytes] | None) -> Usage:
        result = self._read_outcome(outcome)
        if isinstance(result, Failure):
            return line.most if may_have_used(result) else Usage(0, 0)
        usage = completions.read_usage(result)
        return line.most if usage.prompt is None or usage.completion is None else usage

    async def _take_over(self, batch: _Batch, spent: Mapping[LineKey, Amount]) -> None:
        """Take over what earlier sessions reserved for a batch.

        What ended items used is recorded in earlier journals; the rest will be in this session's.
        """
        assert self._run.budget is not None
        recorded = _sum_all(amount for key, amount in spent.items() if key not in batch.lines)
        open_ = _sum_all(amount for key, amount in spent.items() if key in batch.lines)
        batch.lease = self._lease_name(batch)
        await self._run.budget.leases.take_over(
            self._lease_prefix(batch), batch.lease, recorded, open_
        )

    async def _settle_kept(self) -> None:
        """Settle the batches of which all items are recorded."""
        assert self._run.budget is not None
        finished = self._run.items.is_finished
        for batch in list(self._kept):
            if batch.lease is not None and all(finished(key[0]) for key in batch.lines):
                self._kept.remove(batch)
                await self._run.budget.leases.settle_kept(batch.lease)

    # -- tasks -----------------------------------------------------------------------------

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._end_task)

    def _end_task(self, task: asyncio.Task[None]) -> None:
        """Let the run end with the error of a task."""
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        if not isinstance(error, FanfoldError):
            logger.error("the transport of batches failed", exc_info=error)
            error = RunStoppedError(f"the transport of batches failed: {error!r}")
        self._error = self._error or error
        lines = [line for batch in self._batches.values() for line in batch.lines.values()]
        self._refuse([line for line in (*self._queue, *lines) if line.is_awaited], error)

    async def aclose(self) -> None:
        """Stop waiting for batches; a submission in progress may end."""
        if self._submissions:
            await asyncio.wait(self._submissions, timeout=_CLOSE_S)
        for task in (*self._tasks, *self._submissions):
            task.cancel()
        await asyncio.gather(*self._tasks, *self._submissions, return_exceptions=True)
        if self._kept:
            await self._settle_kept()


def _sum_all(amounts: Iterable[Amount]) -> Amount:
    total = _NOTHING
    for amount in amounts:
        total = total.plus(amount)
    return total


def get_deployment(ready: ReadyEndpoints) -> EndpointSpec:
    """Return the deployment that answers the batches of a run.

    Raises:
        ConfigurationError: There is none, or several.
    """
    if len(ready.specs) == 1:
        return ready.specs[0]
    found = ", ".join(spec.label or spec.url for spec in ready.specs)
    msg = (
        f"backend.kind: batch uses one deployment, and {len(ready.specs)} serve the model "
        f"({found}); set endpoints.first.paths to the one whose cluster has backend.dir"
    )
    raise ConfigurationError(msg)


@asynccontextmanager
async def open_batches(
    config: BackendConfig, run: BatchRun, ready: ReadyEndpoints, fleet: Fleet
) -> AsyncIterator[BatchTransport]:
    """Open the transport of batches as the route of a fleet.

    Args:
        config: The settings.
        run: The run.
        ready: Its endpoints.
        fleet: The fleet over them.

    Raises:
        ConfigurationError: The deployment or the folder does not fit.
        JournalError: A record of an earlier session is damaged.
        RunStoppedError: The answers of an earlier session are gone.
    """
    get_deployment(ready)
    await asyncio.to_thread(check_batch_settings, config)
    connections = Transport(fleet.policy)
    service = BatchService(fleet.endpoints[0], connections)
    batches = BatchTransport(config, run, fleet, service)
    try:
        await batches.load()
        fleet.route = batches
        yield batches
    finally:
        fleet.route = None
        await batches.aclose()
        await connections.aclose()
