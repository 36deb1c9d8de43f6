"""Move, merge, split and rename modules of the package whose root is the current directory.

Imports (relative ones too, and modules used as objects), dotted names in strings and paths in documents are
rewritten. Scopes are resolved, so that a local variable with a module's name is left as it is.

    house = House(Path("."))
    house.move({"backends/a.py": "backends/core/a.py"})
    house.merge("backends/core/t.py", ["backends/core/t.py", "backends/core/b.py"], renames={("b", "_x"): "_y"})
    house.rename("backends/core/t.py", {"Old": "New"})
    split(house, "graphs/looking.py", {"graphs/cli/servers.py": ["simulate"]})
"""
from __future__ import annotations

import ast
import re
import subprocess
from collections import defaultdict
from pathlib import Path

PKG = "fanfold"
ROOMS = ("backends", "configs", "graphs", "nodes", "tests", "examples")
TEXT = (".py", ".md", ".json", ".toml", ".yaml", ".yml", ".ipynb", ".jinja", ".sh", ".j2", ".txt", "")


def sh(*args: str) -> str:
    return subprocess.run(args, check=True, capture_output=True, text=True).stdout


def dotted(path: str) -> str:
    p = path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    if p == "__init__":
        return PKG
    return f"{PKG}.{p}"


class Scope(ast.NodeVisitor):
    """Collects the positions of Name nodes that resolve to module scope."""

    def __init__(self, names: set[str]) -> None:
        self.names, self.found = names, []
        self.stack: list[set[str]] = []

    @staticmethod
    def bound(node: ast.AST) -> set[str]:
        got: set[str] = set()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            a = node.args
            for arg in [*a.posonlyargs, *a.args, *a.kwonlyargs, *([a.vararg] if a.vararg else []), *([a.kwarg] if a.kwarg else [])]:
                got.add(arg.arg)
        todo = [node.body] if isinstance(node, ast.Lambda) else list(getattr(node, "body", []))
        if isinstance(node, (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)):
            todo = [g.target for g in node.generators]
        while todo:
            n = todo.pop()
            if isinstance(n, list):
                todo += n
                continue
            if isinstance(n, ast.Name) and isinstance(n.ctx, (ast.Store, ast.Del)):
                got.add(n.id)
            if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                got.add(n.name)
                todo += n.decorator_list
                continue
            if isinstance(n, (ast.Import, ast.ImportFrom)):
                got |= {(x.asname or x.name).split(".")[0] for x in n.names}
                continue
            if isinstance(n, ast.ExceptHandler) and n.name:
                got.add(n.name)
            if isinstance(n, (ast.MatchAs, ast.MatchStar)) and n.name:
                got.add(n.name)
            if isinstance(n, ast.MatchMapping) and n.rest:
                got.add(n.rest)
            if isinstance(n, (ast.Lambda, ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)):
                for w in ast.walk(n):  # walrus leaks out
                    if isinstance(w, ast.NamedExpr):
                        got.add(w.target.id)
                continue
            if isinstance(n, (ast.Global, ast.Nonlocal)):
                continue
            todo += list(ast.iter_child_nodes(n))
        return got

    def local(self, name: str) -> bool:
        return any(name in s for s in self.stack)

    def visit_Name(self, node: ast.Name) -> None:
        if node.id in self.names and not self.local(node.id):
            self.found.append(node)

    def _function(self, node) -> None:
        for d in getattr(node, "decorator_list", []):
            self.visit(d)
        a = node.args
        for x in [*a.defaults, *[d for d in a.kw_defaults if d]]:
            self.visit(x)
        for arg in [*a.posonlyargs, *a.args, *a.kwonlyargs, *([a.vararg] if a.vararg else []), *([a.kwarg] if a.kwarg else [])]:
            if arg.annotation:
                self.visit(arg.annotation)
        if getattr(node, "returns", None):
            self.visit(node.returns)
        if node in self.top and node.name in self.names:
            self.found.append(node)
        self.stack.append(self.bound(node))
        body = node.body if isinstance(node.body, list) else [node.body]
        for b in body:
            self.visit(b)
        self.stack.pop()

    top: set = set()

    def visit_FunctionDef(self, node):
        self._function(node)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node):
        a = node.args
        for x in [*a.defaults, *[d for d in a.kw_defaults if d]]:
            self.visit(x)
        self.stack.append(self.bound(node))
        self.visit(node.body)
        self.stack.pop()

    def visit_ClassDef(self, node):
        for d in node.decorator_list:
            self.visit(d)
        for b in [*node.bases, *[k.value for k in node.keywords]]:
            self.visit(b)
        if node in self.top and node.name in self.names:
            self.found.append(node)
        # class scope: names bound here are visible to its body's own statements only
        mine = self.bound(node)
        for b in node.body:
            if isinstance(b, (ast.FunctionDef, ast.AsyncFunctionDef)):
                self.visit(b)
            else:
                self.stack.append(mine)
                self.visit(b)
                self.stack.pop()

    def _comp(self, node):
        self.visit(node.generators[0].iter)
        self.stack.append(self.bound(node))
        for i, g in enumerate(node.generators):
            self.visit(g.target)
            if i:
                self.visit(g.iter)
            for c in g.ifs:
                self.visit(c)
        if isinstance(node, ast.DictComp):
            self.visit(node.key)
            self.visit(node.value)
        else:
            self.visit(node.elt)
        self.stack.pop()

    visit_ListComp = visit_SetComp = visit_GeneratorExp = visit_DictComp = _comp

    def run(self, tree: ast.Module) -> list:
        self.top = set(tree.body)
        for n in ast.walk(tree):
            if isinstance(n, ast.If) and n in tree.body:
                self.top |= set(n.body)
        self.visit(tree)
        return self.found


