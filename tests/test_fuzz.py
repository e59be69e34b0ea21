"""Damaged files and odd command lines, over every reader: one clear line, and never a traceback, a hang or a crash.

hypothesis chooses a file, a place in it and what is put there; a process of its own (fuzz_readers.py) reads the result."""

import contextlib
import json
import os
import select
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from small import sizes, write_byte_tokenizer

from minitune import hub
from minitune.config import RECIPES
from minitune.files import write_json
from minitune.jobs.evaluate import EvaluateConfig, evaluate
from minitune.jobs.sweep import SweepConfig, sweep
from minitune.models import build, build_encoder
from minitune.quant import NF4Linear
from minitune.train import TrainConfig, train

SCALE = int(os.environ.get("MINITUNE_FUZZ_SCALE", 1))  # times as many inputs, drawn anew at every start where above 1
LIMIT = 4  # seconds of CPU for one input
SIZES = sizes(
    vocab_size=258,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=64,
)
FILES = {  # reader -> (the files that are damaged, how many inputs)
    "model": (["model/config.json", "model/generation_config.json", "model/model.safetensors"], 300),
    "sharded": (["sharded/model.safetensors.index.json", "sharded/part2.safetensors"], 100),
    "4bit": (["4bit/config.json", "4bit/model.safetensors"], 150),
    "encoder": (["encoder/config.json", "encoder/model.safetensors"], 60),
    "adapter": (["adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/minitune.json"], 120),
    "sentencepiece": ([f"sentencepiece/{name}" for name in ("tokenizer.model", "tokenizer_config.json",
                                                           "added_tokens.json", "config.json")], 150),
    "tokenizers": ([f"tokenizers/{name}" for name in ("tokenizer.json", "tokenizer_config.json",
                                                      "generation_config.json")], 150),
    "json rows": (["rows/rows.json"], 60),
    "jsonl rows": (["rows/rows.jsonl"], 60),
    "csv rows": (["rows/rows.csv"], 60),
    "questions": (["questions/asked.txt"], 20),
    "answers": (["questions/out.jsonl", "questions/out.jsonl.settings.json"], 60),
    "answers as a list": (["questions/out.json", "questions/out.json.settings.json"], 40),
    "json texts": (["texts/answers.json", "texts/rows.json"], 30),
    "jsonl texts": (["texts/answers.jsonl", "texts/rows.jsonl"], 30),
    "csv texts": (["texts/answers.csv", "texts/rows.csv"], 20),
    "txt texts": (["texts/answers.txt", "texts/rows.txt"], 20),
    "state": (["run/last/state.safetensors"], 100),
    "resume": ([f"run/{name}" for name in ("config.json", "environment.json", "metrics.jsonl", "samples.jsonl",
                                           "last/state.safetensors")], 50),
    "evaluate a run": (["run/config.json", "run/adapter/adapter_config.json", "run/GENERATIONS"], 50),
    "sweep a run": (["run/sweep/sweep.json", "run/sweep/POINT/evaluation.json"], 20),
    "report a run": ([f"run/{name}" for name in ("evaluation.json", "metrics.jsonl", "environment.json", "config.json",
                                           "sweep/sweep.json", "sweep/POINT/evaluation.json")], 70),
    "study": ([f"study/phi2_topk50_nb5_t1{end}.json" for end in ("", "_score", "_HE", "_HE_score")], 130),
    "config": (["options/train.json"], 60),
    "config of generate": (["options/generate.json"], 30),
    "config of sweep": (["options/sweep.json"], 30),
}  # fmt: skip
COMMANDS = {  # job -> (a command line that is damaged, how many)
    "train": ("--model tiny-phi --data a.json --run r --test-size 0.1 --max-steps 3 --lora-targets q_proj v_proj "
              "--learning-rate 1e-3 --dtype bf16 --device cpu --checkpointing --warmup 0.1 --save-every 2", 60),
    "generate": ("--model tiny-llama --prompt hello --num-beams 2 --temperature 0.5 --stop . --json --out o.jsonl", 40),
    "chat": ("--model tiny-llama --system Be.brief --top-k 4 --max-new-tokens 9 --device cpu", 20),
    "evaluate": ("--predictions a.txt --references b.txt --metrics bleu rouge_l --resamples 20 --out c.json", 40),
    "sweep": ("--run r --top-k 30 40 --temperature 0 0.5 --grid full --base --resamples 20", 40),
    "report": ("runs other --out page.html --answers 2 --resamples 20", 20),
    "inspect_data": ("--model tiny-phi --data a.json --rows 3 --batch-size 2 --out page.html", 20),
}  # fmt: skip
TEXTS = ["", " ", "\x1b[2J\x07\r", "\ud800", "\u202eabc\u2028", "a" * 100_000, "\x00", "../../x", "/dev/null", "~nosuchuser/x",
         "line\nline", "-1", "NaN", "é中\U0001f600", "<s>[INST]", "null"]  # fmt: skip
