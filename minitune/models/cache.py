"""The key-value cache of a decoding, and attention over it.

The keys and values of a prompt are stored once and shared by all sequences decoded from it, so memory does not grow with
beams x prompt length. Letters as in layers.py, and: B prompts, n sequences of each, R = B * n, P stored tokens of the longest
prompt."""

import weakref

import torch
from minitune_kernels import ops, replay

FIRST_CAPACITY = 256  # initial capacity for new tokens; doubled whenever it is used up


class Cache:
    """The keys and values of all layers (LayerCache), and what the layers share: the numbers of stored tokens.

    First the prompts are read, in one or more calls of the model with input_ids (1, N). read() says which tokens the next call
    holds, as `pieces` [(prompt, start, stop), ...]. After that, each call holds the next T tokens of every sequence, input_ids
    (R, T), where the n sequences of a prompt are adjacent.

    lengths: tokens of each prompt, (B,). sequences: n. max_new_tokens: largest number of new tokens of a sequence. window: tokens
    of the sliding window of Mistral v0.1, or None. With a window only the tokens inside it are kept, and new tokens are
    stored in a ring buffer. draft: largest number of guessed tokens, which may be dropped again, in a call."""

    def __init__(self, num_layers, lengths, sequences=1, max_new_tokens=1, window=None, draft=0):
        self.lengths, self.sequences, self.window = list(lengths), sequences, window
        self.new = 0  # stored new tokens of each sequence
        self.pieces = []
        most = max_new_tokens if window is None else min(max_new_tokens, window)
        self.capacity = min(most, FIRST_CAPACITY if window is None else window) + draft  # slots; a ring never grows
        self.layers = [LayerCache(self) for _ in range(num_layers)]
        self.writers = None  # (R, capacity) int32: which sequence wrote the key in a slot; None: the sequence itself
        self.form = None  # ops.CacheForm: how keys are stored; chosen after the prompts were read
        self.shape = None  # ops.Shape, for a form with writers; None after prompts were removed
        self.tapes = {}  # recorded steps: (shapes, dtype, threads) -> Tape or Graph

    def read(self, pieces):
        """Announce the tokens of the prompts that the next call holds: pieces [(prompt, start, stop), ...]."""
        self.pieces = list(pieces)

    def positions(self, T, device):
        """Positions of the next call's tokens, int64: (1, N) while prompts are read, else (R, T)."""
        if self.pieces:
            return torch.cat([torch.arange(start, stop, device=device) for _, start, stop in self.pieces])[None]
        lengths = torch.tensor(self.lengths, device=device).repeat_interleave(self.sequences)
        return lengths[:, None] + self.new + torch.arange(T, device=device)

    def run(self, blocks, x, rope, layout):
        """Run the blocks of a model on x (R, T, C), or (1, N, C) while prompts are read. Returns the same shape.

        rope: (cos, sin) of Rope.tables(). layout: the Layout of this call. A step with the same shapes as earlier ones is
        replayed, from a tape or as a CUDA graph, without running the Python code of the blocks."""

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
        """Slots and masks for a step in torch. They are tensors, not numbers, so that a CUDA graph of the step stays valid.

        positions: (R, T) int64. Returns the slots (T,) int64 of the new tokens, and a bool mask over the slots,
        (1, 1, 1, T, capacity), True where a query may attend. Only if some prompt token is hidden from a query there is a third
        item: a mask over the prompt tokens, (B, 1, n or 1, 1, T or 1, P)."""
        B, n, T = len(self.lengths), self.sequences, positions.shape[1]
        device, window = positions.device, self.window
        index = self.new + torch.arange(T, device=device)  # index of each query among the new tokens
        owner = self.owners(T, device)
        new = (owner <= index[:, None]) & (owner >= 0)
        is_windowed = window is not None and max(self.lengths) + self.new + T > window
        if is_windowed:
            new = new & (index[:, None] - owner < window)
        found = index % self.capacity, new[None, None, None]
        stored = self.layers[0].stored  # number of stored tokens of each prompt, its last ones
        P = max(stored)
        if min(stored) == P and not is_windowed:
            return found
        kept = torch.tensor(stored, device=device)[:, None]
        slot = torch.arange(P, device=device)
        prompt = (slot < kept)[:, None, None, None, None]
        if is_windowed:
            at = slot + (torch.tensor(self.lengths, device=device)[:, None] - kept)  # (B, P) positions of the keys
            prompt = prompt & (positions.view(B, 1, n, 1, T, 1) - at.view(B, 1, 1, 1, 1, P) < window)
        return *found, prompt

    def owners(self, T, device):
        """(capacity,) int64: index of the new token in each slot after the next T are stored; -1 for an empty slot."""
        last = self.new + T - 1
        slot = torch.arange(self.capacity, device=device)
        owner = last - (last - slot) % self.capacity
        return torch.where(owner < 0, -1, owner)

    def advance(self, T):
        """Count the tokens of a call, after all layers have stored them. T: new tokens of each sequence."""
        if self.pieces:
            self.pieces = []
            return
        if self.writers is not None:
            slots = torch.arange(self.new, self.new + T) % self.capacity
            self.writers[:, slots] = torch.arange(len(self.writers), dtype=torch.int32)[:, None]
        self.new += T

    def drop(self, count):
        """Remove the last `count` new tokens of every sequence."""
        self.new -= count

    def reorder(self, rows):
        """Let each sequence continue another one of the same prompt, as in beam search. rows: (R,) int64, which one."""
        if self.form.has_writers:  # keys stay where they are; `writers` says whose they are
            if self.writers is None:
                self.writers = torch.arange(len(rows), dtype=torch.int32)[:, None].expand(-1, self.capacity)
            self.writers = self.writers[rows]
            return
        used = min(self.new, self.capacity)
        for layer in self.layers:
            layer.k[:, :, :used] = layer.k[rows, :, :used]
            layer.v[:, :, :used] = layer.v[rows, :, :used]

    def keep(self, prompts):
        """Keep only these prompts (ascending indices) and their sequences."""
        for layer in self.layers:
            layer.keep(prompts, self.sequences)
        if self.writers is not None:
            rows = torch.tensor([p * self.sequences + i for p in prompts for i in range(self.sequences)])
            place = torch.zeros(len(self.writers), dtype=torch.int32)
            place[rows] = torch.arange(len(rows), dtype=torch.int32)
            self.writers = place[self.writers[rows].long()]
        self.lengths, self.shape, self.tapes = [self.lengths[i] for i in prompts], None, {}

    def next_shape(self, T):
        """The ops.Shape for the next T tokens. Always the same object, because a tape holds its address. It also holds
        references to the tensors whose addresses it stores."""
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
    """Whether a block or a module inside it has a hook. Hooks must run at every step, so such a step is not replayed."""
    if torch.nn.modules.module._has_any_global_hook():
        return True
    return any(module._forward_hooks or module._forward_pre_hooks for block in blocks for module in block.modules())


