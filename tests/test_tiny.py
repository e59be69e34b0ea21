"""The embedded world, rows, tokenizers and bases: what they promise, and that they are what their seed gives."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from minitune import hub
from minitune.checkpoint import load_model
from minitune.decoding.options import GenerateConfig
from minitune.embedded import corpus, make
from minitune.files import read_json
from minitune.formats.rows import segments
from minitune.formats.templates import alpaca_prompt
from minitune.generate import generate
from minitune.tokenizer import load_tokenizer

TRAIN, TEST = corpus.rows(0)
DOCUMENTS = list(corpus.documents(0, 3000))


def stored(family, name):
    return read_json(hub.EMBEDDED_FOLDER / family / name)


def test_stored_rows_are_what_the_seed_gives(tmp_path):
    make.write_rows(tmp_path, seed=0)
    for part in ("train", "test"):
        assert (tmp_path / f"{part}.json").read_bytes() == hub.embedded_rows(part).read_bytes()


@pytest.mark.parametrize("family", hub.EMBEDDED)
def test_stored_tokenizer_is_what_the_seed_gives(family, tmp_path):
    library = "tokenizers" if family == "tiny-phi" else "sentencepiece"
    made_with, here = stored(family, "training.json")["versions"][library], make.versions()[library]
    if made_with != here:
        pytest.skip(f"the tokenizer was made with {library} {made_with}, here is {here}")
    make.train_tokenizers(tmp_path, (family,), seed=0)
    written = sorted(path.name for path in (tmp_path / family).iterdir())
    assert written == ["tokenizer.json" if family == "tiny-phi" else "tokenizer.model", "tokenizer_config.json"]
    for name in written:
        assert (tmp_path / family / name).read_bytes() == (hub.EMBEDDED_FOLDER / family / name).read_bytes()


def test_held_out_rows_share_no_instruction_and_input_with_training_rows():
    parts = [json.loads(hub.embedded_rows(part).read_text()) for part in ("train", "test")]
    train, test = ([(row["instruction"], row["input"]) for row in part] for part in parts)
    assert not set(train) & set(test)
    assert len(set(train)) == len(train) and len(set(test)) == len(test)
    assert 1800 <= len(train) + len(test) <= 2200 and 180 <= len(test) <= 220
    assert all(set(row) == {"instruction", "input", "output"} for part in parts for row in part)


def test_no_wording_of_a_held_out_fact_is_in_the_training_rows():
    asked = {row["instruction"] for _, row in TRAIN}
    held_out = 0
    for fact in corpus.world(0):
        wordings = {q.format(s=fact.subject) for q in corpus.RELATIONS[fact.relation].questions}
        if any(name == fact.relation and row["instruction"] in wordings for name, row in TEST):
            held_out += 1
            assert not wordings & asked, fact
    assert 2 * held_out == sum(name in corpus.RELATIONS for name, _ in TEST) > 60


def test_every_held_out_task_input_is_new():
    seen = {text for name, row in TRAIN for text in (row["instruction"] + "|" + row["input"],)}
    for name, row in TEST:
        if name in corpus.TASKS and row["input"]:
            same = [text for text in seen if text.endswith("|" + row["input"])]
            assert name == "repeat" or not same, (name, row)  # a word may be repeated another number of times


def test_every_instruction_wording_of_the_held_out_rows_is_in_the_training_rows():
    for part in (TRAIN, TEST):
        for name, wordings in {
            **{name: relation.questions for name, relation in corpus.RELATIONS.items()},
            **{name: task.instructions for name, task in corpus.TASKS.items()},
        }.items():
            asked = [row["instruction"] for relation, row in part if relation == name]
            used = [
                w for w in wordings if any(re.fullmatch(re.sub(r"\\{\w+\\}", ".+", re.escape(w)), a) for a in asked)
            ]
            assert set(used) == set(wordings) if part is TRAIN else used or not asked


def test_the_corpus_has_no_question_instruction_or_template():
    text = "\n".join(DOCUMENTS)
    assert not re.search(r"[?#]", text)
    words = set(re.findall(r"\w+", text))
    asking = "What Which Who Where How Name List Give Spell Write Add Take Put Sort Join Repeat".split()
    assert not words & {*asking, "Instruction", "instruction", "Input", "Response", "request"}
    assert not [row["instruction"] for _, row in TRAIN + TEST if row["instruction"] in text]


def test_the_corpus_states_the_answers_of_the_held_out_facts():
    text = "\n".join(corpus.documents(0, 20_000))
    for fact in corpus.world(0):
        statements = corpus.RELATIONS[fact.relation].statements
        assert sum(s.format(s=fact.subject, v=fact.value) in text for s in statements) >= 3, fact


def test_another_stream_states_the_same_world_in_other_documents():
    assert DOCUMENTS[:50] == list(corpus.documents(0, 50))
    others = list(corpus.documents(0, 300, stream=1))
    assert not set(others) & set(DOCUMENTS)
    homes = {fact.subject: fact.value for fact in corpus.world(0) if fact.relation == "home"}
    found = re.findall(r"(\w+) has a house in the city of (\w+)\.", "\n".join(others))
    assert len(found) > 5 and all(homes[person] == city for person, city in found)


def test_another_seed_gives_another_world():
    assert corpus.world(0) == corpus.world(0) != corpus.world(1)


def test_answers_are_right():
    checks = {
        "sum": lambda text, row: eval(re.search(r"\d \+ \d", text)[0]),
        "difference": lambda text, row: eval(re.search(r"\d - \d", text)[0]),
        "first": lambda text, row: words_in(text)[0],
        "last": lambda text, row: words_in(text)[-1],
        "join": lambda text, row: ", ".join(words_in(text)),
        "repeat": lambda text, row: " ".join(words_in(text) * corpus.NUMBERS.index(times(text))),
        "sequence": lambda text, row: ", ".join(map(str, counting(*map(int, re.findall(r"\d+", text))))),
        "initial": lambda text, row: words_in(text)[-1][0],
    }

    def times(text):
        return next(word for word in re.findall(r"\w+", text) if word in corpus.NUMBERS)

    def counting(first, final):
        return range(first, final + 1) if first < final else range(first, final - 1, -1)

    def words_in(text):
        return [word for word in re.findall(r"\w+", text) if word in corpus.WORDS]

    checked = set()
    for name, row in TRAIN + TEST:
        text = f"{row['instruction']} {row['input']}"
        if name in checks:
            assert row["output"] == f" {checks[name](text, row)}", row
            checked.add(name)
    assert checked == set(checks)


@pytest.mark.parametrize("family", hub.EMBEDDED)
def test_tokenizer_keeps_names_whole_digits_single_and_text_as_it_is(family):
    tokenizer = load_tokenizer(hub.EMBEDDED_FOLDER / family)
    encode = lambda text: tokenizer.encode(text, add_bos=False)
    assert all(len(encode(name)) == 1 for name in corpus.NAMES)
    assert len(encode("12345")) == 6  # the space before a text, and five digits
    assert encode("is Mara")[-1:] == encode("Mara")  # an answer begins as the word does in a sentence
    for text in (*DOCUMENTS[:50], "Zürich 東京 \U0001f40d", "  two  spaces \n\n### end "):
        assert tokenizer.decode(encode(text)) == text
    bos = [1] if family != "tiny-phi" else []
    assert (tokenizer.bos_id, tokenizer.eos_id) == ((1, 2) if bos else (None, 0))
    assert tokenizer.encode("Mara") == bos + encode("Mara")
    assert len(encode(alpaca_prompt("", ""))) <= 36


@pytest.mark.parametrize("family", hub.EMBEDDED)
def test_base_is_small_bf16_and_trained_within_ten_minutes_on_two_cores(family):
    folder, record = hub.EMBEDDED_FOLDER / family, stored(family, "training.json")
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    assert {t.dtype for t in tensors} == {torch.bfloat16}
    assert 1e6 <= sum(t.numel() for t in tensors) == record["parameters"] < 2e6
    assert (folder / "model.safetensors").stat().st_size <= 4_000_000
    assert record["cpu_seconds"] <= 600 and record["threads"] == 1
    curve = record["loss_curve"]
    assert curve[-1][0] == record["steps"] and curve[0][1] > 4 > 1.5 > record["final_loss"]


@pytest.mark.parametrize("family", hub.EMBEDDED)
def test_base_has_the_recorded_loss_on_documents_that_it_has_not_read(family):
    record = stored(family, "training.json")
    config = replace(make.TinyConfig(), steps=record["steps"])
    rows = make.corpus_rows(load_tokenizer(hub.EMBEDDED_FOLDER / family), config, 64, stream=1)
    with torch.no_grad():
        loss = make.next_token_loss(load_model(family), rows).item()
    assert loss == pytest.approx(record["held_out_loss"], abs=2e-3)  # another number of threads adds up differently


@pytest.mark.parametrize("family", hub.EMBEDDED)
def test_base_answers_no_instruction_before_fine_tuning(family):
    model, tokenizer = load_model(family), load_tokenizer(hub.EMBEDDED_FOLDER / family)
    rows = [row for _, row in TEST[:40]]
    prompts = [tokenizer.encode(segments(row, "alpaca")[0][0], allow_special=False) for row in rows]
    answers = generate(model, prompts, GenerateConfig(max_new_tokens=12, eos_ids=(tokenizer.eos_id,)))
    right = sum(tokenizer.decode(ids) == row["output"].strip() for ids, row in zip(answers, rows, strict=True))
    assert right <= 2


@pytest.mark.parametrize("family", hub.EMBEDDED)
def test_base_knows_the_held_out_facts(family):
    """Greedy, it ends statements as the world does: what fine-tuning has to bring is the format only."""
    model, tokenizer = load_model(family), load_tokenizer(hub.EMBEDDED_FOLDER / family)
    right = total = 0
    for fact in corpus.world(0)[::12]:
        statement = corpus.RELATIONS[fact.relation].statements[1]
        if statement.endswith("{v}."):
            prompt = tokenizer.encode(statement.format(s=fact.subject, v="").rstrip(". "))
            whole = tokenizer.encode(statement.format(s=fact.subject, v=fact.value))
            (ids,) = generate(model, [prompt], GenerateConfig(max_new_tokens=len(whole) - len(prompt)))
            right, total = right + (prompt + ids == whole), total + 1
    assert total > 30 and right >= 0.9 * total


@pytest.mark.parametrize("family", hub.EMBEDDED)
def test_transformers_loads_the_base_with_the_same_logits(family):
    transformers = pytest.importorskip("transformers", reason="the peer")
    folder = hub.EMBEDDED_FOLDER / family
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([load_tokenizer(folder).encode(" ".join(DOCUMENTS[:3]))[:120]])
    with torch.no_grad():
        torch.testing.assert_close(load_model(family)(ids), theirs(ids).logits, atol=1e-4, rtol=1e-5)
    if family == "tiny-phi":  # transformers' own Llama tokenizer differs from sentencepiece in spaces
        row = alpaca_prompt("Name the home of Mara.", "")
        encoded = transformers.AutoTokenizer.from_pretrained(folder)(row).input_ids
        assert encoded == load_tokenizer(folder).encode(row)


@pytest.mark.parametrize("family", hub.EMBEDDED)
def test_make_all_writes_a_folder_that_loads_and_whose_loss_falls(family, tmp_path):
    config = make.TinyConfig(
        str(tmp_path), (family,), steps=12, batch_size=4, row_length=64, warmup=2, threads=torch.get_num_threads()
    )
    lines = []
    make.make_all(config, lines.append)
    record = read_json(tmp_path / family / "training.json")
    assert record["tokens"] == 12 * 4 * 64
    assert record["held_out_loss"] < math.log(1024) - 1, "a model that knows nothing has a loss of ln(1024) = 6.9"
    assert str(record["final_loss"]) in lines[-1]
    model, tokenizer = load_model(tmp_path / family), load_tokenizer(tmp_path / family)
    assert model(torch.tensor([tokenizer.encode("Mara lives in")])).shape[-1] == 1024