NUMBERS = ["0", "-1", "1", "2", "0.5", "-0.0", "NaN", "Infinity", "-Infinity", "1e400", "-1e400", "1e-400", "1e39", "2147483648",
           "9223372036854775807", "-9223372036854775809", "1" + "0" * 400, "9" * 5000]  # fmt: skip
VALUES = [  # JSON text
    *NUMBERS, *map(json.dumps, TEXTS), "true", "false", "null", "[]", "{}", "[null]", '[""]', "[[1]]", '{"": null}', '{"a": 1}',
    "[1, 2]", '["q_proj", 5]', "[" * 100_000 + "]" * 100_000, "[" * 500 + "]" * 500, '{"a":' * 50_000 + "1" + "}" * 50_000,
    "[" + "1," * 20_000 + "1]",
]  # fmt: skip


def places(value, path=()):
    """Every place in a JSON value: the keys and indices that lead there. Also into text that holds JSON."""
    yield path
    inner = json_in(value)
    if isinstance(value, (dict, list)) or inner is not None:
        value = value if inner is None else inner
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def json_in(value):
    """The object that a text holds as JSON, or None."""
    if isinstance(value, str) and value.startswith("{"):
        with contextlib.suppress(ValueError):
            return json.loads(value)
    return None


def put(value, path, act, raw):
    """JSON text of `value` with what `act` says done at the place `path`; raw: JSON text that is put there."""
    inner = json_in(value)
    if inner is not None and path:
        return json.dumps(put(inner, path, act, raw))
    if not path:
        if act == "wrap":
            return f"[{json.dumps(value)}]"
        return (
            ("[]" if isinstance(value, list) else "{}") if act == "empty" and isinstance(value, (dict, list)) else raw
        )
    key, *rest = path
    if isinstance(value, list):
        parts = [put(v, rest, act, raw) if i == key and (rest or act not in ("drop", "twice")) else json.dumps(v)
                 for i, v in enumerate(value)]  # fmt: skip
        if not rest and act == "drop":
            del parts[key]
        if not rest and act == "twice":
            parts.insert(key, parts[key])
        return f"[{', '.join(parts)}]"
    parts = []
    for name, v in value.items():
        text = f"{json.dumps(name)}: {put(v, rest, act, raw) if name == key and (rest or act != 'drop') else json.dumps(v)}"
        if name == key and not rest and act in ("drop", "twice", "rename"):
            parts += {
                "drop": [],
                "twice": [f"{json.dumps(name)}: {json.dumps(v)}", f"{json.dumps(name)}: {raw}"],
                "rename": [f"{raw if raw.startswith(chr(34)) else json.dumps(name + '_')}: {json.dumps(v)}"],
            }[act]
        else:
            parts.append(text)
    return f"{{{', '.join(parts)}}}"


