"""The check behind the doors ops.py and nf4.py: a fast version of an operation is used only after it agreed with the formula.

The first use of a version in a process, for a dtype and a kind of device, compares it with its formula on a small input. If a
gradient is recorded, the gradients are compared too. A version that differs by more than the rounding of the dtype is set aside
in this process; one for 16 bits must agree in fp32 too. The first version of an operation that is set aside is reported in one
line. A verdict holds while the formula's code is the same object, so an edit in a running process is seen too. An edit that
changes nothing for the sizes and values of EXAMPLES is not noticed.

The comparison runs in a thread of its own (direct.apart), so the caller's autograd, autocast, torch modes and tape do not see it.
Its random numbers come from a generator of its own. README.md says how long it takes."""

import ast
import functools
import hashlib
import math
from pathlib import Path

import torch
from minitune_kernels import built, formulas, nf4_reference, ops_cpu, ops_torch
from minitune_kernels.direct import apart
from torch.compiler import is_compiling
from torch.linalg import vector_norm as norm

# The largest difference as a share of the formula's values, both as root mean squares. In fp32 a sum in another order differs by
# 1e-7. In 16 bits some values are rounded to the neighbouring number. Gradients, which are rounded more often, may differ four
# times as much.
LIMITS = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
FP32_LIMIT = 2**-17
FAR = 16  # times the limit, as a share of the largest value: the limit for each single value

_verdicts = {}  # key -> (the formula's code, whether the version agrees); a key begins with the name of the operation
_aside = set()  # keys of versions that are set aside
_said = set()  # (operation, the formula's code) that a line reported


def agrees(operation, version, x):
    """Whether `version` of `operation` may be used for tensors of the dtype and device of x.

    False where nothing can be compared: while a compiler traces, under a transform of torch.func, and on the meta device."""
    if is_compiling():
        return False
    key = operation, version, x.dtype, "cpu" if x.is_cpu else x.device.type, torch.is_grad_enabled()
    formula = getattr(formulas, operation)
    found = _verdicts.get(key)
    if found is not None and found[0] is code_of(formula):
        return found[1]
    if key[3] == "meta" or torch._C._are_functorch_transforms_active():
        return False
    has_gradient = key[4] and version in RECORDED
    compare = functools.partial(difference, operation, version, x.dtype, x.device, has_gradient)
    return judge(key, formula, compare, words_of(operation, version))


def code_of(formula):
    """What changes when a formula is edited: its code, or the formula itself where it is no function of Python."""
    return getattr(formula, "__code__", formula)


@functools.cache
def formulas_fingerprint():
    """sha256 of the code of formulas.py and nf4_reference.py, without comments and
    docstrings. What was computed with other formulas was computed with another model."""
    code = []
    for module in (formulas, nf4_reference):
        tree = ast.parse(Path(module.__file__).read_text())
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        code.append(ast.unparse(tree))
    return hashlib.sha256("\n".join(code).encode()).hexdigest()


def known(key, formula):
    """The verdict on a key, None where there is none."""
    found = _verdicts.get(key)
    return found[1] if found is not None and found[0] is code_of(formula) else None


def judge(key, formula, compare, version):
    """Whether compare() finds no difference between a version and its formula. The verdict is kept for the key.

    compare: returns the difference in words, or None. version: in words, for the line on the screen."""
    code = code_of(formula)
    fault = apart(compare)
    _verdicts[key] = code, fault is None
    _aside.discard(key)
    if fault:
        _aside.add(key)
        if (key[0], code) not in _said:
            _said.add((key[0], code))
            place = f"{code.co_filename}:{code.co_firstlineno}" if hasattr(code, "co_filename") else repr(code)
            built.tell(
                f"{key[0]} follows its formula ({place}), which is slower: {version} {fault}. "
                "It is set aside in this process, as is every other version that differs"
            )
    return fault is None


