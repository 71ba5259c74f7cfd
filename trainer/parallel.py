"""3D parallelism applied to the plain model: mesh, tensor parallel, FSDP2/HSDP, pipeline stage and schedule.

The promise: whatever the mesh and the number of microbatches, the gradient of a step is the gradient of the mean loss
over all tokens of the global batch. Each microbatch's loss is its tokens' share of that mean (summed cross-entropy
divided by the tokens of the *global* batch), and every reduction over data-parallel ranks is a plain sum, so nothing is
rescaled anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional

from trainer.contract import ParallelConfig, WorkerConfig, even_part
from trainer.llama import Block, Llama, initialise

MESH_DIMS = ("pp", "dp_replicate", "dp_shard", "tp")


@dataclass
class Stage:
    """What one rank holds of the model, and how a batch goes through it."""

    module: Llama
    mesh: DeviceMesh
    config: WorkerConfig
    schedule: Schedule1F1B | None
    """None when pp is 1."""

    @property
    def device(self) -> torch.device:
        return mesh_device(self.mesh)

    @property
    def is_first(self) -> bool:
        return self.module.tok_embeddings is not None

    @property
    def is_last(self) -> bool:
        return self.module.output is not None

    @property
    def microbatches(self) -> int:
        """Of this rank in a step; alike on all ranks of its replica."""
        return len(_microbatches(self.config, self.mesh))

    @property
    def rows(self) -> range:
        """Rows of each global batch that this rank works on; alike on all its tp and pp peers."""
        own, samples = _microbatches(self.config, self.mesh), self.config.samples
        first = own.start * self.config.parallel.dp_shard + self.mesh.get_local_rank("dp_shard") * len(own)
        return range(first * samples, (first + len(own)) * samples)

    @property
    def reports_loss(self) -> bool:
        """Whether this rank's loss enters the global sum: the last stage's, and of a tp group only the first one's."""
        return self.is_last and self.mesh.get_local_rank("tp") == 0


def check_layout(config: WorkerConfig) -> None:
    """Refuse a model or a batch that the mesh cannot divide.

    Raises:
        ValueError: naming the field and what it must be.
    """
    model, data, parallel = config.model, config.data, config.parallel
    if config.microbatch_samples:
        divisor_name, divisor = "parallel.dp_shard * microbatch_samples", parallel.dp_shard * config.microbatch_samples
    else:
        divisor_name = "parallel.dp_replicate * dp_shard * microbatches"
        divisor = parallel.dp * parallel.microbatches
    divisible = [
        ("model.n_heads", model.n_heads, "model.n_kv_heads", model.n_kv_heads),
        ("model.dim", model.dim, "model.n_heads", model.n_heads),
        ("model.n_kv_heads", model.n_kv_heads, "parallel.tp", parallel.tp),
        ("model.ffn_dim", model.ffn_dim, "parallel.tp", parallel.tp),
        ("model.vocab_size", model.vocab_size, "parallel.tp", parallel.tp),
        ("data.seq_len", data.seq_len, "parallel.tp", parallel.tp),
        ("data.global_batch", data.global_batch, divisor_name, divisor),
    ]
    for name, value, divisor_name, divisor in divisible:
        if value % divisor:
            raise ValueError(f"{name} = {value} must be a multiple of {divisor_name} = {divisor}")
    if model.head_dim % 2:
        raise ValueError(f"model.dim / model.n_heads = {model.head_dim} must be even: rotary embedding turns pairs")
    if parallel.pp > model.n_layers:
        raise ValueError(f"parallel.pp = {parallel.pp} must be at most model.n_layers = {model.n_layers}")
    if parallel.pp > 1 and parallel.microbatches < parallel.pp:
        raise ValueError(
            f"parallel.microbatches = {parallel.microbatches} must be at least parallel.pp = {parallel.pp}: "
            "1F1B keeps a microbatch in each stage"
        )