class Text:
    """A file's text with edits by line and column (columns in UTF-8 bytes, as ast gives them)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = path.read_bytes()
        self.starts = [0]
        for line in self.data.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.edits: list[tuple[int, int, bytes]] = []

    def at(self, line: int, col: int) -> int:
        return self.starts[line - 1] + col

    def replace(self, node, text: str) -> None:
        self.edits.append((self.at(node.lineno, node.col_offset), self.at(node.end_lineno, node.end_col_offset), text.encode()))

    def done(self) -> bytes:
        out = self.data
        last = None
        for a, b, t in sorted(set(self.edits), reverse=True):
            assert last is None or b <= last, (self.path, a, b)
            out = out[:a] + t + out[b:]
            last = a
        return out

    def write(self) -> None:
        if self.edits:
            self.path.write_bytes(self.done())


class House:
    def __init__(self, root: Path) -> None:
        self.root = root

    # ---- files
    def tracked(self) -> list[str]:
        return [f for f in sh("git", "-C", str(self.root), "ls-files").splitlines() if not f.startswith(".dev/") and (self.root / f).is_file() and not (self.root / f).is_symlink()]

    def modules(self) -> list[str]:
        return [f for f in self.tracked() if f.endswith(".py")]

    def module_names(self) -> set[str]:
        names = set()
        for f in self.modules():
            names.add(dotted(f))
            parts = f.split("/")[:-1]
            for i in range(1, len(parts) + 1):
                names.add(".".join([PKG, *parts[:i]]))
        return names - self.bound_by_packages()

    def bound_by_packages(self) -> set[str]:
        """Names that a package's __init__ binds itself: from pkg import NAME means these."""
        names = set()
        for f in self.modules():
            if f.endswith("__init__.py"):
                for n in ast.parse((self.root / f).read_bytes()).body:
                    if isinstance(n, ast.ImportFrom) and n.module and n.module != "__future__":
                        names |= {f"{dotted(f)}.{a.asname or a.name}" for a in n.names}
        return names

    @staticmethod
    def absolute(node: ast.ImportFrom, path: str) -> str:
        if not node.level:
            return node.module or ""
        here = [PKG, *path.split("/")[:-1]]
        base = here[: len(here) - node.level + 1]
        return ".".join([*base, *([node.module] if node.module else [])])

    @staticmethod
    def relative(target: str, path: str) -> str:
        here = [PKG, *path.split("/")[:-1]]
        want = target.split(".")
        n = 0
        while n < len(here) and n < len(want) and here[n] == want[n]:
            n += 1
        if n == 0:
            return target
        return "." * (len(here) - n + 1) + ".".join(want[n:])

    # ---- imports
    def _emit(self, node: ast.ImportFrom, mod: str, names: list[ast.alias], path: str, rel: bool) -> str:
        text = self.relative(mod, path) if rel else mod
        return f"from {text} import " + ", ".join(a.name + (f" as {a.asname}" if a.asname else "") for a in names)

    def rewrite_imports(self, old_path: str, new_path: str, where, text: Text, tree: ast.Module) -> None:
        """Rewrite imports of one file.

        where(module, name) -> (new module, new name) or None for names; called with name=None for module itself.
        """
        mods = self._known
        module_uses: dict[str, tuple[str, str]] = {}
        owner: dict[int, ast.AST] = {}
        for fn in ast.walk(tree):
            if isinstance(fn, (ast.FunctionDef, ast.AsyncFunctionDef)):
                for n in ast.walk(fn):
                    owner[id(n)] = fn  # the innermost wins, for walk goes outside in

        def rename_in(node: ast.AST, old: str, new: str) -> bool:
            fn = owner.get(id(node))
            if fn is None:
                return False
            for n in ast.walk(fn):
                if isinstance(n, ast.Name) and n.id == old:
                    text.replace(n, new)
            return True
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                new = []
                changed = False
                for a in node.names:
                    if a.name.startswith(PKG + "."):
                        to = where(a.name, None)
                        if to and to != a.name:
                            changed = True
                            new.append(ast.alias(to, a.asname))
                            continue
                    new.append(a)
                if changed:
                    text.replace(node, "import " + ", ".join(a.name + (f" as {a.asname}" if a.asname else "") for a in new))
            elif isinstance(node, ast.ImportFrom):
                absolute = self.absolute(node, old_path)
                if not (absolute == PKG or absolute.startswith(PKG + ".")):
                    continue
                groups: dict[str, list[ast.alias]] = defaultdict(list)
                for a in node.names:
                    full = f"{absolute}.{a.name}"
                    if full in mods:  # a module as an object
                        to = where(full, None) or full
                        parent, _, base = to.rpartition(".")
                        if base != a.name and not a.asname and not rename_in(node, a.name, base):
                            module_uses[a.name] = (base, to)
                        groups[parent].append(ast.alias(base, a.asname))
                    else:
                        mod, name = where(absolute, a.name) or (absolute, a.name)
                        asname = a.asname
                        if name != a.name and not asname and not rename_in(node, a.name, name):
                            self._local_renames.setdefault(new_path, {})[a.name] = name
                        groups[mod].append(ast.alias(name, asname))
                rel = node.level > 0
                out = []
                for mod, names in groups.items():
                    if mod == dotted(new_path):
                        continue  # its own module after a merge
                    out.append(self._emit(node, mod, names, new_path, rel))
                was = self._emit(node, absolute, node.names, old_path, rel)
                now = "; ".join(out)
                same = len(out) == 1 and out[0] == was and old_path == new_path
                if not same and now != was:
                    indent = " " * node.col_offset
                    if out:
                        # keep a comment behind an opening parenthesis or behind the line
                        first = text.data.splitlines()[node.lineno - 1].decode()
                        comment = ""
                        m = re.search(r"\(\s*(#.*)$", first)
                        if m:
                            comment = "  " + m.group(1)
                        text.replace(node, ("\n" + indent).join(o + (comment if i == 0 else "") for i, o in enumerate(out)))
                    else:
                        text.replace(node, "pass" if node.col_offset else "")
        # usages of renamed module objects
        if module_uses:
            for n in Scope(set(module_uses)).run(tree):
                if isinstance(n, ast.Name):
                    text.replace(n, module_uses[n.id][0])

    def _apply(self, pathmap: dict[str, str], where) -> None:
        self._known = self.module_names()
        self._local_renames: dict[str, dict[str, str]] = {}
        texts = []
        for f in self.modules():
            t = Text(self.root / f)
            tree = ast.parse(t.data)
            new = pathmap.get(f, f)
            self.rewrite_imports(f, new, where, t, tree)
            ren = self._local_renames.get(new, {})
            if ren:
                for n in Scope(set(ren)).run(tree):
                    if isinstance(n, ast.Name):
                        t.replace(n, ren[n.id])
            texts.append(t)
        for t in texts:
            t.write()

    # ---- words in texts
    folders: dict[str, str] = {}
    skip: set[str] = set()

    def _texts(self, modmap: dict[str, str], pathmap: dict[str, str], attr=None) -> None:
        """Rewrite dotted names and paths in strings, docs and configuration."""
        dots = sorted(modmap, key=len, reverse=True)
        if not dots:
            return
        # full names (fanfold.x.y), names without the package (backends.x.y), path forms
        pats = []
        for old in dots:
            short = old.removeprefix(PKG + ".")
            pats.append((old, modmap[old]))
            if "." in short:
                pats.append((short, modmap[old].removeprefix(PKG + ".")))
        rx = re.compile(r"(?<![\w./])(" + "|".join(re.escape(p[0]) for p in pats) + r")(?![\w])(?!\.(?:md|yaml|json)\b)")
        table = dict(pats)
        px = None
        if pathmap:
            forms = {}
            pathmap = pathmap | self.folders
            for o, n in pathmap.items():
                forms[o] = n
            px = re.compile(r"(?<![\w])(" + "|".join(re.escape(p) for p in sorted(forms, key=len, reverse=True)) + r")(?!(?<!/)\w)")
        for f in self.tracked():
            if Path(f).suffix not in TEXT or f.startswith(".git") or f.endswith("CHANGELOG.md") or f in self.skip:
                continue
            p = self.root / f
            try:
                s = p.read_text()
            except UnicodeDecodeError:
                continue
            def sub(m):
                return table[m.group(1)]
            n = s
            if f.endswith(".py"):
                # import statements are already rewritten
                lines = n.split("\n")
                skip: set[int] = set()
                try:
                    for node in ast.walk(ast.parse(n)):
                        if isinstance(node, (ast.Import, ast.ImportFrom)):
                            skip |= set(range(node.lineno - 1, node.end_lineno))
                except SyntaxError:
                    pass
                for i, line in enumerate(lines):
                    if i in skip:
                        continue
                    lines[i] = rx.sub(sub, line)
                    if px:
                        lines[i] = px.sub(lambda m: pathmap[m.group(1)], lines[i])
                n = "\n".join(lines)
            else:
                n = rx.sub(sub, n)
                if px:
                    n = px.sub(lambda m: pathmap[m.group(1)], n)
            if n != s:
                p.write_text(n)

    # ---- operations
    def move(self, pathmap: dict[str, str]) -> None:
        """git mv each file; rewrite imports and texts. Folders are moved by naming each file."""
        modmap = {dotted(o): dotted(n) for o, n in pathmap.items() if o.endswith(".py")}

        def where(mod: str, name: str | None):
            to = modmap.get(mod, mod)
            return to if name is None else (to, name)

        self._apply(pathmap, where)
        for o, n in pathmap.items():
            (self.root / n).parent.mkdir(parents=True, exist_ok=True)
            sh("git", "-C", str(self.root), "mv", o, n)
        self._texts(modmap, pathmap)

    def _top(self, tree: ast.Module) -> dict[str, ast.stmt]:
        names: dict[str, ast.stmt] = {}
        for n in tree.body:
            if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                names[n.name] = n
            elif isinstance(n, ast.Assign):
                for t in n.targets:
                    for w in ast.walk(t):
                        if isinstance(w, ast.Name):
                            names[w.id] = n
            elif isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name):
                names[n.target.id] = n
        return names

    def merge(self, target: str, members: list[str], doc: str | None = None, renames: dict[tuple[str, str], str] | None = None) -> list[str]:
        """Merge modules into ``target`` (one of the members or new). Returns collisions, having changed nothing, if there are any."""
        renames = renames or {}
        ren_of: dict[str, dict[str, str]] = defaultdict(dict)
        for (stem, name), new in renames.items():
            hit = [m for m in members if Path(m).stem == stem]
            assert hit, (stem, members)
            ren_of[hit[0]][name] = new
        sources = {m: (self.root / m).read_text() for m in members}
        trees = {m: ast.parse(s) for m, s in sources.items()}
        mod_of = {dotted(m): m for m in members}
        # order: what is imported comes first
        deps = {m: set() for m in members}
        known = self.module_names()
        for m, tree in trees.items():
            for n in ast.walk(tree):
                if isinstance(n, ast.ImportFrom):
                    a = self.absolute(n, m)
                    if a in mod_of:
                        deps[m].add(mod_of[a])
                    for al in n.names:
                        if f"{a}.{al.name}" in mod_of:
                            deps[m].add(mod_of[f"{a}.{al.name}"])
        order: list[str] = []
        left = list(members)
        while left:
            ready = [m for m in left if not (deps[m] - {m}) - set(order)]
            assert ready, f"cycle among {left}"
            order.append(ready[0])
            left.remove(ready[0])
        # collisions
        seen: dict[str, tuple[str, str]] = {}
        bad: list[str] = []
        imported: dict[str, tuple[str, str]] = {}
        dropped: dict[str, set[int]] = defaultdict(set)
        for m in order:
            for name, node in self._top(trees[m]).items():
                new = ren_of[m].get(name, name)
                src = ast.unparse(node)
                if new in seen:
                    if seen[new][1] == src and new == name:
                        dropped[m].add(id(node))
                    else:
                        bad.append(f"{new}: {seen[new][0]} and {m}")
                        continue
                seen[new] = (m, src)
            for n in ast.walk(trees[m]):
                if isinstance(n, ast.ImportFrom) and n.col_offset == 0 or (isinstance(n, (ast.Import, ast.ImportFrom)) and n in trees[m].body):
                    a = self.absolute(n, m) if isinstance(n, ast.ImportFrom) else ""
                    if a in mod_of:
                        continue
                    for al in n.names:
                        if f"{a}.{al.name}" in mod_of:
                            continue
                        local = al.asname or al.name
                        what = f"{a}.{al.name}" if isinstance(n, ast.ImportFrom) else al.name
                        if local in imported and imported[local][1] != what:
                            bad.append(f"import {local}: {imported[local]} and {m} {what}")
                        imported[local] = (m, what)
        for name, (m, what) in imported.items():
            if name in seen:
                bad.append(f"{name}: defined in {seen[name][0]}, imported in {m} from {what}")
        if bad:
            return bad
        # bodies
        head_imports: list[str] = []
        typing_imports: list[str] = []
        bodies: list[str] = []
        for m in order:
            t = Text(self.root / m)
            tree = trees[m]
            names = dict(ren_of[m])
            # imports among members with another name
            objects: set[str] = set()
            for n in ast.walk(tree):
                if isinstance(n, ast.ImportFrom):
                    a = self.absolute(n, m)
                    for al in n.names:
                        if a in mod_of:
                            real = ren_of[mod_of[a]].get(al.name, al.name)
                            if (al.asname or al.name) != real:
                                names[al.asname or al.name] = real
                        elif f"{a}.{al.name}" in mod_of:
                            objects.add(al.asname or al.name)
            for n in Scope(set(names)).run(tree):
                new = names[n.id if isinstance(n, ast.Name) else n.name]
                if isinstance(n, ast.Name):
                    t.replace(n, new)
                else:
                    line = t.data.splitlines()[n.lineno - 1]
                    col = line.index(n.name.encode(), n.col_offset)
                    a = t.at(n.lineno, col)
                    t.edits.append((a, a + len(n.name.encode()), new.encode()))
            if objects:
                owner = {}
                for n in ast.walk(tree):
                    if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id in objects:
                        target_mod = next(mm for mm in members if Path(mm).stem == n.value.id)
                        t.replace(n, ren_of[target_mod].get(n.attr, n.attr))
            # drop imports and docstring from the body, keep comments
            first_body = 0
            for n in tree.body:
                is_doc = isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant) and isinstance(n.value.value, str) and n is tree.body[0]
                is_imp = isinstance(n, (ast.Import, ast.ImportFrom))
                is_typing = isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"
                drop = id(n) in dropped[m]
                if not (is_doc or is_imp or is_typing or drop):
                    continue
                if is_imp or is_typing:
                    for k in [n] if is_imp else n.body:
                        if isinstance(k, ast.ImportFrom):
                            if k.module == "__future__":
                                continue
                            a = self.absolute(k, m)
                            if a in mod_of or a == dotted(target):
                                continue
                            al = [x for x in k.names if f"{a}.{x.name}" not in mod_of]
                            if not al:
                                continue
                            rel = k.level > 0
                            line = self._emit(k, a, al, target, rel)
                        else:
                            line = ast.unparse(k)
                        tail = t.data.splitlines()[k.lineno - 1].decode()
                        c = re.search(r"#\s*(noqa|type:).*$", tail)
                        (typing_imports if is_typing else head_imports).append(line + (f"  {c.group(0)}" if c else ""))
                a, b = t.at(n.lineno, 0), t.at(n.end_lineno, n.end_col_offset)
                end = t.data.find(b"\n", b)
                end = len(t.data) if end < 0 else end + 1
                # the string below a dropped constant is its docstring
                idx = tree.body.index(n)
                if drop and idx + 1 < len(tree.body):
                    nx = tree.body[idx + 1]
                    if isinstance(nx, ast.Expr) and isinstance(nx.value, ast.Constant) and isinstance(nx.value.value, str):
                        e2 = t.data.find(b"\n", t.at(nx.end_lineno, nx.end_col_offset))
                        end = len(t.data) if e2 < 0 else e2 + 1
                t.edits = [e for e in t.edits if not (a <= e[0] < end)]
                t.edits.append((a, end, b""))
            body = t.done().decode().strip("\n")
            # function-level imports of members vanish; relative ones are emitted anew below
            if body.strip():
                bodies.append(body)
        text = doc or ast.get_docstring(trees[members[0]], clean=False) or ""
        out = f'"""{text}"""\n\nfrom __future__ import annotations\n\n' + "\n".join(dict.fromkeys(head_imports)) + "\n"
        if typing_imports:
            out += "\nif TYPE_CHECKING:\n" + "\n".join("    " + x for x in dict.fromkeys(typing_imports)) + "\n"
        out += "\n\n" + "\n\n\n".join(bodies) + "\n"
        # function-level imports inside bodies: members of the group or relative to another folder
        modmap = {dotted(m): dotted(target) for m in members}
        (self.root / target).parent.mkdir(parents=True, exist_ok=True)
        for m in members:
            if m != target:
                (self.root / m).unlink()
        (self.root / target).write_text(out)
        sh("git", "-C", str(self.root), "add", "-A")
        table: dict[tuple[str, str], tuple[str, str]] = {}
        for m in members:
            for name in self._top(trees[m]):
                table[dotted(m), name] = (dotted(target), ren_of[m].get(name, name))

        def where(mod: str, name: str | None):
            if name is None:
                return modmap.get(mod, mod)
            if (mod, name) in table:
                return table[mod, name]
            return modmap.get(mod, mod), name

        self._known = (self.module_names() | set(modmap)) - self.bound_by_packages()
        self._local_renames = {}
        pend = []
        for f in self.modules():
            t = Text(self.root / f)
            tree = ast.parse(t.data)
            # attribute uses of module objects whose members were renamed
            self.rewrite_imports(f, f, where, t, tree)
            ren = self._local_renames.get(f, {})
            if ren:
                for n in Scope(set(ren)).run(tree):
                    if isinstance(n, ast.Name):
                        t.replace(n, ren[n.id])
            pend.append(t)
        for t in pend:
            t.write()
        self._texts({k: v for k, v in modmap.items() if k != v}, {m: target for m in members if m != target})
        return []

    def rename(self, path: str, names: dict[str, str]) -> None:
        """Rename top-level names of one module, and their uses everywhere."""
        mod = dotted(path)
        self._known = self.module_names()
        self._local_renames = {}

        def where(m: str, name: str | None):
            if name is None:
                return m
            return (m, names.get(name, name)) if m == mod else (m, name)

        pend = []
        for f in self.modules():
            t = Text(self.root / f)
            tree = ast.parse(t.data)
            if f == path:
                for n in Scope(set(names)).run(tree):
                    if isinstance(n, ast.Name):
                        t.replace(n, names[n.id])
                    else:
                        line = t.data.splitlines()[n.lineno - 1]
                        col = line.index(n.name.encode(), n.col_offset)
                        a = t.at(n.lineno, col)
                        t.edits.append((a, a + len(n.name.encode()), names[n.name].encode()))
            self.rewrite_imports(f, f, where, t, tree)
            ren = self._local_renames.get(f, {})
            if ren:
                for n in Scope(set(ren)).run(tree):
                    if isinstance(n, ast.Name):
                        t.replace(n, ren[n.id])
            pend.append(t)
        for t in pend:
            t.write()

    def tidy(self) -> None:
        subprocess.run([".venv/bin/ruff", "check", "-q", "--fix", "."], cwd=self.root, capture_output=True)
        subprocess.run([".venv/bin/ruff", "format", "-q", "."], cwd=self.root)

    def dissolve(self, package: str, table: dict[str, str]) -> None:
        """Have importers of names that a package hands on import them where they are (name -> module path)."""
        mod = dotted(package)
        self._known = self.module_names()
        self._local_renames = {}

        def where(m: str, name: str | None):
            if name is not None and m == mod and name in table:
                return dotted(table[name]), name
            return m if name is None else (m, name)

        pend = []
        for f in self.modules():
            if f == package:
                continue
            t = Text(self.root / f)
            self.rewrite_imports(f, f, where, t, ast.parse(t.data))
            pend.append(t)
        for t in pend:
            t.write()


