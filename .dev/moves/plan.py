"""Apply the layout of moves.tsv in the current checkout, step by step, each with checks and commits.

    python .dev/moves/plan.py [STEP] --moves=moves.tsv [--stop=STEP] [--fast]

STEP is the step to begin with (0, 0b, 1, 2inputs, ...; default 0), --stop the step before which to stop. --fast checks
imports, layers and undefined names only; without it mypy and the unit tests run as well.
"""
import re
import collections, csv, subprocess, sys, time
from pathlib import Path

from move_modules import *

ROWS = list(csv.reader(open(next(a.split("=")[1] for a in sys.argv if a.startswith("--moves="))), delimiter="\t"))[1:]
DUTY = {}
for o, n, *d in ROWS:
    DUTY.setdefault(n, d[0] if d else "")
DUTY["backends/simulated/server.py"] = "HTTP server with deliberate misbehaviour"
DUTY["nodes/aggregators/base.py"] = DUTY.get("nodes/aggregators/base.py") or "what an aggregator is"
DUTY["graphs/run/open_run.py"] = "An open run: its tools, its fleet, and what its endpoints did"
DUTY |= {
    "graphs/worker.py": "The worker: work_shard(task) -> result, and the resources kept between tasks",
    "graphs/run/resources.py": "Open what a session needs: journal, items, budget, fleet or coordinator",
    "nodes/context.py": "What nodes may use: RunTools and Context",
    "graphs/remote/tasks.py": "What the tasks of a session carry, and what each may spend (leases)",
    "configs/backend.py": "Sections backend and node, and what follows from the kind of backend",
    "graphs/session.py": "One session of a run: open it, invoke the graph, turn the end into a result",
    "graphs/context.py": "RunContext: settings, the open runs that nodes share, and their binding to a graph",
    "backends/discovery/sources.py": "Lists of endpoints: files, folders, node lists, Aegis registry; following changes",
    "backends/servers/watchdog.py": "Stand-alone script that ends the servers if their supervisor dies",
    "graphs/run/prepare.py": "Create a run folder, or check that settings fit an existing one",
    "nodes/aggregators/base.py": "Aggregators as commutative monoids: protocol, parameters, values",
    "nodes/item/steps.py": "The item graph as data: its steps, their order, and the StateGraph made of them",
    "backends/core/process.py": "Temporary folders that do not outlive their owners, and limits on open files",
    "backends/core/protocols.py": "Protocols between folders, and the log of an item's calls",
    "backends/discovery/connect.py": "From settings to endpoints that answer, and to an open fleet",
}
# what the rows say, with one target a module; splits are done before
TARGET = {o: n for o, n, *_ in ROWS if not o.startswith("(") and not n.startswith("(")}
OVER = {
    "graphs/lives.py": "graphs/run/prepare.py",
    "backends/build.py": "backends/discovery/connect.py",
    "graphs/crew.py": "graphs/remote/coordinator.py",
    "graphs/looking.py": "graphs/cli/status.py",
    "graphs/walltime.py": "graphs/run/shutdown.py",
    "graphs/opened.py": "graphs/run/open_run.py",
    "graphs/item.py": "graphs/run/items.py",
    "nodes/context.py": "nodes/context.py",
    "backends/sites/leash.py": "backends/core/exit_with_parent.py",
    "backends/sites/academy/client.py": "backends/workers/academy/client.py",
}
TARGET |= OVER
TARGET |= {f"backends/contract/{m}.py": f"backends/core/{m}.py" for m in ("permissions", "schemas", "secrets", "terminal", "values", "checksum", "disk")} | {"graphs/http_app.py": "graphs/integrations/http_app.py", "graphs/requests.py": "graphs/requests.py", "graphs/invocation.py": "graphs/invocation.py"}
DRY = "--fast" in sys.argv
h = House(Path("."))


def run(cmd, **kw):
    return subprocess.run(cmd, shell=True, capture_output=True, text=True, **kw)


