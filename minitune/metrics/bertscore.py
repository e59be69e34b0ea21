"""BERTScore (arXiv 1904.09675) as in the bert-score package, with the encoders of models/roberta.py.

The encoder and its tokenizer are arguments (see checkpoint.load_encoder and tokenizer.load_tokenizer). A text that occurs several
times is encoded once, and texts are packed without padding."""

import math
from collections import Counter
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

# bert-score's layer for each model that minitune can load: the one with the best correlation with people on WMT16.
LAYERS = {
    "roberta-base": 10,
    "roberta-large": 17,
    "roberta-large-mnli": 19,
    "roberta-base-openai-detector": 7,
    "roberta-large-openai-detector": 15,
    "distilroberta-base": 5,
    "bert-base-uncased": 9,
    "bert-large-uncased": 18,
    "bert-base-cased-finetuned-mrpc": 9,
    "bert-base-multilingual-cased": 9,
    "bert-base-chinese": 8,
    "allenai/scibert_scivocab_uncased": 8,
    "allenai/scibert_scivocab_cased": 9,
    "dbmdz/bert-base-turkish-cased": 10,
    "SpanBERT/spanbert-base-cased": 8,
    "SpanBERT/spanbert-large-cased": 17,
    "ProsusAI/finbert": 10,
}
OWNERS = ("FacebookAI/", "google-bert/", "distilbert/", "openai-community/")  # new prefixes of names in LAYERS
PAIRS = 256  # pairs whose embeddings are in memory at once: about 160 MB for 80 tokens x 1024 dims


@torch.inference_mode()
def bert_score(
    references,
    candidates,
    encoder,
    tokenizer,
    layer=None,
    idf=False,
    baseline=None,
    prefix_space=False,
    batch_tokens=1024,
):
    """(P, R, F1), fp32 tensors (pairs,) on the CPU.

    Each token is matched with the most similar token of the other text, by the cosine of the hidden states. P is the mean over
    the candidate's tokens, R over the reference's.

    references: list of str, or of lists of str; with several references P, R and F1 are each the best over them. candidates: list
    of str. Texts are stripped, and truncated to the length that encoder and tokenizer take.
    encoder: a models.roberta.Encoder. tokenizer: its Tokenizer. layer: number of blocks whose output is used, or a model's name
    in LAYERS; None: the entry in LAYERS for the name that the encoder was loaded by.
    idf: weight tokens by log((n + 1) / (references with the token + 1)) over the n references. Without idf every token has weight
    1, except the special tokens around a text, which have weight 0; other tokens may still be matched with them.
    baseline: (P, R, F1) of random pairs, or the path of bert-score's table for this model. Each score then becomes
    (score - baseline) / (1 - baseline).
    prefix_space: put a space before every text, as a byte-level BPE has before a word. bert-score's published numbers and
    baselines for RoBERTa have it (slow tokenizers); with fast tokenizers, and so with transformers 5, bert-score does not.
    batch_tokens: tokens packed into one call of the encoder; on a GPU more is faster.

    An empty text scores 0, as in bert-score. Two deviations from bert-score: if idf gives all tokens of a text weight 0, P or R
    is 0 instead of NaN (F1 is 0 in both); and negative similarities are kept, while bert-score replaces them by 0 if the text is
    in a batch with longer ones. Raises ValueError on NaN and on lists of different lengths."""
    if len(references) != len(candidates):
        raise ValueError(f"got {len(references)} references and {len(candidates)} candidates, expected equal numbers")
    layer = choose_layer(encoder, layer)
    rescale = None if baseline is None else read_baseline(baseline, layer)
    groups = [[group] if isinstance(group, str) else list(group) for group in references]
    if empty := [i for i, group in enumerate(groups) if not group]:
        raise ValueError(f"pair {empty[0]} has no reference, expected at least one")
    if not groups:
        return tuple(torch.zeros(0) for _ in range(3))

    longest = encoder.config.max_length
    limit = tokenizer.config.get("model_max_length")
    longest = min(longest, int(limit)) if isinstance(limit, int | float) else longest
    encode = Encoding(tokenizer, longest, prefix_space)
    pairs = [(encode(ref), encode(c)) for group, c in zip(groups, candidates, strict=True) for ref in group]
    frame = [token for part in tokenizer.frame for token in part]
    if (highest := max(max(text) for pair in pairs for text in pair)) >= encoder.config.vocab_size:
        raise ValueError(
            f"a text has the token {highest}, but the encoder has {encoder.config.vocab_size} tokens; the tokenizer belongs to "
            "another model"
        )
    weights, default = idf_weights([ref for ref, _ in pairs]) if idf else (dict.fromkeys(frame, 0.0), 1.0)
    scores = match_all(pairs, encoder, layer, weights, default, len(frame), batch_tokens)
    if not scores.isfinite().all():
        bad = int((~scores.isfinite().all(1)).nonzero()[0])
        raise ValueError(f"the score of pair {bad} is {scores[bad].tolist()}: the encoder gives NaN or zeros")
    best = torch.stack([part.amax(0) for part in scores.split([len(group) for group in groups])])
    if rescale is not None:
        best = (best - rescale) / (1 - rescale)
    return best[:, 0].clone(), best[:, 1].clone(), best[:, 2].clone()