def damage_json(text, place, act, raw):
    value = json.loads(text)
    found = list(places(value))
    return put(value, found[place % len(found)], act, raw).encode("utf-8", "surrogatepass")


def damage_bytes(content, place, act, raw):
    """Bytes with some flipped, cut off, left out, inserted, zeroed or doubled."""
    at = place % (len(content) + 1)
    piece = raw.encode("utf-8", "surrogatepass")[:5000]
    return {
        "put": content[:at] + piece + content[at:],
        "drop": content[:at] + content[at + len(piece) :],
        "twice": content[: at + 20] + content[at:],
        "rename": content[:at] + bytes([content[at % len(content)] ^ (1 << place % 8)]) + content[at + 1 :],
        "empty": content[:at] + bytes(len(content[at : at + 8])) + content[at + 8 :],
        "wrap": content[:at],
    }[act]


def damage_safetensors(content, place, act, raw):
    """The header as JSON, the JSON of a quant_state, the length, or any byte, more often in the header."""
    size = struct.unpack("<Q", content[:8])[0]
    header, body = content[8 : 8 + size], content[8 + size :]
    kind, place = place % 8, place // 8
    if kind < 4:
        header = damage_json(header, place, act, raw)
    elif kind == 4 and b"quant_state" in header:
        return damage_quant_state(json.loads(header), body, place, act, raw)
    elif kind == 5:
        return struct.pack("<Q", place % 2**64) + header + body
    else:
        whole = content if kind == 7 else content[: 8 + size]
        return damage_bytes(whole, place, act, raw) + content[len(whole) :]
    return struct.pack("<Q", len(header)) + header + body


def damage_quant_state(header, body, place, act, raw):
    names = [name for name in header if name != "__metadata__"]
    names.sort(key=lambda name: header[name]["data_offsets"])
    chosen = [name for name in names if "quant_state" in name]
    chosen, parts, at = chosen[place % len(chosen)], [], 0
    for name in names:
        start, end = header[name]["data_offsets"]
        part = body[start:end]
        if name == chosen:
            part = damage_json(part, place, act, raw)
            header[name]["shape"] = [len(part)]
        header[name]["data_offsets"] = [at, at + len(part)]
        at += len(part)
        parts.append(part)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(parts)


def damage_lines(content, place, act, raw):
    """One line as JSON, or lines that are left out, doubled or moved."""
    lines = content.split(b"\n")
    which, place = place % (len(lines) - 1), place // len(lines)
    if act == "empty":
        lines[which], lines[0] = lines[0], lines[which]
    elif act in ("drop", "twice") and place % 2:
        lines[which : which + 1] = [lines[which]] * (2 * (act == "twice"))
    else:
        lines[which] = damage_json(lines[which], place, act, raw)
    return b"\n".join(lines)


def damage(name, content, place, act, raw, is_bytes):
    """The content of the file `name` after one act."""
    suffix = Path(name).suffix
    with_rules = {".json": damage_json, ".jsonl": damage_lines, ".safetensors": damage_safetensors}.get(suffix)
    if is_bytes or with_rules is None:
        return damage_bytes(content, place, act, raw)
    return with_rules(content, place, act, raw)


def damage_command(line, place, act, raw, is_bytes):
    """A command line with one word changed. A null byte cannot be in one."""
    words, text = line.split(), (json.loads(raw) if raw.startswith('"') else raw)[:100_000].replace("\0", "")
    at = place % len(words)
    if is_bytes and words[at].startswith("--"):
        return [*words[:at], words[at][: 3 + place % 5], *words[at + 1 :]]
    changed = {
        "put": [text],
        "drop": [],
        "twice": [words[at]] * 2,
        "rename": [words[at][:-1]],
        "empty": [""],
        "wrap": [words[at], text],
    }
    return [*words[:at], *changed[act], *words[at + 1 :]]


# --- what is damaged ---


