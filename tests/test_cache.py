"""`apc cache` lists each store with its model and text."""

import json

import tiny
import train
from apc.collect.manifest import manifest_checksum, read_manifest
from apc.commands import cache
from apc.config.load import load_config


def test_a_store_is_listed_with_its_model_and_text_and_an_old_one_with_a_dash(tmp_path, capsys):
    folder = tiny.make_workplace(tmp_path)
    train.train(load_config(None, tiny.tiny_overrides(folder, stage="collect", **{"data.score_windows": 1})))
    capsys.readouterr()
    cache.main(["--dir", str(folder / "stores")])
    assert "model on fit.txt, 640 tokens × 3 layers, neuron" in capsys.readouterr().out

    (path,) = cache.stores(folder / "stores")
    manifest = read_manifest(path)
    del manifest["source"]  # as earlier versions wrote it
    (path / "manifest.json").write_text(json.dumps(manifest | {"checksum": manifest_checksum(manifest)}))
    cache.main(["--dir", str(folder / "stores")])
    assert "–, 640 tokens × 3 layers, neuron" in capsys.readouterr().out
    train.train(load_config(None, tiny.tiny_overrides(folder, stage="collect", **{"data.score_windows": 1})))
    assert f"patterns: found {path}" in capsys.readouterr().out
