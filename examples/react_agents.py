"""Thousands of ReAct agents: one agent per molecule, with RDKit as its tools.

``task.graph`` names the function ``agent`` below. It takes the fleet as a chat model and returns
the agent for all items. fanfold runs ``limits.streams`` of them at once, and counts all calls of an
agent for its item: requests, tokens, journal, budget.

On a simulated fleet of this machine: ``python react_agents.py [AGENTS]``
(needs ``pip install 'fanfold[agents,chem]'``)
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

from langchain.agents import create_agent
from langchain.agents.structured_output import ToolStrategy
from langchain_core.tools import tool
from pydantic import BaseModel, Field
from rdkit import Chem
from rdkit.Chem import rdMolDescriptors

from fanfold import ChatFleet, build_graph


@tool
def lipophilicity(smiles: str) -> float:
    """Estimate the octanol-water partition coefficient (log P, Crippen) of a molecule."""
    log_p, _ = rdMolDescriptors.CalcCrippenDescriptors(Chem.MolFromSmiles(smiles))
    return round(float(log_p), 2)


@tool
def polar_surface(smiles: str) -> float:
    """Compute the topological polar surface area of a molecule, in square angstroms."""
    return round(float(rdMolDescriptors.CalcTPSA(Chem.MolFromSmiles(smiles))), 1)


class Verdict(BaseModel):
    """Final answer of an agent about its molecule."""

    permeable: bool
    score: float = Field(ge=0, le=1)


def agent(model: ChatFleet) -> Any:
    """Return the agent of one item; fanfold calls this once."""
    return create_agent(
        model,
        [lipophilicity, polar_surface],
        system_prompt="You are a medicinal chemist. Use your tools, then give your verdict.",
        response_format=ToolStrategy(Verdict),
    )


SETTINGS: dict[str, Any] = {
    "name": "react-agents",
    "input": {"dataset": "rdkit-nci5k", "id": "mol_id"},
    "task": {
        "prompt": "Would this molecule pass a cell membrane? SMILES: {smiles}",
        "schema": Verdict.model_json_schema(),
        "graph": "react_agents:agent",
    },
    # a real fleet: {urls: [http://node17:8000/v1, …]}; this one calls each tool once
    "endpoints": {"simulated": {"nodes": 4, "responder": "agent", "time_scale": 20}},
    "limits": {"streams": 512, "steps_per_item": 12, "item_timeout_s": 300},
    "reduce": [{"op": "top_k", "field": "score", "k": 5, "show": ["smiles"]}, {"op": "count"}],
}


async def main(agents: int) -> dict[str, Any]:
    """Run a number of agents and print what they found."""
    sys.path.insert(0, str(Path(__file__).parent))  # where "react_agents:agent" is found
    settings = SETTINGS | {"input": SETTINGS["input"] | {"limit": agents}}
    end: dict[str, Any] = await build_graph(settings).ainvoke({})
    top, count = end["aggregate"]
    requests, tokens = end["progress"]["requests"], end["progress"]["tokens"]
    print(f"{count['done']} agents done, {count['failed']} failed (simulated)")
    print(f"{requests} calls, {tokens['prompt']} + {tokens['completion']} tokens")
    for row in top["rows"]:
        print(f"{row['value']:.3f}  {row['show']['smiles']}")
    return end


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000))