def is_any_set_aside():
    """Whether a version is set aside in this process. No step is replayed then (replay.py).

    A verdict counts only while its formula is the present one."""
    if not _aside:
        return False
    current = {key: getattr(formulas, key[0], None) for key in _aside}
    return any(formula is None or _verdicts[key][0] is code_of(formula) for key, formula in current.items())


# --- the comparison ---


def difference(operation, version, dtype, device, has_gradient):
    """How a version differs from its formula, in words, or None. One for 16 bits is compared in fp32 too, where a change shows
    that is smaller than the rounding of 16 bits."""
    formula, fast = called(operation, getattr(formulas, operation)), VERSIONS[operation, version]
    for kind in dict.fromkeys((dtype, torch.float32)):
        limit = LIMITS.get(kind, FP32_LIMIT)
        for arguments in EXAMPLES[operation](Numbers(kind, device), version):
            try:
                expected, found = outcomes((formula, fast), arguments, has_gradient)
            except Exception as error:  # raised again where the operation is called
                return f"cannot be compared, as the formula or this version fails with {type(error).__name__}"
            for number, pair in enumerate(zip(found, expected, strict=True)):
                is_gradient = has_gradient and number > 0
                if share := distance(*pair, 4 * limit if is_gradient else limit):
                    return f"differs {'in its gradient ' if is_gradient else ''}by {share} of the values"
    return None


def called(operation, formula):
    """The formula with the arguments of EXAMPLES, and one result: the losses of tokens are summed."""
    if operation != "cross_entropy":
        return formula
    return lambda hidden, weight, targets: formula(hidden, Head(weight), targets).sum()


def outcomes(functions, arguments, has_gradient):
    """For each of the functions: [its results, and the gradients of its arguments that ask for one]. All gradients come from one
    backward pass, which takes longer than the arithmetic."""
    found, sums, leaves = [], [], []
    with torch.set_grad_enabled(has_gradient):
        for function in functions:
            own = [t.detach().clone().requires_grad_(t.requires_grad) if torch.is_tensor(t) else t for t in arguments]
            results = function(*own)
            found.append(list(results) if isinstance(results, tuple) else [results])
            if has_gradient:
                [result] = found[-1]
                sums.append((result * weights(result.numel(), result.device).view_as(result).to(result.dtype)).sum())
                leaves += [t for t in own if torch.is_tensor(t) and t.requires_grad]
    if has_gradient:
        # of a sum, since a gradient that is passed to torch.autograd.grad makes torch import sympy, in 0.6 s
        gradients = torch.autograd.grad(sum(sums), leaves)
        count = len(gradients) // len(functions)
        found = [[results[0].detach(), *gradients[i * count : (i + 1) * count]] for i, results in enumerate(found)]
    return found


@functools.cache
def weights(count, device):
    """The gradient of `count` results."""
    return torch.arange(count, device=device).cos()


def distance(found, expected, limit):
    """None where two tensors agree, else how far they are apart, in words."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return "all"
    if not found.is_floating_point():
        return None if torch.equal(found, expected) else f"{(found != expected).double().mean().item():.0%}"
    expected = expected.double()
    gap = found - expected
    share, most = (norm(gap, order).item() / (norm(expected, order).item() or 1.0) for order in (2, math.inf))
    if share <= limit and most <= FAR * limit:  # false for NaN
        return None
    return f"{share:.2g}" if math.isfinite(share) else "all"


class Numbers:
    """numbers(*shape): random values in a dtype on a device, the same in every process; they ask for a gradient."""

    def __init__(self, dtype, device):
        self.dtype, self.device, self.used = dtype, device, 0

    def __call__(self, *shape, scale=1.0, dtype=None):
        start, count = self.used, math.prod(shape)
        self.used += count
        drawn = draws(max(4096, 1 << (self.used - 1).bit_length()))
        return (drawn[start : self.used].view(shape) * scale).to(self.device, dtype or self.dtype).requires_grad_()


@functools.cache
def draws(count):
    """Random numbers that all examples share."""
    return torch.randn(count, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")


class Head:
    """A language model's head, as far as formulas.cross_entropy uses it."""

    def __init__(self, weight):
        self.weight = weight

    def __call__(self, hidden):
        return hidden @ self.weight.T

    def parameters(self):
        return [self.weight]


