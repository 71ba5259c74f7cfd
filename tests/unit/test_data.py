"""Data: what is fed depends on the corpus, the seed and the global index alone, is prepared once, and is checked."""

import dataclasses
import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from trainer.contract import DataConfig
from trainer.data import Dataset, open_dataset
from trainer.data import prepare as prepare_module
from trainer.data.corpora import STDLIB_MAX_BYTES, CorpusError, list_corpus
from trainer.data.dataset import DataError
from trainer.data.permutation import permute
from trainer.data.prepare import prepare

REPOSITORY = Path(__file__).parents[2]
VOCAB = 300
SEED = 7


def texts(count: int, seed: int = 0) -> list[str]:
    """Documents of different lengths over a small vocabulary, so that merges are found; with what is not ASCII."""
    draw = random.Random(seed)
    words = ["herd", "sheep", "wölf", "Schäfer", "羊", "fold", "\n", "    return", "def", "🐑"]
    return [" ".join(draw.choices(words, k=draw.randint(5, 200))) for _ in range(count)]


def write_corpus(folder: Path, documents: list[str]) -> Path:
    folder.mkdir(parents=True)
    for number, text in enumerate(documents):
        (folder / f"{number:04d}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[DataConfig, list[str]]:
    root = tmp_path_factory.mktemp("data")
    documents = texts(120)
    corpus = write_corpus(root / "corpus", documents)
    config = DataConfig(
        corpus=str(corpus), seq_len=16, global_batch=8, validation_fraction=0.1, cache_dir=str(root / "cache")
    )
    prepare(config, VOCAB, SEED)
    return config, documents


def stream(config: DataConfig, split: str) -> np.ndarray:
    """A split's tokens, read without any of the code under test but its place."""
    (manifest,) = Path(config.cache_dir).glob("*/manifest.json")
    files = sorted(manifest.parent.glob(f"{split}-*.tokens"))
    return np.concatenate([np.zeros(0), *(np.fromfile(file, dtype="<u2") for file in files)]).astype(np.int64)


def windows_of(tokens: np.ndarray, seq_len: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + seq_len + 1]) for i in range(0, len(tokens) - seq_len, seq_len)]


def samples(dataset: Dataset, step: int, rows: range) -> list[tuple[int, ...]]:
    inputs, targets = dataset.batch(step, rows)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    return [(*row, int(last)) for row, last in zip(inputs.tolist(), targets[:, -1], strict=True)]


# --- the order --------------------------------------------------------------------------------------------------------


@given(n=st.integers(1, 3000), key=st.text(max_size=8))
@settings(max_examples=60, deadline=None)
def test_permutation_visits_each_index_once(n: int, key: str) -> None:
    assert sorted(permute(i, n, key) for i in range(n)) == list(range(n))


def test_permutation_of_an_astronomical_range_takes_no_time_and_stays_inside() -> None:
    n = 10**13 + 1
    found = {permute(i, n, "0/0") for i in range(500)}
    assert len(found) == 500 and all(0 <= value < n for value in found)
    # Neighbours are scattered: the mean distance of two uniform draws is n / 3.
    ordered = [permute(i, n, "0/0") for i in range(500)]
    mean = sum(abs(a - b) for a, b in itertools.pairwise(ordered)) / 499
    assert 0.28 < mean / n < 0.39


def test_order_never_changes_between_versions() -> None:
    """A run that is restored by a newer Shepherd must go on with the same samples."""
    assert [permute(i, 10, "7/0") for i in range(10)] == [7, 8, 1, 6, 4, 0, 2, 3, 9, 5]
    assert [permute(i, 10, "7/1") for i in range(10)] == [2, 9, 1, 4, 0, 6, 7, 8, 5, 3]


def test_each_epoch_visits_every_window_once_in_its_own_order(prepared: tuple[DataConfig, list[str]]) -> None:
    config, _ = prepared
    dataset = open_dataset(config, VOCAB, SEED)
    expected = windows_of(stream(config, "train"), config.seq_len)
    steps = 2 * len(expected) // config.global_batch + 1
    fed = [sample for step in range(1, steps + 1) for sample in samples(dataset, step, range(config.global_batch))]
    first, second = fed[: len(expected)], fed[len(expected) : 2 * len(expected)]
    assert sorted(first) == sorted(expected) == sorted(second)
    assert first != second and first != expected


@given(step=st.integers(1, 10_000), cuts=st.lists(st.integers(0, 8), max_size=4))
@settings(max_examples=40, deadline=None)
def test_samples_do_not_depend_on_how_many_ranks_share_them(prepared, step: int, cuts: list[int]) -> None:
    config, _ = prepared
    dataset = open_dataset(config, VOCAB, SEED)
    edges = sorted({0, config.global_batch, *cuts})
    shared = [s for a, b in itertools.pairwise(edges) for s in samples(dataset, step, range(a, b))]
    assert shared == samples(dataset, step, range(config.global_batch))


