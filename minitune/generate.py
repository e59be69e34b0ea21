"""Decoding: new tokens for prompts. Greedy decoding, sampling, beam search and beam sampling with a key-value cache.

The options mean what they mean in transformers, and the tokens are the same. Not here: loading a model (session.py)."""

import hashlib
from dataclasses import dataclass

import torch
from minitune_kernels import nf4, ops
from torch import nn

from minitune.adapters.lora import LoRALinear
from minitune.decoding import sampling
from minitune.decoding.lookup import Lookup
from minitune.decoding.options import GenerateConfig as GenerateConfig
from minitune.decoding.search import Answer, Search
from minitune.models.cache import Cache
from minitune.models.layers import LayerNorm, Linear, RMSNorm
from minitune.quant import NF4Linear
from minitune.screen import some

NORMS = {RMSNorm: "rms_norm", LayerNorm: "layer_norm"}  # class of a module -> its operation in ops
# hidden_act of config.json -> the operation of the MLP in ops
BY_ACTIVATION = {"silu": "swiglu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
# Default length of a guess: 7 guessed tokens and the last one are 8 rows, which cost one pass over the weights.
FREE_LOOKUP = 7
PREFILL_TOKENS = 2048  # most prompt tokens in one call of the model


@dataclass
class Counts:
    """Counts of one decoding."""

    steps: int = 0  # calls of the model after the prompts were read
    guessed: int = 0  # tokens guessed by prompt lookup
    accepted: int = 0  # guessed tokens that were right


@dataclass
class Prefix:
    """Keys, values and logits of some prompts, for decoding the same prompts again with the same model. decode() fills an empty
    Prefix, and uses a filled one instead of running the model over the prompts."""

    parts: list | None = None  # for each layer: {index of the prompt: (keys, values), each (H_kv, P, D)}
    logits: torch.Tensor | None = None  # (B, V), of the token after each prompt

    def bytes(self):
        """Memory of the keys and values, in bytes."""
        pairs = [pair for layer in self.parts for pair in layer.values()]
        return sum(t.numel() * t.element_size() for pair in pairs for t in pair)


def generate(model, prompts, config, tokenizer=None):
    """The new token ids of each prompt, without the end token: a list of lists.

    prompts: lists of token ids, of any lengths. config: a GenerateConfig. tokenizer: needed for config.stop. Each prompt has
    num_return_sequences adjacent lists in the result. An answer does not depend on the other prompts: bit by bit on a CPU
    with up to steady_rows() sequences, elsewhere up to rounding in the matrix products. Raises as decode() does."""
    return [answer.ids for answer in decode(model, prompts, config, tokenizer)[0]]


@torch.no_grad()
def decode(model, prompts, config, tokenizer=None, on_token=None, memory=None, prefix=None, copies=None):
    """(list of Answers, Counts). Each prompt has num_return_sequences adjacent Answers.

    prompts, config, tokenizer: as in generate(). on_token: called with each new id as soon as it is chosen; for a single
    answer without beams. memory: the cache.Memory of a conversation that the prompt continues; it then holds the answer too;
    for a single answer without beams. prefix: a Prefix, to decode the same prompts several times. copies: for a batch out of a
    longer list, the part of earlier_copies() of that list that belongs to these prompts; equal prompts then draw different
    random numbers.
    Raises ValueError on an empty prompt, a prompt that leaves no room in the model's context, ids that the model does not
    have, and options that exclude each other; FloatingPointError on NaN in the logits."""
    check(model, prompts, config, tokenizer, on_token, memory)
    if not prompts:
        return [], Counts()
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        decoder = Decoder(model, config, tokenizer, prefix, copies or earlier_copies(prompts))
        return decoder.beams(prompts) if config.num_beams > 1 else decoder.rows(prompts, on_token, memory)
    finally:
        for module in training:
            module.training = True


def earlier_copies(prompts):
    """For each prompt, how many earlier prompts in the list are equal to it."""
    seen, copies = {}, []
    for prompt in map(tuple, prompts):
        copies.append(seen.get(prompt, 0))
        seen[prompt] = copies[-1] + 1
    return copies


def check(model, prompts, config, tokenizer, on_token, memory):
    """Raises ValueError if decode() cannot work with these arguments."""
    context, vocabulary = model.config.max_position_embeddings, model.config.vocab_size
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i} has no tokens; give at least one, such as BOS")
        if len(prompt) >= context:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens, but the model's context is {context}, answer included; shorten it"
            )
        if config.max_length is not None and len(prompt) >= config.max_length:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens, but prompt and answer may have max_length {config.max_length}; "
                "shorten it, or set max_new_tokens"
            )
        if not 0 <= min(prompt) or max(prompt) >= vocabulary:
            wrong = next(t for t in prompt if not 0 <= t < vocabulary)
            raise ValueError(f"prompt {i} has the token {wrong}, but the model has {vocabulary} tokens")
    if beyond := [i for i in config.eos_ids or () if i >= vocabulary]:
        raise ValueError(f"eos_ids is {some(beyond)}, but the model has the tokens 0 to {vocabulary - 1:,}")
    if config.stop and tokenizer is None:
        raise ValueError("stop is given without a tokenizer, which is needed to find these texts")
    if on_token and (config.num_beams > 1 or len(prompts) * config.num_return_sequences != 1):
        raise ValueError("streaming needs a single answer without beams: a beam may still be replaced by another")
    if memory is not None and (config.num_beams > 1 or len(prompts) * config.num_return_sequences != 1):
        raise ValueError("memory works for a single answer without beams only")
    if config.lookup and len(prompts) > 1:
        raise ValueError(f"lookup is for one prompt at a time, and there are {len(prompts)}; set it to 0")