IMPORT_ALL = """
import importlib, subprocess, sys
bad = 0
for f in subprocess.run(['git','ls-files','-co','--exclude-standard','*.py'],capture_output=True,text=True).stdout.split():
    import os
    if not os.path.exists(f) or f.startswith(('tests/','examples/','.dev/')) or f.endswith('__main__.py') or 'watchdog' in f or 'mpi' in f: continue
    m = 'fanfold.' + f[:-3].replace('/', '.'); m = m.removesuffix('.__init__')
    try: importlib.import_module(m)
    except Exception as e: print(m, type(e).__name__, e); bad = 1
sys.path.insert(0, 'tests')
import importlib.util as u; spec = u.spec_from_file_location("arch", next(p for p in ("tests/test_architecture.py","tests/test_house.py") if __import__("os").path.exists(p))); t = u.module_from_spec(spec); spec.loader.exec_module(t)
for name in ('test_folders_import_only_what_they_may', 'test_no_cycles'):
    try: getattr(t, name)()
    except AssertionError as e:
        tb = e.__traceback__
        while tb.tb_next: tb = tb.tb_next
        loc = tb.tb_frame.f_locals
        if 'wrong' in loc: print({k: v for k, v in loc['wrong'].items() if v})
        if 'edges' in loc: print({k: sorted(v & loc['edges'].keys()) for k, v in loc['edges'].items()})
        print(name); bad = 1
sys.exit(bad)
"""


def check(what):
    t = time.time()
    h.tidy()
    if DRY:
        Path(".mypy_cache").mkdir(exist_ok=True)
        Path(".mypy_cache/import_all.py").write_text(IMPORT_ALL)
        out = run(".venv/bin/ruff check -q --select F . ; .venv/bin/python .mypy_cache/import_all.py")
        if out.returncode or "F821" in out.stdout:
            print(out.stdout[-5000:], out.stderr[-3000:])
            sys.exit(f"FAST: {what}")
        print(f"   fast check {what} {time.time() - t:.0f} s", flush=True)
        return
    out = run(".venv/bin/ruff format --check -q . && .venv/bin/ruff check -q . && .venv/bin/mypy 2>&1 | tail -15; exit ${PIPESTATUS[0]}", executable="/bin/bash")
    if out.returncode:
        print(out.stdout[-4000:], out.stderr[-2000:])
        sys.exit(f"STATIC: {what}")
    tests = "tests/test_house.py tests/test_architecture.py" if DRY else "tests/unit tests/test_house.py tests/test_architecture.py"
    tests = " ".join(x for x in tests.split() if Path(x).exists())
    out = run(f"timeout 600 .venv/bin/python -m pytest -q -n 2 -x {tests} 2>&1 | tail -30; exit ${{PIPESTATUS[0]}}", executable="/bin/bash")
    if out.returncode:
        print(out.stdout[-5000:])
        sys.exit(f"TESTS: {what}")
    print(f"   checked {what} in {time.time() - t:.0f} s", flush=True)


def commit(msg):
    run("git add -A")
    out = run(f"git commit -qm {msg!r}")
    print("COMMIT", msg, out.stderr[-200:], flush=True)


def current(path):
    """Where a module of the rows lies now."""
    return path


def sentence(text):
    text = text.strip().rstrip(".")
    return text[:1].upper() + text[1:] + "."