def test_samples_depend_on_the_global_index_not_on_the_batch(prepared: tuple[DataConfig, list[str]]) -> None:
    config, _ = prepared
    whole = open_dataset(config, VOCAB, SEED)
    halves = open_dataset(dataclasses.replace(config, global_batch=4), VOCAB, SEED)
    assert samples(whole, 3, range(8)) == samples(halves, 5, range(4)) + samples(halves, 6, range(4))
    assert samples(open_dataset(config, VOCAB, SEED + 1), 3, range(8)) != samples(whole, 3, range(8))


def test_validation_goes_through_the_held_out_tokens_in_order(prepared: tuple[DataConfig, list[str]]) -> None:
    config, _ = prepared
    dataset = open_dataset(config, VOCAB, SEED)
    expected = windows_of(stream(config, "validation"), config.seq_len)
    for index in (0, 1, len(expected) // 8, len(expected)):
        inputs, targets = dataset.validation_batch(index, range(2, 5))
        for row in range(3):
            window = expected[(index * config.global_batch + 2 + row) % len(expected)]
            assert tuple(inputs[row].tolist()) == window[:-1] and tuple(targets[row].tolist()) == window[1:]


# --- what is in it ----------------------------------------------------------------------------------------------------


def decoded(config: DataConfig, split: str) -> list[str]:
    """The documents of a split, from its tokens and their starts."""
    (folder,) = (path.parent for path in Path(config.cache_dir).glob("*/manifest.json"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens, starts = stream(config, split), np.fromfile(folder / f"{split}.starts", dtype="<u8").tolist()
    documents = [tokens[a:b] for a, b in itertools.pairwise([*starts, len(tokens)])]
    marks = tokenizer.token_to_id("<|begin_of_text|>"), tokenizer.token_to_id("<|end_of_text|>")
    assert all((document[0], document[-1]) == marks for document in documents)
    return [tokenizer.decode(document[1:-1].tolist(), skip_special_tokens=False) for document in documents]


def test_every_document_comes_back_from_the_tokens_in_order(prepared: tuple[DataConfig, list[str]]) -> None:
    config, documents = prepared
    train, validation = decoded(config, "train"), decoded(config, "validation")
    held_out = set(validation)
    assert [d for d in documents if d not in held_out] == train
    assert [d for d in documents if d in held_out] == validation
    assert 0 < len(validation) < 0.25 * len(documents)


def test_split_is_decided_by_a_documents_text_alone(tmp_path: Path) -> None:
    base = texts(60)
    # Twice the same texts under other names, in another order, among others.
    more = [*texts(40, seed=1), *reversed(base), *base]
    held_out = []
    for name, documents in [("a", base), ("b", more)]:
        config = DataConfig(
            corpus=str(write_corpus(tmp_path / name, documents)),
            seq_len=4,
            validation_fraction=0.2,
            cache_dir=str(tmp_path / f"cache-{name}"),
        )
        prepare(config, VOCAB, SEED)
        validation = set(decoded(config, "validation"))
        assert not validation & set(decoded(config, "train"))
        held_out.append(validation & set(base))
    assert held_out[0] == held_out[1] != set()


@pytest.mark.parametrize(
    ("documents", "fraction", "held_out"), [(2, 1e-9, 1), (2, 0.999999, 1), (5, 1e-9, 1), (1, 0.5, 0)]
)
def test_each_side_of_the_split_has_a_document(tmp_path: Path, documents: int, fraction: float, held_out: int) -> None:
    corpus = write_corpus(tmp_path / "corpus", texts(documents))
    config = DataConfig(
        corpus=str(corpus),
        seq_len=2,
        validation_fraction=fraction,
        validation_batches=held_out,
        cache_dir=str(tmp_path / "cache"),
    )
    prepare(config, VOCAB, SEED)
    assert (len(decoded(config, "validation")), len(decoded(config, "train"))) == (held_out, documents - held_out)


def test_marks_that_a_document_spells_out_are_not_marks(tmp_path: Path) -> None:
    documents = ["before <|end_of_text|><|begin_of_text|> after " * 5, *texts(3)]
    config = DataConfig(
        corpus=str(write_corpus(tmp_path / "corpus", documents)),
        seq_len=4,
        validation_fraction=0.0,
        cache_dir=str(tmp_path / "cache"),
    )
    prepare(config, VOCAB, SEED)
    assert decoded(config, "train") == documents
    assert (stream(config, "train") == 0).sum() == len(documents)


def test_shards_are_one_stream(prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, _ = prepared
    cut = dataclasses.replace(config, cache_dir=str(tmp_path))
    monkeypatch.setattr(prepare_module, "SHARD_TOKENS", 37)
    prepare(cut, VOCAB, SEED)
    assert len(list(tmp_path.glob("*/train-*.tokens"))) > 50
    one, many = open_dataset(config, VOCAB, SEED), open_dataset(cut, VOCAB, SEED)
    many.verify()
    for step in range(1, 60):
        assert samples(one, step, range(8)) == samples(many, step, range(8))


def test_same_corpus_gives_the_same_bytes_in_every_process(prepared, tmp_path: Path) -> None:
    config, _ = prepared
    digests = set()
    for threads in ("1", "4"):
        other = dataclasses.replace(config, cache_dir=str(tmp_path / threads))
        result = run_prepare(other, env={"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads})
        digests.add(json.loads(result.stdout)["digest"])
    assert digests == {prepare(config, VOCAB, SEED).digest} == {open_dataset(config, VOCAB, SEED).digest}


def test_digest_names_everything_that_decides_what_is_fed(prepared, tmp_path: Path) -> None:
    config, documents = prepared
    elsewhere = dataclasses.replace(config, cache_dir=str(tmp_path / "cache"))
    corpus = write_corpus(tmp_path / "corpus", [*documents[:-1], documents[-1] + "!"])
    changes = ({}, {"seq_len": 8}, {"global_batch": 4}, {"validation_fraction": 0.3}, {"corpus": str(corpus)})
    configs = [dataclasses.replace(elsewhere, **change) for change in changes]
    digests = [prepare(changed, VOCAB, SEED).digest for changed in configs]
    digests += [prepare(elsewhere, VOCAB, SEED + 1).digest, prepare(elsewhere, VOCAB - 1, SEED).digest]
    assert digests[0] == prepare(config, VOCAB, SEED).digest
    assert len(set(digests)) == len(digests)


# --- preparing --------------------------------------------------------------------------------------------------------


def run_prepare(config: DataConfig, env: dict[str, str] | None = None, code: str = "") -> subprocess.CompletedProcess:
    return finish(start_prepare(config, env, code))


def start_prepare(config: DataConfig, env: dict[str, str] | None = None, code: str = "") -> subprocess.Popen:
    what = json.dumps({"data": dataclasses.asdict(config), "vocab_size": VOCAB, "seed": SEED})
    command = ["-c", code] if code else ["-m", "trainer.data.prepare"]
    process = subprocess.Popen(
        [sys.executable, "-P", *command],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **(env or {})},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    with process.stdin as pipe:
        pipe.write(what)
    process.stdin = None  # or communicate() would flush it once more
    return process


def finish(process: subprocess.Popen) -> subprocess.CompletedProcess:
    out, err = process.communicate(timeout=240)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def test_five_processes_prepare_once(prepared, tmp_path: Path) -> None:
    config = dataclasses.replace(prepared[0], cache_dir=str(tmp_path / "cache"))
    counted = (
        "import os, sys, trainer.data.prepare as p; build = p._build\n"
        "def counting(*a): os.mkdir(os.environ['COUNTED']); build(*a)\n"  # a second build fails
        "p._build = counting; sys.exit(p.main())"
    )
    running = [start_prepare(config, {"COUNTED": str(tmp_path / "built")}, counted) for _ in range(5)]
    results = [finish(process) for process in running]
    assert [r.returncode for r in results] == [0] * 5, results
    lines = [json.loads(r.stdout) for r in results]
    assert {line["digest"] for line in lines} == {prepare(prepared[0], VOCAB, SEED).digest}
    assert (tmp_path / "built").exists()
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_process_killed_while_it_prepared_leaves_nothing_that_is_taken_for_data(prepared, tmp_path: Path) -> None:
    config = dataclasses.replace(prepared[0], cache_dir=str(tmp_path))
    killed = "import os, sys, trainer.data.prepare as p\np._publish = lambda *a: os.kill(os.getpid(), 9)\np.main()"
    assert run_prepare(config, code=killed).returncode == -9
    assert list(tmp_path.rglob("*.partial"))
    with pytest.raises(FileNotFoundError, match=r"python -m trainer\.data\.prepare"):
        open_dataset(config, VOCAB, SEED)
    assert prepare(config, VOCAB, SEED).digest == prepare(prepared[0], VOCAB, SEED).digest
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("damage", ["cut", "flip", "manifest", "missing"])
def test_damage_is_found_and_repaired(prepared, tmp_path: Path, damage: str, capsys) -> None:
    config = dataclasses.replace(prepared[0], cache_dir=str(tmp_path))
    whole = prepare(config, VOCAB, SEED)
    tokens, manifest = Path(whole.cache, "train-00000.tokens"), Path(whole.cache, "manifest.json")
    if damage == "cut":
        tokens.write_bytes(tokens.read_bytes()[:-2])
    elif damage == "flip":
        raw = bytearray(tokens.read_bytes())
        raw[1000] ^= 1
        tokens.write_bytes(raw)
        with pytest.raises(DataError, match=r"train-00000\.tokens"):
            open_dataset(config, VOCAB, SEED).verify()
    elif damage == "manifest":
        manifest.write_text(manifest.read_text().replace('"documents": 1', '"documents": 2'))
    else:
        tokens.unlink()
    if damage != "flip":
        with pytest.raises(DataError, match="damaged"):
            open_dataset(config, VOCAB, SEED)
    assert prepare(config, VOCAB, SEED).digest == whole.digest
    assert "preparing again" in capsys.readouterr().err
    open_dataset(config, VOCAB, SEED).verify()


def test_opening_reads_no_tokens(prepared: tuple[DataConfig, list[str]]) -> None:
    """Each generation of workers opens it: descriptors do not pile up."""
    config, _ = prepared
    open_dataset(config, VOCAB, SEED).batch(1, range(8))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        open_dataset(config, VOCAB, SEED).batch(1, range(8))
    assert len(os.listdir("/proc/self/fd")) == before


# --- corpora and errors -----------------------------------------------------------------------------------------------


def test_corpus_by_file_folder_glob_and_url(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n\n{"text": ""}\n{"text": "first too", "id": 3}\n')
    (tmp_path / "deep" / "er" / "c.txt").write_bytes(b"third \xff")
    (tmp_path / "ignored.bin").write_bytes(b"\0")

    def read(url: str) -> list[str]:
        return list(list_corpus(url).documents())

    assert read(str(tmp_path)) == ["first", "first too", "second", "third \ufffd"]
    assert read(f"file://{tmp_path}/b.txt") == ["second"]
    assert read(f"{tmp_path}/*.txt") == ["second"]
    assert read(f"{tmp_path}/**/*.txt") == ["second", "third \ufffd"]
    memory = fsspec.filesystem("memory")
    memory.pipe({"/herd/z.txt": b"z", "/herd/y.txt": b"y"})
    assert read("memory://herd/*.txt") == ["y", "z"]


@pytest.mark.parametrize("url", ["/no/such/place/*.txt", "/no/such/place", "nosuchscheme://x", "memory://empty/*"])
def test_corpus_that_matches_nothing_is_an_error_that_names_field_and_value(url: str) -> None:
    with pytest.raises(CorpusError, match=r"data\.corpus = ") as caught:
        list_corpus(url)
    assert repr(url) in str(caught.value)


@pytest.mark.parametrize("line", ["not json", '{"body": "x"}', '{"text": 3}', '["x"]'])
def test_bad_json_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "x.jsonl").write_text(f'{{"text": "good"}}\n{line}\n')
    with pytest.raises(CorpusError, match=r"x\.jsonl line 2"):
        list(list_corpus(str(tmp_path)).documents())


def test_python_stdlib_is_source_text_without_tests() -> None:
    corpus = list_corpus("python-stdlib")
    assert list(corpus.paths) == sorted(corpus.paths)
    assert not [p for p in corpus.paths if "/test/" in p or "site-packages" in p or not p.endswith(".py")]
    documents = list(corpus.documents())
    assert 4_000_000 < sum(len(d.encode()) for d in documents) <= STDLIB_MAX_BYTES * 1.01
    assert any(d.startswith('r"""HTTP/1.1 client library') for d in documents)


@pytest.mark.parametrize(
    ("change", "vocab_size", "message"),
    [
        ({}, 257, r"model\.vocab_size = 257"),
        ({"validation_fraction": 1.0}, VOCAB, r"data\.validation_fraction = 1\.0"),
        ({"seq_len": 0}, VOCAB, r"data\.seq_len = 0"),
        ({"global_batch": 0}, VOCAB, r"data\.global_batch = 0"),
        ({"seq_len": 10**6}, VOCAB, r"train split has no 1000001 tokens"),
        ({"validation_fraction": 1e-9, "seq_len": 2000}, VOCAB, "validation split has no 2001 tokens"),
    ],
)
def test_settings_out_of_range_are_named(prepared, tmp_path: Path, change: dict, vocab_size: int, message: str) -> None:
    config = dataclasses.replace(prepared[0], cache_dir=str(tmp_path), **change)
    with pytest.raises(ValueError, match=message):
        prepare(config, vocab_size, SEED)


def test_command_reports_errors_in_one_line(prepared, tmp_path: Path) -> None:
    result = run_prepare(dataclasses.replace(prepared[0], corpus=str(tmp_path / "nothing")))
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("CorpusError: data.corpus = ") and result.stderr.count("\n") == 1
