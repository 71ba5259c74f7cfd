"""The health of nodes: what is held against one, who is kept away from the mesh, and how a node comes back.

A failure that can be a node's is a *strike*; strikes expire. A node with too many is quarantined, when the mesh can do
without it, and probed while it idles; one that passes returns on probation, and its next strike sends it away for good.
Whose state was proven corrupt is convicted: quarantined as soon as a generation can be opened without it, and no probe
brings it back, since a chip that is wrong now and then passes most of them. Never are more nodes quarantined than
`limits.quarantined_at_most`: what strikes many nodes alike is not theirs.

An audit in which two nodes disagree proves that one of them is wrong, not which. Both are suspects until a third node
has repeated the computation; with no third voice nobody is convicted.
"""

from __future__ import annotations

from orchestrator.core import events as ev
from orchestrator.core import recovery
from orchestrator.core.actions import Action, AskThird, ProbeNode, SetTimer
from orchestrator.core.state import Disagreement, Evidence, State

DISAGREEMENTS_ASKED = 8
"""On which a third is asked at a time: each takes a spare's time, and one bad node disagrees with all its auditors."""


def strike(state: State, name: str, at: int) -> None:
    """Hold a failure against a node."""
    if _is_here(state, name):
        state.strikes.setdefault(name, []).append(at)


def charge(state: State, evidence: Evidence, at: int) -> list[Action]:
    """A strike for the node of `evidence`, and quarantine when that was one too many and a spare can replace it.

    Only while nothing runs: a node that is quarantined holds no slot.
    """
    name = evidence.node
    strike(state, name, at)
    if name not in state.strikes:
        return []
    if evidence.kind == "corrupt":
        state.convicted[name] = None
    too_many = len(state.strikes[name]) >= state.declared_limits.strikes
    too_many = too_many or name in state.probation or evidence.kind == "slow"
    # What only this node fails at ends the run with it: a smaller mesh is better, for the others it needs a spare.
    its_own = recovery.follows_one_node(state, evidence)
    needed = recovery.fewest_nodes(state) if its_own else len(state.mesh)
    return _quarantine(state, name, at) if (too_many or its_own) and state.n_usable > needed else []


def found_slow(state: State, name: str, at: int) -> None:
    """A strike for a node that is slow, once in each generation."""
    if state.slow.get(name) != state.generation:
        state.slow[name] = state.generation
        strike(state, name, at)


def convict(state: State, name: str, at: int) -> list[Action]:
    """A node that holds no slot is proven wrong; one that does is quarantined with the next change of the mesh."""
    strike(state, name, at)
    if not _is_here(state, name):
        return []
    state.convicted[name] = None
    return _quarantine(state, name, at) if state.nodes[name].state == "spare" else []


def quarantine_convicts(state: State, at: int) -> list[Action]:
    """Also those whom nobody could replace when they were convicted; a smaller mesh is better than a corrupt one."""
    actions: list[Action] = []
    fewest = recovery.fewest_nodes(state)
    for name in state.convicted:
        if state.n_usable > fewest:
            actions += _quarantine(state, name, at)
    return actions


def can_be_replaced(state: State) -> bool:
    """Whether a spare in good standing could take the place of a node that is to be quarantined."""
    return _has_room(state) and any(
        node.state == "spare" and state.standing(spare) == "good" for spare, node in state.nodes.items()
    )


def forgive(state: State, at: int) -> None:
    """Strikes, disputes and probations that are over are forgotten."""
    since = at - state.declared_limits.strike_expiry_us
    for name, struck in list(state.strikes.items()):
        state.strikes[name] = [time for time in struck if time > since]
        if not state.strikes[name]:
            del state.strikes[name]
    state.misread = {name: what for name, what in state.misread.items() if name in state.strikes}
    state.disputes = {name: time for name, time in state.disputes.items() if time > since}
    state.probation = {name: until for name, until in state.probation.items() if until > at}


def _quarantine(state: State, name: str, at: int) -> list[Action]:
    if state.nodes[name].state not in ("active", "spare") or not _has_room(state):
        return []
    for_good = name in state.convicted or name in state.probation
    state.probation.pop(name, None)
    if for_good or "probe" not in state.capabilities:
        state.move_node(name, "quarantined")
        return []
    state.move_node(name, "probed")
    return probe(state, name, at)