def make_tokenizer(folder):
    """One token a byte."""
    folder.mkdir(parents=True)
    write_byte_tokenizer(folder, ["<s>", "</s>"], bos_token="<s>", eos_token="</s>", add_bos_token=True)
    write_json(folder / "generation_config.json", {"eos_token_id": 1, "temperature": 0.5, "do_sample": True})


def make_model(folder):
    """The same weights in model/, in two files in sharded/, and in 4 bit in 4bit/."""
    config = {
        "model_type": "llama", "bos_token_id": 0, "eos_token_id": 1, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                            "high_freq_factor": 4.0, "original_max_position_embeddings": 32}, **SIZES,
    }  # fmt: skip
    tensors = build(config).state_dict()
    for name in ("model", "sharded", "4bit"):
        make_tokenizer(folder / name)
        write_json(folder / name / "config.json", config)
    save_file(tensors, folder / "model/model.safetensors", metadata={"format": "pt"})
    halves = {
        file: dict(list(tensors.items())[i::2]) for i, file in enumerate(("part1.safetensors", "part2.safetensors"))
    }
    for file, part in halves.items():
        save_file(part, folder / "sharded" / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in halves.items() for name in part}
    write_json(
        folder / "sharded/model.safetensors.index.json", {"metadata": {"total_size": 9}, "weight_map": weight_map}
    )
    stored = dict(tensors)
    for name in [name for name in tensors if "proj" in name]:
        layer = NF4Linear.from_weight(stored.pop(name), None, torch.float32, double_quant="gate" in name)
        stored |= layer.to_bnb(name.removesuffix(".weight"))
    bnb = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    save_file(stored, folder / "4bit/model.safetensors", metadata={"format": "pt"})
    write_json(folder / "4bit/config.json", {**config, "quantization_config": bnb})


