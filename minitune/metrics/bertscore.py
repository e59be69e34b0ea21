"""BERTScore (arXiv 1904.09675) as the bert-score package computes it, over a hand-written encoder.

The encoder and its tokenizer come as arguments (checkpoint.load_encoder, tokenizer.load_tokenizer). Texts that occur more than
once are encoded once, and packed without padding."""

import math
from collections import Counter
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

LAYERS = {  # the layer that agrees best with people on WMT16, as bert-score ships it, of the models that load here
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
OWNERS = ("FacebookAI/", "google-bert/", "distilbert/", "openai-community/")  # of names that once had none
PAIRS = 256  # whose embeddings are in memory at once: about 160 MB of 80 tokens x 1024


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
    """(P, R, F1), fp32 tensors (pairs,) on the CPU: every token is matched with the most similar one of the other text, by
    the cosine of the hidden states; P is the mean over the candidate's tokens, R over the reference's.

    references: list of str, or of lists of str: each of P, R and F1 is then the best over a pair's references.
    candidates: list of str. Both are stripped, and cut to what encoder and tokenizer take.
    encoder: models.roberta.Encoder. layer: hidden states after so many blocks, or a model's name in LAYERS; None: as
    LAYERS says for the name that the encoder was loaded by.
    idf: weight tokens by log((n + 1) / (references with the token + 1)) over the n references. Without it every token
    weighs 1 but the two around a text, which weigh 0; other tokens may be matched with these all the same.
    baseline: (P, R, F1) of random pairs, or the path of bert-score's table of them for this model; each score becomes
    (score - baseline) / (1 - baseline).
    prefix_space: a space before every text, as a byte-level BPE has before a word. bert-score's published numbers and
    baselines were made so with RoBERTa, as its slow tokenizers do; with fast ones, and so with transformers 5, bert-score
    leaves the space out.
    batch_tokens: packed into one call of the encoder; on a GPU more is faster.

    An empty text scores 0, as in bert-score. Two deviations: where idf gives all tokens of a text weight 0, P or R is 0
    (NaN in bert-score; F1 is 0 in both); and a similarity below 0 counts as it is, while bert-score takes 0 for it where
    the text stands in a batch with longer ones. Raises ValueError on NaN."""
    if len(references) != len(candidates):
        raise ValueError(f"got {len(references)} references and {len(candidates)} candidates, expected as many")
    layer = choose_layer(encoder, layer)
    rescale = None if baseline is None else read_baseline(baseline, layer)
    groups = [[group] if isinstance(group, str) else list(group) for group in references]
    if empty := [i for i, group in enumerate(groups) if not group]:
        raise ValueError(f"pair {empty[0]} has no reference, expected one or more")
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
            f"a text has the token {highest}, but the encoder has {encoder.config.vocab_size}; its tokenizer is of another model"
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
    """Text to a tuple of ids, each text once."""

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
    """({token id: weight}, the weight of other tokens) from the ids of all references, a reference counted as often as
    it occurs. The tokens around a text are in all of them and weigh 0."""
    n, found = len(references), Counter()
    for ids in references:
        found.update(set(ids))
    return {token: math.log((n + 1) / (count + 1)) for token, count in found.items()}, math.log(n + 1)


def choose_layer(encoder, layer):
    """The number of blocks. layer: as in bert_score. Raises ValueError where the table does not say."""
    blocks = encoder.config.num_hidden_layers
    name = layer
    if layer is None:
        name = getattr(encoder, "name", "")
        for owner in OWNERS:
            name = name.removeprefix(owner)
    if isinstance(name, str):
        if name not in LAYERS:
            raise ValueError(
                f"no layer is known for {name or 'this encoder'!r}; give layer=N (0 to {blocks}), or the name of the model "
                f"that it is, such as {', '.join(list(LAYERS)[:3])}"
            )
        layer = LAYERS[name]
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer <= blocks:
        raise ValueError(f"layer is {layer!r}, expected 0 to {blocks}, the blocks of this encoder")
    return layer


def read_baseline(baseline, layer):
    """(3,) fp32. baseline: three numbers, or the path of a table with the columns LAYER, P, R, F."""
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
                f"{path} has no row for layer {layer}; it has {len(found)} rows and may be of another model"
            )
        baseline = found[layer]
    numbers = torch.tensor([float(number) for number in baseline])
    if len(numbers) != 3 or not (numbers < 1).all():
        raise ValueError(f"baseline is {baseline}, expected three numbers below 1: P, R and F1 of random pairs")
    return numbers


def match_all(pairs, encoder, layer, weights, default, frame, batch_tokens):
    """(pairs, 3) fp32: P, R, F1 of pairs of id tuples (reference, candidate), equal pairs once.

    Pairs of like length come together, so that neither packing nor matching wastes work, and the embeddings of a text
    go when its last pair is done. frame: the number of tokens of an empty text."""
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
    calls, size = [], 0
    for text in texts:
        if not calls or size + len(text) > batch_tokens:
            calls.append([])
            size = 0
        calls[-1].append(text)
        size += len(text)
    return calls


def embed(texts, encoder, layer):
    """{text: unit vectors (T, C)} of texts, tuples of ids, packed into one row."""
    device = next(encoder.parameters()).device
    lengths = [len(text) for text in texts]
    ids = torch.tensor([token for text in texts for token in text], device=device)[None]
    hidden = encoder(ids, lengths=lengths, layer=layer)[0].float()
    return dict(zip(texts, (hidden / hidden.norm(dim=-1, keepdim=True)).split(lengths), strict=True))


def match(pairs, embedded, weights, default, frame):
    """{pair: (P, R, F1)} of pairs of id tuples (reference, candidate), all in one product."""
    ref, cand = (pad_sequence([embedded[pair[side]] for pair in pairs], batch_first=True) for side in (0, 1))
    here = []  # (B, T) bool of each side: whether there is a token
    share = []  # (B, T) the weights, which sum to 1 over a text, or to 0
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
    F1 = (2 * P * R / (P + R)).nan_to_num(nan=0.0)  # 0 / 0; P and R keep a NaN of the encoder's
    is_empty = torch.tensor([min(map(len, pair)) <= frame for pair in pairs], device=P.device)
    return dict(zip(pairs, torch.stack((P, R, F1), dim=1).masked_fill(is_empty[:, None], 0).tolist(), strict=True))
