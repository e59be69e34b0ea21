"""The key-value cache of a decoding, and attention over it.

A prompt's keys and values are stored once, however many sequences are decoded from it: memory grows with the new tokens, not with
beams x prompt. Letters as in layers.py, and: B prompts, n sequences of each, R = B * n, P tokens of the longest prompt stored."""

import weakref

import torch
from minitune_kernels import ops, replay

FIRST_CAPACITY = 256  # new tokens that there is room for at first; doubled when they come


class Cache:
    """What all layers share: how many tokens of the prompts and how many new tokens are stored.

    First every prompt is read, in one or more calls of the model with input_ids (1, N): `pieces` says which tokens these are,
    [(prompt, start, stop), ...]. Then each call brings T tokens of every sequence, input_ids (R, T), the n sequences of a
    prompt side by side.
    window: sliding window of Mistral v0.1. Only what it can see is kept; new tokens are in a ring buffer."""

    def __init__(self, num_layers, lengths, sequences=1, max_new_tokens=1, window=None, draft=0):
        self.lengths, self.sequences, self.window = list(lengths), sequences, window
        self.new = 0  # tokens of every sequence that are stored
        self.pieces = []
        most = max_new_tokens if window is None else min(max_new_tokens, window)
        self.capacity = min(most, FIRST_CAPACITY if window is None else window) + draft  # a ring has its size at once
        self.layers = [LayerCache(self) for _ in range(num_layers)]
        self.writers = None  # (R, capacity) int32: the sequence whose token stands in a slot; None: each its own
        self.form = None  # ops.CacheForm: how keys are stored; chosen when the prompts have been read
        self.shape = None  # ops.Shape, for a form with writers; made anew where prompts leave
        self.tapes = {}  # the form of a step -> its Tape or Graph

    def read(self, pieces):
        """Says which tokens of the prompts the next call brings."""
        self.pieces = list(pieces)

    def positions(self, T, device):
        """(1, N) int64 of the pieces, or (R, T) of the next new tokens."""
        if self.pieces:
            return torch.cat([torch.arange(start, stop, device=device) for _, start, stop in self.pieces])[None]
        lengths = torch.tensor(self.lengths, device=device).repeat_interleave(self.sequences)
        return lengths[:, None] + self.new + torch.arange(T, device=device)

    def run(self, blocks, x, rope, layout):
        """x (R, T, C), or (1, N, C) while prompts are read, through the blocks of a model.

        A step with the same shapes as earlier ones is replayed, from a tape or as a CUDA graph, without the blocks' Python."""

        def through(x, cos, sin, *masks):
            layout.cache_masks = masks
            for block, layer in zip(blocks, self.layers, strict=True):
                x = block(x, (cos, sin), layout, layer)
            return x

        if self.pieces:
            return through(x, *rope)
        self.make_room(x.shape[1])
        if self.form.has_writers:
            self.next_shape(x.shape[1])
        inputs = (x, *rope) if self.form.has_writers else (x, *rope, *self.masks(layout.positions))
        kind = replay.recorder(x, self.form)
        if kind is None:
            return through(*inputs)
        form = *(t.shape for t in inputs), x.dtype, torch.get_num_threads()
        if form not in self.tapes:
            self.tapes[form] = kind(blocks)
            self.tapes[form].fault = "a hook" if has_hooks(blocks) else None
        return self.tapes[form].run(through, *inputs)

    def make_room(self, T):
        """Make room for the next T tokens in every layer."""
        if self.layers[0].prompt_k is None:
            for layer in self.layers:
                layer.lay_out()
        if self.window is not None or self.new + T <= self.capacity:
            return
        more = max(self.capacity, T)
        self.capacity += more
        for layer in self.layers:
            layer.grow(more)
        if self.writers is not None:
            own = torch.arange(len(self.writers), dtype=torch.int32)[:, None].expand(-1, more)
            self.writers = torch.cat([self.writers, own], dim=1)
        self.tapes = {}

    def masks(self, positions):
        """The tensors that a step in torch needs beside keys and values, so that a CUDA graph of it stays right: the slots (T,)
        int64 of the tokens at `positions` (R, T); a bool mask over the new tokens (1, 1, 1, T, capacity), True where a query
        may look; and, only if some prompt token is hidden from a query, a mask over the prompt tokens, shape
        (B, 1, n or 1, 1, T or 1, P)."""
        B, n, T = len(self.lengths), self.sequences, positions.shape[1]
        device, window = positions.device, self.window
        index = self.new + torch.arange(T, device=device)  # of the queries among the new tokens
        owner = self.owners(T, device)
        new = (owner <= index[:, None]) & (owner >= 0)
        is_windowed = window is not None and max(self.lengths) + self.new + T > window
        if is_windowed:
            new = new & (index[:, None] - owner < window)
        found = index % self.capacity, new[None, None, None]
        stored = self.layers[0].stored  # tokens kept of each prompt, the last ones
        P = max(stored)
        if min(stored) == P and not is_windowed:
            return found
        kept = torch.tensor(stored, device=device)[:, None]
        slot = torch.arange(P, device=device)
        prompt = (slot < kept)[:, None, None, None, None]
        if is_windowed:
            at = slot + (torch.tensor(self.lengths, device=device)[:, None] - kept)  # (B, P) positions
            prompt = prompt & (positions.view(B, 1, n, 1, T, 1) - at.view(B, 1, 1, 1, 1, P) < window)
        return *found, prompt

    def owners(self, T, device):
        """(capacity,) int64: which new token each slot of the ring holds once the next T are stored; -1: none."""
        last = self.new + T - 1
        slot = torch.arange(self.capacity, device=device)
        owner = last - (last - slot) % self.capacity
        return torch.where(owner < 0, -1, owner)

    def advance(self, T):
        """Called when all layers have stored the tokens of a call."""
        if self.pieces:
            self.pieces = []
            return
        if self.writers is not None:
            slots = torch.arange(self.new, self.new + T) % self.capacity
            self.writers[:, slots] = torch.arange(len(self.writers), dtype=torch.int32)[:, None]
        self.new += T

    def drop(self, count):
        """Forget the last `count` new tokens of every sequence."""
        self.new -= count

    def reorder(self, rows):
        """rows (R,) int64: the sequence that each one continues from now on, of the same prompt."""
        if self.form.has_writers:  # nothing moves
            if self.writers is None:
                self.writers = torch.arange(len(rows), dtype=torch.int32)[:, None].expand(-1, self.capacity)
            self.writers = self.writers[rows]
            return
        used = min(self.new, self.capacity)
        for layer in self.layers:
            layer.k[:, :, :used] = layer.k[rows, :, :used]
            layer.v[:, :, :used] = layer.v[rows, :, :used]

    def keep(self, prompts):
        """Keep only these prompts (their indices, ascending) and their sequences."""
        for layer in self.layers:
            layer.keep(prompts, self.sequences)
        if self.writers is not None:
            rows = torch.tensor([p * self.sequences + i for p in prompts for i in range(self.sequences)])
            place = torch.zeros(len(self.writers), dtype=torch.int32)
            place[rows] = torch.arange(len(rows), dtype=torch.int32)
            self.writers = place[self.writers[rows].long()]
        self.lengths, self.shape, self.tapes = [self.lengths[i] for i in prompts], None, {}

    def next_shape(self, T):
        """The ops.Shape for the next T tokens: the same object each time, since a tape holds its address. It keeps the
        tensors that it points to alive."""
        if self.shape is None:
            layer = self.layers[0]
            B, H_kv, P, D = layer.prompt_k.shape
            self.shape = ops.Shape(B=B, n=self.sequences, H_kv=H_kv, D=D, P=P, window=self.window or 0)
            self.shape.tensors = torch.tensor(self.lengths), torch.tensor(layer.stored)
            self.shape.lengths, self.shape.stored = (t.data_ptr() for t in self.shape.tensors)
        shape = self.shape
        shape.T, shape.capacity, shape.new_tokens = T, self.capacity, self.new
        shape.writers = None if self.writers is None else self.writers.data_ptr()
        return shape


