"""Makes the embedded models: a tokenizer and a base model of 1.5-1.8 M parameters for each family, and the instruction rows.

Not here: fine-tuning (train.py) and the text (corpus.py). The tokenizers are trained on the corpus and on the training rows in
Alpaca's template, so that prompts stay short. The base models are trained on the corpus only. The same seed gives the same rows
and tokenizers byte for byte; the weights may differ by the rounding of the machine."""

import io
import json
import math
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import tokenizers
import torch
from safetensors.torch import save
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn import functional as F
from tqdm import tqdm

from minitune import hub
from minitune.config import arg, positive
from minitune.embedded import corpus
from minitune.files import write_json, write_whole
from minitune.formats.rows import segments
from minitune.models import build
from minitune.tokenizer import END_OF_TEXT, load_tokenizer

TOKENIZER_DOCUMENTS = 4000  # documents of the corpus that the tokenizers are trained on
NAME_LINES = 100  # extra lines with each name, so that most names become one token
CURVE_STEPS = 50  # steps averaged for one point of the recorded loss curve


@dataclass(frozen=True)
class TinyConfig:
    """The options of make_tiny.py."""

    folder: str = arg(str(hub.EMBEDDED_FOLDER), "folder to write the models and the rows to")
    families: tuple[str, ...] = arg(hub.EMBEDDED, "models to make", choices=hub.EMBEDDED)
    seed: int = arg(0, "random seed of the world, the corpus, the rows and the weights")
    vocab_size: int = arg(1024, "tokens in each vocabulary")
    steps: int = arg(1800, "steps of base training; 0: write the rows and the tokenizers only")
    batch_size: int = arg(16, "rows of the corpus in a step")
    row_length: int = arg(128, "tokens in a row; a document may continue in the next row")
    learning_rate: float = arg(3e-3, "peak learning rate; cosine decay to a twentieth of it")
    warmup: int = arg(50, "steps of warm-up")
    weight_decay: float = arg(0.1, "AdamW weight decay of the linear layers")
    threads: int = arg(1, "CPU threads of the training")
    corpus: str | None = arg(None, "file to write the training text to; not set: it is not written")

    def __post_init__(self):
        positive(self, "vocab_size", "batch_size", "row_length", "learning_rate", "warmup", "threads")
        if self.steps < 0:
            raise ValueError(f"steps is {self.steps}, expected 0 or more")


def architecture(family, vocab_size):
    """The config.json of a family as a dict, in Hugging Face's spelling. Below 2.0 M parameters, so at most 4 MB in bf16."""
    common = {
        "vocab_size": vocab_size,
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": "bfloat16",
    }
    gated = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2}
    own = {
        "tiny-mistral": {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "num_key_value_heads": 2,
            "intermediate_size": 384,
            "sliding_window": 64,  # shorter than the longest prompts, so that it has an effect
            "tie_word_embeddings": False,
            **gated,
        },
        "tiny-llama": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_key_value_heads": 4,
            "intermediate_size": 448,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            **gated,
        },
        "tiny-phi": {
            "architectures": ["PhiForCausalLM"],
            "model_type": "phi",
            "num_key_value_heads": 4,
            "intermediate_size": 512,
            "hidden_act": "gelu_new",
            "layer_norm_eps": 1e-5,
            "partial_rotary_factor": 0.5,
            "qk_layernorm": False,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
    }
    return own[family] | common


def make_all(config: TinyConfig, say=print):
    """Write the rows, and the tokenizer and base model of each family, to config.folder. say: prints one line.

    The training.json of each family records seed, steps, tokens, losses, seconds and versions."""
    folder = Path(config.folder)
    for part, count in write_rows(folder / "rows", config.seed).items():
        say(f"{folder / 'rows' / part}.json: {count:,} rows")
    train_tokenizers(folder, config.families, config.seed, config.vocab_size)
    say(f"tokenizers of {', '.join(config.families)}: {config.vocab_size} tokens each")
    if config.corpus:
        texts = corpus.documents(config.seed, documents_needed(config))
        write_whole(config.corpus, "\n\n".join(texts) + "\n")
    for family in config.families if config.steps else ():
        record = train_base(family, folder / family, config)
        say(
            f"{folder / family}: {record['parameters'] / 1e6:.2f} M parameters, loss {record['final_loss']:.4f} "
            f"(held out {record['held_out_loss']:.4f}) after {record['tokens'] / 1e6:.1f} M tokens, "
            f"{record['seconds']:.0f} s, {record['cpu_seconds']:.0f} CPU seconds"
        )


def write_rows(folder, seed=0):
    """Write train.json and test.json with Alpaca rows. Returns {part: number of rows}."""
    parts = dict(zip(("train", "test"), corpus.rows(seed), strict=True))
    for part, named in parts.items():
        lines = [json.dumps(row, ensure_ascii=False) for _, row in named]
        write_whole(Path(folder) / f"{part}.json", "[\n" + ",\n".join(lines) + "\n]\n")
    return {part: len(named) for part, named in parts.items()}


