"""Formats of rows, and the templates that turn a row or a conversation into text. No tokens here, and no files."""

import reprlib

# Stanford Alpaca's, to the letter, with one newline after the last colon as in the study's `text` column.
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
FORMATS = {  # name -> the keys that it reads; a row has the first format whose first key it has
    "alpaca": ("instruction", "input", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
SUPPORTED = (
    "minitune reads Alpaca rows (instruction, output and perhaps input), prompt/completion rows (prompt, "
    "completion) and text rows (text)"
)
CONVERSATIONS = ("messages", "conversations")


def detect(row):
    """The name of a row's format, by its keys. Raises ValueError that names the supported formats where none fits."""
    for name, keys in FORMATS.items():
        if keys[0] in row:
            return name
    if found := [key for key in CONVERSATIONS if key in row]:
        raise ValueError(f"{found[0]!r} makes it a conversation, which is not supported yet; {SUPPORTED}")
    raise ValueError(f"its keys are {', '.join(map(repr, row)) or 'none'}; {SUPPORTED}")


def segments(row, row_format):
    """The text of a row in pieces, each with whether it is the answer: [(text, is_supervised), ...].

    The pieces are tokenised one by one, so that no marker has to be searched for.
    Raises ValueError that names the key where a value is missing or is not text."""
    if row_format == "text":
        return [(text_of(row, "text"), True)]
    if row_format == "prompt_completion":
        return [(text_of(row, "prompt"), False), (text_of(row, "completion"), True)]
    if row_format == "alpaca":
        return [
            (
                alpaca_prompt(
                    text_of(row, "instruction"), text_of(row, "input") if row.get("input") is not None else ""
                ),
                False,
            ),
            (text_of(row, "output"), True),
        ]
    raise ValueError(f"row_format is {row_format!r}, expected one of {', '.join(FORMATS)}")


def alpaca_prompt(instruction, input=""):
    """The Alpaca prompt, which ends with "### Response:\\n". A blank input counts as none."""
    template = TEMPLATES["alpaca"]["with_input" if input.strip() else "without_input"]
    return template.format(instruction=instruction, input=input)


def text_of(row, key):
    if key not in row:
        raise ValueError(f"{key!r} is missing; the row has {', '.join(map(repr, row))}")
    if not isinstance(row[key], str):
        raise ValueError(f"{key!r} is {reprlib.repr(row[key])}, expected text")
    return row[key]


# --- conversations ---

BOS, EOS = object(), object()  # in a rendered conversation: the tokenizer's begin and end token
CHAT_TEMPLATES = ("alpaca", "plain", "llama2", "mistral", "phi2")
ADAPTER_TEMPLATES = {"alpaca": "alpaca", "prompt_completion": "plain", "text": "plain"}  # by the rows trained on


def conversation(turns, template, system=None):
    """A conversation as pieces to tokenise one by one: texts, BOS and EOS. It ends where the next answer begins.

    turns: [question, answer, question, ...], the last one a question. system: a text before all, or None.
    alpaca: the study's, earlier turns before the last; plain: nothing around it; llama2: Llama-2-chat; mistral: Mistral-Instruct
    v2 and v3; phi2: Phi-2's question and answer. Raises ValueError on another template."""
    if template not in CHAT_TEMPLATES:
        raise ValueError(f"template is {template!r}, expected one of {', '.join(CHAT_TEMPLATES)}")
    pieces = [] if template == "llama2" else [BOS]
    for i in range(0, len(turns), 2):
        question, answer = turns[i], turns[i + 1] if i + 1 < len(turns) else None
        opening = f"{system}\n\n" if system and i == 0 else ""
        if template == "alpaca":
            pieces.append(opening + alpaca_prompt(question))
        elif template == "plain":
            pieces.append(opening + question)
        elif template == "llama2":
            opening = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system and i == 0 else ""
            pieces += [BOS, f"[INST] {opening}{question} [/INST]"]
        elif template == "mistral":
            pieces.append(f"[INST] {opening}{question}[/INST]")
        else:
            pieces.append(f"{opening}Instruct: {question}\nOutput:")
        if answer is not None:
            pieces += {
                "alpaca": [answer, EOS, "\n\n"],
                "plain": [answer, "\n"],
                "llama2": [f" {answer} ", EOS],
                "mistral": [f" {answer}", EOS],
                "phi2": [f" {answer}", EOS, "\n"],
            }[template]
    return pieces