def build_mesh(parallel: ParallelConfig, device_type: str, timeout: timedelta, backend: str = "") -> DeviceMesh:
    """The mesh (pp, dp_replicate, dp_shard, tp) over all ranks of the default process group, row-major.

    `timeout` bounds every collective of each dimension's groups, and their creation. A mesh does not pass on the
    default group's: without this, ranks would wait 30 minutes for a lost peer. `backend` is the device's, or another.
    """
    shape = (parallel.pp, parallel.dp_replicate, parallel.dp_shard, parallel.tp)
    options: Any
    if backend:
        options = None
    elif device_type == "cuda":
        backend, options = "nccl", distributed.ProcessGroupNCCL.Options()
        options._timeout = timeout
    else:
        backend, options = "gloo", distributed.ProcessGroupGloo.Options("gloo", timeout)  # type: ignore[call-arg, no-untyped-call]
    overrides: dict[int | str, Any] = dict.fromkeys(MESH_DIMS, (backend, options))
    return init_device_mesh(device_type, shape, mesh_dim_names=MESH_DIMS, backend_override=overrides)


def mesh_device(mesh: DeviceMesh) -> torch.device:
    """The device of this rank."""
    return torch.device("cuda", torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device("cpu")


def stage_layers(n_layers: int, pp: int, stage: int) -> range:
    """Numbers of the layers of a pipeline stage: contiguous, as even as possible.

    Layers that are left over go to the first stages, since the last one also works on the output head.
    """
    return even_part(n_layers, pp, stage)


def _microbatches(config: WorkerConfig, mesh: DeviceMesh) -> range:
    """Those of this rank's replica."""
    return config.microbatches_of(mesh.get_local_rank("dp_replicate"))


def build_stage(config: WorkerConfig, mesh: DeviceMesh, *, initial: bool = True) -> Stage:
    """This rank's stage on its device, sharded, with its schedule.

    Parameters are made block by block, so no more than one block (or the embedding and head) is ever held in full.
    Without `initial` they are NaN and wait for a restore: one that a restore forgets is caught by the finite check.

    Raises:
        ValueError: the mesh cannot divide the model or the batch.
    """
    check_layout(config)
    parallel = config.parallel
    with torch.device("meta"):
        module = Llama(config.model, stage_layers(config.model.n_layers, parallel.pp, mesh.get_local_rank("pp")))
    # A mesh of two dimensions makes it HSDP: sharded over the inner, replicated over the outer. Each slice of a mesh
    # is made anew, which takes a millisecond.
    data_mesh = mesh["dp_replicate", "dp_shard"] if parallel.dp_replicate > 1 else mesh["dp_shard"]
    tp_mesh = mesh["tp"]
    for number, block in module.layers.items():
        assert isinstance(block, Block)
        _materialise(block, config, mesh, f"layers.{number}", initial)
        if parallel.tp > 1:
            _tensor_parallel_block(block, tp_mesh)
        _shard(block, config, data_mesh)
    for name in ("tok_embeddings", "norm", "output"):
        part = getattr(module, name)
        if part is not None:
            _materialise(part, config, mesh, name, initial)
    if parallel.tp > 1:
        _tensor_parallel_ends(module, tp_mesh)
    _shard(module, config, data_mesh)
    return Stage(module=module, mesh=mesh, config=config, schedule=_schedule(module, config, mesh))


def _materialise(module: nn.Module, config: WorkerConfig, mesh: DeviceMesh, prefix: str, initial: bool) -> None:
    if initial:
        module.to_empty(device="cpu")
        initialise(module, config.model, config.seed, prefix)
        module.to(mesh_device(mesh))
        return
    module.to_empty(device=mesh_device(mesh))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(torch.nan)


# --- tensor parallel (Shoeybi et al. 2019) with sequence parallel norms (Korthikanti et al. 2022) --------------------
# src_data_rank=None: every rank has made the same full values, so each takes its own shard without communication.
# Sequence parallelism is not an option but the rule: it puts the norms' weights on the same mesh as all others.


def _tensor_parallel_block(block: Block, tp: DeviceMesh) -> None:
    def gather_T() -> ParallelStyle:
        return PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))

    plan: dict[str, ParallelStyle] = {
        "attention_norm": SequenceParallel(),
        "attention": gather_T(),
        "attention.wq": ColwiseParallel(),
        "attention.wk": ColwiseParallel(),
        "attention.wv": ColwiseParallel(),
        "attention.wo": RowwiseParallel(output_layouts=Shard(1)),
        "ffn_norm": SequenceParallel(),
        "feed_forward": gather_T(),
        "feed_forward.w1": ColwiseParallel(),
        "feed_forward.w3": ColwiseParallel(),
        "feed_forward.w2": RowwiseParallel(output_layouts=Shard(1)),
    }
    parallelize_module(block, tp, plan, src_data_rank=None)


