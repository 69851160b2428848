"""Damaged or malicious files are read correctly or rejected in one line, in little memory and time.

Nothing in them is executed.
"""

import json
import os
import pickle
import random
import resource
import secrets
import shutil
import time

import pytest
import torch

import tiny
import train
from apc import load_run
from apc.cluster import codebook
from apc.cluster.codebook import Codebook
from apc.collect import manifest
from apc.collect.store import PatternStore
from apc.config.load import load_config
from apc.predict import predictor
from apc.predict.predictor import Predictor
from apc.utils import tensor_files
from apc.utils.errors import UserError

MUTANTS = int(os.environ.get("APC_MUTANTS", 5_000))  # over all readers
NUMBERS = (0, 1, 2, 255, 256, 65535, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 62, (1 << 64) - 1)
WORDS = (
    b"null",
    b"true",
    b"-1",
    b"1e999",
    b"NaN",
    b"{}",
    b"[]",
    b'""',
    b"9" * 30,
    b'"../../x"',
    b"[[[[[[[[",
    b'"/etc/passwd"',
    b"\xff\xfe",
    b"1.5",
    b'"uint8"',
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tiny.make_workplace(tmp_path_factory.mktemp("fuzz"))
    for form in ("cluster", "low-bit"):
        train.train(
            load_config(
                None,
                tiny.tiny_overrides(
                    folder,
                    stage="predict",
                    **{"predictor.form": form, "run.name": form, "collect.ffn_inputs": "stored"},
                ),
            )
        )
    return folder


def mutated(content: bytes, draw: random.Random) -> bytes:
    """The bytes with one to four changes.

    A change replaces a bit, a byte, a number or a JSON value, or deletes or repeats a piece.
    """
    data = bytearray(content)
    head = min(len(data), 1 << draw.choice((4, 8, 12, 30)))  # most headers are at the beginning
    for _ in range(draw.randint(1, 4)):
        at, kind = draw.randrange(max(1, min(head, len(data)))), draw.randrange(7)
        if kind == 0 and data:
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1 and data:
            data[at] = draw.randrange(256)
        elif kind == 2:
            data[at : at + 8] = draw.choice(NUMBERS).to_bytes(8, "little")
        elif kind == 3:
            del data[at : at + draw.choice((1, 7, 64, len(data)))]
        elif kind == 4:
            data[at:at] = data[at : at + draw.choice((1, 9, 200))]
        else:
            places = [index for index, byte in enumerate(data[:head]) if byte in b":[,"]
            if places:
                begin = draw.choice(places) + 1
                end = next((index for index in range(begin, len(data)) if data[index] in b",]}"), len(data))
                data[begin:end] = draw.choice(WORDS)
    return bytes(data)


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def check(path, content, read, agrees, count, seed):
    draw = random.Random(seed)
    refused = 0
    for number in range(count):
        data = mutated(content, draw)
        path.write_bytes(data)
        before, began = peak(), time.monotonic()
        try:
            found = read()
        except UserError as error:
            refused += 1
            assert "\n" not in str(error), (seed, number)
        else:
            assert agrees(found), f"seed {seed}, mutant {number}: read with other content"
        assert peak() - before <= 2 * len(data) + (16 << 20), (
            f"seed {seed}, mutant {number}: {peak() - before} bytes for {len(data)}"
        )
        assert time.monotonic() - began < 5, (seed, number)
    path.write_bytes(content)
    read()
    assert refused > count / 4, refused


@pytest.mark.parametrize("kind", ["codebook", "predictor", "low-bit predictor", "manifest", "shard"])
def test_mutants_are_read_correctly_or_rejected(made, tmp_path, kind):
    seed = int(os.environ.get("APC_SEED", secrets.randbelow(1 << 30)))  # a run seeds `random`
    print(f"APC_SEED={seed}")
    run = load_run(made / "runs" / ("low-bit" if kind.startswith("low") else "cluster"))
    if kind in ("manifest", "shard"):
        store = tmp_path / "store"
        shutil.copytree(next(path for path in (made / "stores").iterdir() if path.is_dir()), store)
        path = store / "manifest.json" if kind == "manifest" else next(iter(sorted(store.glob("*-patterns*.npy"))))
        read = lambda: PatternStore(store).block(0, 2, ["patterns.neuron"])
        about = lambda info: str({name: value for name, value in vars(info).items() if name != "activity"})
        expected, info = read().patterns["neuron"], about(PatternStore(store).info)
        agrees = lambda block: (
            torch.equal(block.patterns["neuron"], expected)
            and (kind == "shard" or about(PatternStore(store).info) == info)
        )
    else:
        source = run.folder.codebook if kind == "codebook" else run.folder.predictor
        path = tmp_path / source.name
        shutil.copy(source, path)
        reader = Codebook if kind == "codebook" else Predictor
        tensors = lambda found: found.sites["neuron"].tensors() if kind == "codebook" else found.state_dict()
        read, held = lambda: reader.load(path), tensors(reader.load(path))
        agrees = lambda found: (
            tensors(found).keys() == held.keys()
            and all(torch.equal(value, held[name]) for name, value in tensors(found).items())
        )
    check(path, path.read_bytes(), read, agrees, MUTANTS // 5, seed)


VALUES = (
    None,
    True,
    -1,
    0,
    1,
    1 << 70,
    0.5,
    -2.5,
    float("inf"),
    "",
    "x",
    "neuron",
    [],
    ["neuron"],
    [1],
    {},
    {"neuron": 1},
    {"x": "y"},
    [[]],
)


def altered(value: object, draw: random.Random) -> object:
    """A JSON value with one item changed, removed or added."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        name = draw.choice(list(value))
        kind = draw.random()
        return {other: item for other, item in value.items() if other != name} | (
            {} if kind < 0.1 else {"more": draw.choice(VALUES)} if kind < 0.15 else {name: altered(value[name], draw)}
        )
    if isinstance(value, list) and value and draw.random() < 0.8:
        index = draw.randrange(len(value))
        return value[:index] + ([] if draw.random() < 0.2 else [altered(value[index], draw)]) + value[index + 1 :]
    return draw.choice(VALUES)


@pytest.mark.parametrize("kind", ["codebook", "predictor", "low-bit predictor", "manifest"])
def test_mutants_with_valid_checksums_are_read_or_rejected(made, tmp_path, kind):
    """Anyone can compute a checksum, so the content of a file must be consistent too."""
    seed = int(os.environ.get("APC_SEED", secrets.randbelow(1 << 30)))
    print(f"APC_SEED={seed}")
    draw, refused, count = random.Random(seed), 0, 300
    run = load_run(made / "runs" / ("low-bit" if kind.startswith("low") else "cluster"))
    if kind == "manifest":
        folder = tmp_path / "store"
        shutil.copytree(next(path for path in (made / "stores").iterdir() if path.is_dir()), folder)
        held = json.loads((folder / "manifest.json").read_text())
        held.pop("checksum")

        def write():
            found = altered(held, draw)
            signed = found | {"checksum": manifest.manifest_checksum(found)} if isinstance(found, dict) else found
            (folder / "manifest.json").write_text(json.dumps(signed))

        def read():
            found = PatternStore(folder)
            found.block(0, min(2, found.info.windows), found.info.fields()[:1])
    else:
        source = run.folder.codebook if kind == "codebook" else run.folder.predictor
        reader, module = (Codebook, codebook) if kind == "codebook" else (Predictor, predictor)
        path = tmp_path / source.name
        header, tensors = tensor_files.load_tensors(source, module.KIND, (module.VERSION,))

        def write():
            given = dict(tensors)
            if draw.random() < 0.3:
                name = draw.choice(list(given))
                given[name] = draw.choice(
                    [given[name][:1], given[name].double(), given[name].flatten(), torch.full_like(given[name], 1)]
                )
            tensor_files.save_tensors(
                path, module.KIND, module.VERSION, altered(header, draw) if draw.random() < 0.8 else header, given
            )

        read = lambda: reader.load(path)
    for number in range(count):
        write()
        try:
            read()
        except UserError as error:
            refused += 1
            assert "\n" not in str(error), (seed, number)
    assert refused > count / 4, refused


def test_nothing_in_a_file_is_executed(made, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    run = load_run(made / "runs" / "cluster")
    trap = pickle.dumps(Trap())
    for target in (run.folder.codebook, run.folder.predictor, run.folder.checkpoint("cluster")):
        copy = tmp_path / "run"
        shutil.copytree(run.folder.path, copy)
        (copy / target.relative_to(run.folder.path)).write_bytes(trap)
        for name in ("codebook", "predictor"):
            if target == run.folder.checkpoint("cluster"):
                (copy / f"{name}.safetensors").unlink()
        with pytest.raises(UserError):
            words = tiny.tiny_overrides(
                made, stage="predict", **{"run.dir": tmp_path, "run.name": "run", "collect.ffn_inputs": "stored"}
            )
            train.train(load_config(None, words))
        shutil.rmtree(copy)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["../../outside.npy", "/etc/passwd", "00000-patterns.neuron.npy/../../x"])
def test_a_manifest_cannot_name_a_file_outside_its_folder(made, tmp_path, name):
    store = tmp_path / "store"
    shutil.copytree(next(path for path in (made / "stores").iterdir() if path.is_dir()), store)
    manifest = json.loads((store / "manifest.json").read_text())
    files = manifest["shards"][0]["files"]
    files[name] = files.pop(next(iter(files)))
    (store / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="shard 0 does not list exactly its own files"):
        PatternStore(store)  # whatever its checksum says
