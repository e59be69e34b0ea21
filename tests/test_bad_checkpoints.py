"""Folders of weights that are refused: in one line that says what is wrong, and nothing is written."""

import json
import os
import runpy
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import BNB, EMBEDDING, HEAD, SHARD, write_byte_tokenizer, write_model, write_weights

from minitune.checkpoint import load_model
from minitune.hub import INDEX

ROOT = Path(__file__).resolve().parents[1]


def change_json(file, change):
    def damage(folder):
        value = json.loads((folder / file).read_text())
        change(value)
        (folder / file).write_text(json.dumps(value))

    return damage


def change_tensors(change):
    def damage(folder):
        tensors = load_file(folder / SHARD)
        change(tensors)
        save_file(tensors, folder / SHARD)

    return damage


def change_bytes(change, file=SHARD):
    return lambda folder: (folder / file).write_bytes(change((folder / file).read_bytes()))


def put_first(target):
    def change(index):
        index["weight_map"][next(iter(index["weight_map"]))] = target

    return change_json(INDEX, change)


def other_names(folder):
    tensors = write_model(folder)
    for name in [n for n in tensors if "layers.1" in n][:6]:
        tensors[name.replace("layers.1", "layers.7")] = tensors.pop(name)
    (folder / INDEX).unlink()
    write_weights(folder, tensors)


def outdated_phi(folder):
    tensors = {n.replace("self_attn", "mixer"): t for n, t in write_model(folder, "phi").items()}
    (folder / INDEX).unlink()
    write_weights(folder, tensors)


def pickled(folder):
    for file in (*folder.glob("*.safetensors"), folder / INDEX):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"not looked at")


def first_of(tensors, dims=2):
    return next(name for name, tensor in tensors.items() if tensor.ndim == dims)


def with_first(make):
    return change_tensors(lambda tensors: tensors.update({first_of(tensors): make(tensors[first_of(tensors)])}))


def first_value(value):
    def make(tensor):
        tensor[0, 0] = value
        return tensor

    return make


def name_twice(folder):
    raw = (folder / SHARD).read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    name = next(name for name in header if name != "__metadata__")
    text = json.dumps(header)[:-1] + f', "{name}": {json.dumps(header[name])}}}'
    (folder / SHARD).write_bytes(struct.pack("<Q", len(text)) + text.encode() + raw[start:])


def headless(folder):
    tensors = {n.removeprefix("model."): t for n, t in write_model(folder).items() if n != HEAD}
    (folder / INDEX).unlink()
    write_weights(folder, tensors)


def long_names(folder):
    tensors = write_model(folder)
    (folder / INDEX).unlink()
    del tensors[EMBEDDING]
    write_weights(folder, tensors | {"x" * 1000 + str(i): torch.ones(1) for i in range(9)})


def metas_names(folder):
    tensors = write_model(folder)
    (folder / INDEX).unlink()
    tensors["tok_embeddings.weight"] = tensors.pop(EMBEDDING)
    write_weights(folder, tensors)


