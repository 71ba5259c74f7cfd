"""Export and import of Hugging Face models, against transformers and safetensors: logits, bits, damage, memory."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from core_watch import LIMITS
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_checkpoints import CONFIG, make_state, save
from s3_server import s3_bucket
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from orchestrator.core import events as ev
from orchestrator.core.actions import OpenGeneration
from orchestrator.core.events import Layout
from orchestrator.core.supervisor import Supervisor
from storage import blocks, export, imports, windows
from storage.commits import CommitConflict, create_commit, list_commits, read_commit, verify
from storage.durable import load
from storage.export import cast
from storage.hugging_face import FormatError, LlamaShape, make_header, read_config, read_header
from storage.manifest import ManifestError, StateMismatch, commit_name
from storage.urls import StoreError, locate, remove
from storage.windows import open_checkpoint
from trainer.contract import ModelConfig, OptimizerConfig
from trainer.llama import Llama
from trainer.optim import build_optimizer, train_state

SHAPE = LlamaShape(**{name: value for name, value in asdict(CONFIG).items() if name != "preset"})
TOKENS_BT = torch.randint(CONFIG.vocab_size, (2, 40), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_bucket() as url:
        yield url


@pytest.fixture(params=["disk", "memory", "s3"])
def home(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        return str(tmp_path)
    if request.param == "memory":
        return f"memory://{tmp_path.name}"
    return f"{request.getfixturevalue('bucket')}/{tmp_path.name}"


def fetched(url: str, folder: Path) -> Path:
    """A copy of what lies under `url`."""
    store = locate(url)
    folder.mkdir()
    for path in store.fs.ls(store.root, detail=False):
        (folder / path.rsplit("/", 1)[-1]).write_bytes(store.fs.cat_file(path))
    return folder


def put(folder: Path, url: str) -> str:
    """The reverse of `fetched`."""
    for path in folder.iterdir():
        with fsspec.open(f"{url}/{path.name}", "wb", auto_mkdir=True) as out:
            out.write(path.read_bytes())
    return url


def exported(run: str, target: str, step: int | None = None, **options: Any) -> export.Exported:
    step = list_commits(run)[-1] if step is None else step
    return export.export(
        open_checkpoint(run, read_commit(run, step)), SHAPE, target, **{"max_positions": 64, **options}
    )


def model_of(run: str, config: ModelConfig = CONFIG) -> Llama:
    """Our model, restored from the newest checkpoint as a worker does it; the moments must be zero."""
    model = Llama(config)
    state = train_state(model, build_optimizer(model, OptimizerConfig()), step=-1)
    for tensor in state.tensors.values():
        tensor.fill_(torch.nan)
    rng = state.per_rank["rng"].clone()
    commit = read_commit(run, list_commits(run)[-1])
    load(run, commit, state)
    assert state.step == commit.step
    assert torch.equal(state.per_rank["rng"], rng), "an import says nothing of random states"
    assert all(not tensor.any() for name, tensor in state.tensors.items() if not name.startswith("model/"))
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out = model(TOKENS_BT)
    return out if isinstance(out, torch.Tensor) else out.logits


def their_model(tied: bool = False, dtype: torch.dtype = torch.float32, seed: int = 1) -> LlamaForCausalLM:
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=CONFIG.dim,
            num_hidden_layers=CONFIG.n_layers,
            num_attention_heads=CONFIG.n_heads,
            num_key_value_heads=CONFIG.n_kv_heads,
            intermediate_size=CONFIG.ffn_dim,
            vocab_size=CONFIG.vocab_size,
            rope_parameters={"rope_type": "default", "rope_theta": CONFIG.rope_theta},
            rms_norm_eps=CONFIG.norm_eps,
            tie_word_embeddings=tied,
        )
    )
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.1)
    return model.to(dtype)


# --- against transformers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("home", "dtype"), [("disk", ""), ("memory", "bfloat16"), ("s3", "")], indirect=["home"])
def test_transformers_load_an_export_and_give_our_logits(home, tmp_path, dtype):
    state = make_state(7)
    save(f"{home}/run", state)
    done = exported(f"{home}/run", f"{home}/out", dtype=dtype, max_shard_bytes=100_000)
    folder = fetched(f"{home}/out", tmp_path / "out-here")
    assert done.files == len(list(folder.glob("*.safetensors"))) > 1
    theirs, told = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(told.values()), told
    assert theirs.config.rope_parameters["rope_theta"] == CONFIG.rope_theta
    assert theirs.config.max_position_embeddings == 64
    ours = Llama(CONFIG)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            value = state.tensors[f"model/{name}"]
            parameter.copy_(value.bfloat16() if dtype else value)
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("home", "dtype", "tied", "shard"),
    [
        ("disk", torch.float32, False, "50GB"),
        ("s3", torch.float32, True, "100KB"),
        ("memory", torch.bfloat16, False, "60KB"),
        ("disk", torch.float16, True, "50GB"),
    ],
    indirect=["home"],
    ids=str,
)
def test_an_import_of_what_transformers_saved_gives_their_logits(home, tmp_path, dtype, tied, shard):
    their_model(tied, dtype).save_pretrained(tmp_path / "hf", max_shard_size=shard)
    assert (len(list((tmp_path / "hf").glob("*.safetensors"))) == 1) == (shard == "50GB")
    source = imports.open_source(put(tmp_path / "hf", f"{home}/hf-there"))
    assert (source.shape, source.tied) == (SHAPE, tied)
    commit = imports.import_model(source, f"{home}/run", 0, "import")
    assert verify(f"{home}/run", commit) == []
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)  # .float() keeps rounded angles
    torch.testing.assert_close(logits(model_of(f"{home}/run")), logits(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("home", "dtype"),
    [("disk", torch.float32), ("memory", torch.bfloat16), ("s3", torch.bfloat16)],
    indirect=["home"],
    ids=str,
)
def test_an_export_of_an_import_is_bit_identical(home, tmp_path, dtype):
    their_model(dtype=dtype).save_pretrained(tmp_path / "hf")
    imports.import_model(imports.open_source(put(tmp_path / "hf", f"{home}/hf-there")), f"{home}/run", 0, "import")
    exported(f"{home}/run", f"{home}/out", dtype="bfloat16" if dtype == torch.bfloat16 else "")
    before = load_file(tmp_path / "hf" / "model.safetensors")
    after = load_file(fetched(f"{home}/out", tmp_path / "out-here") / "model-00001-of-00001.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name


def test_an_import_in_several_files_and_of_a_later_step(tmp_path, monkeypatch):
    """Restored by the only rank of a world as large as the number of files, which asks for no random state."""
    monkeypatch.setattr(imports, "PART_BYTES", 200_000)
    theirs = their_model()
    theirs.save_pretrained(tmp_path / "hf")
    commit = imports.import_model(imports.open_source(str(tmp_path / "hf")), str(tmp_path / "run"), 900, "import")
    assert len(commit.parts) > 2 and commit.step == 900
    torch.testing.assert_close(logits(model_of(str(tmp_path / "run"))), logits(theirs), rtol=1e-5, atol=1e-5)
    with pytest.raises(StateMismatch, match=r"holds .*float32 of shape \(270, 48\), the run wants"):
        model_of(str(tmp_path / "run"), replace(CONFIG, vocab_size=271))


def test_a_new_run_starts_from_an_import():
    """The core: a run without a journal that finds a checkpoint of step 0 orders its first generation to restore it."""
    core = Supervisor()
    mesh = Layout(pp=1, dp_replicate=1, dp_shard=1, tp=1, slots_per_node=1, nodes=1, spares=0)
    core.handle(ev.RunDeclared(at=0, run="run", layout=mesh, limits=LIMITS, total_steps=10, capabilities=("ram",)))
    core.handle(ev.EpochBegan(at=0, epoch=1, version="test"))
    core.handle(ev.CheckpointsFound(at=0, steps=(0,)))
    actions = core.handle(ev.NodeJoined(at=1, node="n0", domain="", snapshots={}))
    (order,) = [action for action in actions if isinstance(action, OpenGeneration)]
    assert (order.source, order.step) == ("durable", 0)


# --- formats ---------------------------------------------------------------------------------------------------------


def test_headers_are_those_of_safetensors(tmp_path):
    tensors = {"b": torch.randn(3, 5), "a": torch.randn(7).bfloat16(), "none": torch.zeros(0, 4).half()}
    kinds = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
    save_file(tensors, tmp_path / "theirs")
    raw = (tmp_path / "theirs").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    entries = read_header("theirs", raw[: 8 + length], len(raw))
    assert {(e.name, e.dtype, e.shape) for e in entries} == {
        (name, kinds[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()
    }
    for entry in entries:
        assert raw[entry.start : entry.stop] == tensors[entry.name].view(torch.uint8).numpy().tobytes()
    header, placed = make_header([(e.name, e.dtype, e.shape) for e in entries])
    data = b"".join(tensors[e.name].view(torch.uint8).numpy().tobytes() for e in entries)
    assert [(header + data)[e.start : e.stop] for e in placed] == [
        tensors[e.name].view(torch.uint8).numpy().tobytes() for e in entries
    ]
    (tmp_path / "ours").write_bytes(header + data)
    loaded = load_file(tmp_path / "ours")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40))
def test_rounding_to_bfloat16_is_torchs(bits: list[int]) -> None:
    raw = np.array([*bits, 0x3F808000, 0x3F818000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0x7FFFFFFF], np.uint32)
    ours = torch.from_numpy(cast(raw, "float32", "bfloat16").view(np.int16)).view(torch.bfloat16)
    theirs = torch.from_numpy(raw.view(np.float32)).bfloat16()
    assert torch.equal(ours.isnan(), theirs.isnan())
    known = ~theirs.isnan()
    assert torch.equal(ours[known].view(torch.int16), theirs[known].view(torch.int16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "model_type = 'mistral': Shepherd's model has 'llama' only"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "rope_type = 'llama3'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type = 'linear'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"hidden_size": None}, "hidden_size = None: must be a positive whole number"),
        ({"num_key_value_heads": 4}, "6 heads of 8 over 4 key/value heads"),
        ({"head_dim": 16}, "6 heads of 16"),
    ],
)
def test_a_config_that_is_no_model_of_ours_is_refused(change, message):
    document = their_model().config.to_dict()
    read_config(json.dumps(document).encode())
    with pytest.raises(FormatError, match=message):
        read_config(json.dumps(document | change).encode())
    with pytest.raises(FormatError, match="not a JSON object"):
        read_config(b"[]")


def resave(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "model.layers.1.mlp.up_proj.weight: is missing of the"),
        (lambda t: t.update({"extra.weight": torch.zeros(1)}), "extra.weight: is not part of the model"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(49)}), r"model.norm.weight: has shape \[49\].*\[48\]"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(48).double()}), "model.norm.weight is F64"),
    ],
)
def test_tensors_that_are_not_the_models_are_refused_by_name(tmp_path, change, message):
    their_model().save_pretrained(tmp_path / "hf")
    resave(tmp_path / "hf", change)
    with pytest.raises(FormatError, match=message):
        imports.open_source(str(tmp_path / "hf"))


def test_a_model_with_a_part_missing_or_cut_off_is_refused(tmp_path):
    folder = tmp_path / "hf"
    with pytest.raises(FormatError, match=r"there is no config\.json"):
        imports.open_source(str(folder))
    their_model().save_pretrained(folder, max_shard_size="100KB")
    file = sorted(folder.glob("*.safetensors"))[1]
    raw = file.read_bytes()
    for damaged in (b"", raw[:7], raw[:100], raw[:-1], raw + b"\0", b"\xff" * 8 + raw[8:]):
        file.write_bytes(damaged)
        with pytest.raises(FormatError, match=file.name):
            imports.open_source(str(folder))
    file.unlink()
    with pytest.raises(FormatError, match=f"{file.name}: is not there"):
        imports.open_source(str(folder))
    file.write_bytes(raw)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = "../elsewhere.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match="elsewhere"):
        imports.open_source(str(folder))


# --- damage, and what is left behind ---------------------------------------------------------------------------------


def flip(url: str, at: int) -> None:
    store = locate(url)
    raw = bytearray(store.fs.cat_file(store.root))
    raw[at] ^= 4
    store.fs.pipe_file(store.root, bytes(raw))


def names(url: str) -> list[str]:
    store = locate(url)
    return [path for path in store.fs.find(store.root) if not path.endswith("/")]


@pytest.mark.parametrize("home", ["disk", "memory"], indirect=True)
def test_a_file_that_changed_since_its_export_is_not_imported(home):
    save(f"{home}/run", make_state(7))
    exported(f"{home}/run", f"{home}/out", max_shard_bytes=100_000)
    flip(f"{home}/out/model-00002-of-00004.safetensors", -5)
    source = imports.open_source(f"{home}/out")
    with pytest.raises(FormatError, match=r"model-00002-of-00004\.safetensors: is damaged"):
        imports.import_model(source, f"{home}/new", 0, "import")
    assert names(f"{home}/new") == []
    assert list_commits(f"{home}/new") == []


@pytest.mark.parametrize("home", ["disk", "memory"], indirect=True)
def test_an_import_that_is_interrupted_once_its_record_is_there_leaves_nothing(home, monkeypatch):
    save(f"{home}/run", make_state(7))
    exported(f"{home}/run", f"{home}/out")
    source = imports.open_source(f"{home}/out")
    removed: list[str] = []

    def interrupted(url: str, commit: Any) -> None:
        assert create_commit(url, commit)
        raise KeyboardInterrupt

    def noted(url: str, name: str) -> None:
        removed.append(name)
        remove(url, name)

    with monkeypatch.context() as patch:
        patch.setattr(imports, "create_commit", interrupted)
        patch.setattr(imports, "remove", noted)
        with pytest.raises(KeyboardInterrupt):
            imports.import_model(source, f"{home}/new", 3, "import")
    assert removed[0] == commit_name(3), "a record without data is a checkpoint that cannot be read"
    assert names(f"{home}/new") == []
    commit = imports.import_model(source, f"{home}/new", 3, "import")
    assert verify(f"{home}/new", commit) == []


def test_an_import_that_another_overtakes_takes_nothing_from_it(tmp_path, monkeypatch):
    save(f"{tmp_path}/run", make_state(7))
    exported(f"{tmp_path}/run", f"{tmp_path}/out")
    url = f"{tmp_path}/new"

    def overtaken(url: str, commit: Any) -> None:
        assert create_commit(url, replace(commit, run="another"))
        create_commit(url, commit)

    monkeypatch.setattr(imports, "create_commit", overtaken)
    with pytest.raises(CommitConflict):
        imports.import_model(imports.open_source(f"{tmp_path}/out"), url, 0, "import")
    commit = read_commit(url, 0)
    assert commit.run == "another" and verify(url, commit) == []


def test_an_export_that_fails_leaves_nothing(home):
    commit = save(f"{home}/run", make_state(7))
    saved = open_checkpoint(f"{home}/run", commit)
    ((index, chunk),) = saved.tensors["model/layers.2.feed_forward.w1.weight"].parts
    flip(f"{home}/run/{index.data}", chunk.file_offset)
    with pytest.raises(ManifestError, match="is damaged"):
        exported(f"{home}/run", f"{home}/out", max_shard_bytes=100_000)
    assert names(f"{home}/out") == []


def test_a_store_that_fails_at_the_last_file_is_left_empty(tmp_path, monkeypatch):
    save(str(tmp_path / "run"), make_state(7))
    upload = export.upload

    def full(store: Any, path: str, name: str) -> None:
        if name == "model.safetensors.index.json":
            raise OSError(28, "No space left")
        upload(store, path, name)

    monkeypatch.setattr(export, "upload", full)
    target = f"memory://{tmp_path.name}/out"
    with pytest.raises(OSError, match="No space left"):
        exported(str(tmp_path / "run"), target)
    assert names(target) == []


def test_nothing_is_overwritten(home):
    save(f"{home}/run", make_state(7))
    exported(f"{home}/run", f"{home}/out")
    before = names(f"{home}/out")
    with pytest.raises(StoreError, match=r"is not empty \(config\.json"):
        exported(f"{home}/run", f"{home}/out")
    assert names(f"{home}/out") == before
    with pytest.raises(StoreError, match="there are checkpoints already"):
        imports.import_model(imports.open_source(f"{home}/out"), f"{home}/run", 0, "import")
    assert list_commits(f"{home}/run") == [7]


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path):
    save(str(tmp_path), make_state(7))
    saved = open_checkpoint(str(tmp_path), read_commit(str(tmp_path), 7))
    for change, message in (
        ({"n_layers": 2}, "model/layers.2.attention.wk.weight: no part of a Llama of 2 layers"),
        ({"n_layers": 4}, "model/layers.3.attention.wk.weight: the checkpoint does not hold it"),
        (
            {"vocab_size": 271},
            r"model/output.weight: the checkpoint holds shape \[270, 48\], the model has \[271, 48\]",
        ),
    ):
        with pytest.raises(FormatError, match=message):
            export.export(saved, replace(SHAPE, **change), str(tmp_path / "out"), max_positions=1)
    assert not (tmp_path / "out").exists()


# --- memory ----------------------------------------------------------------------------------------------------------


def peak_of(work: Any) -> int:
    """Bytes that Python and numpy held at once, at most."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_is_bounded_by_the_window_and_not_by_the_model(tmp_path, monkeypatch):
    """A tensor of 40 MB in a state of 250 MB, through windows of 1 MiB."""
    for module in (windows, imports):
        monkeypatch.setattr(module, "WINDOW_BYTES", 1 << 20)
    monkeypatch.setattr(blocks, "READ_BLOCKS", 1)
    shape = replace(SHAPE, vocab_size=40_000, dim=256, n_heads=8, n_kv_heads=2)
    model = {theirs: np.ones(sizes, np.float32) for theirs, sizes in shape.tensors().values()}
    header, entries = make_header((name, "float32", value.shape) for name, value in model.items())
    (tmp_path / "hf").mkdir()
    with open(tmp_path / "hf" / "model.safetensors", "wb") as out:
        out.write(header)
        for entry in entries:
            out.write(model[entry.name].tobytes())
    (tmp_path / "hf" / "config.json").write_bytes(export.config_json(shape, "float32", 64))
    n_bytes = sum(value.nbytes for value in model.values())
    assert n_bytes > 80e6
    del model
    run, out_url = str(tmp_path / "run"), str(tmp_path / "out")
    into = peak_of(lambda: imports.import_model(imports.open_source(str(tmp_path / "hf")), run, 0, "import"))
    saved = open_checkpoint(run, read_commit(run, 0))
    out_of = peak_of(lambda: export.export(saved, shape, out_url, dtype="bfloat16", max_positions=1))
    assert into < 8 << 20, into
    assert out_of < 12 << 20, out_of
