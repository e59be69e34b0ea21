"""Perplexity of a model on texts: exp of the mean cross-entropy, in nats, of the next token.

perplexity() is for a trained model on held-out answers or long texts. judge_perplexity() is for another model, the judge (GPT-2),
on generated texts. The model is an argument: model.model(ids, documents=lengths) gives hidden states and model.lm_head
logits, as in minitune.models. Texts are packed without padding, and logits are computed for a few tokens at a time."""

import math
from dataclasses import dataclass

import torch
from minitune_kernels import ops


@dataclass(frozen=True)
class Window:
    """A part of a sequence that the model reads at once: ids[start:stop], of which ids[first:stop] are scored. sequence: its
    index."""

    sequence: int
    start: int
    first: int
    stop: int


def perplexity(model, tokenizer, texts, prompts=None, context=None, stride=None, batch_tokens=2048):
    """Perplexity of a model on texts; every token has the same weight. Returns a dict with:

    perplexity (per token), word_perplexity (per str.split() word, which can be compared between tokenizers; None without a word),
    bits_per_byte (of UTF-8; None without a byte), mean_nll (nats per token), nll (nats in all), and the numbers of tokens, words
    and bytes.

    texts: list of str. prompts: list of str of the same length, or None; each text follows its prompt, which is read but not
    scored. All tokens of a text are scored. Without BOS and prompt, the first token is not scored, because nothing precedes it,
    but its bytes count. context, stride, batch_tokens: as in sequence_nll(). Raises ValueError if there is nothing to score,
    and on NaN."""
    if prompts is not None and len(prompts) != len(texts):
        raise ValueError(f"got {len(prompts)} prompts and {len(texts)} texts, expected equal numbers")
    sequences, starts = [], []
    for i, text in enumerate(texts):
        before = tokenizer.encode(prompts[i] if prompts is not None else "")
        sequences.append(before + tokenizer.encode(text, add_bos=False))
        starts.append(len(before))
    scored = sequence_nll(model, sequences, starts, context, stride, batch_tokens)
    nll, tokens = math.fsum(nll for nll, _ in scored), sum(tokens for _, tokens in scored)
    if not tokens:
        raise ValueError(f"none of the {len(texts)} texts has a token to score; expected at least two tokens in one")
    words, size = sum(len(text.split()) for text in texts), sum(len(text.encode()) for text in texts)
    return {
        "perplexity": exp(nll / tokens),
        "word_perplexity": exp(nll / words) if words else None,
        "bits_per_byte": nll / math.log(2) / size if size else None,
        "mean_nll": nll / tokens,
        "nll": nll,
        "tokens": tokens,
        "words": words,
        "bytes": size,
    }


def judge_perplexity(model, tokenizer, texts, add_start_token=False, context=None, stride=None, batch_tokens=2048):
    """Perplexity of a judge on generated texts. Returns a dict; the first two names are those of Hugging Face evaluate:

    perplexities: exp(mean loss) of each text. mean_perplexity: their mean, which the study reports. token_perplexity: exp of the
    mean loss over all tokens of all texts. tokens: their number. unscored: indices of the texts without a loss. losses: (nats,
    tokens) of each text.

    The two means differ, and mean_perplexity is less reliable. In it a sentence has the same weight as a page, and because exp
    grows fast, a few unusual answers dominate. A text without a loss counts as 0, which is better than any real perplexity, so
    a system gains from empty answers. token_perplexity gives all tokens the same weight and leaves such texts out.

    An empty text has no loss. Without a start token a text of one token has none either, because nothing is predicted.
    add_start_token: score the first token too, after the judge's BOS, or after <|endoftext|> for GPT-2, which has no BOS (the
    default of evaluate; the study did not do it). Texts longer than the judge's context are read in windows; context, stride,
    batch_tokens: as in sequence_nll(). Raises ValueError on NaN."""
    start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    if add_start_token and start is None:
        raise ValueError("add_start_token is set, but the judge's tokenizer has neither BOS nor EOS; do not set it")
    before = [start] if add_start_token else []
    sequences = [before + tokenizer.encode(text, add_bos=False) for text in texts]
    scored = sequence_nll(model, sequences, [len(before)] * len(texts), context, stride, batch_tokens)
    nll, tokens = math.fsum(nll for nll, _ in scored), sum(tokens for _, tokens in scored)
    perplexities = [exp(nll / tokens) if tokens else 0.0 for nll, tokens in scored]
    return {
        "mean_perplexity": math.fsum(perplexities) / len(texts) if texts else None,
        "token_perplexity": exp(nll / tokens) if tokens else None,
        "perplexities": perplexities,
        "tokens": tokens,
        "unscored": [i for i, (_, tokens) in enumerate(scored) if not tokens],
        "losses": scored,
    }