def _tensor_parallel_ends(module: Llama, tp: DeviceMesh) -> None:
    plan: dict[str, ParallelStyle] = {}
    if module.tok_embeddings is not None:
        plan["tok_embeddings"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))
    if module.output is not None:
        plan["norm"] = SequenceParallel()
        plan["output"] = ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())
    if plan:
        parallelize_module(module, tp, plan, src_data_rank=None)


# --- fully sharded and hybrid data parallel (FSDP2; Zhao et al. 2023) ------------------------------------------------


def _shard(module: nn.Module, config: WorkerConfig, data_mesh: DeviceMesh) -> None:
    parallel = config.parallel
    low_precision = config.dtype == "bfloat16"
    if parallel.dp == 1 and not low_precision:
        return
    policy = MixedPrecisionPolicy()
    if low_precision:
        # Gradients are accumulated over microbatches and reduced over ranks in float32.
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    # A pipeline stage runs many microbatches between two optimizer steps: gathering the parameters for each again
    # would cost more than keeping them.
    fully_shard(module, mesh=data_mesh, mp_policy=policy, reshard_after_forward=parallel.pp == 1)
    assert isinstance(module, FSDPModule)
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)


# --- pipeline (1F1B; Narayanan et al. 2021) and the passes of a batch ------------------------------------------------