def _has_room(state: State) -> bool:
    return state.n_in_quarantine < state.declared_limits.quarantined_at_most


def probe(state: State, name: str, at: int) -> list[Action]:
    """Have it probed; its answer has as long as a start may take, which it contains."""
    state.n_probes += 1
    number = state.probes[name] = state.n_probes
    deadline = SetTimer(timer=f"probe/{number}", at=at + state.declared_limits.start_deadline_us)
    return [ProbeNode(node=name, number=number), deadline]


def probed(state: State, number: int, passed: bool, at: int) -> str | None:
    """What a probe has shown, or that it was not answered. The node that is usable again, if it is."""
    name = next((name for name, newest in state.probes.items() if newest == number), None)
    if name is None:
        return None
    del state.probes[name]
    if not passed:
        state.move_node(name, "quarantined")
        return None
    _take_back(state, name, at)
    return name


def take_back(state: State, n: int, at: int) -> None:
    """The run would end for want of nodes: those that have only failed too often serve again, the newest first."""
    away = [name for name, node in state.nodes.items() if node.state == "quarantined" and name not in state.convicted]
    for name in away[::-1][: max(0, n)]:
        _take_back(state, name, at)


def _take_back(state: State, name: str, at: int) -> None:
    state.move_node(name, "spare")
    state.strikes.pop(name, None)
    state.probation[name] = at + state.declared_limits.probation_us


def disagreed(state: State, event: ev.AuditDisagreed) -> list[Action]:
    """Two nodes disagree: both are suspects, and a spare of good standing is asked, where there is one."""
    pair = (event.auditor, event.accused)
    known = any(
        (d.generation, d.step, d.auditor, d.accused) == (event.generation, event.step, *pair)
        for d in state.disagreements
    )
    if known or any(name in state.convicted or not _is_here(state, name) for name in pair):
        return []
    forgive(state, event.at)
    state.disputes |= dict.fromkeys(pair, event.at)
    return _ask_somebody(state, event.generation, event.step, pair, event.at)


def lost(state: State, name: str, at: int) -> list[Action]:
    """Whom a lost node was to judge is judged by another."""
    actions: list[Action] = []
    for asked in [asked for asked in state.disagreements if asked.judge == name]:
        state.disagreements.remove(asked)
        actions += _ask_somebody(state, asked.generation, asked.step, (asked.auditor, asked.accused), at)
    return actions


def _ask_somebody(state: State, generation: int, step: int, pair: tuple[str, str], at: int) -> list[Action]:
    busy = [asked.judge for asked in state.disagreements]
    spares = (name for name, node in state.nodes.items() if node.state == "spare" and name not in busy)
    judge = next((name for name in spares if state.standing(name) == "good" and name not in pair), None)
    if judge is None or "third" not in state.capabilities or len(state.disagreements) >= DISAGREEMENTS_ASKED:
        return []
    state.n_disagreements += 1
    asked = Disagreement(
        number=state.n_disagreements,
        generation=generation,
        step=step,
        auditor=pair[0],
        accused=pair[1],
        judge=judge,
    )
    state.disagreements.append(asked)
    return ask(state, asked, at)


def ask(state: State, asked: Disagreement, at: int) -> list[Action]:
    """Have the third node repeat the computation, in no longer than a start may take."""
    order = AskThird(
        number=asked.number,
        generation=asked.generation,
        step=asked.step,
        auditor=asked.auditor,
        accused=asked.accused,
        judge=asked.judge,
    )
    return [order, SetTimer(timer=f"third/{asked.number}", at=at + state.declared_limits.start_deadline_us)]


def settled(state: State, number: int, wrong: str) -> list[Disagreement]:
    """The third has spoken, or its time is over. What that settles: all in which the one whom it convicts stands."""
    found = next((asked for asked in state.disagreements if asked.number == number), None)
    if found is None:
        return []
    state.disagreements.remove(found)
    if wrong not in (found.auditor, found.accused):
        return []
    others = [asked for asked in state.disagreements if wrong in (asked.auditor, asked.accused)]
    state.disagreements = [asked for asked in state.disagreements if asked not in others]
    for asked in (found, *others):
        state.disputes.pop(asked.accused if wrong == asked.auditor else asked.auditor, None)
    return [found, *others]


def _is_here(state: State, name: str) -> bool:
    return name in state.nodes and state.nodes[name].state != "lost"