def has_hooks(blocks):
    """Whether a block, or a module in it, has a hook: hooks must run at every step."""
    if torch.nn.modules.module._has_any_global_hook():
        return True
    return any(module._forward_hooks or module._forward_pre_hooks for block in blocks for module in block.modules())


class Memory:
    """What is known of one conversation: its ids, and each layer's keys and values (H_kv, len(ids), D). The model reads only the
    tokens of the next prompt that differ. Nothing is kept once a sliding window has dropped tokens."""

    def __init__(self):
        self.forget()

    def forget(self):
        self.ids, self.layers = [], []

    def recall(self, cache, prompt):
        """Copy what is known of this prompt into `cache`, which is empty and of this prompt alone. Returns the number of tokens;
        at least one is left to read."""
        known = 0
        while known < min(len(self.ids), len(prompt) - 1) and self.ids[known] == prompt[known]:
            known += 1
        if known:
            for layer, (k, v) in zip(cache.layers, self.layers, strict=True):
                layer.parts[0] = k[:, :known], v[:, :known]
        return known

    def keep(self, cache, ids):
        """Keep what the cache holds of `ids`, the prompt and the new tokens."""
        ids = ids[: cache.lengths[0] + cache.new]
        if cache.window and len(ids) >= cache.window:
            self.forget()
        elif cache.layers[0].prompt_k is not None or cache.layers[0].parts:
            self.ids, self.layers = ids, [layer.first(len(ids)) for layer in cache.layers]