WHOLE = rf"{SHARD} is not a whole safetensors file \(.+\)\. It is damaged or incomplete"
DAMAGES = {  # name: (what happens to a good folder of two shards, what the message says)
    "empty-shard": (change_bytes(lambda b: b""), WHOLE),
    "cut-inside-the-header": (change_bytes(lambda b: b[:50]), WHOLE),
    "cut-inside-a-tensor": (change_bytes(lambda b: b[:-100]), WHOLE),
    "bytes-at-the-end": (change_bytes(lambda b: b + b"x"), WHOLE),
    "header-beyond-the-file": (change_bytes(lambda b: struct.pack("<Q", len(b)) + b[8:]), WHOLE),
    "header-of-2**63": (change_bytes(lambda b: struct.pack("<Q", 2**63) + b[8:]), WHOLE),
    "header-not-json": (change_bytes(lambda b: b[:8] + b"?" + b[9:]), WHOLE),
    "dtype-from-the-future": (change_bytes(lambda b: b.replace(b'"F32"', b'"F99"')), WHOLE),
    "shard-missing": (lambda f: (f / SHARD).unlink(), rf"lacks 1 of 2 files that its index names: {SHARD}"),
    "shard-a-folder": (lambda f: ((f / SHARD).unlink(), (f / SHARD).mkdir()), rf"{SHARD} cannot be read"),
    "shard-link-to-nothing": (
        lambda f: ((f / SHARD).unlink(), (f / SHARD).symlink_to(f / "blob")),
        "lacks 1 of 2 files",
    ),
    "index-out-of-the-folder": (
        put_first("../x.safetensors"),
        r"'\.\./x\.safetensors', expected a file in the same folder",
    ),
    "index-absolute": (put_first("/etc/hostname"), "'/etc/hostname', expected a file in the same folder"),
    "index-subfolder": (put_first("a/b.safetensors"), "'a/b.safetensors', expected a file in the same folder"),
    "index-dots": (put_first(".."), r"'\.\.', expected a file in the same folder"),
    "index-nul": (put_first("a\0b"), "lacks 1 of"),
    "index-number": (put_first(7), "weight_map.* is 7, expected text"),
    "index-empty": (change_json(INDEX, lambda i: i.clear()), f"{INDEX}: weight_map is missing, expected an object"),
    "index-of-nothing": (change_json(INDEX, lambda i: i["weight_map"].clear()), "weight_map is empty"),
    "index-list": (lambda f: (f / INDEX).write_text("[]"), "expected an object"),
    "shard-a-pipe": (lambda f: ((f / SHARD).unlink(), os.mkfifo(f / SHARD)), f"{SHARD} cannot be read: it is a pipe"),
    "header-that-names-a-tensor-twice": (name_twice, r"names \S+ twice in its header, which the format forbids"),
    "index-not-json": (lambda f: (f / INDEX).write_text('{"weight_map": '), f"{INDEX} is not valid JSON: line 1"),
    "names": (
        other_names,
        r"6 missing: (model\.layers\.1\.\S+ ){2}and 4 more; 6 with other names: (model\.layers\.7\.\S+ ){2}and 4 more",
    ),
    "long-names": (
        long_names,
        r"1 missing: model.embed_tokens.weight; 9 with other names: x{97}\.\.\., x{97}\.\.\. and 7 more",
    ),
    "head-missing": (headless, "The model was saved without its head"),
    "meta's-names": (metas_names, "The names are those of Meta's or Mistral's own format"),
    "shape": (with_first(lambda t: t[:, :-1].contiguous()), r"1 of another shape: \S+ \[\d+, \d+\], expected \[\d+, "),
    "transposed": (with_first(lambda t: t.flatten()), r"1 of another shape: \S+ \[\d+\], expected"),
    "float8": (
        with_first(lambda t: t.to(torch.float8_e4m3fn)),
        "1 of a dtype other than F32, F16, BF16, F64: .* F8_E4M3",
    ),
    "integers": (with_first(lambda t: t.to(torch.int8)), "1 of a dtype other than F32, F16, BF16, F64: .* I8"),
    "nan": (
        with_first(first_value(float("nan"))),
        "weight holds NaN or infinity in float32; the checkpoint is damaged",
    ),
    "infinity": (with_first(first_value(-float("inf"))), "weight holds NaN or infinity in float32"),
    "outdated-phi": (outdated_phi, r"missing: .*\. The names are those of an outdated Phi file: use the newer rev"),
    "pickle-only": (pickled, r"has neither .* it has pytorch_model\.bin: convert to safetensors first"),
    "config-not-json": (
        lambda f: (f / "config.json").write_text("{"),
        "config.json is not valid JSON: line 1, column 2",
    ),
    "config-list": (lambda f: (f / "config.json").write_text("[]"), r"config.json: it is \[\], expected an object"),
    "config-empty": (lambda f: (f / "config.json").write_text(""), "config.json is not valid JSON"),
    "config-not-text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "config.json is not UTF-8 text"),
    "config-missing": (lambda f: (f / "config.json").unlink(), "has no config.json; expected a folder with"),
    "model-type": (
        change_json("config.json", lambda c: c.update(model_type="gpt_oss")),
        "model_type is 'gpt_oss', expected one of llama, mistral, phi",
    ),
    "model-type-of-another-kind": (
        change_json("config.json", lambda c: c.update(model_type=["llama"])),
        r"model_type is \['llama'\], expected one of",
    ),
    "another-config": (
        change_json("config.json", lambda c: c.update(hidden_size=32)),
        r"\d+ of another shape: \S+ \[264, 64\], expected \[264, 32\]",
    ),
    "absurd-sizes": (
        change_json("config.json", lambda c: c.update(vocab_size=2**62)),
        "vocab_size is 4611686018427387904, expected a whole number from 1 to 2147483647",
    ),
    "quantised-otherwise": (
        change_json("config.json", lambda c: c.update(quantization_config={"quant_method": "gptq", "bits": 4})),
        "quant_method='gptq'",
    ),
    "4-bit-in-name-only": (
        change_json("config.json", lambda c: c.update(quantization_config=BNB)),
        "config.json has a quantization_config for 4-bit weights, but no weight is in 4 bit",
    ),
}


