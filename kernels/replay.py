"""Records the operations of one decoding step and replays them without Python: as a CUDA graph on a GPU, as a tape on a CPU.
Python takes a quarter of the time of a small model's step.

On a CPU each C operation appends itself and its addresses to the tape (perform() in tape.c). Watch finds every other operation
that computes something. A recording is used only after one step was both replayed and computed, with equal bits. A replayed step
does not run its Python code, so its prints and counters do not run either. A model with a module whose attributes change from
step to step is not replayed (see Snapshot). MINITUNE_KERNELS=torch records no tapes."""

import copy
import weakref

import torch
from minitune_kernels import agreement, formulas, ops_cpu
from minitune_kernels.built import tell
from torch.overrides import TorchFunctionMode

# Methods of tensors that may run between C operations: those that read a shape, those that return a view (if they copy
# instead, the tape is invalid), and those that allocate.
SHAPES = set("size dim numel stride is_contiguous __get__ __len__".split())
VIEWS = set(
    "__get__ __getitem__ chunk contiguous detach dropout expand flatten narrow permute reshape split squeeze to transpose "
    "unflatten unsqueeze view view_as".split()
)
ALLOCATIONS = set("empty empty_like new_empty".split())

RECORDED = 4  # the call that is recorded. Recording costs the time of two calls, which a short answer would not save


def recorder(x, form):
    """The class that replays decoding steps: Tape, Graph or None. x: the input of a step; form: the ops.CacheForm of its cache.

    None once a version of an operation was set aside: an edited formula may do anything, so it has to run at every step."""
    if agreement.is_any_set_aside():
        return None
    if form.has_writers:
        return Tape if ops_cpu.takes(x) else None
    return Graph if x.is_cuda and not torch.is_grad_enabled() else None


class Repeated:
    """Calls a function of some modules normally three times, records the fourth call, checks the fifth against its replay, then
    replays. Valid while shapes and the cache's memory stay the same."""

    def __init__(self, modules=()):
        self.modules = modules
        self.fault = None  # why the recording is invalid, in words
        self.runs = 0

    def run(self, function, *inputs):
        """function(*inputs), a tensor, which is valid until the next call. After a change of the modules the function is called
        normally again."""
        self.runs += 1
        if self.runs < RECORDED or self.fault:
            return function(*inputs)
        if self.runs == RECORDED:
            output = self.record(function, *(t.clone() for t in inputs))  # clones: a replay writes into its inputs
            self.snapshot = Snapshot(self.modules)
            return output
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        replayed = self.replay()
        if not self.snapshot.is_current():  # checked while a GPU replays; a replay that is not used does no harm
            self.fault = "the model was changed"
            return function(*inputs)
        if self.runs > RECORDED + 1:
            return replayed
        replayed, computed = replayed.clone(), function(*inputs)
        if not torch.equal(replayed, computed):
            self.fault = "a replay differs from the computed step"
            tell(f"decoding steps are not replayed, which is slower: {self.fault}")
        return computed


class Tape(Repeated):
    """A recording of C operations on a CPU, each of which appends itself to the tape."""

    def __init__(self, modules=()):
        super().__init__(modules)
        library, _ = ops_cpu.library()
        self.address = library.tape_new()
        weakref.finalize(self, free, self.address)

    def record(self, function, *inputs):
        """function(*inputs), recorded. inputs: tensors that replay() reads; fill them before each replay."""
        library, _ = ops_cpu.library()
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

    def replay(self):
        """Compute the tensor that record() returned again, from what its inputs hold now. Raises MemoryError."""
        library, _ = ops_cpu.library()
        if library.tape_run(self.address):
            raise MemoryError("no memory for a decoding step")
        return self.output


def free(address):
    """Free a tape. One that an interrupt left recording is stopped first."""
    ops_cpu.library()[0].tape_free(address)


class Graph(Repeated):
    """A recording of any operations on a GPU, as a CUDA graph. A step that cannot be captured, for example because it reads a
    number on the CPU, is reported once and runs normally."""

    def record(self, function, *inputs):
        self.inputs, self.graph = inputs, torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.graph):
                self.output = function(*inputs)
        except RuntimeError as error:
            self.fault = str(error).splitlines()[0]
            tell(f"decoding steps are not replayed, which is slower: {self.fault}")
            return function(*inputs)
        return self.replay()  # the capture computed nothing

    def replay(self):
        self.graph.replay()
        return self.output


class Snapshot:
    """What the formulas and some modules were: their code; attributes, submodules and hooks, and the addresses of the weights."""

    def __init__(self, modules):
        self.now = [vars(part) for module in modules for part in module.modules()]
        self.before = [{name: copied(value) for name, value in attributes.items()} for attributes in self.now]
        self.formulas = formula_codes()
        held = [[*attributes["_parameters"].values(), *attributes["_buffers"].values()] for attributes in self.now]
        self.tensors = [t for group in held for t in group if t is not None]
        self.addresses = [t.data_ptr() for t in self.tensors]

    def is_current(self):
        """Whether nothing changed since, and torch has no global module hooks."""
        try:
            is_same = self.now == self.before and [t.data_ptr() for t in self.tensors] == self.addresses
        except (RuntimeError, ValueError):  # == of tensors or arrays that are not the same object
            return False
        return is_same and self.formulas == formula_codes() and not torch.nn.modules.module._has_any_global_hook()


def formula_codes():
    """The code objects of the formulas. Equal lists cost a microsecond to compare, as == of objects begins with identity."""
    return [agreement.code_of(value) for value in vars(formulas).values() if callable(value)]


def copied(value):
    """A copy of a container, which may be changed in place. Anything else is returned as it is."""
    return copy.copy(value) if isinstance(value, (dict, list, set)) else value


class Watch(TorchFunctionMode):
    """While active, looks at every call of torch. Additions run in C instead, so that they are on the tape too.

    fault: the first call that a tape cannot repeat, or None. kept: the tensors whose addresses are on the tape, to keep them
    alive."""

    def __init__(self):
        super().__init__()
        self.fault, self.kept = None, []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", str(function))
        if name in ("add", "add_") and not kwargs and len(args) == 2 and is_sum(*args):
            result = ops_cpu.add(*args, out=args[0] if name == "add_" else None)
            self.kept += [t.detach() for t in (*args, result)]
            return result
        result = function(*args, **(kwargs or {}))
        if name == "data_ptr":
            self.kept.append(args[0].detach())
        elif found := tensors(result):
            known = {t.untyped_storage().data_ptr() for t in tensors(args)}
            is_view = name in VIEWS and all(t.untyped_storage().data_ptr() in known for t in found)
            is_view = is_view and not (kwargs or {}).get("inplace")  # dropout in place returns its input and changes it
            if not is_view and name not in ALLOCATIONS:
                self.fault = self.fault or f"torch's {name}()"
        elif name not in SHAPES:
            self.fault = self.fault or f"torch's {name}()"
        return result


def is_sum(x, y):
    """Whether ops_cpu.add() can add x and y."""
    return (
        isinstance(x, torch.Tensor)
        and isinstance(y, torch.Tensor)
        and x.dtype is y.dtype
        and (x.shape == y.shape or y.shape == x.shape[-1:])
        and x.is_contiguous()
        and y.is_contiguous()
        and ops_cpu.takes(x)
        and y.is_cpu
    )


def tensors(values):
    """[value] for a tensor; the tensors in a tuple or list, however deep; [] for anything else."""
    if isinstance(values, torch.Tensor):
        return [values]
    return [t for value in values for t in tensors(value)] if isinstance(values, (tuple, list)) else []