def _schedule(module: Llama, config: WorkerConfig, mesh: DeviceMesh) -> Schedule1F1B | None:
    parallel, data = config.parallel, config.data
    if parallel.pp == 1:
        return None
    B, T = config.samples, data.seq_len
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    # Shapes are given, not inferred: inference would run the model once more and exchange pickled objects.
    with torch.device("meta"):
        tokens_BT = torch.empty(B, T, dtype=torch.int64)
        hidden_BTD = torch.empty(B, T // parallel.tp, config.model.dim, dtype=dtype, requires_grad=True)
        logits_BTV = torch.empty(B, T, config.model.vocab_size, dtype=dtype, requires_grad=True)
    stage = PipelineStage(
        module,
        mesh.get_local_rank("pp"),
        parallel.pp,
        mesh_device(mesh),
        input_args=tokens_BT if module.tok_embeddings is not None else hidden_BTD,
        output_args=logits_BTV if module.output is not None else hidden_BTD,
        group=mesh.get_group("pp"),
    )
    return Schedule1F1B(stage, len(_microbatches(config, mesh)), loss_fn=_loss_share(config), scale_grads=False)


def _loss_share(config: WorkerConfig) -> Callable[[Tensor, Tensor], Tensor]:
    global_tokens = config.data.global_batch * config.data.seq_len

    def loss_share(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
        """Cross-entropy of a microbatch as its share of the mean over the global batch; scalar, float32."""
        logits = logits_BTV.flatten(0, 1).float()
        return functional.cross_entropy(logits, targets_BT.flatten(), reduction="sum") / global_tokens

    return loss_share


def forward_backward(stage: Stage, inputs_BT: Tensor | None, targets_BT: Tensor | None) -> Tensor:
    """One step's gradients, left in ``.grad`` and reduced over data-parallel ranks.

    Args:
        inputs_BT: this rank's rows of the global batch, [B, T] int64; needed on the first stage.
        targets_BT: their next tokens, likewise; needed on the last stage.

    Returns:
        This rank's share of the global mean loss, float32 scalar on its device; zero where `reports_loss` is false.
    """
    # In this thread, not in autograd's own for the device: DTensor keeps what names the groups of a mesh by thread, and
    # `groups.forget_meshes` can clear this one's only.
    with torch.autograd.set_multithreading_enabled(False):
        if stage.schedule is None:
            assert inputs_BT is not None and targets_BT is not None
            shares = _accumulate(stage, inputs_BT, targets_BT)
        else:
            shares = []
            _prepare_buffers(stage.schedule, gradients=True)
            stage.schedule.step(
                *((inputs_BT,) if stage.is_first else ()),
                target=targets_BT if stage.is_last else None,
                losses=shares if stage.is_last else None,
                return_outputs=False,
            )
    _reduce_partial_gradients(stage.module)
    return _sum_of_shares(stage, shares)


def _reduce_partial_gradients(module: nn.Module) -> None:
    """Sum the norms' gradients over tp, whose ranks saw different parts of the sequence. FSDP has done so by itself."""
    for parameter in module.parameters():
        gradient = parameter.grad
        if isinstance(gradient, DTensor) and any(placement.is_partial() for placement in gradient.placements):
            assert isinstance(parameter, DTensor)
            parameter.grad = gradient.redistribute(placements=parameter.placements)


def _accumulate(stage: Stage, inputs_BT: Tensor, targets_BT: Tensor) -> list[Tensor]:
    count = stage.microbatches
    loss_share = _loss_share(stage.config)
    shares = []
    for number, (x_BT, y_BT) in enumerate(zip(inputs_BT.chunk(count), targets_BT.chunk(count), strict=True), start=1):
        if isinstance(stage.module, FSDPModule):
            stage.module.set_requires_gradient_sync(number == count)
            stage.module.set_is_last_backward(number == count)
        share = loss_share(stage.module(x_BT), y_BT)
        share.backward()  # type: ignore[no-untyped-call]
        shares.append(share.detach())
    return shares


@torch.no_grad()
def forward_only(stage: Stage, inputs_BT: Tensor | None, targets_BT: Tensor | None) -> Tensor:
    """This rank's share of the mean loss over a global batch, without gradients; arguments as `forward_backward`."""
    shares: list[Tensor] = []
    if stage.schedule is None:
        assert inputs_BT is not None and targets_BT is not None
        count, loss_share = stage.microbatches, _loss_share(stage.config)
        for x_BT, y_BT in zip(inputs_BT.chunk(count), targets_BT.chunk(count), strict=True):
            shares.append(loss_share(stage.module(x_BT), y_BT))
    else:
        _prepare_buffers(stage.schedule, gradients=False)
        stage.schedule.eval(
            *((inputs_BT,) if stage.is_first else ()),
            target=targets_BT if stage.is_last else None,
            losses=shares if stage.is_last else None,
            return_outputs=False,
        )
    return _sum_of_shares(stage, shares)


def _prepare_buffers(schedule: Schedule1F1B, *, gradients: bool) -> None:
    """Have an older torch make a pipeline's buffers anew when they were made for the other kind of pass."""
    made = not has_warm_up(schedule) and schedule._stage_forward_initialized
    if made and schedule._stage_backward_initialized != gradients:
        schedule._stage_forward_initialized = schedule._stage_backward_initialized = False


def has_warm_up(schedule: Schedule1F1B) -> bool:
    """Whether the ranks of a pipeline agree on shapes before its first batch, as they do from torch 2.12 on."""
    return hasattr(schedule, "_warmup_p2p")


def _sum_of_shares(stage: Stage, shares: list[Tensor]) -> Tensor:
    if not stage.reports_loss:
        return torch.zeros((), device=stage.device)
    return torch.stack([share.detach() for share in shares]).sum()