class Memory:
    """Token ids of one conversation so far, and each layer's keys and values of them, (H_kv, len(ids), D).

    The model then reads only the part of the next prompt after the common beginning. Nothing is kept if a sliding window has
    dropped tokens."""

    def __init__(self):
        self.forget()

    def forget(self):
        self.ids, self.layers = [], []

    def recall(self, cache, prompt):
        """Put the stored keys and values of the beginning of `prompt` into `cache`, an empty cache of this one prompt.

        prompt: list of token ids. Returns the number of tokens found, at most len(prompt) - 1: the model must read at least one
        token to give logits."""
        known = 0
        while known < min(len(self.ids), len(prompt) - 1) and self.ids[known] == prompt[known]:
            known += 1
        if known:
            for layer, (k, v) in zip(cache.layers, self.layers, strict=True):
                layer.parts[0] = k[:, :known], v[:, :known]
        return known

    def keep(self, cache, ids):
        """Remember the cache's keys and values of `ids`, the prompt and the new tokens."""
        ids = ids[: cache.lengths[0] + cache.new]
        if cache.window and len(ids) >= cache.window:
            self.forget()
        elif cache.layers[0].prompt_k is not None or cache.layers[0].parts:
            self.ids, self.layers = ids, [layer.first(len(ids)) for layer in cache.layers]