def split(h: House, path: str, parts: dict[str, list[str]], docs: dict[str, str] | None = None) -> None:
    """Take top-level names out of a module into new modules (or append to existing)."""
    t = Text(h.root / path)
    src = t.data.decode()
    tree = ast.parse(src)
    mod = dotted(path)
    lines = src.splitlines(keepends=True)
    imports = "".join("".join(lines[n.lineno - 1:n.end_lineno]) for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom)) and getattr(n, "module", "") != "__future__")
    imp_nodes = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom)) and getattr(n, "module", "") != "__future__"]
    typing = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    table = {}
    chunks = {p: [] for p in parts}
    cut = []
    for i, n in enumerate(tree.body):
        names = []
        if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names = [n.name]
        elif isinstance(n, ast.Assign):
            names = [x.id for x in n.targets if isinstance(x, ast.Name)]
        elif isinstance(n, ast.AnnAssign):
            names = [n.target.id]
        for p, wanted in parts.items():
            if names and names[0] in wanted:
                start = min([n.lineno, *[d.lineno for d in getattr(n, "decorator_list", [])]])
                end = n.end_lineno
                if i + 1 < len(tree.body) and isinstance(tree.body[i + 1], ast.Expr) and isinstance(tree.body[i + 1].value, ast.Constant):
                    end = tree.body[i + 1].end_lineno
                chunks[p].append("".join(lines[start - 1:end]))
                cut.append((start, end))
                table[mod, names[0]] = (dotted(p), names[0])
    missing = {w for ws in parts.values() for w in ws} - {n for _, n in table}
    assert not missing, missing
    moved = {p: {n for (m, n), (q, _) in table.items() if q == dotted(p)} for p in parts}
    keep = [l for i, l in enumerate(lines, 1) if not any(a <= i <= b for a, b in cut)]

    def uses(text: str) -> set[str]:
        return {n.id for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Name)}

    rest = "".join(keep)
    top = h._top(tree)
    # the rest imports what it needs of the parts, the parts of the rest
    add = ""
    for p in parts:
        need = sorted(uses(rest) & moved[p])
        if need:
            add += f"from {h.relative(dotted(p), path)} import {', '.join(need)}\n"
    if add:
        last = imp_nodes[-1].end_lineno
        offset = sum(1 for a, b in cut for k in range(a, b + 1) if k <= last)
        idx = last - offset
        rest_lines = rest.splitlines(keepends=True)
        rest = "".join(rest_lines[:idx]) + add + "".join(rest_lines[idx:])
    (h.root / path).write_text(rest)
    for p, body in chunks.items():
        text = "\n\n".join(body)
        here = []
        for n in imp_nodes:
            if isinstance(n, ast.ImportFrom) and n.level:
                here.append(h._emit(n, h.absolute(n, path), n.names, p, True))
            else:
                here.append("".join(lines[n.lineno - 1:n.end_lineno]).rstrip("\n"))
        need = sorted((uses(text) & set(top)) - moved[p])
        own = [x for x in need if (mod, x) not in table]
        if own:
            here.append(f"from {h.relative(mod, p)} import {', '.join(own)}")
        for q in parts:
            more = [x for x in need if table.get((mod, x), ("",))[0] == dotted(q)]
            if more:
                here.append(f"from {h.relative(dotted(q), p)} import {', '.join(more)}")
        typ = ""
        if typing:
            typ = "".join("".join(lines[n.lineno - 1:n.end_lineno]) for n in typing)
        target = h.root / p
        if target.exists():
            old = target.read_text()
            ot = ast.parse(old)
            oi = [n for n in ot.body if isinstance(n, (ast.Import, ast.ImportFrom))]
            ol = old.splitlines(keepends=True)
            at = oi[-1].end_lineno if oi else 0
            target.write_text("".join(ol[:at]) + "\n".join(here) + "\n" + "".join(ol[at:]).rstrip("\n") + "\n\n\n" + text)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            doc = (docs or {}).get(p, ast.get_docstring(tree, clean=False))
            target.write_text(f'"""{doc}"""\n\nfrom __future__ import annotations\n\n' + "\n".join(here) + "\n" + typ + "\n\n" + text)
    sh("git", "-C", str(h.root), "add", "-A")

    def where(m, name):
        if name is None:
            return m
        return table.get((m, name), (m, name))

    h._known = h.module_names()
    h._local_renames = {}
    pend = []
    for f in h.modules():
        if f == path:
            continue
        tt = Text(h.root / f)
        h.rewrite_imports(f, f, where, tt, ast.parse(tt.data))
        pend.append(tt)
    for tt in pend:
        tt.write()
    h.tidy()
