"""What is thought of a committed checkpoint, and who finds out: verification, second opinions, scrubs, certificates.

`committed` -> `verified` -> `certified`. A checkpoint is verified when a node has read it back and every digest has
matched; so soon after its commit, and again each `scrub_us`, one at a time, in quiet moments and slowly. A restore
checks all that it uses before a tensor changes. That is why it takes the newest committed checkpoint, verified or not:
less work is lost, and if it is damaged, nothing is but the time to find out, and an older one serves. It does not
verify: what a node still has in memory or on its disk comes from there, so that one that succeeds may have read nothing
of the store.

Who finds damage may be the one that reads badly. So a second node is asked before a checkpoint is called `damaged`.
If that finds it whole, the first gets a strike. A recovery does not wait for it: what a restore has refused is
damaged for it at once, and a second opinion later clears it or does not.

A certificate (storage.manifest) is a statement on the computation, as verification is one on the bytes. Where audits
prove that a node has computed wrongly, the run goes back to the newest certified checkpoint: see `rewind`.
"""

from __future__ import annotations

from orchestrator.core import events as ev
from orchestrator.core import health
from orchestrator.core.actions import Action, OpenGeneration, PublishTrust, SetTimer, VerifyCheckpoint
from orchestrator.core.checkpoints import revoke_if
from orchestrator.core.state import DISTRUSTED, USABLE, VERIFIED, Checkpoint, Doubt, State, Verification

TRIES = 3
"""Verifications of one checkpoint that may come to nothing, before it is left alone for REST_US."""
REST_US = 3600 * 1_000_000
"""A store or a mesh that does not let it be read now may do so in an hour."""
PATIENCE = 4
"""Times what reading takes at the ordered pace. A store that gives a fourth of it is busy with more urgent things."""
SLOWEST_BYTES_PER_S = 25_000_000
"""Who reads so fast is waited for, too: the pace bounds the reader, and what the store gives is another thing. It is a
fifth of what eight streams from an object store give (storage/commits.py); 840 GB take nine hours."""


def next_verification(state: State, at: int) -> list[Action]:
    """In a quiet moment: the verification that is wanted most, if none is under way.

    Called after every event: what is due by the clock needs no timer, which a controller's death would lose, since a
    mesh that trains tells of its steps all the time.
    """
    if state.verification is not None or "verify" not in state.capabilities:
        return []
    said: list[Action] = []
    while (step := _due(state, at)) is not None:
        checkpoint = state.checkpoints[step]
        node = _reader(state, checkpoint)
        if node is not None:
            state.n_verifications += 1
            state.verification = Verification(
                number=state.n_verifications, step=step, generation=checkpoint.generation, node=node
            )
            state.readers[node] = state.n_verifications
            return said + _order(state, state.verification, at)
        if checkpoint.doubt is None:
            return said
        said += _damaged(state, step, checkpoint.doubt.problem, checkpoint.doubt.node)  # nobody can say otherwise
    return said


def order_again(state: State, at: int) -> list[Action]:
    """After a controller's restart: the verification that is under way, if it is still wanted."""
    if state.verification is None:
        return []
    if _still_asked(state, state.verification) is None:
        state.verification = None
        return []
    return _order(state, state.verification, at)