def step(name, folder_ok, order=None, renames=None, before=None, after_move=None, after=None, folders=None, docs=None):
    """Move and merge all modules whose target is in the folders that folder_ok accepts."""
    renames, docs = renames or {}, docs or {}
    if before:
        before()
    have = set(h.modules())
    targets = collections.defaultdict(list)
    for o in sorted(have):
        if o.startswith("tests/") or o.startswith("examples/"):
            continue
        n = TARGET.get(o)
        if n and folder_ok(n):
            targets[n].append(o)
    moves, merges = {}, {}
    taken = set()
    for n, ms in targets.items():
        if n in have and n not in ms and n not in TARGET:
            ms.insert(0, n)
        prim = next((m for m in ms if m == n), None) or next((m for m in ms if Path(m).stem == Path(n).stem), None) or max(ms, key=lambda m: (Path(m).name != "__init__.py", len(Path(m).read_text())))
        others = [m for m in ms if m != prim]
        if prim != n:
            moves[prim] = n
        now = [n]
        for m in others:
            home = str(Path(n).parent)
            stem = Path(m).stem if Path(m).stem != "__init__" else Path(m).parent.name + "_init"
            p = f"{home}/{stem}.py"
            if p == m:
                now.append(m)
                continue
            while (p in have and TARGET.get(p) != "gone" and p not in moves) or p in moves.values() or p in targets or (p in taken):
                p = p.removesuffix(".py") + "_part.py"
            moves[m] = p
            taken.add(p)
            now.append(p)
        if others:
            merges[n] = now
    # not python files lying in the folders that empty
    extra = {}
    for f in h.tracked():
        if f.endswith(".py"):
            continue
        d = str(Path(f).parent)
        src = [o for o in moves if str(Path(o).parent) == d and Path(o).name == "__init__.py"]
        if src:
            extra[f] = str(Path(moves[src[0]]).parent / Path(f).name)
    h.folders = folders or {}
    if moves:
        h.move(extra | moves)
        if after_move:
            after_move()
        check(name + " move")
        commit(f"Move: {name}")
    if order:
        merges = {k: merges[k] for k in [*[o for o in order if o in merges], *[m for m in merges if m not in (order or [])]]}
    for n, ms in merges.items():
        bad = h.merge(n, ms, doc=docs.get(n) or sentence(DUTY[n]), renames={k[1:]: v for k, v in renames.items() if k[0] == n})
        if bad:
            sys.exit(f"COLLISIONS {n} {ms}: {bad}")
        h.tidy()
        out = run(".venv/bin/ruff check . ; .venv/bin/python -c 'import importlib, sys; importlib.import_module(\"" + dotted(n) + "\")'")
        if out.returncode:
            print(out.stdout[-3000:], out.stderr[-3000:])
            sys.exit(f"MERGE {n}")
        print("  merged", n, [Path(m).name for m in ms], flush=True)
    if after:
        after()
    if merges:
        check(name + " merge")
        commit(f"Merge modules: {name}")


def within(*dirs):
    return lambda n: str(Path(n).parent) in dirs

START = sys.argv[1] if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else "0"
STOP = next((a.split("=")[1] for a in sys.argv if a.startswith("--stop=")), None)
started = False


def sub(path, *pairs, count=0):
    p = Path(path)
    s = p.read_text()
    for a, b in pairs:
        n = re.sub(a, b, s, flags=re.M)
        if n == s:
            print("NO MATCH", path, a)
        s = n
    p.write_text(s)


def everywhere(pattern, repl, globs=("*.py",)):
    for g in globs:
        for f in h.tracked():
            if Path(f).match(g):
                p = Path(f)
                s = p.read_text()
                n = re.sub(pattern, repl, s)
                if n != s:
                    p.write_text(n)


TARGET["graphs/session.py"] = "graphs/session.py"


def check_static_only():
    h.tidy()
    if DRY:
        return
    out = run(".venv/bin/ruff check -q . && .venv/bin/mypy 2>&1 | tail -15")
    print(out.stdout[-300:])


def at(name):
    global started
    if STOP == name:
        sys.exit(f"stopped before {name}")
    if name == START:
        started = True
    if started:
        print("=====", name, flush=True)
    return started


