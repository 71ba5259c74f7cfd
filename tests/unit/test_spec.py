"""The job's document: presets, overrides, what is filled in, the way back from TOML, and meshes that divide."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from typing import Any

import hypothesis
import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator import spec as specs
from orchestrator.core import placement
from orchestrator.spec import JobSpec, SpecError, load, parse
from trainer.contract import Degrees, ModelConfig, WorkerConfig, build, encode

PRESETS = sorted(path.stem for path in specs.PRESETS.glob("*.toml"))
assert len(PRESETS) >= 12
SECTIONS = (
    "run",
    "model",
    "data",
    "parallel",
    "optimizer",
    "checkpoint",
    "recovery",
    "audit",
    "script",
    "cluster",
    "metrics",
)


def document(**sections: dict[str, Any]) -> dict[str, Any]:
    return {**sections, "run": {"name": "r", "url": "/runs/r", **sections.get("run", {})}}


# --- presets and overrides ---


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_gives_every_field_of_the_model(preset):
    table = tomllib.loads((specs.PRESETS / f"{preset}.toml").read_text())["model"]
    assert set(table) | {"preset"} == {field.name for field in dataclasses.fields(ModelConfig)}
    model = parse(document(model={"preset": preset})).model
    assert model == ModelConfig(preset=preset, **table)


def test_fields_beside_a_preset_win():
    model = parse(document(model={"preset": "tiny", "n_layers": 7})).model
    assert (model.n_layers, model.dim) == (7, 64)


JOB = """
[run]
name = "job"
url = "/runs/job"
[model]
preset = "tiny"
"""


@pytest.fixture
def job(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text(JOB)
    return path


@pytest.mark.parametrize(
    ("override", "section", "field", "value"),
    [
        ("run.steps=200", "run", "steps", 200),
        ("run.name=other-job", "run", "name", "other-job"),
        ('run.name="quoted"', "run", "name", "quoted"),
        ("run.url=s3://bucket/run", "run", "url", "s3://bucket/run"),
        ("run.name=2026-01-01", "run", "name", "2026-01-01"),
        ("run.deterministic=false", "run", "deterministic", False),
        ("optimizer.lr=1e-3", "optimizer", "lr", 1e-3),
        ("cluster.cpus_per_slot=2", "cluster", "cpus_per_slot", 2.0),
        ("cluster.ram_dir=", "cluster", "ram_dir", ""),
        ("model.preset=demo_5m", "model", "dim", 384),
        ("data.corpus=/texts/a=b.txt", "data", "corpus", "/texts/a=b.txt"),
    ],
)
def test_an_override_is_read_as_toml_or_else_as_text(job, override, section, field, value):
    found = getattr(getattr(load(job, [override]), section), field)
    assert found == value and type(found) is type(value)


def test_later_overrides_win(job):
    assert load(job, ["run.steps=1", "run.steps=2"]).run.steps == 2


@pytest.mark.parametrize("override", ["steps=1", "run.steps", "run.=1", ".steps=1", "", "=", "run"])
def test_an_override_in_another_form_is_refused(job, override):
    with pytest.raises(SpecError, match=r"^--set .*: write section\.key=value, as in --set run\.steps=200$"):
        load(job, [override])


def test_an_override_of_a_field_that_is_not_there_is_refused(job):
    with pytest.raises(SpecError, match=r"^run\.step: there is no such field; valid here: name, url, steps"):
        load(job, ["run.step=1"])
    job.write_text("model = 1")
    with pytest.raises(SpecError, match=r"^model: must be a table"):
        load(job, ["model.dim=4"])


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "cannot be read"),
        (b"[run", "is not TOML"),
        (b"\xff\xfe", "is not TOML"),
        (b"a = 1\na = 2\n", "is not TOML"),
    ],
)
def test_a_file_that_is_no_toml_is_refused_by_its_name(tmp_path, content, complaint):
    path = tmp_path / "job.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SpecError, match=f"^{path}: {complaint}: "):
        load(path)


def test_a_url_that_nobody_can_read_is_refused():
    with pytest.raises(SpecError, match=r"^nosuch://job\.toml: cannot be read: "):
        load("nosuch://job.toml")


# --- what comes out ---


def test_a_document_comes_back_unchanged_from_json_and_toml(job):
    spec = load(job, ["parallel.tp=2", "cluster.slots_per_node=2", "run.seed=9223372036854775807"])
    shown = tomli_w.dumps(spec.document())
    for again in (parse(spec.document()), parse(tomllib.loads(shown)), parse(json.loads(json.dumps(spec.document())))):
        assert again == spec
        assert again.document() == spec.document()
        assert again.digest() == spec.digest()
    assert tuple(spec.document()) == SECTIONS


def test_the_digest_names_the_document_and_not_the_way_it_was_written():
    written = parse(document(cluster={"cpus_per_slot": 1}, recovery={"halt_deadline_s": 10}))
    assert written.digest() == parse(document()).digest()
    assert parse(document(run={"seed": 1})).digest() != written.digest()


def test_a_worker_gets_the_configuration_over_the_wire(job):
    config = load(job).worker_config
    fields = encode(config)
    assert fields.pop("type") == "WorkerConfig"
    assert build(WorkerConfig, json.loads(json.dumps(fields))) == config
    assert (config.run, config.url, config.model.dim) == ("job", "/runs/job", 64)


def test_relative_paths_start_where_the_user_is_and_tilde_stays_the_nodes_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    spec = parse(
        {
            "run": {"name": "r", "url": "out/r"},
            "data": {"corpus": "texts/*.txt", "cache_dir": "cache"},
            "cluster": {"log_dir": "logs", "ram_dir": "~/ram"},
        }
    )
    assert spec.run.url == f"{tmp_path}/out/r"
    assert (spec.data.corpus, spec.data.cache_dir) == (f"{tmp_path}/texts/*.txt", f"{tmp_path}/cache")
    assert (spec.cluster.log_dir, spec.cluster.ram_dir) == (f"{tmp_path}/logs", "~/ram")
    monkeypatch.chdir("/")
    assert parse(spec.document()) == spec, "also where another process reads it"
    assert parse({"run": {"name": "r"}}).run.url == "/runs/r"
    assert parse({"run": {"name": "r", "url": "~/r"}}).run.url == "/home/me/r", "one folder for all nodes"
    defaults = parse({"run": {"name": "r", "url": "s3://bucket/r"}})
    assert (defaults.run.url, defaults.data.corpus) == ("s3://bucket/r", "python-stdlib")
    assert (defaults.cluster.log_dir, defaults.cluster.ram_dir) == ("~/.local/state/shepherd", "")
    assert defaults.data.cache_dir == "~/.cache/shepherd/data"


def test_limits_are_the_same_times_in_microseconds():
    limits = parse(document(recovery={"halt_deadline_s": 0.25, "strikes": 5})).limits
    assert limits.halt_deadline_us == 250_000
    assert (limits.start_deadline_us, limits.wait_deadline_us, limits.commit_deadline_us) == (
        300_000_000,
        600_000_000,
        120_000_000,
    )
    assert (limits.strikes, limits.same_error_tries, limits.recoveries_without_progress) == (5, 2, 8)
    assert not limits.swaps_slow and parse(document(recovery={"stragglers": "swap"})).limits.swaps_slow


SMALL = st.integers(1, 4)


@st.composite
def meshes(draw: st.DrawFn) -> dict[str, Any]:
    """A document that divides, with up to two of its numbers changed."""
    tp, pp, replicas, shards, kv_heads = (draw(SMALL) for _ in range(5))
    heads = kv_heads * tp * draw(SMALL)
    microbatches = pp * draw(SMALL)
    job = document(
        model={
            "dim": heads * 2 * draw(SMALL),
            "n_layers": pp + draw(SMALL),
            "n_heads": heads,
            "n_kv_heads": kv_heads * tp,
            "ffn_dim": tp * draw(SMALL),
            "vocab_size": tp * (260 + draw(SMALL)),
        },
        data={"global_batch": replicas * shards * microbatches * draw(SMALL), "seq_len": tp * draw(SMALL)},
        parallel={
            "pp": pp,
            "dp_replicate": replicas,
            "dp_shard": shards,
            "tp": tp,
            "microbatches": microbatches,
        },
        cluster={"slots_per_node": tp * draw(st.sampled_from([1, replicas, shards, pp * replicas]))},
    )
    numbers = [(name, field) for name in ("model", "data", "parallel", "cluster") for field in job[name]]
    for name, field in draw(st.lists(st.sampled_from(numbers), max_size=2)):
        job[name][field] = draw(st.integers(0, 24)) + 260 * (field == "vocab_size")
    return job


@settings(max_examples=600, deadline=None)
@given(job=meshes())
def test_a_mesh_that_is_accepted_really_divides(job):
    """Whatever is accepted can be cut into heads, layers, stages, nodes and batches without a remainder."""
    try:
        spec = parse(job)
    except SpecError:
        hypothesis.event("refused")
        return
    hypothesis.event("accepted")
    check_divides(spec)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_published_models_on_their_meshes_divide(preset, tp):
    job = document(
        model={"preset": preset},
        parallel={"tp": tp, "pp": 2, "dp_shard": 4, "microbatches": 4},
        data={"global_batch": 64, "seq_len": 2048},
        cluster={"slots_per_node": 8, "device": "cuda"},
    )
    heads = tomllib.loads((specs.PRESETS / f"{preset}.toml").read_text())["model"]["n_kv_heads"]
    if heads % tp == 0:
        check_divides(parse(job))
    else:
        with pytest.raises(SpecError, match=f"parallel.tp = {tp}: must divide model.n_kv_heads = {heads}"):
            parse(job)


def check_divides(spec: JobSpec) -> None:
    m, d, p, layout = spec.model, spec.data, spec.parallel, spec.layout
    assert m.n_heads * m.head_dim == m.dim and m.head_dim % 2 == 0
    assert m.n_heads // m.n_kv_heads * m.n_kv_heads == m.n_heads
    for cut in (m.dim, m.n_heads, m.n_kv_heads, m.ffn_dim, m.vocab_size, d.seq_len):
        assert cut // p.tp * p.tp == cut
    assert m.n_layers >= p.pp
    rows = d.global_batch // p.dp
    assert rows * p.dp == d.global_batch
    assert rows // p.microbatches * p.microbatches == rows
    assert p.pp == 1 or p.microbatches >= p.pp
    assert p.world_size == layout.slots == layout.nodes * layout.slots_per_node
    slots = [list(placement.slots_of(layout, place)) for place in range(layout.nodes)]
    assert [slot for node in slots for slot in node] == list(range(p.world_size))
    assert all(len({slot // p.tp for slot in node}) * p.tp == len(node) for node in slots), "tp stays inside a node"


def test_many_nodes_report_through_others_and_may_be_silent_longer():
    def silence_s(nodes: int, **recovery: float) -> float:
        parallel, data = {"dp_replicate": nodes}, {"global_batch": nodes}
        return parse(document(parallel=parallel, data=data, recovery=recovery)).recovery.node_silence_s

    assert (silence_s(255), silence_s(256), silence_s(256, node_silence_s=12)) == (4.5, 10, 12)


@pytest.mark.parametrize(
    ("replicas", "shards", "slots", "min_replicas", "shrinks_to"),
    [
        (4, 1, 1, 1, (3, 2, 1)),
        (4, 2, 2, 3, (3,)),
        (4, 4, 2, 4, ()),
        (1, 4, 2, 1, ()),
        (4, 1, 2, 1, ()),  # a node holds two replicas, and cannot lose one of them
    ],
)
def test_a_mesh_shrinks_as_far_as_it_may_where_a_replica_fills_whole_nodes(
    replicas, shards, slots, min_replicas, shrinks_to
):
    job = document(
        parallel={"dp_replicate": replicas, "dp_shard": shards},
        data={"global_batch": 16},
        cluster={"slots_per_node": slots},
        recovery={"min_replicas": min_replicas},
    )
    assert parse(job).layout.shrinks_to == shrinks_to


def test_a_shrunk_mesh_has_the_same_batch_in_the_same_microbatches():
    job = document(parallel={"dp_replicate": 4, "dp_shard": 2, "microbatches": 3}, data={"global_batch": 96})
    whole = parse(job).worker_config
    assert whole.on_mesh(whole.parallel.degrees) is whole
    for replicas, most in ((3, 4), (2, 6), (1, 12)):
        config = whole.on_mesh(Degrees(dp_replicate=replicas, dp_shard=2))
        assert (config.samples, config.parallel.microbatches, config.parallel.dp_replicate) == (4, most, replicas)
        assert config.data == whole.data
        two = Degrees(dp_replicate=2, dp_shard=2)
        assert config.on_mesh(two) == whole.on_mesh(two), "whatever it was made from"


def test_meshes_to_fall_back_to_come_after_those_with_fewer_replicas_and_keep_the_batch():
    job = document(
        parallel={"pp": 2, "dp_replicate": 3, "dp_shard": 2, "microbatches": 2},
        data={"global_batch": 24},
        cluster={"slots_per_node": 2},
        recovery={"min_replicas": 2, "fallback_meshes": [{"dp_replicate": 3, "dp_shard": 2}, {"pp": 2}]},
    )
    spec = parse(job)
    layout = spec.layout
    assert [(str(mesh.degrees), mesh.nodes) for mesh in layout.meshes] == [
        ("pp 2 x dp_replicate 3 x dp_shard 2", 6),
        ("pp 2 x dp_replicate 2 x dp_shard 2", 4),
        ("dp_replicate 3 x dp_shard 2", 3),
        ("pp 2", 1),
    ]
    assert layout.smallest == list(layout.meshes)[-1] == layout.sized(1, Degrees(pp=2))
    assert parse(spec.document()) == spec
    for mesh in layout.meshes:
        config = spec.worker_config.on_mesh(mesh.degrees)
        each = [len(config.microbatches_of(replica)) for replica in range(mesh.dp_replicate)]
        assert config.samples == 2 and sum(each) * mesh.dp_shard * config.samples == 24
        assert max(each) == config.parallel.microbatches >= mesh.pp