def norm_examples(numbers, version):
    x, weight, bias = numbers(3, 2, 37), numbers(37), numbers(37)
    return [(x, weight, bias, 1e-2)]


def rope_examples(numbers, version):
    rest = 0 if version == "Triton" else 6  # dims of a head that are not rotated
    angles = numbers(2, 1, 5, 11, dtype=torch.float32).detach() * 3
    tables = angles.cos().to(numbers.dtype), angles.sin().to(numbers.dtype)
    heads = numbers(2, 5, 3, 22 + rest).detach().transpose(1, 2).requires_grad_()  # (B, H, T, D), as a projection lies
    return [(heads, *tables)]


def linear_examples(numbers, version):
    x, weight, bias = numbers(3, 96), numbers(9, 96, scale=0.1), numbers(9)  # C takes multiples of 32
    return [(x, weight, bias), (x, weight, None)]


def lora_examples(numbers, version):
    A, B = (numbers(*shape, dtype=torch.float32) for shape in ((5, 70), (19, 5)))
    return [(numbers(3, 19, scale=8), numbers(3, 70), A, B, 0.5)]


# Keys of a prompt, of new tokens before this call, of this call: in the examples over a cache.
PROMPT, NEW, NOW = 3, 2, 2


def attention_examples(numbers, version):
    T = S = 5
    if "cache" in version:
        T, S = NOW, PROMPT + NEW + NOW
    mask = torch.ones(T, S, dtype=torch.bool, device=numbers.device).tril(S - T)
    examples = []
    for D in (20, 100) if "C" in version else (20,):
        q, k, v = numbers(2, 4, T, D, scale=2), numbers(2, 2, S, D), numbers(2, 2, S, D)
        for t in (k, v):
            t.data[1, :, :PROMPT] = t.data[0, :, :PROMPT]  # two sequences of one prompt
        examples.append((q, k, v, mask))
    return [*examples, (*examples[0][:3], None)] if version == "torch" else examples


def over_cache_in_torch(q, k, v, mask):
    prompts, new = stored(k, v, PROMPT + NEW + NOW)
    new_mask = torch.zeros(1, 1, 1, NOW, new[0].shape[2], dtype=torch.bool, device=q.device)
    new_mask[..., : NEW + NOW] = mask[:, PROMPT:]
    return ops_torch.attention_over_cache(q, (*prompts, *new), new_mask, None)


def over_cache_in_c(q, k, v, mask):
    (R, H, T, D), H_kv = q.shape, k.shape[1]
    prompts, new = stored(k, v, PROMPT + NEW)
    length = torch.tensor([PROMPT])
    sizes = {
        "B": 1,
        "n": R,
        "H": H,
        "H_kv": H_kv,
        "T": T,
        "D": D,
        "P": PROMPT,
        "capacity": NEW + NOW + 1,
        "new_tokens": NEW,
    }
    shape = ops_cpu.Shape(length.data_ptr(), length.data_ptr(), **sizes)
    out = ops_cpu.attention_over_cache(q, k[:, :, -NOW:], v[:, :, -NOW:], shape, (*prompts, *new))
    return out.view(R, T, H, D).transpose(1, 2)


def stored(k, v, count):
    """((keys, values) of the prompt, (keys, values) of the new tokens up to key `count`), as a cache stores them."""
    prompts = [t[:1, :, :PROMPT].contiguous() for t in (k, v)]
    new = [t.new_zeros(len(t), t.shape[1], NEW + NOW + 1, t.shape[3]) for t in (k, v)]
    for room, t in zip(new, (k, v), strict=True):
        room[:, :, : count - PROMPT] = t[:, :, PROMPT:count]
    return prompts, new