class Encoding:
    """A function from a text to a tuple of ids, which remembers the texts that it has seen."""

    def __init__(self, tokenizer, longest, prefix_space):
        self.tokenizer, self.longest, self.prefix = tokenizer, longest, " " if prefix_space else ""
        self.known = {}

    def __call__(self, text):
        text = text.strip()
        if text not in self.known:
            shown = self.prefix + text if text else text
            self.known[text] = tuple(self.tokenizer.encode_framed(shown, self.longest))
        return self.known[text]


def idf_weights(references):
    """({token id: weight}, weight of all other tokens) from the ids of the references. Equal references all count. The special
    tokens around a text are in every reference, so their weight is 0."""
    n, found = len(references), Counter()
    for ids in references:
        found.update(set(ids))
    return {token: math.log((n + 1) / (count + 1)) for token, count in found.items()}, math.log(n + 1)


def choose_layer(encoder, layer):
    """The number of blocks to use. layer: as in bert_score(). Raises ValueError if LAYERS has no entry."""
    blocks = encoder.config.num_hidden_layers
    name = layer
    if layer is None:
        name = getattr(encoder, "name", "")
        for owner in OWNERS:
            name = name.removeprefix(owner)
    if isinstance(name, str):
        if name not in LAYERS:
            raise ValueError(
                f"no layer is known for {name or 'this encoder'!r}; give layer=N (0 to {blocks}), or the name of a known model, "
                f"such as {', '.join(list(LAYERS)[:3])}"
            )
        layer = LAYERS[name]
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer <= blocks:
        raise ValueError(f"layer is {layer!r}, expected 0 to {blocks}, the blocks of this encoder")
    return layer


def read_baseline(baseline, layer):
    """Baselines of P, R and F1 as a tensor (3,) fp32. baseline: three numbers, or the path of a table with the columns LAYER, P,
    R, F. Raises ValueError if there are no such numbers."""
    if isinstance(baseline, str | Path):
        path = Path(baseline)
        try:
            lines = path.read_text().splitlines()
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror}); expected a table of baselines") from None
        rows = [line.replace("\t", ",").split(",") for line in lines if line.strip()]
        if not rows or [cell.strip() for cell in rows[0]] != ["LAYER", "P", "R", "F"]:
            raise ValueError(f"{path} does not begin with LAYER,P,R,F; expected bert-score's table of baselines")
        try:
            found = {int(row[0]): [float(cell) for cell in row[1:]] for row in rows[1:]}
        except (ValueError, IndexError):
            raise ValueError(f"{path} has a row that is not four numbers; expected LAYER,P,R,F") from None
        if layer not in found:
            raise ValueError(
                f"{path} has no row for layer {layer}; it has {len(found)} rows and may be for another model"
            )
        baseline = found[layer]
    numbers = torch.tensor([float(number) for number in baseline])
    if len(numbers) != 3 or not (numbers < 1).all():
        raise ValueError(f"baseline is {baseline}, expected three numbers below 1: P, R and F1 of random pairs")
    return numbers


