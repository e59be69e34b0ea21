"""Templates that turn an instruction or a conversation into text. Not here: tokens and files."""

from typing import NamedTuple

# Stanford Alpaca's templates, unchanged. A newline follows the last colon, as in the `text` column of the study's rows.
TEMPLATES = {
    "alpaca": {
        "with_input": "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
        "without_input": "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:\n",
    },
}


def alpaca_prompt(instruction, input=""):
    """The Alpaca prompt, which ends with "### Response:\\n". A blank input is left out."""
    template = TEMPLATES["alpaca"]["with_input" if input.strip() else "without_input"]
    return template.format(instruction=instruction, input=input)


# --- conversations ---

BOS, EOS = object(), object()  # in a rendered conversation: the tokenizer's BOS and EOS token
CHAT_TEMPLATES = ("alpaca", "plain", "llama2", "mistral", "mistral-v1", "mistral-v3", "mistral-tekken", "phi2")
ADAPTER_TEMPLATES = {
    "alpaca": "alpaca",
    "prompt_completion": "plain",
    "text": "plain",
}  # format of the training rows -> template
# Texts of the special tokens of chat formats. A row that contains one was probably written by a chat template.
MARKUP = (
    *("<s>", "</s>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<start_of_turn>", "<end_of_turn>"),
)


class Special(str):
    """In a rendered conversation: the text of a special token other than BOS and EOS."""


class MistralTurns(NamedTuple):
    """In a rendered conversation: the turns of a Mistral chat, whose format depends on the tokenizer. See for_tokenizer()."""

    turns: list
    system: str | None


def conversation(turns, template, system=None):
    """A conversation as a list of pieces: texts, BOS, EOS, Special and MistralTurns. It ends where the next answer begins.

    turns: [question, answer, question, ...]; the last one is a question. system: the system prompt, or None.
    template: alpaca (one Alpaca prompt for each turn), plain (text without a template), llama2 (Llama-2-chat), phi2 (Phi-2's
    question and answer), mistral (the Mistral-Instruct format that fits the tokenizer), mistral-v1 (Instruct v0.1 and
    v0.2), mistral-v3 (v0.3), mistral-tekken (NeMo and later). Raises ValueError on another template."""
    if template not in CHAT_TEMPLATES:
        raise ValueError(f"template is {template!r}, expected one of {', '.join(CHAT_TEMPLATES)}")
    if template == "mistral":
        return [MistralTurns(turns, system)]
    pieces = [] if template == "llama2" else [BOS]
    for i in range(0, len(turns), 2):
        question, answer = turns[i], turns[i + 1] if i + 1 < len(turns) else None
        has_system = system and i == (len(turns) - 1 if template in ("mistral-v3", "mistral-tekken") else 0)
        opening = f"{system}\n\n" if has_system else ""
        if template == "alpaca":
            pieces += [opening + alpaca_prompt(question), *([] if answer is None else [answer, EOS, "\n\n"])]
        elif template == "plain":
            pieces += [opening + question, *([] if answer is None else [answer, "\n"])]
        elif template == "llama2":
            opening = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if has_system else ""
            pieces += [BOS, f"[INST] {opening}{question} [/INST]", *([] if answer is None else [f" {answer} ", EOS])]
        elif template == "phi2":
            pieces.append(f"{opening}Instruct: {question}\nOutput:")
            pieces += [] if answer is None else [f" {answer}", EOS, "\n"]
        elif template == "mistral-v1":
            pieces += [f"{' ' * (i > 0)}[INST] {opening}{question} [/INST]"]
            pieces += [] if answer is None else [f" {answer}", EOS]
        else:
            space = " " if template == "mistral-v3" else ""
            pieces += [Special("[INST]"), f"{space}{opening}{question}", Special("[/INST]")]
            pieces += [] if answer is None else [f"{space}{answer}", EOS]
    return pieces


def for_tokenizer(pieces, tokenizer):
    """`pieces` with each MistralTurns rendered in the format that fits the tokenizer.

    A byte-level tokenizer with the token [INST] is that of NeMo and later; another one with this token is that of v0.3. For v0.1
    and v0.2 [INST] is plain text."""
    found = []
    for piece in pieces:
        if isinstance(piece, MistralTurns):
            has_tokens = None not in (tokenizer.id_of("[INST]"), tokenizer.id_of("[/INST]"))
            version = ("tekken" if tokenizer.is_byte_level else "v3") if has_tokens else "v1"
            found += conversation(piece.turns, f"mistral-{version}", piece.system)
        else:
            found.append(piece)
    return found