def cross_entropy_examples(numbers, version):
    hidden, weight = numbers(ops_torch.CHUNK + 3, 24), numbers(53, 24)
    return [(hidden, weight, torch.arange(len(hidden), device=numbers.device) * 7 % 53)]


def most_likely_examples(numbers, version):
    places = torch.arange(2 * 301, device=numbers.device).view(2, 301) * 37 % 301  # no two alike in a row
    return [((places * 0.125 - 20).to(numbers.dtype), 4)]


EXAMPLES = {
    "rms_norm": lambda *how: [(x, weight, eps) for x, weight, _, eps in norm_examples(*how)],
    "layer_norm": norm_examples,
    "rope": rope_examples,
    "swiglu": lambda numbers, version: [(numbers(3, 37, scale=4), numbers(3, 37))],
    "gelu": lambda numbers, version: [(numbers(3, 37, scale=2),)],
    "gelu_tanh": lambda numbers, version: [(numbers(3, 37, scale=2),)],
    "linear": linear_examples,
    "lora": lora_examples,
    "attention": attention_examples,
    "cross_entropy": cross_entropy_examples,
    "most_likely": most_likely_examples,
}


def in_one_pass(activation, approximation):
    """An activation by oneDNN, which has it as the end of a product: here with the identity matrix."""
    return lambda x: one_dnn(
        x, torch.eye(x.shape[-1], dtype=x.dtype), x.new_zeros(x.shape[-1]), activation, approximation
    )


def one_dnn(x, weight, bias, activation="none", approximation=""):
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], approximation)


def triton(name):
    """A function of ops_triton.py, which is imported when it is called."""

    def call(*arguments):
        from minitune_kernels import ops_triton

        return getattr(ops_triton, name)(*arguments)

    return call


VERSIONS = {  # (operation, version): a function of the formula's arguments
    **{
        (name, "C"): getattr(ops_cpu, name)
        for name in ("rms_norm", "layer_norm", "rope", "swiglu", "gelu_tanh", "most_likely")
    },
    **{(name, "torch"): getattr(ops_torch, name) for name in ("rms_norm", "rope", "swiglu", "layer_norm")},
    **{(name, "torch"): getattr(ops_torch, name) for name in ("gelu", "gelu_tanh", "linear", "attention")},
    **{(name, "Triton"): triton(name) for name in ("rms_norm", "rope", "swiglu")},
    ("linear", "C"): ops_cpu.linear,
    ("linear", "oneDNN"): one_dnn,
    ("gelu", "oneDNN"): in_one_pass("gelu", "none"),
    ("gelu_tanh", "oneDNN"): in_one_pass("gelu", "tanh"),
    ("lora", "C"): lambda y, *rest: ops_cpu.add_lora(y.clone(), *rest),
    ("lora", "torch"): lambda y, *rest: ops_torch.lora_(y.clone(), *rest),
    ("attention", "torch, causal"): lambda q, k, v, mask: ops_torch.attention(q, k, v, is_causal=True),
    ("attention", "torch, over a cache"): over_cache_in_torch,
    ("attention", "C, over a cache"): over_cache_in_c,
    ("cross_entropy", "torch"): lambda h, weight, t: ops_torch.cross_entropy_with_gradient(h, Head(weight), t),
    ("cross_entropy", "Triton"): lambda h, weight, t: ops_torch.cross_entropy_with_gradient(
        h, Head(weight), t, triton("loss_and_gradient")
    ),
    ("cross_entropy", "torch, without a gradient"): lambda h, weight, t: torch.cat(
        ops_torch.cross_entropy(h, Head(weight), t)
    ).sum(),
    ("most_likely", "torch, without a gradient"): ops_torch.most_likely,
}
RECORDED = {"torch", "torch, causal", "Triton"}  # versions with a gradient


def words_of(operation, version):
    """A version, for the line on the screen."""
    if version == "torch" and operation in ("rms_norm", "rope", "swiglu", "cross_entropy"):
        return "the hand-written gradient in ops_torch.py"
    return f"the version in {version}"