def train_tokenizers(folder, families=hub.EMBEDDED, seed=0, vocab_size=TinyConfig.vocab_size):
    """Write the tokenizer of each family to folder/FAMILY, with a tokenizer_config.json.

    It is tokenizer.model, a sentencepiece BPE with byte fallback like Llama's, or for phi tokenizer.json, a byte-level BPE. Both
    put a space before a text, so that the first word of an answer has the same tokens as within a sentence."""
    lines = list(tokenizer_text(seed))
    for family in families:
        target = Path(folder) / family
        if family == "tiny-phi":
            write_whole(target / "tokenizer.json", train_byte_level(lines, vocab_size).to_str(pretty=True))
            special = {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": END_OF_TEXT,
                "eos_token": END_OF_TEXT,
                "unk_token": END_OF_TEXT,
                "add_bos_token": False,
            }
        else:
            write_whole(target / "tokenizer.model", train_sentencepiece(lines, vocab_size))
            special = {
                "tokenizer_class": "LlamaTokenizer",
                "bos_token": "<s>",
                "eos_token": "</s>",
                "unk_token": "<unk>",
                "add_bos_token": True,
                "add_eos_token": False,
                "legacy": False,
            }
        write_json(target / "tokenizer_config.json", special | {"clean_up_tokenization_spaces": False})


def tokenizer_text(seed):
    """Yields the lines that the tokenizers are trained on."""
    for text in corpus.documents(seed, TOKENIZER_DOCUMENTS):
        yield from text.split("\n")
    train, _ = corpus.rows(seed)
    for _, row in train:
        for text, _ in segments(row, "alpaca"):
            yield from filter(None, text.removeprefix(" ").split("\n"))
    for name in corpus.NAMES:
        yield from [f"is {name}"] * NAME_LINES


def train_sentencepiece(lines, vocab_size):
    """The bytes of a tokenizer.model. As in Llama the ids are 0 <unk>, 1 <s>, 2 </s>, then 256 bytes, merges and characters."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def train_byte_level(lines, vocab_size):
    """A byte-level BPE, a tokenizers.Tokenizer. Id 0 is <|endoftext|>, and every digit is a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def train_base(family, folder, config: TinyConfig):
    """Train a base model on the corpus and write it to `folder`, which has its tokenizer, with config.json,
    generation_config.json and training.json. Returns the content of training.json, a dict."""
    raw = architecture(family, config.vocab_size)
    write_json(folder / "config.json", raw)
    ends = {key: raw[key] for key in ("bos_token_id", "eos_token_id")}
    write_json(folder / "generation_config.json", ends | {"do_sample": False})
    tokenizer = load_tokenizer(folder)
    rows = corpus_rows(tokenizer, config, config.steps * config.batch_size)
    held_out = corpus_rows(tokenizer, config, 64, stream=1)

    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    model = start(build(raw)).train()
    embeddings = {id(model.model.embed_tokens.weight)}
    decayed = [p for p in model.parameters() if p.ndim == 2 and id(p) not in embeddings]
    others = [p for p in model.parameters() if p.ndim < 2 or id(p) in embeddings]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)

    started, cpu_started, losses = time.perf_counter(), time.process_time(), []
    bar = tqdm(range(config.steps), desc=family, unit="step", disable=None, dynamic_ncols=True)
    for step in bar:
        warm = min(1.0, (step + 1) / config.warmup)
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / config.steps)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * warm * (0.05 + 0.95 * cosine)
        loss = next_token_loss(model, rows[step * config.batch_size : (step + 1) * config.batch_size])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())  # a float: keeping the tensors would fragment the memory
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started

    weights = {name: p.detach().to(torch.bfloat16).contiguous() for name, p in model.named_parameters()}
    write_whole(folder / "model.safetensors", save(weights, metadata={"format": "pt"}))
    model.load_state_dict(weights, strict=False)  # the bf16 weights as written; a tied head is not among them
    with torch.no_grad():
        held_out_loss = next_token_loss(model.eval(), held_out).item()
    losses = torch.tensor(losses)
    record = {
        "family": family,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seed": config.seed,
        "steps": config.steps,
        "batch_size": config.batch_size,
        "row_length": config.row_length,
        "tokens": rows.numel(),
        "learning_rate": config.learning_rate,
        "warmup": config.warmup,
        "weight_decay": config.weight_decay,
        "final_loss": round(losses[-100:].mean().item(), 4),
        "held_out_loss": round(held_out_loss, 4),
        "loss_curve": [[i + len(part), round(part.mean().item(), 4)] for i, part in curve_points(losses)],
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "threads": config.threads,
        "versions": versions(),
    }
    write_json(folder / "training.json", record)
    return record


def documents_needed(config):
    """A number of documents that fills all steps. The shortest document has more than 20 tokens, the mean is about 70."""
    return 1000 + config.steps * config.batch_size * config.row_length // 40


def corpus_rows(tokenizer, config, count, stream=0):
    """Packed documents, (count, row_length) int64. Each has BOS before it, if the family has one, and the end token after it.

    stream: as in corpus.documents()."""
    ids, needed = [], count * config.row_length
    for text in corpus.documents(config.seed, documents_needed(config), stream):
        ids += [*tokenizer.encode(text, allow_special=False), tokenizer.eos_id]
        if len(ids) >= needed:
            return torch.tensor(ids[:needed]).view(count, config.row_length)
    raise AssertionError(f"{len(ids)} tokens, but {needed} are needed")


def start(model):
    """Initialise a model as Hugging Face does for these families: weights of linear layers and embeddings from N(0, 0.02), biases
    0. Returns the model."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, torch.nn.Linear) and module.bias is not None:
            torch.nn.init.zeros_(module.bias)
    return model


def next_token_loss(model, rows):
    """Mean cross-entropy in nats of each next token. rows (B, T) int64."""
    logits = model(rows[:, :-1])  # (B, T - 1, V)
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def curve_points(losses):
    """[(first step, losses (n,)), ...] for each CURVE_STEPS steps."""
    return [(i * CURVE_STEPS, part) for i, part in enumerate(losses.split(CURVE_STEPS))]


def versions():
    found = {module.__name__: module.__version__ for module in (sentencepiece, tokenizers, torch)}
    return {"python": platform.python_version(), **found}
