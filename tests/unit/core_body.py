"""A body for the core, in memory: nodes, workers, shared memory, a store and a controller that can die.

It keeps the truth (who lives, which snapshot is where, what is committed), tells the supervisor only what a real body
would, and carries its orders out. What happens next is read from a tape of bytes, so that a history is a short value
that hypothesis can shrink: small bytes are the kindest moves. When the tape ends, faults end, and the run must finish.
Every event and order passes through `Watch`, which knows the rules that the supervisor must keep.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import core_harm
from core_watch import LIMITS, Watch
from core_world import CAPABILITIES, LAYOUTS, Running, SimNode, Tape

from orchestrator.core import actions as ac
from orchestrator.core import events as ev
from orchestrator.core import placement
from orchestrator.core.codec import state_from_json, state_to_json
from orchestrator.core.events import Layout, Snapshot
from orchestrator.core.supervisor import Supervisor

STEPS = 16
CHECKPOINT_INTERVAL_STEPS = 3
SNAPSHOTS_KEPT = 3
# Moves after the end of the tape in which a run must reach its end. The longest of 8,000 histories took 211.
MOVES_TO_FINISH = 500


class Body:
    """The world and the controller around one supervisor."""

    def __init__(self, tape: Tape) -> None:
        self.tape, self.watch, self.supervisor = tape, Watch(), Supervisor()
        self.at = self.epoch = self.names = 0
        self.total_steps = STEPS
        self.nodes: dict[str, SimNode] = {}
        self.left: list[dict[int, list[Snapshot]]] = []
        """Shared memory of machines whose agent has died."""
        self.store: dict[int, int] = {}
        """Step to the generation whose checkpoint of it is committed."""
        self.bad_steps: set[int] = set()
        self.pinned: set[int] = set()
        self.bad_snapshots: set[Snapshot] = set()
        self.truth = core_harm.Corruption()
        self.queues: dict[str, list[ev.Event]] = {}
        """Sender to what it has sent; senders overtake each other, a sender's messages do not."""
        self.told: list[ev.Event] = []
        self.timers: list[tuple[int, str]] = []
        self.outbox: list[tuple[str, ac.Action]] = []
        self.running: Running | None = None
        self.exit_code: int | None = None
        """The run's verdict, once EndRun has been carried out."""
        self.shapes: dict[int, Layout] = {}
        """Generation to how its mesh was laid out."""
        self.limits = replace(LIMITS, quarantined_at_most=1 + 2 * tape.below(2))
        self.layout, self.capabilities = LAYOUTS[tape.below(len(LAYOUTS))], CAPABILITIES[tape.below(len(CAPABILITIES))]
        self.declare()

    # --- the controller ---

    def tell(self, event: ev.Event) -> None:
        self.at += (1 + self.tape.below(8)) * 250_000
        event = replace(event, at=max(event.at, self.at))
        self.at = event.at
        if isinstance(event, ev.WorkerFailed):
            self.truth.expose(self, event)
        actions = self.supervisor.handle(event)
        self.watch.see(self.supervisor, event, actions)
        self.watch_truth()
        for action in actions:
            match action:
                case ac.SetTimer():
                    self.timers.append((action.at, action.timer))
                case ac.OpenGeneration() | ac.HaltGeneration():
                    self.outbox += [(node, action) for node in action.nodes]
                case _:
                    self.outbox.append(("", action))

    def declare(self) -> None:
        """Start or resume the run: every agent is new."""
        self.nodes, self.queues, self.told, self.outbox, self.timers = {}, {}, [], [], []
        self.running = self.exit_code = None
        self.tell(
            ev.RunDeclared(
                at=self.at,
                run="run",
                layout=self.layout,
                limits=self.limits,
                total_steps=self.total_steps,
                capabilities=self.capabilities,
            )
        )
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """A controller takes over from the journal: what the last one had not carried out, and its timers, are gone."""
        self.supervisor = Supervisor(state_from_json(json.loads(json.dumps(state_to_json(self.supervisor.state)))))
        self.outbox, self.timers = [], []
        self.queues.pop("store", None)
        self.epoch += 1
        self.tell(ev.EpochBegan(at=self.at, epoch=self.epoch, version="test"))
        if self.pinned:
            self.tell(ev.CheckpointsPinned(at=self.at, steps=tuple(sorted(self.pinned))))
        self.tell(ev.CheckpointsFound(at=self.at, steps=tuple(sorted(self.store))))

    @property
    def mesh(self) -> Layout:
        """How the newest generation's mesh is laid out."""
        return self.layout if self.running is None else self.shapes[self.running.order.generation]

    def send(self, sender: str, event: ev.Event) -> None:
        self.queues.setdefault(sender, []).append(event)

    # --- carrying out orders ---

    def carry_out(self, index: int) -> None:
        name, action = self.outbox.pop(index)
        match action:
            case ac.OpenGeneration():
                self.shapes[action.generation] = self.layout.sized(action.dp_replicate, action.fallback)
                if self.running is None or self.running.order.generation < action.generation:
                    self.running = Running(order=action, step=action.step, told=action.step)
                self._start_node(self.nodes[name], action)
            case ac.HaltGeneration():
                self._halt_node(self.nodes[name], action)
            case ac.AskStop():
                if self.running is not None and self.running.order.generation == action.generation:
                    self.running.stop = True
            case ac.CommitCheckpoint():
                self._commit(action)
            case ac.DeleteCheckpoint() if action.step in self.pinned:
                self.send("store", ev.CheckpointsPinned(at=0, steps=tuple(sorted(self.pinned))))
            case ac.DeleteCheckpoint():
                self.store.pop(action.step, None)
                self.bad_steps.discard(action.step)
            case ac.VerifyCheckpoint():
                core_harm.read_back(self, action)
            case ac.InjectFault():
                core_harm.inject(self, action)
            case ac.ProbeNode() | ac.AskThird():
                core_harm.examine(self, action)
            case ac.ReleaseNode():
                if action.node in self.nodes:
                    self._kill(self.nodes[action.node])
            case ac.EndRun():
                self.exit_code = action.exit_code
                self.left += [node.ram for node in self.nodes.values() if node.alive]
                self.nodes, self.queues, self.outbox, self.timers = {}, {}, [], []

    def _start_node(self, node: SimNode, order: ac.OpenGeneration) -> None:
        if not node.alive or node.mute or node.generation >= order.generation:
            return
        node.generation, node.hung = order.generation, {}
        place = order.nodes.index(node.name)
        node.slots = dict.fromkeys(placement.slots_of(self.shapes[order.generation], place), True)
        wanted = Snapshot(generation=order.snapshot_generation, step=order.step)
        for transfer in order.transfers:
            if transfer.to_node == node.name:
                source = self.nodes[transfer.from_node]
                if not source.alive:
                    gone = f"no copy from {source.name}"
                    failed = ev.GenerationFailed(at=0, generation=order.generation, node=node.name, error=gone)
                    node.slots = dict.fromkeys(node.slots, False)
                    return self.send(node.name, failed)
                if wanted in self.bad_snapshots and self.tape.below(2) == 0:  # else the worker finds it
                    whole = f"{source.name} and nobody else has slot {transfer.slot} whole"
                    failed = ev.GenerationFailed(
                        at=0, generation=order.generation, node=node.name, error=whole, kind="state"
                    )
                    node.slots = dict.fromkeys(node.slots, False)
                    return self.send(node.name, failed)
                assert wanted in source.ram[transfer.from_slot], (wanted, transfer)
                node.ram.setdefault(transfer.slot, []).append(wanted)
        refused = order.source == "durable" and order.step in self.bad_steps
        refused |= order.source == "ram" and wanted in self.bad_snapshots
        refused |= self.truth.refuses(self, node, order)
        if refused:
            self.end_worker(node, next(iter(node.slots)), "state", "digest mismatch")
        elif order.source == "ram":
            assert self.restored(node, order).keys() == node.slots.keys(), (wanted, node)
        elif order.source == "durable":
            assert order.step in self.store, order

    def restored(self, node: SimNode, order: ac.OpenGeneration) -> dict[int, list[int]]:
        """The slots of `node` to those whose snapshots they restore, by the numbers of the mesh that wrote them."""
        wanted = Snapshot(generation=order.snapshot_generation, step=order.step)
        mesh = self.shapes[order.generation]
        writers = self.layout.sized(order.snapshot_dp_replicate, order.snapshot_fallback)
        if not mesh.has_shards_of(writers):
            return self._resharded(node, order, writers, wanted)
        held = {slot for slot, snapshots in node.ram.items() if wanted in snapshots}
        if mesh == writers:
            return {slot: [slot] for slot in node.slots if slot in held}
        shards = {placement.shard_of(writers, slot): slot for slot in held}
        found = {slot: shards.get(placement.shard_of(mesh, slot)) for slot in node.slots}
        return {slot: [source] for slot, source in found.items() if source is not None}

    def _resharded(
        self, node: SimNode, order: ac.OpenGeneration, writers: Layout, wanted: Snapshot
    ) -> dict[int, list[int]]:
        """Each rank takes some of all shards: one slot of each that a node of the mesh holds, or is to be sent."""
        held = {t.slot for t in order.transfers}
        held |= {slot for name in order.nodes for slot, kept in self.nodes[name].ram.items() if wanted in kept}
        shards = {placement.shard_of(writers, slot): slot for slot in sorted(held, reverse=True)}
        whole = len(shards) == writers.slots // writers.dp_replicate
        return {slot: list(shards.values()) for slot in node.slots} if whole else {}

    def _halt_node(self, node: SimNode, order: ac.HaltGeneration) -> None:
        if not node.alive or node.mute or node.generation > order.generation:
            return
        parked = order.park and node.well and self.tape.below(8) < 7
        node.generation, node.slots, node.hung = order.generation, {}, {}
        held = node.snapshots()
        running = self.running is not None and self.running.order.generation == order.generation
        mesh = self.running.order.nodes if self.running is not None and running else ()
        place = placement.slots_of(self.mesh, mesh.index(node.name)) if node.name in mesh else range(0)
        alike = held and set(held) == set(place) and len(set(held.values())) == 1
        if alike and self.tape.below(2):
            halted = ev.NodesHalted(
                at=0, nodes=(node.name,), generation=order.generation, snapshots=held[place[0]], parked=parked
            )
            return self.send(node.name, halted)
        self.send(
            node.name, ev.NodeHalted(at=0, node=node.name, generation=order.generation, snapshots=held, parked=parked)
        )

    def _commit(self, order: ac.CommitCheckpoint) -> None:
        if order.replaces_damaged and self.store.get(order.step) not in (None, order.generation):
            del self.store[order.step]
            self.bad_steps.discard(order.step)
        if self.tape.below(8) == 7 or self.store.get(order.step, order.generation) != order.generation:
            return self.send("store", ev.CheckpointFailed(at=0, step=order.step, error="store"))
        self.store[order.step] = order.generation
        self.send(
            "store", ev.CheckpointCommitted(at=0, step=order.step, epoch=order.epoch, generation=order.generation)
        )

    # --- what happens by itself ---

    def healthy(self) -> list[SimNode]:
        """The running generation's nodes, when all of them and all of their workers are well; else none."""
        if self.running is None or self.running.stalled:
            return []
        nodes = [self.nodes[name] for name in self.running.order.nodes]
        well = all(node.well and node.generation == self.running.order.generation for node in nodes)
        return nodes if well else []

    def become_ready(self) -> None:
        assert self.running is not None
        self.running.phase = "training"
        ready = ev.GenerationReady(
            at=0,
            generation=self.running.order.generation,
            step=self.running.step,
            rendezvous_us=1,
            build_us=1,
            restore_us=1,
            processes={"forked": len(self.running.order.nodes)},
        )
        self.send("mesh", ready)

    def advance(self) -> None:
        """One step, or the end of the loop. How many ranks complete its snapshot, and whether it is told, varies."""
        running = self.running
        assert running is not None
        generation = running.order.generation
        if running.flipped or running.diverged:
            return core_harm.find(self)
        if running.step == self.total_steps or (running.stop and running.step > running.order.step):
            steps_last = self.tape.below(8) == 7  # agents tell a new controller the facts first, and then the steps
            if not steps_last:
                self._tell_steps()
            self.end_save()
            if running.saved != running.step:
                running.saving = running.step
                self.end_save()
            reason = "completed" if running.step == self.total_steps else "stopped"
            self.send("mesh", ev.GenerationFinished(at=0, generation=generation, step=running.step, reason=reason))
            if steps_last:
                self._tell_steps()
            running.phase = "finished"
            return
        running.step += 1
        lagging = self.tape.below(4) - 2  # the number of slots whose snapshot of this step is never completed
        for node in self.healthy():
            for slot in node.slots:
                if slot >= lagging:
                    held = node.ram.setdefault(slot, [])
                    held.append(Snapshot(generation=generation, step=running.step))
                    del held[:-SNAPSHOTS_KEPT]
        self._send_copies(running)
        if running.step % CHECKPOINT_INTERVAL_STEPS == 0:
            self._tell_steps()
            self.end_save()
            running.saving = running.step
        elif self.tape.below(3) < 2:
            self._tell_steps()

    def _send_copies(self, running: Running) -> None:
        """To each node's buddy, which has them as soon as the step is done, or never."""
        nodes = [self.nodes[name] for name in running.order.nodes]
        for place, keeper in enumerate(running.order.buddies):
            if not nodes[keeper].alive or self.tape.below(4) == 3:
                continue
            for slot in nodes[place].slots:
                newest = nodes[place].ram.get(slot, [])[-1:]
                held = nodes[keeper].ram.setdefault(slot, [])
                held += [snapshot for snapshot in newest if snapshot not in held]
                del held[:-SNAPSHOTS_KEPT]

    def _tell_steps(self) -> None:
        running = self.running
        assert running is not None
        if running.told < running.step:
            done = ev.StepsDone(
                at=0,
                generation=running.order.generation,
                first=running.told + 1,
                last=running.step,
                data_wait_us=1000,
                checkpoint_us=2000,
                validation_us=500,
                tokens=8,
                loss_millionths=(1,),
            )
            running.told = running.step
            self.send("mesh", done)

    def end_save(self) -> None:
        """The save that is under way ends, in one way or another."""
        running = self.running
        assert running is not None
        if running.saving is None:
            return
        step, running.saving = running.saving, None
        if self.tape.below(8) == 7:
            self.send("mesh", ev.CheckpointFailed(at=0, step=step, error="rank 0: disk full"))
            return
        running.saved = step
        generation = running.order.generation
        self.send("mesh", ev.CheckpointWritten(at=0, generation=generation, step=step, bytes=1, write_us=1))

    def join(self, returning: bool) -> None:
        self.names += 1
        node = SimNode(name=f"n{self.names}", ram=self.left.pop() if returning else {})
        self.nodes[node.name] = node
        domain = ("", "rack 1", "rack 2")[self.tape.below(3)]
        self.send(node.name, ev.NodeJoined(at=0, node=node.name, domain=domain, snapshots=node.snapshots()))

    # --- faults ---

    def _kill(self, node: SimNode) -> None:
        if node.alive:
            node.alive = False
            self.left.append(node.ram)

    def kill_node(self, node: SimNode) -> None:
        self._kill(node)
        if self.tape.below(4) == 3:
            self.left.pop()  # the machine died, not only its agent
        known = node.name in self.supervisor.state.nodes  # else its joining must be heard first
        lost = ev.NodeLost(at=0, node=node.name, cause="connection closed")
        self.send("detector" if known else node.name, lost)

    def fail_worker(self, node: SimNode) -> None:
        slot = list(node.slots)[self.tape.below(len(node.slots))]
        kind = ("", "exception", "collective", "memory", "audit", "exception")[self.tape.below(6)]
        if kind:
            self.end_worker(node, slot, kind, f"error {self.tape.below(3)}")
        else:
            self.kill_worker(node, slot, *((None, 9), (3, None))[self.tape.below(2)])
        peers = [n for n in self.nodes.values() if n.well]
        for other in peers[: self.tape.below(3)]:
            self.end_worker(other, next(iter(other.slots)), "collective", "connection closed by peer")

    def end_worker(self, node: SimNode, slot: int, kind: str, error: str) -> None:
        node.slots[slot] = False
        step = self.running.step if self.running else 0
        words = ev.WorkerFailed(
            at=0, node=node.name, generation=node.generation, slot=slot, step=step, kind=kind, error=error
        )
        self.send(node.name, words)
        self._exit(node, slot, 1, None)

    def kill_worker(self, node: SimNode, slot: int, code: int | None, signal: int | None) -> None:
        node.slots[slot] = False
        self._exit(node, slot, code, signal)

    def _exit(self, node: SimNode, slot: int, code: int | None, signal: int | None) -> None:
        gone = ev.WorkerExited(
            at=0, node=node.name, generation=node.generation, slot=slot, exit_code=code, signal=signal
        )
        self.send(node.name, gone)

    def refuse_to_start(self) -> None:
        assert self.running is not None
        order = self.running.order
        blamed = ("", order.nodes[0])[self.tape.below(2)]
        self.send("body", ev.GenerationFailed(at=0, generation=order.generation, node=blamed, error="no store"))

    def damage(self) -> None:
        """The newest checkpoint, or the newest snapshot, is no longer what was written."""
        if self.tape.below(2) == 0 and self.store:
            self.bad_steps.add(max(self.store))
        else:
            held = [s for node in self.nodes.values() for ram in node.ram.values() for s in ram]
            if held:
                self.bad_snapshots.add(max(held, key=lambda s: (s.step, s.generation)))

    def pin(self) -> None:
        """Somebody pins a checkpoint, or lets it go; a controller hears of it when it begins, or wants to delete it."""
        self.pinned ^= {sorted(self.store)[self.tape.below(len(self.store))]}

    # --- one move ---

    def kind_moves(self) -> list[tuple[int, Callable[[], None]]]:
        """What a world without faults does next, each with its weight."""
        moves: list[tuple[int, Callable[[], None]]] = []
        if self.outbox:
            moves.append((80, lambda: self.carry_out(self.tape.below(min(3, len(self.outbox))))))
        senders = [sender for sender, queue in self.queues.items() if queue]
        if senders:
            moves.append((120, lambda: self.deliver(senders[self.tape.below(len(senders))])))
        if self.exit_code is None:
            alive = sum(node.alive for node in self.nodes.values())
            if alive < self.layout.nodes + self.layout.spares:
                moves.append((24, lambda: self.join(returning=False)))
            if self.healthy() and self.running is not None:
                if self.running.phase == "starting":
                    moves.append((80, self.become_ready))
                elif self.running.phase == "training":
                    if self.running.saving is not None:
                        moves.append((40, self.end_save))
                    moves.append((80, self.advance))
            moves += core_harm.notices(self)
        return moves

    def deliver(self, sender: str) -> None:
        event = self.queues[sender].pop(0)
        self.told.append(event)
        self.tell(event)

    def fire(self, first: tuple[int, str]) -> None:
        """Time passes until this timer."""
        self.timers.remove(first)
        self.at = max(self.at, first[0])
        self.tell(ev.TimerFired(at=self.at, timer=first[1]))

    def hostile_moves(self) -> list[tuple[int, Callable[[], None]]]:
        moves: list[tuple[int, Callable[[], None]]] = []
        alive = [node for node in self.nodes.values() if node.alive]
        working = [node for node in alive if node.slots and not node.mute]
        repeatable = [event for event in self.told if not isinstance(event, ev.CheckpointFailed)]
        if self.exit_code is not None:
            return [(20, self.resume)]
        if repeatable:
            moves.append((6, lambda: self.tell(replace(repeatable[-1 - self.tape.below(len(repeatable))], at=self.at))))
        commits = [event for event in self.told if isinstance(event, ev.CheckpointCommitted)]
        if commits:
            moves.append((3, lambda: self.tell(replace(commits[self.tape.below(len(commits))], at=self.at))))
        if working:
            moves.append((6, lambda: self.fail_worker(working[self.tape.below(len(working))])))
        if alive:
            moves.append((3, lambda: self.kill_node(alive[self.tape.below(len(alive))])))
            moves.append((1, lambda: setattr(alive[self.tape.below(len(alive))], "mute", True)))
        # The old agent's loss is told before the new one joins: see the promises of a body in events.py.
        if self.left and not any(isinstance(event, ev.NodeLost) for queue in self.queues.values() for event in queue):
            moves.append((1, lambda: self.join(returning=True)))
        patient = [timer for timer in self.timers if not timer[1].startswith("wait/")]
        if patient:  # messages are slower than a deadline
            moves.append((2, lambda: self.fire(min(patient))))
        grows = [timer for timer in self.timers if timer[1] == f"grow/{self.supervisor.state.generation}"]
        if grows:
            moves.append((8, lambda: self.fire(grows[0])))
        if self.running is not None and self.running.phase == "starting":
            moves.append((1, self.refuse_to_start))
        moves += core_harm.moves(self)
        moves.append((2, self.begin_epoch))
        moves.append((1, self.damage))
        if self.store:
            moves.append((1, self.pin))
            moves.append((2, lambda: core_harm.certify(self)))
        moves.append((1, self.ask_to_stop))
        if self.supervisor.state.update is None:
            moves.append((2, self.ask_for_update))
        return moves

    def ask_for_update(self) -> None:
        """Somebody wants another job, and perhaps other code."""
        code = ("", "new", "newer")[self.tape.below(3)]
        self.tell(
            ev.UpdateRequested(
                at=self.at,
                by="somebody",
                changes={"optimizer.lr": str(self.tape.below(4))},
                code=code,
                limits=replace(self.limits, halt_deadline_us=(10 + len(self.watch.log) % 3) * 1_000_000),
                total_steps=self.total_steps,
                restarts=code != self.supervisor.state.code or self.tape.below(2) == 1,
                chooses_interval=self.tape.below(2) == 1,
                undo={"optimizer.lr": self.supervisor.state.changes.get("optimizer.lr", "as declared")},
                number=self.supervisor.state.n_updates + 1,
            )
        )

    def ask_to_stop(self) -> None:
        self.tell(ev.StopRequested(at=self.at, by="somebody", graceful=self.tape.below(4) < 3))

    def resume(self) -> None:
        """Declare the run again, perhaps with another mesh; one that was done goes on to more steps."""
        if self.exit_code == 0:
            self.total_steps += STEPS
        if self.exit_code == 1:  # no checkpoint is left to trust: somebody has looked, and removed them
            for step, checkpoint in self.supervisor.state.checkpoints.items():
                if checkpoint.trust in ("damaged", "revoked"):
                    self.store.pop(step, None)
                    self.bad_steps.discard(step)
        if self.tape.below(2):
            self.layout = LAYOUTS[self.tape.below(len(LAYOUTS))]
        self.declare()

    def step(self) -> None:
        moves = self.kind_moves() + self.hostile_moves()
        at = self.tape.below(sum(weight for weight, _ in moves))
        for weight, move in moves:
            if at < weight:
                return move()
            at -= weight

    def run(self) -> None:
        """The tape's history, and then the way to a finished run without faults.

        Raises:
            AssertionError: a rule was broken, or the run did not finish.
        """
        while not self.tape.ended:
            self.step()
        for _ in range(MOVES_TO_FINISH):
            if self.exit_code == 0:
                assert self.store.get(self.total_steps), "finished without its last checkpoint"
                assert not self.truth.is_exposed(self, self.total_steps), "it ends in state that was proven corrupt"
                return
            self._step_without_faults()
        raise AssertionError(f"not finished after {MOVES_TO_FINISH} moves without faults: {self.supervisor.state}")

    def watch_truth(self) -> None:
        """What the supervisor believes about the generation holds in the world."""
        state = self.supervisor.state
        if state.job == "training":
            assert self.running is not None and self.running.order.generation == state.generation
            assert self.running.phase != "starting", "training before every rank was ready"
            assert state.step <= self.running.step, "steps that nobody did"

    def _step_without_faults(self) -> None:
        state = self.supervisor.state
        moves = self.kind_moves()
        if self.exit_code is not None:
            self.resume()
        elif moves:
            moves[0][1]()
        elif state.job == "training":  # nothing moves: a node hangs, and its silence passes its bound
            hung = [n for n in self.nodes.values() if n.mute and state.nodes[n.name].state == "active"]
            for node in hung:
                self.tell(ev.NodeLost(at=self.at, node=node.name, cause="silent"))
        else:
            self.fire(min(self.timers))