# ---------------------------------------------------------------- 0 prepare
if at("0"):
    props = {"is_elsewhere": "is_remote", "works_on_nodes": "starts_workers_on_nodes", "at_a_time": "concurrent_shards", "carried": "message_bytes", "shares_folder": "workers_share_folder"}
    sub("backends/places.py",
        (r"^_SMALL: Final = 400_000\n\"\"\".*?\n\n\n", ""),
        (r"^def is_elsewhere\((?:.|\n)*?(?=^def shard_pool)", ""),
        (r"^from \.contract\.wire import CARRY\n", ""))
    for f in h.modules():
        p = Path(f)
        s = p.read_text()
        if not re.search(r"import .*(is_elsewhere|works_on_nodes|at_a_time|shares_folder)|places import .*carried", s):
            continue
        n = s
        for old, new in props.items():
            if old == "carried" and "places import carried" not in s:
                continue
            n = re.sub(rf"\b{old}\(([\w.]+(?:\([^()]*\))?)\)", rf"\1.{new}", n)
            n = re.sub(rf"(from \.+backends\.places import [^\n]*?)\b{old}\b(, )?", r"\1", n)
        n = re.sub(r"^from \.+backends\.places import\s*\n", "", n, flags=re.M)
        n = re.sub(r"(places import .*?),\s*$", r"\1", n, flags=re.M)
        p.write_text(n)
    s = Path("configs/backend.py").read_text()
    s = s.replace('''    @model_validator(mode="after")
    def _of_its_kind''', '''    @property
    def is_remote(self) -> bool:
        """Return True if shards run outside this process."""
        return self.kind != "local" or self.processes > 1

    @property
    def starts_workers_on_nodes(self) -> bool:
        """Return True if the coordinator starts workers on the nodes of its own batch job."""
        return self.kind == "launched" or (self.kind == "parsl" and self.config == "htex_job")

    @property
    def concurrent_shards(self) -> int:
        """Return how many shards are worked on at the same time, over all workers."""
        if self.kind == "local":
            return self.processes
        return self.workers * (self.slots if self.kind == "academy" else 1)

    @property
    def message_bytes(self) -> int:
        """Return the largest size of a task, and of a result, in bytes."""
        small = self.kind == "academy" and self.exchange.kind in {"http", "globus"}
        return _SMALL_MESSAGE if small else CARRY

    @property
    def workers_share_folder(self) -> bool:
        """Return True if workers reach the run folder."""
        if self.shared_folder is not None:
            return self.shared_folder
        return self.kind != "globus_compute"

    @model_validator(mode="after")
    def _of_its_kind''', 1)
    s = s.replace("_EVERY: Final = {", '_SMALL_MESSAGE: Final = 400_000\n"""Academy\'s HTTP exchanges carry 512 kB, of which the envelope takes some."""\n_EVERY: Final = {', 1)
    first = re.search(r"^from \.", s, flags=re.M).start()
    s = s[:first] + "from ..backends.contract.wire import CARRY\n" + s[first:]
    Path("configs/backend.py").write_text(s)
    t = Path("tests/test_house.py").read_text()
    a, b = t.index("FLOORS: dict"), t.index("\n\n\ndef dotted")
    t = t[:a] + '''BACKENDS = {
    "backends.core",
    "backends.fleet",
    "backends.inputs",
    "backends.simulated",
    "backends.servers",
    "backends.storage",
    "backends.workers",
    "backends.discovery",
    "backends.budget",
    "backends.cluster",
}
FLOORS: dict[str, set[str]] = {  # folder -> folders it may import; the longest prefix wins
    "backends.core": set(),
    "configs": {"backends.core"},
    "backends.fleet": {"backends.core"},
    "backends.servers": {"backends.core"},
    "backends.inputs": {"backends.core", "configs"},
    "backends.simulated": {"backends.core", "configs"},
    "backends.storage": {"backends.core", "configs"},
    "backends.workers": {"backends.core", "configs"},
    "backends.discovery": {
        "backends.core",
        "backends.fleet",
        "backends.servers",
        "backends.simulated",
        "backends.storage",
        "configs",
    },
    "backends.budget": {
        "backends.core",
        "backends.discovery",
        "backends.fleet",
        "backends.storage",
        "configs",
    },
    "backends.cluster": {"backends.core", "backends.servers", "configs"},
    "nodes": {"backends.core"},
    "graphs.remote": {"configs", "nodes"} | BACKENDS,
    "graphs.run": {"configs", "nodes", "graphs.remote"} | BACKENDS,
    "graphs": {"configs", "nodes", "graphs.remote", "graphs.run"} | BACKENDS,
    "graphs.integrations": {"configs", "nodes", "graphs", "graphs.run"} | BACKENDS,
    "graphs.jobs": {"configs", "nodes", "graphs", "graphs.run"} | BACKENDS,
    "graphs.cli": {
        "configs",
        "nodes",
        "graphs",
        "graphs.run",
        "graphs.remote",
        "graphs.jobs",
        "graphs.integrations",
    }
    | BACKENDS,
}
OLD = {"backends", "backends.accounts", "backends.sites"}  # folders that are being emptied
FLOORS |= {name: {"configs"} | OLD | BACKENDS for name in OLD}
FLOORS = {name: may | (OLD - {name}) for name, may in FLOORS.items()}
FLOORS |= {
    name: may | {"graphs", "graphs.cli", "graphs.jobs", "graphs.run", "graphs.remote", "graphs.integrations"}
    for name, may in FLOORS.items()
    if name.startswith("graphs")
}''' + t[b:]
    # until contract has become core
    t = t.replace('"backends.core"', '"backends.contract"')
    Path("tests/test_house.py").write_text(t)
    Path("configs/backend.py").touch()
    check_static_only()
    commit("Backend settings: what follows from the kind is a property of the settings; the architecture test has the target's layers")
    h.move({"graphs/run.py": "graphs/session.py"})
    TARGET["graphs/session.py"] = "graphs/session.py"
    sub("tests/test_house.py", (r"graphs\.session", "graphs.run"))
    check("graphs/session")
    commit("Move: graphs/run.py is graphs/session.py")
