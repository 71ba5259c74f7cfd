"""From a job, a profile and a list of failures to a scenario that can be lived through."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.need import need_of
from orchestrator.simulate.body import Scenario
from orchestrator.simulate.profile import Failures, Profile
from orchestrator.spec import JobSpec, SpecError

FLOPS_PER_PARAMETER_AND_TOKEN = 6
"""Forward and backward without attention (Kaplan et al., arXiv 2001.08361, section 2.1)."""


def scaled(spec: JobSpec, gpus: int) -> str:
    """The override that makes the spec's mesh one of `gpus` slots, by more or fewer replicas.

    Raises:
        SpecError: `gpus` is no multiple of a replica.
    """
    p = spec.parallel
    replica = p.pp * p.dp_shard * p.tp
    if gpus < replica or gpus % replica:
        below = max(replica, gpus // replica * replica)
        raise SpecError(
            f"--gpus {gpus}: a replica has pp {p.pp} x dp_shard {p.dp_shard} x tp {p.tp} = {replica} slots; "
            f"choose a multiple, as {below} or {below + replica}"
        )
    return f"parallel.dp_replicate={gpus // replica}"


def step_s(spec: JobSpec, profile: Profile) -> float:
    """Seconds of one training step by arithmetic."""
    tokens = spec.data.global_batch * spec.data.seq_len
    flops = FLOPS_PER_PARAMETER_AND_TOKEN * need_of(spec).parameters * tokens
    return flops / (spec.layout.slots * profile.tflops_per_gpu.value * 1e12)


def of_spec(spec: JobSpec, profile: Profile, failures: Failures, days: float, seed: int) -> Scenario:
    """The job in virtual time.

    Raises:
        SpecError: the profile's costs are beyond the job's patience, so that every recovery would fail; or it does not
            say when a failure is seen. Or the job is a script.
    """
    if spec.is_script:
        raise SpecError("script.command: how long a script's steps take is not known here; simulate the Llama trainer")
    costs, r = profile.costs, spec.recovery
    start_s = costs.restart.value + max(costs.restore_durable.value, costs.restore_ram.value + costs.restore_peer.value)
    needs = (
        ("halt_deadline_s", r.halt_deadline_s, costs.halt.value),
        ("start_deadline_s", r.start_deadline_s, start_s),
    )
    if problems := _unseen(profile, failures):
        raise SpecError("\n".join(problems))
    short = [f"recovery.{name} = {has:g}: this profile takes {takes:g} s" for name, has, takes in needs if has <= takes]
    if short:
        raise SpecError("\n".join(short))
    return Scenario(
        layout=spec.layout if profile.shrinks else replace(spec.layout, shrinks_to=(), fallbacks=()),
        limits=spec.limits,
        step_us=max(1, round(step_s(spec, profile) * 1_000_000)),
        checkpoint_interval_steps=spec.checkpoint.interval_steps,
        snapshot_interval_steps=spec.checkpoint.snapshot_interval_steps,
        profile=profile,
        failures=failures,
        days=days,
        seed=seed,
        microbatches=spec.parallel.microbatches,
        rack_machines=failures.machines_per_rack,
    )


def _unseen(profile: Profile, failures: Failures) -> list[str]:
    return [
        f"failures: {cause.name}: the profile's [detection] does not say when one sees its sign, {cause.sign}"
        for cause in failures.causes
        if getattr(profile.detection, cause.sign) is None
    ]