class Decoder:
    """The loops of decode(), for one model and its options. R rows of a step, V tokens of the vocabulary."""

    def __init__(self, model, config, tokenizer, prefix, copies):
        self.model, self.config, self.tokenizer, self.prefix, self.copies = model, config, tokenizer, prefix, copies
        self.eos = config.eos_ids if config.eos_ids is not None else getattr(model, "eos_ids", ())
        self.device = next(model.parameters()).device
        self.window = getattr(model.config, "sliding_window", None)
        # Most tokens of an answer to any prompt.
        self.longest = min(config.max_new_tokens, model.config.max_position_embeddings)
        self.counts = Counts()
        self.steady = steady_rows(model)

    def limit(self, prompt_length):
        """Most tokens of an answer to a prompt of `prompt_length` tokens."""
        longest, both = self.longest, self.config.max_length
        return longest if both is None else min(longest, both - prompt_length)

    # --- the model ---

    def read(self, prompts, sequences, draft=0, memory=None):
        """Read the prompts into a new cache. Returns (Cache, logits (B, V) of the token after each prompt).

        sequences: sequences of each prompt. draft: most guessed tokens in a step. memory: a cache.Memory or None."""
        lengths = [len(prompt) for prompt in prompts]
        cache = Cache(self.model.config.num_hidden_layers, lengths, sequences, self.longest, self.window, draft)
        if self.prefix is not None and self.prefix.parts is not None:
            for layer, parts in zip(cache.layers, self.prefix.parts, strict=True):
                layer.parts = parts  # shared: a LayerCache copies from it and does not write to it
            return cache, self.prefix.logits
        start = memory.recall(cache, prompts[0]) if memory else 0
        last = {}
        for call in self.calls(lengths, start):
            cache.read(call)
            ids = torch.tensor([[t for i, start, stop in call for t in prompts[i][start:stop]]], device=self.device)
            hidden, end = self.model.model(ids, cache=cache)[0], 0
            for i, start, stop in call:
                end += stop - start
                if stop == lengths[i]:
                    last[i] = hidden[end - 1]
        hidden = torch.stack([last[i] for i in range(len(prompts))])
        logits = self.model.lm_head(hidden)
        if self.prefix is not None:
            self.prefix.parts, self.prefix.logits = [layer.parts for layer in cache.layers], logits
        return cache, logits

    def calls(self, lengths, start):
        """The calls of the model that read the prompts, each a list [(prompt, start, stop), ...].

        lengths: tokens of each prompt. start: first token of the first prompt to read. Short prompts are packed into one call up
        to the length at which the bits stay the same (steady_rows). A longer prompt is split into calls of its own."""
        most = self.steady if self.steady > 1 else PREFILL_TOKENS
        call, size = [], 0
        for i, length in enumerate(lengths):
            if call and size + length - start > most:
                yield call
                call, size = [], 0
            if length - start > most:
                yield from ([(i, a, min(a + PREFILL_TOKENS, length))] for a in range(start, length, PREFILL_TOKENS))
            else:
                call.append((i, start, length))
                size += length - start
            start = 0
        if call:
            yield call

    def step(self, cache, tokens):
        """tokens (R, T) -> logits (R, T, V)."""
        self.counts.steps += 1
        return self.model.lm_head(self.model.model(tokens, cache=cache))

    # --- scores ---

    def logprobs(self, logits):
        """logits (R, V) -> log-probabilities (R, V) fp32. Raises FloatingPointError on NaN."""
        logprobs = logits.float().log_softmax(-1)
        refuse_nan(logprobs[:, 0])  # one NaN in a row of logits makes the whole row NaN
        return logprobs

    def adjusts(self, new_length):
        """Whether adjust() does anything."""
        config = self.config
        least = max(config.min_new_tokens - new_length, config.min_length or 0)
        rare = config.bad_words_ids, config.suppress_tokens, config.begin_suppress_tokens, config.forced_eos_token_id
        is_forced = config.forced_bos_token_id is not None
        is_penalised = config.repetition_penalty != 1.0 or config.no_repeat_ngram_size > 0
        return is_penalised or bool(least > 0 and self.eos) or is_forced or any(rare)

    def adjust(self, scores, histories, new_length):
        """Apply the penalties and bans to scores (R, V), in transformers' order. Returns new scores.

        histories: lists of ids of each row, prompt included. new_length: tokens of the answers so far."""
        config = self.config
        if config.repetition_penalty != 1.0:
            scores = sampling.penalise_repetition(scores, self.seen(histories), config.repetition_penalty)
        if config.no_repeat_ngram_size:
            scores = sampling.ban_repeated_ngrams(scores, histories, config.no_repeat_ngram_size)
        if config.bad_words_ids:
            words = [list(word) for word in config.bad_words_ids if len(word) > 1 or word[0] not in self.eos]
            scores = sampling.ban_words(scores, histories, words)
        if self.eos and config.min_length:
            short = [row for row, ids in enumerate(histories) if len(ids) < config.min_length]
            scores = sampling.ban(scores, self.eos, short)
        if self.eos and new_length < config.min_new_tokens:
            scores = sampling.ban(scores, self.eos)
        if config.forced_bos_token_id is not None:
            first = [row for row, ids in enumerate(histories) if len(ids) == 1]
            scores = sampling.force(scores, [config.forced_bos_token_id], first)
        if config.forced_eos_token_id:
            last = [row for row, ids in enumerate(histories) if new_length + 1 == self.limit(len(ids) - new_length)]
            scores = sampling.force(scores, config.forced_eos_token_id, last)
        if config.suppress_tokens:
            scores = sampling.ban(scores, config.suppress_tokens)
        if config.begin_suppress_tokens:
            is_forced = config.forced_bos_token_id is not None
            begins = [
                row for row, ids in enumerate(histories) if new_length == (is_forced and len(ids) - new_length == 1)
            ]
            scores = sampling.ban(scores, config.begin_suppress_tokens, begins)
        return scores

    def warp(self, scores, keep=1):
        """sampling.warp() with the options of this decoding."""
        config = self.config
        return sampling.warp(
            scores, config.temperature, config.top_k, config.top_p, config.min_p, keep, config.typical_p
        )

    def renormalise(self, scores):
        return scores.log_softmax(-1) if self.config.renormalize_logits else scores

    def seen(self, histories):
        """(R, V) bool, True for the tokens in each row's history."""
        seen = torch.zeros(len(histories), self.model.config.vocab_size, dtype=torch.bool)
        for row, ids in enumerate(histories):
            seen[row, ids] = True
        return seen.to(self.device)

    def generators(self, prompts):
        """A torch.Generator for each answer. Its seed depends on the option `seed`, the prompt and the number of the answer to
        it, so the other prompts of a batch have no influence."""
        generators, n = [], self.config.num_return_sequences
        for prompt, copy in zip(prompts, self.copies, strict=True):
            for i in range(n):
                digest = hashlib.sha256(f"{self.config.seed} {copy * n + i} {list(prompt)}".encode()).digest()
                generators.append(torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")))
        return generators

    def ends(self, ids):
        """ "eos" or "stop" if the last of these new ids ends an answer, else None."""
        if ids[-1] in self.eos:
            return "eos"
        if self.config.stop:
            # Enough tokens to hold the longest stop text: a token is at least one of the up to 4 bytes of a character.
            text = self.tokenizer.decode(ids[-4 * max(map(len, self.config.stop)) - 1 :])
            if any(stop in text for stop in self.config.stop):
                return "stop"
        return None

    # --- greedy and sampling ---

    def rows(self, prompts, on_token=None, memory=None):
        """Greedy decoding and sampling: ([Answer, ...], Counts). A prompt leaves the batch when all its answers are complete."""
        if getattr(self.model.config, "rope", None) and self.model.config.rope.kind == "dynamic":
            memory = None  # dynamic RoPE rotates all keys again when the length changes
        config, n = self.config, self.config.num_return_sequences
        answers, length = [Answer() for _ in range(len(prompts) * n)], 0
        limits = [self.limit(len(prompt)) for prompt in prompts for _ in range(n)]
        generators = self.generators(prompts) if config.samples else None
        lookup = self.lookup(len(prompts))
        cache, logits = self.read(prompts, n, lookup.at_most if lookup else 0, memory)
        logits = logits.repeat_interleave(n, dim=0)
        running = list(range(len(prompts)))  # indices of the prompts in the batch; answer i of prompt p is p * n + i
        histories = [list(prompt) for prompt in prompts for _ in range(n)]
        done = [False] * len(answers)
        try:
            while True:
                active = [p * n + i for p in running for i in range(n)]
                drawn_from = generators and [generators[a] for a in active]
                tokens, logprobs = self.choose(logits, [histories[a] for a in active], length, drawn_from)
                length += 1
                for a, token, logprob in zip(active, tokens.tolist(), logprobs.tolist(), strict=True):
                    if not done[a]:
                        histories[a].append(token)
                        done[a] = self.append(answers[a], token, logprob, limits[a], on_token)
                still = [k for k, p in enumerate(running) if not all(done[p * n : p * n + n])]
                if not still:
                    return answers, self.counts
                if len(still) < len(running):
                    kept = [k * n + i for k in still for i in range(n)]
                    cache.keep(still)
                    running, tokens = [running[k] for k in still], tokens[kept]
                if lookup:
                    logits = self.guess(lookup, cache, histories[0], answers[0], limits[0], on_token)
                    if logits is None:
                        return answers, self.counts
                    length = len(answers[0].ids)
                else:
                    logits = self.step(cache, tokens[:, None])[:, -1]
        finally:  # also if on_token raises to stop an answer
            if memory is not None:
                memory.keep(cache, histories[0])

    def choose(self, logits, histories, new_length, generators):
        """(next token of each row (R,), its log-probability under the model (R,)). logits: (R, V).

        histories: lists of ids of each row, prompt included. new_length: tokens of the answers so far. generators: one for each
        row to draw with, or None for greedy decoding."""
        if generators is None and not self.adjusts(new_length):
            logprobs, tokens = likeliest(logits, 1)
            return tokens[:, 0], logprobs[:, 0]
        logprobs = self.logprobs(logits)
        scores = self.adjust(logits.float(), histories, new_length)
        if generators is None:
            tokens = scores.argmax(-1)
        else:
            numbers = torch.cat([torch.rand(1, generator=g, dtype=torch.float64) for g in generators])
            tokens = sampling.draw(self.warp(scores), numbers)
        return tokens, logprobs.gather(1, tokens[:, None])[:, 0]

    def append(self, answer, token, logprob, limit, on_token=None):
        """Add a token to an answer of at most `limit` tokens. Returns whether the answer is complete."""
        answer.ids.append(token)
        answer.logprobs.append(logprob)
        ended = self.ends(answer.ids)
        if ended == "eos":
            answer.ids.pop()
        elif on_token:
            on_token(token)
        if ended:
            answer.ended_by = ended
        return bool(ended) or len(answer.ids) == limit

    def lookup(self, prompts):
        """The Lookup of this decoding, or None. prompts: their number. If the option is not set, a single greedy answer uses
        lookup with guesses short enough to keep the bits (steady_rows)."""
        config = self.config
        at_most = config.lookup
        if at_most is None:
            is_greedy = not config.samples and prompts * config.num_return_sequences == 1
            at_most = min(FREE_LOOKUP, self.steady - 1) if is_greedy else 0
        return Lookup(at_most) if at_most else None

    def guess(self, lookup, cache, history, answer, limit, on_token):
        """One step of prompt lookup: guess tokens, verify them in one call, and append those that greedy decoding chooses too.

        history: ids of prompt and answer, which is extended; limit: most tokens of the answer. Returns the logits (1, V) after
        the accepted tokens, or None if the answer is complete."""
        room = limit - len(answer.ids)
        guess = lookup.guess(history, room - 1)
        tokens = torch.tensor([[history[-1], *guess]], device=self.device)
        logits = self.step(cache, tokens)[0]  # (1 + guessed, V)
        self.counts.guessed += len(guess)
        accepted = 0
        for i, token in enumerate(guess):
            chosen, logprob = self.choose(logits[i : i + 1], [history], len(answer.ids), None)
            if chosen.item() != token:
                break
            accepted += 1
            self.counts.accepted += 1
            history.append(token)
            if self.append(answer, token, logprob.item(), limit, on_token):
                return None
        cache.drop(len(guess) - accepted)
        lookup.learn(len(guess), accepted)
        return logits[accepted : accepted + 1]

    # --- beams ---

    def beams(self, prompts):
        """Beam search or beam sampling: ([Answer, ...], Counts). A prompt leaves the batch when its search is complete."""
        config, n = self.config, self.config.num_beams
        count = max(2, 1 + len(self.eos)) * n  # candidates: n remain even if every beam ends with every end token
        count = min(count, n * self.model.config.vocab_size)
        searches = [Search(list(prompt), n, self.limit(len(prompt))) for prompt in prompts]
        generators = self.generators(prompts)[:: config.num_return_sequences] if config.samples else None
        cache, logits = self.read(prompts, n)
        logits = logits.repeat_interleave(n, dim=0)
        running = list(range(len(prompts)))
        while True:
            active = [searches[p] for p in running]
            drawn_from = generators and [generators[p] for p in running]
            found = self.candidates(logits, active, drawn_from, count)
            parents = [search.advance(self, *parts) for search, *parts in zip(active, *found, strict=True)]
            still = [k for k, search in enumerate(active) if not search.done]
            if not still:
                break
            rows = [k * n + beam for k, beams in enumerate(parents) for beam in beams]
            if cache.new and rows != list(range(len(rows))):
                cache.reorder(torch.tensor(rows, device=self.device))
            if len(still) < len(running):
                cache.keep(still)
                running = [running[k] for k in still]
            tokens = torch.tensor([[ids[-1]] for p in running for ids in searches[p].tokens], device=self.device)
            logits = self.step(cache, tokens)[:, -1]
        return [answer for s in searches for answer in s.answers(config.num_return_sequences)], self.counts

    def candidates(self, logits, searches, generators, count):
        """The candidates for the next step, best first, or in the order drawn.

        logits: (prompts * num_beams, V). searches: the Search of each prompt. generators: one for each prompt, or None. count:
        candidates of each prompt. Returns [scores, beams, tokens, log-probabilities], each a list of `count` entries for each
        prompt, as Search.advance() takes them."""
        n, length, config = self.config.num_beams, searches[0].length, self.config
        before = torch.tensor([search.scores for search in searches], device=self.device)[:, :, None]  # (prompts, n, 1)
        if config.samples or self.adjusts(length):
            raw = self.logprobs(logits)
            scores = self.adjust(raw, [ids for search in searches for ids in search.histories()], length)
            if config.samples:
                scores = self.renormalise(self.warp(scores, keep=len(self.eos) + 1 if self.eos else 2))
                tokens = torch.arange(scores.shape[1], device=self.device).expand_as(scores)
            else:
                scores, tokens = self.renormalise(scores).topk(min(count, scores.shape[1]))
                raw = raw.gather(1, tokens)
        else:  # the `count` best of all beams are among the `count` best of each beam
            raw, tokens = likeliest(logits, min(count, logits.shape[1]))
            scores = raw
        each = scores.shape[1]
        scores = (scores.view(len(searches), n, each) + before).flatten(1)
        if config.samples:
            numbers = [torch.rand(n * each, generator=generator, dtype=torch.float64) for generator in generators]
            drawn = [sampling.draw_several(*parts, count) for parts in zip(scores, numbers, strict=True)]
            picks = torch.stack(drawn).to(self.device)
        else:
            picks = scores.topk(count).indices
        tokens, raw = (t.reshape(len(searches), n * each).gather(1, picks) for t in (tokens, raw))
        return [found.tolist() for found in (scores.gather(1, picks), picks // each, tokens, raw)]


def likeliest(logits, count):
    """logits (R, V) -> (log-probabilities (R, count) fp32, ids (R, count) int64), best first. Raises FloatingPointError on
    NaN."""
    logprobs, ids = ops.most_likely(logits, count)
    refuse_nan(logprobs)
    return logprobs, ids


def refuse_nan(logprobs):
    if logprobs.isnan().any():
        raise FloatingPointError(
            "the model's logits are NaN: its weights are damaged, or too large for this dtype; try fp32"
        )


@torch.no_grad()
def steady_rows(model):
    """Largest number of tokens per call for which every token's result is bit-identical to processing it alone.

    1 if a matrix product of a library is used, since its order of summation depends on the number of rows."""
    config, modules = model.config, list(model.modules())
    rope = getattr(config, "rope", None)
    if rope is not None and rope.kind == "dynamic":  # the frequencies depend on the last position of a call
        return 1
    lora = [module for module in modules if isinstance(module, LoRALinear)]
    halves = {half for module in lora for half in (module.lora_A, module.lora_B)}
    operations = {"attention", "most_likely", "linear", BY_ACTIVATION[getattr(config, "hidden_act", "silu")]}
    operations |= {NORMS[type(module)] for module in modules if type(module) in NORMS}
    operations |= {"lora"} if lora else set()
    operations |= {"rope"} if rope is not None else set()
    weights, rows = [], []
    for module in modules:
        if isinstance(module, NF4Linear):
            shape = module.out_features, module.in_features
            rows.append(nf4.steady_rows(module.packed.device, shape, module.dtype))
        elif type(module) is Linear:
            weights.append(module.weight)
        elif module._parameters and module not in halves and type(module) not in (*NORMS, nn.Embedding):
            return 1
    return min([ops.steady_rows(next(model.parameters()), operations, weights), *rows])