class LayerCache:
    """Keys and values of one layer: of the prompts (B, H_kv, P, D), and of the new tokens (R, H_kv, capacity, D)."""

    def __init__(self, cache):
        # Weak: cache -> layer -> cache would be a cycle, freed only by the garbage collector.
        self.cache = weakref.proxy(cache)
        self.parts = {}  # while prompts are read: prompt -> (k, v), each (H_kv, S, D)
        self.stored = []
        self.prompt_k = self.prompt_v = self.k = self.v = None

    def attend(self, q, k, v, layout):
        """Store k, v and attend. q (R, H, T, D); k, v (R, H_kv, T, D), or all with R = 1 while prompts are read.
        Returns (R, T, H * D) in q.dtype."""
        if self.cache.pieces:
            return self.read(q, k, v)
        self.cache.make_room(q.shape[2])
        form, stores = self.cache.form, (self.prompt_k, self.prompt_v, self.k, self.v)
        if form.has_writers:
            where = self.cache.next_shape(q.shape[2])
            where.H = q.shape[1]
        else:
            where = layout.masks(self.cache)
        return ops.attention_over_cache(form, q, k, v, stores, where)

    def read(self, q, k, v):
        """The tokens of cache.pieces: each attends to the earlier ones of its prompt."""
        window, outputs, sizes = self.cache.window, [], [stop - start for _, start, stop in self.cache.pieces]
        for (prompt, start, stop), *piece in zip(
            self.cache.pieces, *(t.split(sizes, dim=2) for t in (q, k, v)), strict=True
        ):
            own_q, own_k, own_v = piece
            keys, values = own_k[0], own_v[0]
            if start:
                before_k, before_v = self.parts[prompt]
                keys, values = torch.cat([before_k, keys], dim=1), torch.cat([before_v, values], dim=1)
            T, S = stop - start, keys.shape[1]
            mask = ops.causal_mask(T, S, window, q.device) if start or (window and S > window) else None
            out = ops.attention(own_q, keys[None], values[None], mask, is_causal=mask is None and T > 1)
            outputs.append(out.transpose(1, 2))
            if window and S > window - 1:  # no later token looks further back
                keys, values = keys[:, S - window + 1 :], values[:, S - window + 1 :]
            self.parts[prompt] = keys, values
        return torch.cat(outputs, dim=1).reshape(1, q.shape[2], -1)

    def lay_out(self):
        """Join the prompts in one tensor, with unused slots after the shorter ones. An interrupt leaves all or nothing done."""
        parts = [self.parts[prompt] for prompt in range(len(self.cache.lengths))]
        self.stored = [k.shape[1] for k, _ in parts]
        H_kv, _, D = parts[0][0].shape
        shape = len(parts), H_kv, max(self.stored), D
        self.cache.form = form = ops.cache_form(parts[0][0])
        self.dtype, device, dtype = parts[0][0].dtype, parts[0][0].device, form.dtype
        make = (
            torch.empty if form.has_writers else torch.zeros
        )  # masks hide slots that were not written: 0 * NaN is NaN
        prompt_k, prompt_v = (make(shape, dtype=dtype, device=device) for _ in range(2))
        for i, (k, v) in enumerate(parts):
            prompt_k[i, :, : self.stored[i]], prompt_v[i, :, : self.stored[i]] = k, v
        room = len(parts) * self.cache.sequences, H_kv, self.cache.capacity, D
        self.k, self.v = (make(room, dtype=dtype, device=device) for _ in range(2))
        self.prompt_v, self.prompt_k = prompt_v, prompt_k  # its keys last: they say that all is there
        self.parts = {}

    def grow(self, more):
        """Make room for that many further new tokens."""
        room = self.k.new_zeros(*self.k.shape[:2], more, self.k.shape[3])
        self.k, self.v = torch.cat([self.k, room], dim=2), torch.cat([self.v, room], dim=2)

    def first(self, count):
        """Keys and values (H_kv, count, D) of the only sequence's first tokens, in the dtype in which they were read."""
        if self.prompt_k is None:
            return tuple(t[:, :count] for t in self.parts[0])
        new = count - self.stored[0]
        pairs = (self.prompt_k, self.k), (self.prompt_v, self.v)
        return tuple(torch.cat([before[0], after[0, :, :new]], dim=1).to(self.dtype) for before, after in pairs)

    def keep(self, prompts, n):
        if self.prompt_k is None:
            self.lay_out()
        rows = [prompt * n + i for prompt in prompts for i in range(n)]
        self.stored = [self.stored[i] for i in prompts]
        longest = max(self.stored)
        self.prompt_k, self.prompt_v = (t[prompts][:, :, :longest].contiguous() for t in (self.prompt_k, self.prompt_v))
        self.k, self.v = self.k[rows], self.v[rows]