def match_all(pairs, encoder, layer, weights, default, frame, batch_tokens):
    """(pairs, 3) fp32: P, R and F1 of pairs of id tuples (reference, candidate). Equal pairs are computed once.

    Pairs are sorted by length, so that little padding is needed. The embeddings of a text are freed after its last pair.
    weights, default: as idf_weights() returns them. frame: number of tokens of an empty text."""
    unique = sorted(set(pairs), key=lambda pair: (len(pair[0]) + len(pair[1]), pair))
    last = {text: i for i, pair in enumerate(unique) for text in pair}
    embedded, scores = {}, {}
    for start in range(0, len(unique), PAIRS):
        part = unique[start : start + PAIRS]
        new = sorted(
            {text for pair in part for text in pair if text not in embedded}, key=lambda text: (len(text), text)
        )
        for call in batches(new, batch_tokens):
            embedded.update(embed(call, encoder, layer))
        for i in range(0, len(part), 64):
            scores.update(match(part[i : i + 64], embedded, weights, default, frame))
        for text in [text for text in embedded if last[text] < start + PAIRS]:
            del embedded[text]
    return torch.tensor([scores[pair] for pair in pairs])


def batches(texts, batch_tokens):
    """Lists of consecutive texts, tuples of ids, with at most `batch_tokens` tokens together, or one longer text."""
    calls, size = [], 0
    for text in texts:
        if not calls or size + len(text) > batch_tokens:
            calls.append([])
            size = 0
        calls[-1].append(text)
        size += len(text)
    return calls


def embed(texts, encoder, layer):
    """{text: unit vectors (T, C)} for texts, tuples of ids, which are packed into one row."""
    device = next(encoder.parameters()).device
    lengths = [len(text) for text in texts]
    ids = torch.tensor([token for text in texts for token in text], device=device)[None]
    hidden = encoder(ids, lengths=lengths, layer=layer)[0].float()
    return dict(zip(texts, (hidden / hidden.norm(dim=-1, keepdim=True)).split(lengths), strict=True))


def match(pairs, embedded, weights, default, frame):
    """{pair: (P, R, F1)} for pairs of id tuples (reference, candidate), computed in one batched product.

    embedded: {text: (T, C)}. Other arguments as in match_all()."""
    ref, cand = (pad_sequence([embedded[pair[side]] for pair in pairs], batch_first=True) for side in (0, 1))
    here = []  # for each side: (B, T) bool, False on padding
    share = []  # for each side: (B, T) weights that sum to 1 over a text, or to 0 if all are 0
    for side, padded in ((0, ref), (1, cand)):
        rows = [torch.tensor([weights.get(token, default) for token in pair[side]]) for pair in pairs]
        w = pad_sequence(rows, batch_first=True).to(padded.device)
        total = w.sum(1, keepdim=True)
        share.append(w / total.where(total != 0, 1))
        lengths = torch.tensor([len(pair[side]) for pair in pairs], device=padded.device)
        here.append(torch.arange(w.shape[1], device=padded.device) < lengths[:, None])
    similar = cand @ ref.mT  # (B, T_cand, T_ref)
    precision = similar.masked_fill(~here[0][:, None, :], -torch.inf).amax(2).masked_fill(~here[1], 0)
    recall = similar.masked_fill(~here[1][:, :, None], -torch.inf).amax(1).masked_fill(~here[0], 0)
    P, R = (precision * share[1]).sum(1), (recall * share[0]).sum(1)
    F1 = (2 * P * R / (P + R)).nan_to_num(nan=0.0)  # for 0 / 0; a NaN of the encoder stays in P and R
    is_empty = torch.tensor([min(map(len, pair)) <= frame for pair in pairs], device=P.device)
    return dict(zip(pairs, torch.stack((P, R, F1), dim=1).masked_fill(is_empty[:, None], 0).tolist(), strict=True))