@pytest.fixture(scope="module")
def good_folder(tmp_path_factory):
    """Two shards, a tokenizer of bytes, and rows to train on beside the folder."""
    folder = tmp_path_factory.mktemp("good") / "model"
    write_model(folder, shards=2)
    write_byte_tokenizer(folder, ["<|endoftext|>"], eos_token="<|endoftext|>")
    return folder


def run_train(folder, work, capsys, monkeypatch, *options):
    """(exit code, stderr, the files that it left) of scripts/train.py, in the empty folder `work`."""
    (work / "rows.json").write_text(json.dumps([{"prompt": "Say a.", "completion": " a"}] * 4))
    before = set(work.rglob("*"))
    argv = ["train.py", "--model", str(folder), "--data", "rows.json", "--test-size", "0", "--run", "runs/it"]
    monkeypatch.setattr(sys, "argv", [*argv, "--device", "cpu", "--dtype", "fp32", "--max-steps", "1", *options])
    monkeypatch.chdir(work)
    capsys.readouterr()
    code = 0
    try:
        runpy.run_path(str(ROOT / "scripts/train.py"), run_name="__main__")
    except SystemExit as exit:
        code = exit.code
    return code, capsys.readouterr().err, set(work.rglob("*")) - before


@pytest.mark.parametrize("name", DAMAGES)
def test_a_bad_folder_is_refused_in_one_line_and_nothing_is_written(name, good_folder, tmp_path, capsys, monkeypatch):
    damage, message = DAMAGES[name]
    folder, work = tmp_path / "model", tmp_path / "work"
    shutil.copytree(good_folder, folder)
    work.mkdir()
    damage(folder)
    with pytest.raises(ValueError, match=message) as raised:
        load_model(folder)
    assert "\n" not in str(raised.value) and str(folder) in str(raised.value)
    assert len(str(raised.value).replace(str(folder), "")) < 450
    code, stderr, files = run_train(folder, work, capsys, monkeypatch)
    assert code == 2 and stderr.startswith("error: ") and stderr.count("\n") == 1, stderr
    assert not files


def test_the_folder_that_the_tests_break_is_good(good_folder, tmp_path, capsys, monkeypatch):
    code, stderr, files = run_train(good_folder, tmp_path, capsys, monkeypatch)
    assert code == 0, stderr
    assert {"adapter", "config.json", "metrics.jsonl"} <= {path.name for path in files}


def test_targets_that_no_layer_has_leave_nothing_behind(good_folder, tmp_path, capsys, monkeypatch):
    code, stderr, files = run_train(good_folder, tmp_path, capsys, monkeypatch, "--lora-targets", "Wqkv")
    assert code == 2 and "no linear layer is named Wqkv; this model has q_proj" in stderr and not files


def test_weights_too_large_for_fp16_are_refused(tmp_path):
    tensors = write_model(tmp_path)
    tensors["model.norm.weight"][3] = 70000.0
    write_weights(tmp_path, tensors)
    load_model(tmp_path, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="model.norm.weight holds NaN or infinity in float16; .* too large for this"):
        load_model(tmp_path, dtype=torch.float16)


def test_a_damaged_weight_is_named_when_it_is_quantised(tmp_path):
    tensors = write_model(tmp_path)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    write_weights(tmp_path, tensors)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: .* has NaN or infinity in 1 of"):
        load_model(tmp_path, quantize="nf4")


def test_unknown_ways_to_quantise_are_refused_before_anything_is_looked_up():
    with pytest.raises(ValueError, match="quantize is 'int8', expected none, nf4 or nf4-dq"):
        load_model("no-such-model", quantize="int8")


def test_a_bad_adapter_is_refused_before_the_weights_are_read(tmp_path):
    write_model(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"r": 4, "use_dora": True}))
    with pytest.raises(ValueError, match="adapter_config.json: use_dora is True"):
        load_model(tmp_path / "model", adapter=tmp_path / "adapter")