class LayerCache:
    """Keys and values of one layer: of the prompts (B, H_kv, P, D) and of the new tokens (R, H_kv, capacity, D)."""

    def __init__(self, cache):
        # Weak: cache -> layer -> cache would be a cycle, freed only by the garbage collector.
        self.cache = weakref.proxy(cache)
        self.parts = {}  # while prompts are read: index of the prompt -> (k, v), each (H_kv, S, D)
        self.stored = []  # number of stored tokens of each prompt
        self.prompt_k = self.prompt_v = self.k = self.v = None

    def attend(self, q, k, v, layout):
        """Store k and v, then attend over all stored keys. Returns (R, T, H * D) in q.dtype.

        q: (R, H, T, D). k, v: (R, H_kv, T, D). While prompts are read all have R = 1 and T = N. layout: the Layout of this
        call."""
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
        """Store the prompt tokens of cache.pieces and attend. Each token attends to the earlier ones of its prompt."""
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
            if window and S > window - 1:  # later tokens attend to the last window - 1 of these only
                keys, values = keys[:, S - window + 1 :], values[:, S - window + 1 :]
            self.parts[prompt] = keys, values
        return torch.cat(outputs, dim=1).reshape(1, q.shape[2], -1)

    def lay_out(self):
        """Join the prompts in one tensor, with unused slots after the shorter ones, and allocate room for new tokens.

        The attributes are set so that an interrupt leaves either the old or the new state."""
        parts = [self.parts[prompt] for prompt in range(len(self.cache.lengths))]
        self.stored = [k.shape[1] for k, _ in parts]
        H_kv, _, D = parts[0][0].shape
        shape = len(parts), H_kv, max(self.stored), D
        self.cache.form = form = ops.cache_form(parts[0][0])
        self.dtype, device, dtype = parts[0][0].dtype, parts[0][0].device, form.dtype
        # With masks, unwritten slots get weight 0. They must not hold NaN, since 0 * NaN is NaN.
        make = torch.empty if form.has_writers else torch.zeros
        prompt_k, prompt_v = (make(shape, dtype=dtype, device=device) for _ in range(2))
        for i, (k, v) in enumerate(parts):
            prompt_k[i, :, : self.stored[i]], prompt_v[i, :, : self.stored[i]] = k, v
        room = len(parts) * self.cache.sequences, H_kv, self.cache.capacity, D
        self.k, self.v = (make(room, dtype=dtype, device=device) for _ in range(2))
        self.prompt_v, self.prompt_k = prompt_v, prompt_k  # prompt_k last: `prompt_k is None` means "not laid out yet"
        self.parts = {}

    def grow(self, more):
        """Make room for `more` further new tokens of each sequence."""
        room = self.k.new_zeros(*self.k.shape[:2], more, self.k.shape[3])
        self.k, self.v = torch.cat([self.k, room], dim=2), torch.cat([self.v, room], dim=2)

    def first(self, count):
        """(keys, values) of the first `count` tokens of the only sequence, each (H_kv, count, D), in the model's dtype."""
        if self.prompt_k is None:
            return tuple(t[:, :count] for t in self.parts[0])
        new = count - self.stored[0]
        pairs = (self.prompt_k, self.k), (self.prompt_v, self.v)
        return tuple(torch.cat([before[0], after[0, :, :new]], dim=1).to(self.dtype) for before, after in pairs)

    def keep(self, prompts, n):
        """Keep only these prompts (ascending indices) and their n sequences each."""
        if self.prompt_k is None:
            self.lay_out()
        rows = [prompt * n + i for prompt in prompts for i in range(n)]
        self.stored = [self.stored[i] for i in prompts]
        longest = max(self.stored)
        self.prompt_k, self.prompt_v = (t[prompts][:, :, :longest].contiguous() for t in (self.prompt_k, self.prompt_v))
        self.k, self.v = self.k[rows], self.v[rows]