def _order(state: State, asked: Verification, at: int) -> list[Action]:
    """The order, with a deadline by the size of the checkpoint; where that is not known, by that of the largest."""
    limits, known = state.declared_limits, state.checkpoints
    n_bytes = known[asked.step].bytes or max(c.bytes for c in known.values())
    slowest = max(1, min(limits.verify_bytes_per_s // PATIENCE, SLOWEST_BYTES_PER_S))
    patience_us = limits.start_deadline_us + 1_000_000 * n_bytes // slowest
    return [
        VerifyCheckpoint(
            number=asked.number,
            step=asked.step,
            generation=asked.generation,
            node=asked.node,
            bytes_per_s=limits.verify_bytes_per_s,
        ),
        SetTimer(timer=f"verify/{asked.number}", at=at + patience_us),
    ]


def _due(state: State, at: int) -> int | None:
    """First what is in doubt, then the newest that nobody has read, then what was read longest ago."""
    scrub_us = state.declared_limits.scrub_us
    able = {s: c for s, c in state.checkpoints.items() if c.not_before <= at and s <= state.total_steps}
    doubted = [step for step, c in able.items() if c.doubt is not None]
    unread = [step for step, c in able.items() if c.trust == "committed"]
    stale = [step for step, c in able.items() if scrub_us and c.trust in VERIFIED and c.read_at + scrub_us <= at]
    oldest = min(stale, key=lambda step: able[step].read_at, default=None)
    return next(iter((*doubted[-1:], *unread[-1:])), oldest)


def _reader(state: State, checkpoint: Checkpoint) -> str | None:
    """Who is to read it: in good standing, where anybody is; not who read last, nor one that shares its rack; a spare
    rather than one that trains; and of those the one that has rested longest. None where nobody is left to ask."""
    first = checkpoint.doubt.node if checkpoint.doubt is not None else ""
    last = max(state.readers, key=lambda name: state.readers[name], default="")
    domain = state.nodes[last].domain if last else ""
    able = [name for name in state.nodes if may_judge(state, name) and name != first]
    good = [name for name in able if state.standing(name) == "good"]

    def rank(name: str) -> tuple[bool, bool, bool, int]:
        node = state.nodes[name]
        near = bool(domain) and node.domain == domain
        return (name == last, near, node.state != "spare", state.readers.get(name, 0))

    return min(good or able, key=rank, default=None)


def may_judge(state: State, name: str) -> bool:
    """Whether a node's word on a checkpoint counts."""
    node = state.nodes.get(name)
    return node is not None and node.state in ("active", "spare") and name not in state.convicted


def answered(state: State, event: ev.CheckpointVerified) -> list[Action]:
    """A node has read the checkpoint that it was asked to read, or could not."""
    asked = state.verification
    if asked is None or asked.number != event.number:
        return []
    told = (event.step, event.generation, event.node)
    assert told == (asked.step, asked.generation, asked.node), (event, asked)
    state.verification = None
    checkpoint = _still_asked(state, asked)
    if checkpoint is None:
        return []
    if event.unread or not may_judge(state, event.node):
        return _put_off(state, checkpoint, event.at)
    checkpoint.tries, checkpoint.bytes = 0, event.bytes or checkpoint.bytes
    first = checkpoint.doubt
    if event.problems:
        if first is not None:
            return _damaged(state, event.step, event.problems[0], f"{first.node} and {event.node}")
        checkpoint.doubt = Doubt(node=event.node, problem=event.problems[0], by_itself=True)
        return []
    state.verifications["whole"] += 1
    return _whole(state, event.step, event.at, event.node, f"{event.bytes} bytes read")


def _still_asked(state: State, asked: Verification) -> Checkpoint | None:
    """What a verification is about, unless it has been deleted, replaced or revoked meanwhile."""
    checkpoint = state.checkpoints.get(asked.step)
    if checkpoint is None or checkpoint.generation != asked.generation:
        return None
    return checkpoint if checkpoint.trust in USABLE or checkpoint.doubt is not None else None


def unanswered(state: State, number: int, at: int) -> list[Action]:
    """Its time is over: the node loses the order, and another gets it."""
    asked = state.verification
    if asked is None or asked.number != number:
        return []
    state.verification = None
    checkpoint = _still_asked(state, asked)
    return [] if checkpoint is None else _put_off(state, checkpoint, at)


def _put_off(state: State, checkpoint: Checkpoint, at: int) -> list[Action]:
    state.verifications["unread"] += 1
    checkpoint.tries += 1
    if checkpoint.tries >= TRIES:
        checkpoint.tries, checkpoint.not_before = 0, at + REST_US
    return []


def _damaged(state: State, step: int, problem: str, by: str) -> list[Action]:
    checkpoint = state.checkpoints[step]
    state.verifications["damaged"] += 1
    already = checkpoint.trust == "damaged"
    checkpoint.trust, checkpoint.doubt = "damaged", None
    checkpoint.by, checkpoint.why = by, problem
    return [] if already else publish(state, step)


def _whole(state: State, step: int, at: int, by: str, detail: str) -> list[Action]:
    checkpoint = state.checkpoints[step]
    before, first = checkpoint.trust, checkpoint.doubt
    if first is not None and first.by_itself:
        state.verifications["misread"] += 1
        health.strike(state, first.node, at)
        if first.node in state.strikes:
            state.misread[first.node] = f"checkpoint {step}, which {by} found whole afterwards: {first.problem}"
    checkpoint.doubt, checkpoint.read_at = None, at
    if before in VERIFIED:
        return []
    checkpoint.trust = "verified" if checkpoint.certificate is None else "certified"
    checkpoint.by, checkpoint.why = by, detail
    return publish(state, step)


def refuse(state: State, opened: OpenGeneration, node: str, error: str) -> list[Action]:
    """A worker has read the checkpoint that it was ordered to restore from, and found it damaged.

    For this recovery it is. Whether it stays so, another node says later, where there is one.
    """
    checkpoint = state.checkpoints.get(opened.step)
    if checkpoint is None or checkpoint.trust in DISTRUSTED:
        return []
    checkpoint.trust, checkpoint.by, checkpoint.why = "damaged", node, error
    if "verify" in state.capabilities:
        checkpoint.doubt = Doubt(node=node, problem=error, by_itself=len(opened.nodes) == 1)
        checkpoint.tries = checkpoint.not_before = 0
    return publish(state, opened.step)


def certified(state: State, event: ev.CheckpointCertified) -> list[Action]:
    """A certificate counts for the checkpoint that it names, once that is verified."""
    checkpoint = state.checkpoints.get(event.step)
    if checkpoint is None or checkpoint.trust not in USABLE or checkpoint.generation != event.generation:
        return []
    checkpoint.certificate = event.certificate
    if checkpoint.trust == "committed":
        return []
    checkpoint.trust = "certified"
    return publish(state, event.step)


def rewind(state: State, step: int, by: str) -> list[int]:
    """Audits, which are samples, have proven a computation wrong: one that was passed over may have been wrong before.

    So what is newer than the newest certified checkpoint is not trusted any more, in shared memory or on the store.
    Where nothing is certified, only what came of the proven step is not: the caller has seen to that. (Corruption at
    rest needs no certificate: it is looked for in every step, so what was there before the step is known to be clean.)

    Returns:
        The steps that are revoked.
    """
    trusted = max((s for s, c in state.checkpoints.items() if c.trust == "certified" and s < step), default=None)
    if trusted is None:
        return []
    state.distrust(state.generation, trusted + 1)
    why = f"newer than checkpoint {trusted}, the newest certified when an audit proved step {step} wrong"
    return revoke_if(state, by, why, lambda writer, held: held > trusted)


def publish(state: State, step: int) -> list[Action]:
    """Tell what is thought of a checkpoint, where the body does so."""
    checkpoint = state.checkpoints[step]
    trust = checkpoint.trust
    if "verify" not in state.capabilities or trust == "written" or trust == "committed":
        return []
    return [
        PublishTrust(
            step=step,
            generation=checkpoint.generation,
            epoch=state.epoch,
            trust=trust,
            by=checkpoint.by,
            detail=checkpoint.why,
            certificate=checkpoint.certificate if trust == "certified" else None,
        )
    ]