def make_folder(folder):
    """Write every file that is damaged later: small, whole and readable."""
    make_model(folder)
    encoder = {"model_type": "bert", "type_vocab_size": 2, "pad_token_id": 0, "hidden_act": "gelu", **SIZES}
    (folder / "encoder").mkdir()
    write_json(folder / "encoder/config.json", encoder)
    save_file(build_encoder(encoder).state_dict(), folder / "encoder/model.safetensors", metadata={"format": "pt"})
    for name, model, files in (
        (
            "sentencepiece",
            "tiny-llama",
            ("tokenizer.model", "tokenizer_config.json", "config.json", "generation_config.json"),
        ),
        (
            "tokenizers",
            "tiny-phi",
            ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"),
        ),
    ):
        (folder / name).mkdir()
        for file in files:
            shutil.copy(hub.resolve(model) / file, folder / name)
    write_json(folder / "sentencepiece/added_tokens.json", {"<extra>": 1024, "<more>": 1025})
    rows = [{"instruction": f"say {i}", "input": "x" * (i % 2), "output": f"it is {i}"} for i in range(8)]
    for name in ("rows", "texts"):
        write_json(folder / name / "rows.json", rows)
        (folder / name / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        header = "instruction,input,output\n"
        (folder / name / "rows.csv").write_text(header + "".join(",".join(row.values()) + "\n" for row in rows))
    write_json(folder / "run.json", [{"prompt": row["instruction"], "completion": row["output"]} for row in rows])
    texts = [row["output"] for row in rows]
    write_json(folder / "texts/answers.json", texts)
    (folder / "texts/answers.jsonl").write_text("".join(json.dumps({"answer": text}) + "\n" for text in texts))
    (folder / "texts/answers.csv").write_text("answer\n" + "\n".join(texts) + "\n")
    for name in ("answers", "rows"):
        (folder / f"texts/{name}.txt").write_text("\n".join(texts) + "\n")
    (folder / "questions").mkdir()
    (folder / "questions/asked.txt").write_text("one?\ntwo?\n")
    make_options(folder / "options")
    make_study(folder / "study")


def make_run(folder):
    """A trained and evaluated run with a sweep, the working folder being `folder`."""
    quiet = lambda line: None
    options = {"model": "model", "data": "run.json", "run": "run", "device": "cpu", "dtype": "fp32", "max_steps": 3}
    train(TrainConfig(**options, test_size=2.0, lora_rank=2, learning_rate=1e-2, sample_tokens=2, batch_size=2), quiet)
    asked = {"run": "run", "resamples": 20}
    evaluate(EvaluateConfig(max_new_tokens=2, **asked), quiet)
    sweep(SweepConfig(num_beams=(1,), top_k=(5, 50), do_sample=False, max_new_tokens=(2,), **asked), quiet)
    shutil.copytree("run/adapter", "adapter")


def make_options(folder):
    write_json(
        folder / "train.json", {"model": "tiny-phi", **RECIPES["tiny-phi"], "data": "a.json", "warmup": 0.1, "seed": 1}
    )
    write_json(
        folder / "generate.json", {"model": "tiny-phi", "prompt": "x", "stop": ["."], "temperature": 0.7, "json": True}
    )
    write_json(
        folder / "sweep.json", {"run": "r", "top_k": [30, 50], "temperature": [0.5], "study": False, "train": []}
    )


def make_study(folder):
    stem = "phi2_topk50_nb5_t1"
    write_json(folder / f"{stem}.json", ["an answer", "another"])
    write_json(folder / f"{stem}_score.json", {"Perplexity": 20.5, "BLEU": 0.1, "ROUGE-L": 0.3, "BERTScore": 0.8})
    grades = {"grammatical_correctness": 5, "coherence": 4, "correctness_of_answer": 3}
    write_json(folder / f"{stem}_HE.json", [{"index": i, **grades, "comment": "good"} for i in range(2)])
    averages = {f"average_{name}": value for name, value in grades.items()} | {"human_evaluation_average": 4.0}
    write_json(folder / f"{stem}_HE_score.json", averages)


class Reader:
    """The process that reads, started again where it died."""

    def __init__(self, folder):
        self.folder, self.process = folder, None

    def start(self):
        script = Path(__file__).with_name("fuzz_readers.py")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "bufsize": 0}
        with open(self.folder / "stderr.txt", "wb") as errors:
            pipes["stderr"] = errors
            command = [sys.executable, "-W", "ignore", str(script)]
            self.process = subprocess.Popen(command, cwd=self.folder, env=environment, **pipes)
        assert self.reply(120) is not None, self.errors()

    def reply(self, seconds):
        """The answer, or None where there was none in this time or the process has ended."""
        line, deadline = b"", time.monotonic() + seconds
        while not line.endswith(b"\n") and select.select([self.process.stdout], [], [], deadline - time.monotonic())[0]:
            if not (more := self.process.stdout.readline()):
                return None
            line += more
        return json.loads(line) if line.endswith(b"\n") else None

    def read(self, reader, argv=()):
        """Let `reader` read what is there. What is wrong with how it ended, in words, or None."""
        if self.process is None:
            self.start()
        self.process.stdin.write(json.dumps({"reader": reader, "argv": list(argv)}).encode() + b"\n")
        answer = self.reply(30)
        if answer is None:
            self.stop()
            code = self.process.returncode
            self.process = None
            return f"no answer in 30 s, or a crash (exit code {code}): {self.errors()}"
        if answer["seconds"] > LIMIT:
            return f"it took {answer['seconds']:.1f} s of CPU time, expected at most {LIMIT}"
        self.refused = answer["refused"]
        return answer["fault"]

    def read_whole(self, reader):
        """Reads what is not damaged, which must not be refused."""
        fault = self.read(reader)
        assert fault is None and not self.refused, fault or self.refused

    def stop(self):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()

    def errors(self):
        return (self.folder / "stderr.txt").read_bytes()[-2000:].decode("utf-8", "replace")


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    before = Path.cwd()
    os.chdir(folder)
    try:
        torch.manual_seed(0)
        make_folder(folder)
        make_run(folder)
        found = Reader(folder)
        yield found
        if found.process is not None:
            found.stop()
    finally:
        os.chdir(before)