@torch.inference_mode()
def sequence_nll(model, sequences, starts=None, context=None, stride=None, batch_tokens=2048):
    """[(sum of -ln p in nats, number of scored tokens), ...] of sequences of token ids.

    sequences: lists of ids, including BOS if the model expects it. starts: index of the first scored token of each sequence (0
    counts as 1, because nothing predicts the first token). context: tokens that the model reads at once; None: the model's own.
    A longer sequence is read in windows that begin `stride` tokens apart, each with positions from 0. Every token is scored
    once, in the first window that has it. So each window but the first scores its last `stride` tokens, each after at least
    context - stride others. A smaller stride takes more time and gives a lower, more accurate number; None: half a context.
    batch_tokens: tokens packed into one call of the model; a longer window has a call of its own.
    Raises ValueError on a token that the model does not have, a stride that does not fit, and NaN."""
    own = model.config.max_position_embeddings
    context = own if context is None else context
    if not 2 <= context <= own:
        raise ValueError(f"context is {context}, expected 2 to {own}, the tokens that this model reads at once")
    stride = max(1, context // 2) if stride is None else stride
    if not 1 <= stride < context:
        raise ValueError(f"stride is {stride}, expected 1 to {context - 1}, less than the context")
    if model.training:
        raise ValueError("the model is in training mode, where dropout changes the loss; call model.eval() first")
    starts = [0] * len(sequences) if starts is None else starts
    windows = []
    for i, (ids, start) in enumerate(zip(sequences, starts, strict=True)):
        if ids and not 0 <= min(ids) <= max(ids) < model.config.vocab_size:
            raise ValueError(
                f"text {i} has the token {max(ids)}, but the model has {model.config.vocab_size} tokens; the tokenizer belongs "
                "to another model"
            )
        windows += cut(i, len(ids), max(1, start), context, stride)
    nll, tokens = [0.0] * len(sequences), [0] * len(sequences)
    device = next(model.parameters()).device
    for call in pack(windows, batch_tokens):
        ids = [sequences[w.sequence][w.start : w.stop] for w in call]
        hidden = model.model(torch.tensor([sum(ids, [])], device=device), documents=[len(part) for part in ids])[0]
        predicting, targets, end = [], [], 0
        for w, part in zip(call, ids, strict=True):
            predicting.append(hidden[end + w.first - 1 - w.start : end + len(part) - 1])
            targets += part[w.first - w.start :]
            end += len(part)
        losses = ops.token_losses(torch.cat(predicting), model.lm_head, torch.tensor(targets, device=device))
        for w, part in zip(call, losses.double().cpu().split([w.stop - w.first for w in call]), strict=True):
            nll[w.sequence] += part.sum().item()
            tokens[w.sequence] += len(part)
    if broken := [i for i, value in enumerate(nll) if not math.isfinite(value)]:
        raise ValueError(
            f"the loss of {len(broken)} of {len(nll)} texts is not finite; that of text {broken[0]} is {nll[broken[0]]}"
        )
    return list(zip(nll, tokens, strict=True))


def cut(sequence, length, first, context, stride):
    """The Windows of one sequence of `length` tokens. Together they score each token from index `first` on once."""
    windows, start = [], 0
    while first < length:
        stop = min(start + context, length)
        if stop > first:
            windows.append(Window(sequence, start, first, stop))
            first = stop
        start += stride
    return windows


def pack(windows, batch_tokens):
    """Lists of consecutive windows with at most `batch_tokens` tokens together, or of one longer window."""
    calls, size = [], 0
    for window in windows:
        length = window.stop - window.start
        if not calls or size + length > batch_tokens:
            calls.append([])
            size = 0
        calls[-1].append(window)
        size += length
    return calls


def exp(x):
    """e**x, or infinity if that exceeds a float (a loss above 709 nats per token or word)."""
    return math.exp(x) if x < 709 else math.inf
