"""An agent that screens molecules: a whole batch is one tool call.

``as_tool`` turns settings into a LangChain tool. The agent passes molecules and gets the ranking,
its first rows, and the path of the full table. The owner of the tool sets the limit on the cost of
all calls below; the agent has no argument for it.

The fleet is simulated, and so is the agent's model, which follows a script:
``python as_tool.py [MOLECULES]`` (needs ``pip install 'fanfold[agents,chem]'``)
"""

from __future__ import annotations

import asyncio
import json
import sys
from tempfile import TemporaryDirectory
from typing import Any

from langchain.agents import create_agent
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

from fanfold import SimulatedFleet, SimulationSpec, as_tool
from fanfold.backends.simulated.requests import Question
from fanfold.backends.simulated.responders import ToolCall

SETTINGS: dict[str, Any] = {
    "name": "screen_solubility",
    "input": {"smiles": "smiles"},
    "task": {
        "prompt": "Estimate the aqueous solubility of this molecule.\nSMILES: {smiles}",
        "schema": {
            "type": "object",
            "required": ["log_s"],
            "properties": {"log_s": {"type": "number"}},
        },
    },
    "budget": {"requests": 1000},  # over all calls of the tool; or usd, tokens
    # a real fleet: {urls: [http://node17:8000/v1, …]}
    "endpoints": {"simulated": {"nodes": 2, "responder": "esol", "time_scale": 20}},
    "reduce": [{"op": "top_k", "field": "log_s", "k": 50, "show": ["smiles"]}],
}


def script(question: Question) -> str | ToolCall:
    """Act as a model: call the tool with the user's molecules, then report the best one."""
    last = question.messages[-1]
    if last["role"] == "tool":
        best = json.loads(last["content"])["aggregate"][0]["rows"][0]
        return f"The most soluble is {best['show']['smiles']} (log S {best['value']})."
    smiles = last["content"].partition(":")[2].split()
    return ToolCall("screen_solubility", {"items": [{"smiles": text} for text in smiles]})


async def main(count: int) -> str:
    """Ask the agent to screen a number of molecules."""
    molecules = ["C" * (n % 17 + 1) + "O" * (n % 5 > 0) for n in range(count)]
    spec = SimulationSpec(nodes=1, responder="script", time_scale=100)
    with TemporaryDirectory() as folder:
        screen = as_tool(SETTINGS, max_items=300, rows=5, folder=folder, allow_simulated=True)
        async with SimulatedFleet(spec, {"script": lambda _: script}) as simulated:
            model = ChatOpenAI(
                base_url=simulated.urls[0], api_key=SecretStr("EMPTY"), model=spec.model
            )
            agent: Any = create_agent(model, [screen])
            question = f"Screen these for solubility: {' '.join(molecules)}"
            end = await agent.ainvoke({"messages": [("user", question)]})
    call, result, answer = end["messages"][1:]
    print(f"{call.tool_calls[0]['name']}: {len(call.tool_calls[0]['args']['items'])} molecules")
    print(f"the tool says: {result.content[:60]}…")
    print(f"the agent says: {answer.content}")
    return str(answer.content)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 300))