class Kept:
    """Remembers the files of a folder as they are now, and restores them."""

    def __init__(self, folder):
        self.folder = folder
        self.marks = marks(folder)
        self.files = {path: Path(path).read_bytes() for path in self.marks}

    def restore(self, damaged=None):
        found = marks(self.folder)
        for path in found.keys() - self.files.keys():
            os.unlink(path)
        for path, content in self.files.items():
            if path == str(damaged) or found.get(path) != self.marks[path]:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                Path(path).write_bytes(content)
                self.marks[path] = mark(os.stat(path))


def marks(folder):
    """{path: mark} of all files in a folder but those of this test. By scandir: this is done 2000 times."""
    found = {}
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            found |= marks(entry.path)
        elif entry.name != "stderr.txt":
            found[entry.path] = mark(entry.stat(follow_symlinks=False))
    return found


def mark(found):
    """What changes where a file is written, of its os.stat()."""
    return found.st_ino, found.st_size, found.st_mtime_ns


ACTS = st.tuples(
    st.integers(0, 2**20),
    st.sampled_from(["put", "put", "put", "drop", "twice", "rename", "empty", "wrap"]),
    st.sampled_from(VALUES),
    st.sampled_from([False, False, False, True]),
)
QUICK = {"deadline": None, "database": None, "derandomize": SCALE == 1, "suppress_health_check": list(HealthCheck)}


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_read_or_refused_in_one_line(reader, name):
    files, count = FILES[name]
    if name.startswith("answers"):  # these are made by the reader itself
        reader.read_whole(name)
    files, kept, faults = [resolved(reader.folder, file) for file in files], Kept(reader.folder), []
    reader.read_whole(name)
    kept.restore()

    @settings(max_examples=count * SCALE, **QUICK)
    @given(st.sampled_from(files), ACTS)
    def run(file, act):
        damaged = damage(str(file), kept.files[str(file)], *act)
        file.write_bytes(damaged)
        if fault := reader.read(name):
            faults.append(f"{file.relative_to(reader.folder)}, {short(act)}: {fault}")
        kept.restore(file)

    run()
    assert not faults, first_of_each(faults)


@pytest.mark.parametrize("job", COMMANDS)
def test_an_odd_command_line_is_taken_or_refused_in_one_line(reader, job):
    (line, count), faults = COMMANDS[job], []

    @settings(max_examples=count * SCALE, **QUICK)
    @given(ACTS)
    def run(act):
        argv = damage_command(line, *act)
        if fault := reader.read(job, argv):
            faults.append(f"{' '.join(argv)[:200]!r}: {fault}")

    run()
    assert not faults, first_of_each(faults)


def first_of_each(faults):
    """How many faults, and one of each kind. Faults that end with the same line are of one kind."""
    kinds = {}
    for fault in faults:
        kinds.setdefault(fault.strip().splitlines()[-1][-60:], fault)
    return f"{len(faults)} faults of {len(kinds)} kinds:\n" + "\n".join(f"- {fault[:1200]}" for fault in kinds.values())


def test_there_are_2000_inputs():
    assert sum(count for _, count in (*FILES.values(), *COMMANDS.values())) >= 2000


def resolved(folder, name):
    """The path of a file, GENERATIONS and POINT being what the run called them."""
    if name.endswith("GENERATIONS"):
        return sorted(folder.glob("run/generations/*finetuned*.jsonl"))[0]
    if "POINT" in name:
        return sorted(folder.glob(name.replace("POINT", "*")))[0]
    return folder / name


def short(act):
    return tuple(value if not isinstance(value, str) else value[:60] for value in act)
