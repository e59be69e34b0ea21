"""The operations of one decoding step, recorded once and played again without the Python between them, in which a step of a
small model spends a quarter of its time: on a GPU a CUDA graph, on a CPU a tape.

The C operations write themselves down (perform() in tape.c) with the addresses that they were given; Watch sees to it that
nothing else happened to the numbers meanwhile. A record is believed after one step that was computed too. A function that is
played does not run its Python: what it prints is that of the first steps. A module that counts its calls, or keeps what it
saw, is noticed and runs at every step (see Parts). MINITUNE_KERNELS=torch makes no tapes."""

import copy
import weakref

import torch
from minitune_kernels import decode
from minitune_kernels.built import tell
from torch.overrides import TorchFunctionMode

# Methods of tensors that may stand between C operations: those that ask for a form, those that look at the same numbers in
# another form (where they copy instead, the tape is dropped), and those that make room.
ASKING = set("size dim numel stride is_contiguous __get__ __len__".split())
LOOKING = set(
    "__get__ __getitem__ chunk contiguous detach dropout expand flatten narrow permute reshape split squeeze to transpose "
    "unflatten unsqueeze view view_as".split()
)
MAKING = set("empty empty_like new_empty".split())


RECORDED = 4  # the run that is recorded: it costs as much as two runs more, which a short answer would not win back


class Repeated:
    """run() calls a function of some modules until it is known by heart; as long as shapes and the memory of the cache stay."""

    def __init__(self, modules=()):
        self.modules = modules
        self.fault = None  # why it cannot be played, in words
        self.runs = 0

    def run(self, function, *inputs):
        """function(*inputs), a tensor that is valid until the next call: called some times, then called and recorded, then
        played and called, to be compared bit by bit, and from then on played, until the modules are changed."""
        self.runs += 1
        if self.runs < RECORDED or self.fault:
            return function(*inputs)
        if self.runs == RECORDED:
            output = self.record(function, *(t.clone() for t in inputs))  # written to: must not be a part of a table
            self.parts = Parts(self.modules)
            return output
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        played = self.play()
        if not self.parts.stay():  # asked while a GPU plays; what was played did no harm
            self.fault = "the model was changed"
            return function(*inputs)
        if self.runs > RECORDED + 1:
            return played
        played, computed = played.clone(), function(*inputs)
        if not torch.equal(played, computed):
            self.fault = "what is played is not what was computed"
            tell(f"decoding steps are not played, which is slower: {self.fault}")
        return computed


class Tape(Repeated):
    """C operations on a CPU, which write themselves down."""

    def __init__(self, modules=()):
        super().__init__(modules)
        library, _ = decode.library()
        self.address = library.tape_new()
        weakref.finalize(self, free, self.address)

    def record(self, function, *inputs):
        """function(*inputs), written down. inputs: tensors that play() reads, to be written to before."""
        library, _ = decode.library()
        watch = Watch()
        try:
            library.record(self.address)
            with watch:
                output = function(*inputs)
        finally:
            library.record(None)
        self.fault = watch.fault
        self.inputs, self.output, self.kept = inputs, output, watch.kept
        return output

    def play(self):
        """What record() returned, for what its inputs hold now: the same tensor. Raises MemoryError."""
        library, _ = decode.library()
        if library.tape_run(self.address):
            raise MemoryError("no memory for a decoding step")
        return self.output


def free(address):
    """End a tape, also one that an interrupt left open."""
    decode.library()[0].tape_free(address)


class Graph(Repeated):
    """Any operations on a GPU: a CUDA graph, which repeats them with the memory that they used. What cannot be captured, such as
    a number that is read, is said once and goes on as before."""

    def record(self, function, *inputs):
        self.inputs, self.graph = inputs, torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.graph):
                self.output = function(*inputs)
        except RuntimeError as error:
            self.fault = str(error).splitlines()[0]
            tell(f"decoding steps are not played, which is slower: {self.fault}")
            return function(*inputs)
        return self.play()  # the capture computed nothing

    def play(self):
        self.graph.replay()
        return self.output


class Parts:
    """What some modules are made of: their attributes, parts and hooks, and where their weights lie."""

    def __init__(self, modules):
        self.now = [vars(part) for module in modules for part in module.modules()]
        self.before = [{name: apart(value) for name, value in attributes.items()} for attributes in self.now]
        held = [[*attributes["_parameters"].values(), *attributes["_buffers"].values()] for attributes in self.now]
        self.tensors = [t for group in held for t in group if t is not None]
        self.addresses = [t.data_ptr() for t in self.tensors]

    def stay(self):
        """Whether all is as it was, and no hook for all modules has come."""
        try:
            stays = self.now == self.before and [t.data_ptr() for t in self.tensors] == self.addresses
        except (RuntimeError, ValueError):  # of two tensors, or arrays, that are not one and the same
            return False
        return stays and not torch.nn.modules.module._has_any_global_hook()


def apart(value):
    """A copy of what may be changed where it lies."""
    return copy.copy(value) if isinstance(value, (dict, list, set)) else value


class Watch(TorchFunctionMode):
    """While open, sums of C's operations are computed there too, and every call that a tape could not repeat is noticed.

    fault: the first of them, or None; kept: the memory whose addresses were asked for, whatever becomes of its tensors."""

    def __init__(self):
        super().__init__()
        self.fault, self.kept = None, []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", str(function))
        if name in ("add", "add_") and not kwargs and len(args) == 2 and is_sum(*args):
            result = decode.add(*args, out=args[0] if name == "add_" else None)
            self.kept += [t.detach() for t in (*args, result)]
            return result
        result = function(*args, **(kwargs or {}))
        if name == "data_ptr":
            self.kept.append(args[0].detach())
        elif found := tensors(result):
            known = {t.untyped_storage().data_ptr() for t in tensors(args)}
            is_view = name in LOOKING and all(t.untyped_storage().data_ptr() in known for t in found)
            is_view = is_view and not (kwargs or {}).get("inplace")  # of dropout
            if not is_view and name not in MAKING:
                self.fault = self.fault or f"torch's {name}()"
        elif name not in ASKING:
            self.fault = self.fault or f"torch's {name}()"
        return result


def is_sum(x, y):
    """Whether decode.add takes these."""
    return (
        isinstance(x, torch.Tensor)
        and isinstance(y, torch.Tensor)
        and x.dtype is y.dtype
        and (x.shape == y.shape or y.shape == x.shape[-1:])
        and x.is_contiguous()
        and y.is_contiguous()
        and decode.takes(x)
        and y.is_cpu
    )


def tensors(values):
    """The tensors among a value, or those in a tuple or list."""
    if isinstance(values, torch.Tensor):
        return [values]
    return [t for value in values for t in tensors(value)] if isinstance(values, (tuple, list)) else []