if False:
    check("prepare")
    commit("Backend settings: what follows from the kind is a property of the settings; the architecture test has the target's layers")

# ---------------------------------------------------------------- 0b lazy modules
def unlazy(path):
    src = Path(path).read_text()
    tree = ast.parse(src)
    block = next(n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING" and n.orelse)
    lazy = {}
    for n in block.body:
        if isinstance(n, ast.ImportFrom):
            for al in n.names:
                lazy[al.asname or al.name] = f"from {'.' * n.level}{n.module or ''} import {al.name}" + (f" as {al.asname}" if al.asname else "")
    lines = src.split("\n")
    inserts, edits = [], []
    for f in tree.body:
        if not isinstance(f, ast.FunctionDef):
            continue
        params = {x.arg for x in [*f.args.args, *f.args.kwonlyargs]}
        need = {}
        for n in ast.walk(f):
            if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id in lazy:
                base = lazy[n.value.id]
                mod = re.match(r"from (\S+) import (\w+)", base)
                local = n.attr if n.attr not in params | {f.name} else f"{mod[2]}_{n.attr}"
                need[f"    from {mod[1]}{'' if mod[1].endswith('.') else '.'}{mod[2]} import {n.attr}" + (f" as {local}" if local != n.attr else "")] = 1
                edits.append((n, local))
        if not need:
            continue
        at_line = f.body[0].end_lineno if isinstance(f.body[0], ast.Expr) and isinstance(f.body[0].value, ast.Constant) else f.body[0].lineno - 1
        inserts.append((at_line, [*sorted(need), ""]))
    for n, local in sorted(edits, key=lambda e: (e[0].lineno, e[0].col_offset), reverse=True):
        assert n.lineno == n.end_lineno
        line = lines[n.lineno - 1]
        lines[n.lineno - 1] = line[:n.col_offset] + local + line[n.end_col_offset:]
    for at_line, new in sorted(inserts, reverse=True):
        lines[at_line:at_line] = new
    # the block's lines are above all functions
    del lines[block.lineno - 1:block.end_lineno]
    s = "\n".join(lines)
    s = re.sub(r"^from \.lazily import Later\n", "", s, flags=re.M)
    Path(path).write_text(s)


if at("0b"):
    for f in ("graphs/cli.py", "graphs/presets_cli.py", "graphs/cluster_cli.py", "graphs/globus_cli.py"):
        unlazy(f)
    Path("graphs/lazily.py").unlink()
    sub("graphs/estimate.py", (r"^from \.options import SAMPLE\n", ""), (r"sample: int = SAMPLE", "sample: int = 200"))
    sub("graphs/checking.py", (r"^from \.options import SAMPLE\n", ""), (r"sample: int = SAMPLE", "sample: int"))
    sub("pyproject.toml", (r'^"graphs/form.py" = ', '"graphs/*cli*.py" = ["PLC0415"]         # a command imports what it needs when it is called\n"graphs/form.py" = '))
    check("lazy")
    commit("Commands import their modules when they are called; the stand-ins for modules are gone")

# ---------------------------------------------------------------- 1 core
if at("1"):
    def after_move1():
        sub("backends/sites/parsl_configs.py", (r'f"\{__package__\}\.leash"', "exit_with_parent.__name__"))
        s = Path("backends/sites/parsl_configs.py").read_text()
        i = re.search(r"^from \.", s, flags=re.M).start()
        Path("backends/sites/parsl_configs.py").write_text(s[:i] + "from ..core import exit_with_parent\n" + s[i:])
    if Path("nodes/gate.py").exists() and "create_kept_task" in Path("nodes/gate.py").read_text():
        split(h, "nodes/gate.py", {"backends/contract/kept_tasks.py": ["T", "KEPT", "create_kept_task", "keep", "_keep_marked", "_Keeping"]}, {"backends/contract/kept_tasks.py": "Tasks that the end of asyncio.run does not cancel."})
        check("kept tasks")
        commit("Tasks that outlive asyncio.run have a module of their own")
    TARGET["backends/contract/kept_tasks.py"] = "backends/core/aio.py"
    step("backends/core", within("backends/core"), folders={"backends/contract/": "backends/core/"}, after_move=after_move1)

# ---------------------------------------------------------------- 2 leaves
h.skip = {"tests/test_house.py"}
if at("2inputs"):
    def before():
        split(h, "backends/build.py", {"backends/inputs/settings_part.py": ["input_spec", "needed_columns"]})
        TARGET["backends/inputs/settings_part.py"] = "backends/inputs/source.py"
    step("backends/inputs", within("backends/inputs"), before=before)
if at("2cluster"):
    def before():
        split(h, "graphs/walltime.py", {"backends/cluster/walltime.py": ["Walltime", "walltime", "_ends", "_time", "END", "SLURM", "_LATER_S"]}, {"backends/cluster/walltime.py": "When this process must end, by its settings or by the batch job around it."})
    step("backends/cluster", within("backends/cluster"), before=before)
if at("2servers"):
    def after_moves():
        sub("backends/servers/guard.py", (r'with_name\("watcher.py"\)', 'with_name("watchdog.py")'))
    step("backends/servers", within("backends/servers"), after_move=after_moves)
if at("2simulated"):
    step("backends/simulated", within("backends/simulated"), folders={"backends/fleet/simulated/": "backends/simulated/"})
if at("2storage"):
    step("backends/storage", within("backends/storage"), folders={"backends/accounts/results/": "backends/storage/", "backends/accounts/answers/": "backends/storage/", "backends/accounts/": "backends/storage/"},
         renames={("backends/storage/results.py", "delimited", "_columns"): "_csv_columns", ("backends/storage/results_schema.py", "fitting", "_SCALARS"): "_SCALARS_FITTING"})
# ---------------------------------------------------------------- 3
if at("3names"):
    names = re.search(r"_MODULES: Final = (\{.*?\n\})", Path("backends/fleet/__init__.py").read_text(), flags=re.S)
    table = {n: f"backends/fleet/{m}.py" for m, ns in eval(names.group(1)).items() for n in ns}
    h.dissolve("backends/fleet/__init__.py", table)
    Path("backends/fleet/__init__.py").write_text('"""The fleet: many endpoints behind one chat model."""\n')
    check("fleet names")
    commit("The fleet's package hands on no names: importers name the module")
if at("3fleet"):
    split(h, "backends/fleet/transport.py", {"backends/fleet/answer.py": ["BodyTooLargeError", "ProxyError"]})
    check("fleet errors")
    commit("Errors of the transport stand beside the reading of failures")
    step("backends/discovery and backends/fleet", within("backends/discovery", "backends/fleet"),
         renames={("backends/discovery/probe.py", "matching", "_SHOWN"): "_MODELS_SHOWN", ("backends/fleet/load.py", "gauges", "_AT_ONCE"): "_GAUGES_AT_ONCE"})
if at("3budget"):
    split(h, "graphs/costs.py", {"graphs/session.py": ["cost_of_life"]})
    check("cost of a life")
    commit("The cost of a session is added up where the session ends")
    step("backends/budget", within("backends/budget"), renames={("backends/budget/tokens.py", "tokens", "_ASKED"): "_TOKENIZERS_ASKED", ("backends/budget/tokens.py", "counting", "Count"): "TokenCount"})
if at("3workers"):
    sub("backends/sites/launched/local.py", (r'"""The launcher of a machine without one: ``… -m fanfold.backends.sites.launched.local N COMMAND``.', '"""A launcher for this machine: ``python -m …launched.local N COMMAND``.'))
    step("backends/workers", within("backends/workers", "backends/workers/globus", "backends/workers/academy", "backends/workers/launched"), folders={"backends/sites/": "backends/workers/"},
         renames={("backends/workers/executor.py", "parsl_pool", "end"): "end_parsl_pool"})
if at("3configs"):
    step("configs", within("configs"), after_move=lambda: sub("tests/test_house.py", (r'"configs\.load"', '"configs.loader"')), renames={("configs/backend.py", "node", "_command"): "_server_command"})
# ---------------------------------------------------------------- 4 nodes
if at("4nodes"):
    step("nodes", after_move=lambda: sub("tests/test_house.py", (r'"nodes\.steps"', '"nodes.item.steps"')), folder_ok=within("nodes", "nodes/batch", "nodes/item", "nodes/shard", "nodes/aggregators"))


# ---------------------------------------------------------------- 5 graphs
if at("5cli"):
    def before():
        split(h, "graphs/looking.py", {"graphs/simulate_part.py": ["simulate", "_serve", "_write_endpoints"]})
        TARGET["graphs/simulate_part.py"] = "graphs/cli/servers.py"
        # the presets' commands do their work themselves
        s = Path("graphs/presets_cli.py").read_text()
        s = re.sub(r"    from \.looking import presets_list.*\n", "    from ..configs.loader import preset_names, preset_text\n", s)
        s = re.sub(r"    from \.looking import presets_show.*\n", "    from ..configs.loader import preset_text\n", s)
        s = re.sub(r"    from \.looking import presets_copy.*\n", "    from ..configs.loader import copy_preset\n", s)
        s = s.replace("    looking_presets_list()\n", """    for name in preset_names():
        print(f"{name:24} {preset_text(name).splitlines()[0].removeprefix('# ')}")
""")
        s = s.replace("    looking_presets_show(name)\n", '    print(preset_text(name), end="")\n')
        s = s.replace('    looking_presets_copy(name, target or Path(f"{name}.yaml"))\n', """    target = target or Path(f"{name}.yaml")
    copy_preset(name, target)
    print(f"{target} written; fill in endpoints and input, then: fanfold check {target}")
""")
        s = re.sub(r"^app = ", "presets = ", s, flags=re.M).replace("@app.", "@presets.")
        Path("graphs/presets_cli.py").write_text(s)
        s = Path("graphs/globus_cli.py").read_text()
        s = re.sub(r"^app = ", "globus = ", s, flags=re.M).replace("@app.", "@globus.")
        Path("graphs/globus_cli.py").write_text(s)
        s = Path("graphs/cli.py").read_text()
        s = s.replace("presets_cli.app", "presets_cli.presets").replace("globus_cli.app", "globus_cli.globus")
        Path("graphs/cli.py").write_text(s)
        s = Path("graphs/looking.py").read_text()
        i = s.index("def presets_list")
        s = s[:i].rstrip() + "\n"
        Path("graphs/looking.py").write_text(s)
        h.tidy()
        run("git add -A")

    def after_move():
        Path("graphs/cli/__init__.py").write_text('"""The command line: one module per group of commands."""\n\nfrom __future__ import annotations\n\nfrom .app import main\n\n__all__ = ["main"]\n')
        everywhere(r"fanfold\.graphs\.cli\.app:main", "fanfold.graphs.cli:main", ("*.toml", "*.md", "*.py"))
        sub("pyproject.toml", (r'"graphs/\*cli\*\.py"', '"graphs/cli/*.py"'))
        run("git add -A")

    step("graphs/cli", within("graphs/cli"), before=before, after_move=after_move,
         renames={("graphs/cli/status.py", "costing", "_lines"): "_cost_lines"})


def init(folder, doc):
    def make():
        Path(f"graphs/{folder}/__init__.py").write_text(f'"""{doc}"""\n')
        run("git add -A")
    return make


if at("5jobs"):
    step("graphs/jobs", within("graphs/jobs"), after_move=init("jobs", "Chains of batch jobs: submit, begin, end, cancel, and what they used."), renames={("graphs/jobs/usage.py", "useful", "_job"): "_job_utilization"})
if at("5integrations"):
    step("graphs/integrations", within("graphs/integrations"), after_move=init("integrations", "A run as an agent's tool, as a service and as an Academy agent."))
if at("5remote"):
    def before():
        split(h, "graphs/crew.py", {"graphs/shutdown_part.py": ["life_end"]})
        TARGET["graphs/shutdown_part.py"] = "graphs/run/shutdown.py"
    step("graphs/remote", within("graphs/remote"), before=before, after_move=init("remote", "Shards on workers: the coordinator, its tasks, and the heartbeat between both sides."))
if at("5run"):
    def before():
        split(h, "graphs/item.py", {"nodes/item/graph_part.py": ["ItemGraph", "build_item", "assemble", "described"]})
        TARGET["nodes/item/graph_part.py"] = "nodes/item/steps.py"
    step("graphs/run", lambda n: n.startswith(("graphs/run/", "nodes/item/")), before=before, after_move=init("run", "What a session of a run consists of, from its folder to its end."))
if at("5top"):
    step("graphs", within("graphs", "backends/core", "backends/storage", "backends/cluster", "backends/discovery", "backends/budget", "configs", "nodes"))

if at("6tests"):
    U = {"budget": ["accounts/test_budget", "accounts/test_cost_sums", "backends/test_tariffs", "fleet/test_token_counts"],
         "storage": ["accounts/*", "answers/*"],
         "discovery": ["backends/test_limits_policy", "backends/test_locate_static", "backends/test_waiting", "fleet/test_fleet_folder", "fleet/test_fleet_matching", "fleet/test_fleet_nodelist", "fleet/test_fleet_sources", "fleet/test_endpoint_file_trust", "sites/test_nearby_specs"],
         "cluster": ["backends/test_server_times", "graphs/test_walltime"],
         "simulated": ["fleet/test_sim_*"],
         "core": ["graphs/test_loop_aside", "graphs/test_shared_use", "sites/test_scratch"],
         "configs": ["graphs/test_settings_options"],
         "workers": ["sites/*"]}
    moves = {}
    files = [f for f in h.tracked() if f.startswith("tests/unit/")]
    for to, pats in U.items():
        for pat in pats:
            for f in files:
                if f not in moves and re.fullmatch("tests/unit/" + pat.replace("*", "[^/]*") + r"(\.py)?", f):
                    moves[f] = f"tests/unit/{to}/{Path(f).name}"
    for f in h.tracked():
        for a, b in {"lives": "runs", "cluster": "jobs", "embedding": "langgraph", "globus": "workers/globus", "academy": "workers/academy", "launched": "workers/launched"}.items():
            if f.startswith(f"tests/integration/{a}/"):
                moves[f] = f.replace(f"tests/integration/{a}/", f"tests/integration/{b}/", 1)
        if re.match(r"tests/integration/test_(langgraph|tracing)", f):
            moves[f] = f.replace("tests/integration/", "tests/integration/langgraph/")
        if re.match(r"tests/integration/test_simulated", f):
            moves[f] = f.replace("tests/integration/", "tests/integration/simulated/")
    moves["tests/test_house.py"] = "tests/test_architecture.py"
    if Path("backends/accounts/conformance.py").exists():
        moves["backends/accounts/conformance.py"] = "tests/conformance/journal_checks.py"
    h.skip = set()
    h.move(moves)
    Path("backends/accounts/__init__.py").unlink(missing_ok=True)
    sub("tests/conformance/journal_checks.py", (r"from \.+backends\.", "from fanfold.backends."))
    check("tests")
    commit("Move: the tests mirror the folders")
if at("7final"):
    t = Path("tests/test_architecture.py").read_text()
    a = t.index("OLD = {"); b = t.index("\n\n\ndef dotted")
    t = t[:a].rstrip() + t[b:]
    t = t.replace('    "graphs.jobs": {"configs", "nodes", "graphs", "graphs.run"}', '    "graphs.jobs": {"configs", "nodes", "graphs", "graphs.run", "graphs.remote"}')
    t = t.replace('    "backends.core": set(),\n', '    "backends": set(),\n    "backends.core": set(),\n', 1)
    Path("tests/test_architecture.py").write_text(t)
    check("final")
    commit("Architecture test: the layers hold without exceptions")
