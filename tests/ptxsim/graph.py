"""Control flow graph of one function: branch targets, structural block order, code layout."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .errors import PtxParseError
from .parse.syntax import Func, Ins


def _uncond(ins: Ins) -> bool:
    return ins.pred is None and ins.parts[0] in ("bra", "ret", "exit", "trap", "brx")


def find_label(ins: Ins, name: str) -> int:
    s = ins.scope
    while s is not None:
        if name in s.labels:
            return s.labels[name]
        s = s.parent
    raise PtxParseError(f"line {ins.line}: unknown label {name}", line=ins.line)


def branch_targets(ins: Ins) -> list[int]:
    """body indices this branch may jump to."""
    if ins.parts[0] == "bra":
        return [find_label(ins, ins.args[0][1])]
    if ins.parts[0] == "brx":
        assert ins.scope is not None
        names = ins.scope.find("tables", ins.args[1][1])
        if names is None:
            raise PtxParseError(f"line {ins.line}: unknown branch table {ins.args[1][1]}", line=ins.line)
        return [find_label(ins, n) for n in names]
    return []


def components(nodes: Sequence[Any], succ: Mapping[Any, Iterable[Any]]) -> list[list[Any]]:
    """Tarjan, iterative; returns list of components (each a list)."""
    index, low, onst, st, out = {}, {}, set(), [], []
    cnt = 0
    ns = set(nodes)
    for root in nodes:
        if root in index:
            continue
        work = [(root, iter([s for s in succ[root] if s in ns]))]
        index[root] = low[root] = cnt
        cnt += 1
        st.append(root)
        onst.add(root)
        while work:
            v, it = work[-1]
            adv = False
            for w in it:
                if w not in index:
                    index[w] = low[w] = cnt
                    cnt += 1
                    st.append(w)
                    onst.add(w)
                    work.append((w, iter([s for s in succ[w] if s in ns])))
                    adv = True
                    break
                if w in onst:
                    low[v] = min(low[v], index[w])
            if adv:
                continue
            work.pop()
            if work:
                low[work[-1][0]] = min(low[work[-1][0]], low[v])
            if low[v] == index[v]:
                comp = []
                while True:
                    w = st.pop()
                    onst.discard(w)
                    comp.append(w)
                    if w == v:
                        break
                out.append(comp)
    return out


def structural_order(nodes: list[int], succ: dict[int, list[int]], entry: int) -> list[int]:
    """Topological order of the loop-nesting forest: loop bodies are contiguous, joins follow their branches.

    With 'lowest pc first' scheduling on this order, divergent threads reconverge at the immediate
    post-dominator for structured code.
    """
    nodes = sorted(nodes)
    comps = components(nodes, succ)
    cid = {}
    for i, c in enumerate(comps):
        for v in c:
            cid[v] = i
    ns = set(nodes)
    csucc: dict[int, set[int]] = {i: set() for i in range(len(comps))}
    indeg = dict.fromkeys(range(len(comps)), 0)
    for v in nodes:
        for w in succ[v]:
            if w in ns and cid[w] != cid[v] and cid[w] not in csucc[cid[v]]:
                csucc[cid[v]].add(cid[w])
    for i in csucc:
        for j in csucc[i]:
            indeg[j] += 1
    key = {i: min(c) for i, c in enumerate(comps)}
    heap = [((0 if cid.get(entry) == i else 1), key[i], i) for i in indeg if indeg[i] == 0]
    heapq.heapify(heap)
    out = []
    preds: dict[int, list[int]] | None = None
    while heap:
        _, _, i = heapq.heappop(heap)
        c = comps[i]
        if len(c) == 1:
            out.append(c[0])
        else:
            cs = set(c)
            if entry in cs:
                h = entry
            else:
                if preds is None:
                    preds = {v: [] for v in nodes}
                    for v in nodes:
                        for w in succ[v]:
                            if w in ns:
                                preds[w].append(v)
                hs = [v for v in c if any(p not in cs for p in preds[v])]
                h = min(hs) if hs else min(c)
            sub = {v: [w for w in succ[v] if w in cs and w != h] for v in c}
            out += structural_order(c, sub, h)
        for j in csucc[i]:
            indeg[j] -= 1
            if indeg[j] == 0:
                heapq.heappush(heap, (1, key[j], j))
    return out


def layout(f: Func) -> tuple[list[Ins], dict[int, int]]:
    """Reorder the basic blocks of f. Returns (list of Ins, map body index -> position)."""
    body = f.body or []
    n = len(body)
    leaders = {0}
    tg = {}
    for i, ins in enumerate(body):
        if ins.parts[0] in ("bra", "brx"):
            tg[i] = branch_targets(ins)
            leaders.update(t for t in tg[i] if t < n)
            if i + 1 < n:
                leaders.add(i + 1)
        elif ins.parts[0] in ("ret", "exit", "trap") and i + 1 < n:
            leaders.add(i + 1)
    ls = sorted(leaders)
    blocks = {}
    for a, b in zip(ls, [*ls[1:], n], strict=True):
        blocks[a] = b
    succ = {}
    for a, b in blocks.items():
        last = body[b - 1] if b > a else None
        s = []
        if last is not None and (b - 1) in tg:
            s += [t for t in tg[b - 1] if t < n]
        if (last is None or not _uncond(last)) and b < n:
            s.append(b)
        succ[a] = s
    reach, st = {0}, [0]
    while st:
        for w in succ[st.pop()]:
            if w not in reach:
                reach.add(w)
                st.append(w)
    order = structural_order(list(reach), succ, 0) if n else []
    out: list[Ins] = []
    pos: dict[int, int] = {}
    for k, a in enumerate(order):
        b = blocks[a]
        pos[a] = len(out)
        for i in range(a, b):
            pos[i] = len(out)
            out.append(body[i])
        last = body[b - 1]
        nxt = order[k + 1] if k + 1 < len(order) else None
        if not _uncond(last) and b != nxt:
            if b < n:
                j = Ins("ptxsim_jump", [], None, False, last.line, last.loc, last.scope, f)
                j.text = "(fallthrough)"
                j.target = b
                out.append(j)
            else:
                j = Ins("ret", [], None, False, last.line, last.loc, last.scope, f)
                j.text = "ret (implicit)"
                out.append(j)
    if not out:
        j = Ins("ret", [], None, False, f.line, None, None, f)
        j.text = "ret (implicit)"
        out.append(j)
        pos[0] = 0
    pos.setdefault(n, len(out))
    return out, pos
