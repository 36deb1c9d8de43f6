"""What a run would ask and take, found out without asking a model."""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..backends.build import input_spec, located, needed_columns
from ..backends.contract.template import Template
from ..backends.fleet.matching import match
from ..backends.fleet.probe import Found
from ..backends.inputs.spill import spill
from ..backends.inputs.store import ItemStore
from ..backends.simulation import simulation
from ..configs.load import Loaded
from .prepare import check_endpoints, check_graph, check_input

_SAMPLE = 200
_BYTES_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run would ask and take.

    Attributes:
        items: Number of items.
        skipped: Rows of the input that become no item.
        invalid: Items that fail without a call.
        source: What the input is.
        endpoints: One line per endpoint.
        first_id: The first item's name.
        system: The constant text, sent first.
        first_prompt: The first item's question, as it would be sent.
        requests: Requests if every first answer is valid.
        most_requests: Requests if every repair is used.
        prompt_tokens: Tokens of the prompts, at 4 bytes a token, extrapolated from up to 200.
        completion_tokens: Most tokens of the answers.
    """

    items: int
    skipped: int
    invalid: int
    source: str
    endpoints: tuple[str, ...]
    first_id: str
    system: str
    first_prompt: str
    requests: int
    most_requests: int
    prompt_tokens: int
    completion_tokens: int


async def estimate(loaded: Loaded) -> Estimate:
    """Read the input, probe the endpoints, render the first prompt.

    Raises:
        ConfigurationError: Something does not fit, or no endpoint serves the model.
    """
    check_input(loaded)
    check_graph(loaded)
    check_endpoints(loaded)
    lines = await _probe(loaded)
    return await asyncio.to_thread(_read, loaded, lines)


async def _probe(loaded: Loaded) -> tuple[str, ...]:
    if loaded.config.endpoints.simulated is not None:
        spec = simulation(loaded.config)
        nodes = f"{spec.nodes} node{'s' if spec.nodes > 1 else ''}"
        return (f"SIMULATED fleet of {nodes} serving {spec.model!r}",)
    config = loaded.config
    async with located(config, loaded.plain["endpoints"]) as place:
        found = await place.ask()
        match(found, config.model.name or place.model, config.endpoints.models)
        chosen = () if place.why is None else (place.why,)
        return (*chosen, *map(_line, found))


def _line(found: Found) -> str:
    if found.error:
        return f"{found.label}: not reachable: {found.error}"
    kind = " SIMULATED" if found.simulated else ""
    context = "".join(f", context {n:,}" for _, n in found.max_model_len[:1])
    models = ", ".join(found.models)
    return f"{found.label}:{kind} serves {models}{context}, {1000 * (found.latency_s or 0):.0f} ms"


def _read(loaded: Loaded, lines: tuple[str, ...]) -> Estimate:
    config = loaded.config
    prompt, system = Template.parse(config.task.prompt), config.task.system
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "items.arrow"
        summary = spill(input_spec(config, None), file, needed_columns(config))
        with ItemStore(file) as store:
            sample = [i for i in store.read(0, min(_SAMPLE, len(store))) if not i.problem]
    texts = [prompt.render(item.row) for item in sample]
    asked = summary.items - summary.invalid
    tokens = sum(_tokens(system) + _tokens(text) for text in texts) / max(1, len(texts))
    return Estimate(
        items=summary.items,
        skipped=summary.skipped_total,
        invalid=summary.invalid,
        source=summary.source,
        endpoints=lines,
        first_id=sample[0].id if sample else summary.first.id,
        system=system,
        first_prompt=texts[0] if texts else "(no item can be asked)",
        requests=asked,
        most_requests=asked * (1 + config.task.repairs),
        prompt_tokens=round(asked * tokens),
        completion_tokens=asked * config.model.max_tokens,
    )


def _tokens(text: str) -> int:
    return -(-len(text.encode()) // _BYTES_PER_TOKEN)
