"""Speed of BERTScore, in pairs per second, measured in turn with a peer.

Tokenising, encoding and matching are timed, on both sides; loading is not."""

import datetime
import random
import shlex
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from minitune import data, hub
from minitune.bench.turns import measure_peer
from minitune.checkpoint import load_encoder
from minitune.config import arg, positive
from minitune.device import DTYPES, choose_device, environment
from minitune.files import write_json
from minitune.metrics.bertscore import bert_score
from minitune.models import build_encoder
from minitune.tokenizer import ROBERTA_SPECIAL, load_tokenizer

ROBERTA_BASE = {
    "model_type": "roberta", "vocab_size": 50265, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip


@dataclass(frozen=True)
class BenchBertScoreConfig:
    """The options of bench_bertscore.py."""

    model: str | None = arg(
        None,
        "folder of a RoBERTa or BERT; not set: roberta-base's shape with random weights and a BPE trained on the rows",
    )
    layer: int = arg(12, "number of blocks whose hidden states are used")
    data: str = arg("embedded", "rows whose outputs the texts are cut from: a file in Alpaca format, or embedded")
    pairs: int = arg(128, "number of pairs of random texts")
    words: int = arg(60, "mean length of a text in words; the standard deviation is a quarter of it")
    idf: bool = arg(False, "weight tokens by idf")
    batch_tokens: int = arg(1024, "tokens packed into one call of the encoder")
    dtype: str = arg("fp32", "compute dtype", choices=tuple(DTYPES))
    device: str = arg("auto", "auto, cpu, cuda or cuda:N")
    peer: str | None = arg(
        None,
        "command of another system, run in turn with minitune; {model}, {data} (JSON: references, candidates) and {layer} are "
        "replaced. It must print one JSON line with system, pairs_per_s and mean_f1",
    )
    repeats: int = arg(3, "runs of each system, in turn (A B A B ...); medians are reported")
    out: str | None = arg(None, "JSON file for the results, with settings and machine")

    def __post_init__(self):
        positive(self, "pairs", "words", "batch_tokens", "repeats")


def cut_texts(rows, count, words):
    """`count` texts of about `words` words, at least 5, cut from random places of the rows' outputs."""
    running = " ".join(row["output"] for row in rows).split()
    generator, texts = random.Random(0), []
    for _ in range(count):
        length = max(5, round(generator.gauss(words, words / 4)))
        if length > len(running):
            raise ValueError(f"the rows have {len(running)} words of output together, expected {length} or more")
        start = generator.randrange(len(running) - length + 1)
        texts.append(" ".join(running[start : start + length]))
    return texts


def write_random_roberta(folder, texts, raw=ROBERTA_BASE):
    """Write the folder of a RoBERTa with random weights and a byte-level BPE trained on `texts`. raw: its config.json."""
    folder = Path(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = list(ROBERTA_SPECIAL)
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=8192, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.model.save(str(folder))
    torch.manual_seed(0)
    encoder = build_encoder(raw)
    save_file(encoder.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", raw)
    limit = raw["max_position_embeddings"] - 2
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "RobertaTokenizer", "model_max_length": limit})


def bench_bertscore(config, say=print):
    """Score the pairs, in turn with the peer. Returns the results, a dict, which are also written to `config.out`."""
    device = choose_device(config.device)
    rows = data.read_rows(str(hub.embedded_rows("train")) if config.data == "embedded" else config.data)
    texts = cut_texts(rows, 2 * config.pairs, config.words)
    references, candidates = texts[: config.pairs], texts[config.pairs :]
    measured, means = {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = config.model
        if folder is None:
            folder = temporary
            write_random_roberta(folder, [row["output"] for row in rows])
        encoder, tokenizer = load_encoder(folder, DTYPES[config.dtype], device), load_tokenizer(hub.resolve(folder))
        pairs_file = Path(temporary) / "pairs.json"
        write_json(pairs_file, {"references": references, "candidates": candidates})
        tokens = sum(len(tokenizer.encode_framed(text)) for text in texts)
        options = {"layer": config.layer, "idf": config.idf, "batch_tokens": config.batch_tokens}
        bert_score(references[:4], candidates[:4], encoder, tokenizer, **options)  # warms up
        for _ in range(config.repeats):
            started = time.perf_counter()
            F1 = bert_score(references, candidates, encoder, tokenizer, **options)[2]
            seconds = time.perf_counter() - started
            results = [{"system": "minitune", "pairs_per_s": config.pairs / seconds, "mean_f1": F1.mean().item()}]
            if config.peer:
                filled = {"{model}": folder, "{data}": pairs_file, "{layer}": config.layer}
                command = config.peer
                for mark, value in filled.items():
                    command = command.replace(mark, shlex.quote(str(value)))
                results.append(measure_peer(command))
            for result in results:
                measured.setdefault(result["system"], []).append(result["pairs_per_s"])
                means[result["system"]] = result["mean_f1"]
                say(f"{result['system']}: {result['pairs_per_s']:.2f} pairs/s, mean F1 {result['mean_f1']:.6f}")
    record = {
        "date": datetime.date.today().isoformat(),
        "settings": {
            key: getattr(config, key) for key in ("layer", "pairs", "words", "idf", "batch_tokens", "dtype", "repeats")
        }
        | {"model": Path(config.model).name if config.model else "roberta-base's shape, random"},
        "machine": environment(device),
        "tokens_of_a_text": tokens / len(texts),
        "pairs_per_s": measured,
        "mean_f1": means,
        "median": {system: statistics.median(runs) for system, runs in measured.items()},
    }
    if len(measured) == 2:
        ratios = [ours / theirs for ours, theirs in zip(*measured.values(), strict=True)]
        record["speed_ratio"] = statistics.median(ratios)
        say(f"speed {record['speed_ratio']:.2f}x (pairs {', '.join(f'{ratio:.2f}' for ratio in ratios)})")
    if config.out:
        write_json(config.out, record)
    return record
