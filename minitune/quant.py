"""NF4 4-bit weights (QLoRA, arXiv 2305.14314, section 3): the linear layer, and bitsandbytes' checkpoint format.
The 4-bit weight is frozen: there are gradients of x and of the bias only. The arithmetic is in kernels/nf4.py."""

import json

import torch
from minitune_kernels import nf4
from torch import nn

from minitune.files import parse_json
from minitune.schema import Number, check
from minitune.screen import short, some

# What a bitsandbytes checkpoint stores beside `P.weight`, as `P.weight.SUFFIX`. The last two: with double quantisation only.
BNB_STATE = "quant_state.bitsandbytes__nf4"
BNB_SUFFIXES = ("absmax", "quant_map", BNB_STATE, "nested_absmax", "nested_quant_map")
# Keys of quantization_config that are read here, or have no effect on weights that are already quantised.
BNB_KEYS = set(
    "quant_method load_in_4bit load_in_8bit _load_in_4bit _load_in_8bit bnb_4bit_quant_type bnb_4bit_compute_dtype "
    "bnb_4bit_use_double_quant bnb_4bit_quant_storage llm_int8_threshold llm_int8_enable_fp32_cpu_offload "
    "llm_int8_has_fp16_weight llm_int8_skip_modules".split()
)
STATE = {  # the shape of the JSON beside a 4-bit weight
    "quant_type": {"nf4"},
    "blocksize": {nf4.BLOCK},
    "dtype": {"float32", "float16", "bfloat16"},
    "shape": [Number(1, 2**31 - 1, is_whole=True)],
}
NESTED_STATE = {
    "nested_blocksize": {nf4.NESTED_BLOCK},
    "nested_dtype": {"float32"},
    "nested_offset": Number(-1e30, 1e30),
}
STORAGES = ("uint8", "int8", "float16", "bfloat16", "float32", "float64")


class NF4Linear(nn.Module):
    """A linear layer with a frozen 4-bit weight, made by from_weight() or from_bnb().

    Buffers: packed uint8 (out * in / 2,) and absmax fp32 (out * in / 64,), or with double quantisation absmax_q, absmax2,
    code2 and offset (see nf4.double_quantize). bias: a Parameter in `dtype`, or None. `dtype` is the compute dtype: x is
    cast to it, the weight is dequantised to it, the output is cast back to x.dtype.

    layer.to(dtype), .half() and the like change the compute dtype and the bias; the stored weight keeps its bits."""

    def __init__(self, shape, packed, scales, bias, dtype):
        """shape: (out, in); scales: (absmax,) or (absmax_q, absmax2, code2, offset), see above."""
        super().__init__()
        self.out_features, self.in_features = shape
        self.dtype = dtype
        names = ("absmax",) if len(scales) == 1 else ("absmax_q", "absmax2", "code2", "offset")
        for name, tensor in zip(("packed", *names), (packed, *scales), strict=True):
            self.register_buffer(name, tensor)
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(dtype), requires_grad=bias.requires_grad)

    @classmethod
    def from_weight(cls, weight, bias, dtype, double_quant=False):
        """Quantise weight (out, in) in fp32, fp16 or bf16; bias: (out,) or None.
        dtype: of the computation; None: weight.dtype. Raises ValueError if the weight has NaN or infinity."""
        if weight.dim() != 2:
            raise ValueError(f"weight has shape {tuple(weight.shape)}, expected (out, in)")
        packed, absmax = nf4.quantize(weight)
        if broken := int((~absmax.isfinite()).sum()):
            raise ValueError(
                f"weight of shape {tuple(weight.shape)} has NaN or infinity in {broken} of {absmax.numel()} "
                "blocks of 64, expected finite values; the checkpoint is damaged"
            )
        scales = nf4.double_quantize(absmax) if double_quant else (absmax,)
        return cls(tuple(weight.shape), packed, scales, bias, check_dtype(dtype or weight.dtype))

    @property
    def double_quant(self):
        return "absmax" not in self._buffers

    @property
    def scales(self):
        return (self.absmax_q, self.absmax2, self.code2, self.offset) if self.double_quant else (self.absmax,)

    def forward(self, x):
        """x (.., in) -> (.., out) in x.dtype."""
        packed, *scales = self._buffers.values()  # self.packed and self.scales, without four look-ups of nn.Module
        shape = (self.out_features, self.in_features)
        if x.dtype is self.dtype:
            return nf4.product(x, packed, scales, shape, self.bias)
        return nf4.product(x.to(self.dtype), packed, scales, shape, self.bias).to(x.dtype)

    def dequantize(self, dtype=None):
        """The weight (out, in) as a new tensor in `dtype`; None: the compute dtype."""
        shape = (self.out_features, self.in_features)
        return nf4.dequantize(self.packed, self.scales, shape, dtype or self.dtype)

    def extra_repr(self):
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"dtype={self.dtype}, double_quant={self.double_quant}"
        )

    def _apply(self, fn, recurse=True):
        # Try the conversion on empty tensors first, so that a refused dtype leaves the layer unchanged.
        dtype = check_dtype(fn(torch.empty(0, dtype=self.dtype, device=self.packed.device)).dtype)
        if fn(torch.empty(0, dtype=torch.uint8, device=self.packed.device)).dtype != torch.uint8:
            raise ValueError("a 4-bit layer cannot be cast by .type(); use .to(dtype), which changes its compute dtype")
        # The buffers go through fn() as bytes, which a cast leaves alone: .half() must not round the fp32 scales.
        forms = {name: (tensor.dtype, tensor.shape) for name, tensor in self._buffers.items()}
        for name, tensor in self._buffers.items():
            self._buffers[name] = tensor.reshape(-1).view(torch.uint8)
        try:
            super()._apply(fn, recurse)
            self.dtype = dtype
        finally:
            for name, (dtype, shape) in forms.items():
                self._buffers[name] = self._buffers[name].view(dtype).view(shape)
        return self

    @classmethod
    def from_bnb(cls, tensors, bias=None, dtype=None, shape=None, name="the layer"):
        """A layer from the tensors that a bitsandbytes checkpoint stores for one weight.
        tensors: {"weight": .., "absmax": .., "quant_map": .., "quant_state.bitsandbytes__nf4": ..}, and with double
        quantisation "nested_absmax" and "nested_quant_map". The layer keeps them without a copy: copy tensors of a mapped file.
        dtype: of the computation; None: as stored. shape: (out, in) of the model; None: any. name: for the messages.
        Raises ValueError on a weight of another shape and on anything but NF4 in blocks of 64."""
        nested = "nested_absmax" in tensors or "nested_quant_map" in tensors
        expected = {"weight", *BNB_SUFFIXES[: 5 if nested else 3]}
        if expected != set(tensors):
            raise ValueError(
                f"{name}: missing {some(sorted(expected - set(tensors))) or 'none'}, unexpected "
                f"{some(sorted(set(tensors) - expected), 2) or 'none'}; a 4-bit weight needs {some(sorted(expected))}"
            )
        state = read_state(tensors[BNB_STATE], nested, name)
        if tensors["quant_map"].shape != (len(nf4.CODE),) or tensors["quant_map"].tolist() != list(nf4.CODE):
            raise ValueError(f"{name}: quant_map is not the NF4 table; the file is damaged or of another format")
        if shape is not None and list(shape) != state["shape"]:
            raise ValueError(f"{name}: the stored 4-bit weight has shape {state['shape']}, expected {list(shape)}")
        shape = tuple(state["shape"])
        packed = as_bytes(tensors["weight"])
        absmax = tensors["absmax"].contiguous().view(-1)
        try:
            if nested:
                offset = torch.tensor(state["nested_offset"], dtype=torch.float32, device=packed.device)
                nested_scales = (tensors[key].contiguous().view(-1) for key in ("nested_absmax", "nested_quant_map"))
                scales = (absmax, *nested_scales, offset)
            else:
                scales = (absmax,)
            nf4.check_quantized(packed, scales, shape)
            if not all(scale.isfinite().all() for scale in scales):
                raise ValueError("its scales hold NaN or infinity")
        except ValueError as error:
            raise ValueError(f"{name}: {error}; the file is damaged") from None
        return cls(shape, packed, scales, bias, check_dtype(dtype or getattr(torch, state["dtype"])))

    def to_bnb(self, prefix):
        """{key: tensor}, as bitsandbytes and transformers store the linear layer named `prefix`."""
        state = {
            "quant_type": "nf4",
            "blocksize": nf4.BLOCK,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": [self.out_features, self.in_features],
        }
        absmax, *nested = self.scales
        tensors = {"absmax": absmax, "quant_map": torch.tensor(nf4.CODE, device=absmax.device)}
        if nested:
            tensors |= {"nested_absmax": self.absmax2, "nested_quant_map": self.code2}
            state |= {"nested_blocksize": nf4.NESTED_BLOCK, "nested_dtype": "float32"}
            state |= {"nested_offset": self.offset.item()}
        tensors[BNB_STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8, device=absmax.device)
        stored = {f"{prefix}.weight": self.packed.view(-1, 1)}
        stored |= {f"{prefix}.weight.{suffix}": tensor for suffix, tensor in tensors.items()}
        return stored if self.bias is None else stored | {f"{prefix}.bias": self.bias.detach()}


def check_dtype(dtype):
    if dtype not in nf4.FLOATS:
        raise ValueError(f"dtype is {dtype}, expected {' or '.join(map(str, nf4.FLOATS))} to compute with")
    return dtype


def as_bytes(tensor):
    """The bytes of a packed weight, which may be stored under another dtype than uint8 (bnb_4bit_quant_storage)."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def read_state(tensor, nested, name):
    """The JSON beside a 4-bit weight, checked, as a dict. Raises ValueError, which names the value that is not supported."""
    where = f"{name}: {BNB_STATE}"
    if tensor.dtype != torch.uint8 or tensor.dim() != 1 or len(tensor) > 10_000:
        raise ValueError(f"{where} is not JSON in uint8; the file is damaged")
    try:
        text = bytes(tensor.tolist()).decode()
    except UnicodeDecodeError:
        raise ValueError(f"{where} is not JSON in uint8; the file is damaged") from None
    state = check(parse_json(text, where), STATE | NESTED_STATE if nested else STATE, where)
    if len(state["shape"]) != 2:
        raise ValueError(f"{where}: shape is {short(state['shape'])}, expected [out, in]")
    return state


def is_bnb_4bit(config, source="config.json"):
    """Whether a model's config (dict) says that its weights are stored as bitsandbytes' NF4; False if they are not quantised.
    Raises ValueError on any other quantisation. source: the file, for the messages."""
    quantization = config.get("quantization_config")
    if quantization is None:
        return False
    advice = (
        "minitune reads unquantised weights and bitsandbytes' NF4 (load_in_4bit true, bnb_4bit_quant_type nf4); "
        "use the original checkpoint, with --quantize nf4 for 4 bits"
    )
    if not isinstance(quantization, dict):
        raise ValueError(f"quantization_config in {source} is {short(quantization)}, expected an object")
    load_8bit = quantization.get("load_in_8bit") or quantization.get("_load_in_8bit") or False
    load_4bit = quantization.get("load_in_4bit") or quantization.get("_load_in_4bit") or False
    # Files of 2023 have no quant_method; load_in_4bit says it, as in transformers.
    method = quantization.get("quant_method", "bitsandbytes" if load_4bit or load_8bit else None)
    if method != "bitsandbytes":
        raise ValueError(f"quant_method={short(method)} in {source} is not supported: {advice}")
    if not load_8bit and not load_4bit:  # written by a loader that was asked for neither
        return False
    if load_8bit or not load_4bit:
        raise ValueError(
            f"load_in_8bit={short(load_8bit)} with load_in_4bit={short(load_4bit)} in {source} is not supported: {advice}"
        )
    kind = quantization.get("bnb_4bit_quant_type", "fp4")  # bitsandbytes' default
    if kind != "nf4":
        raise ValueError(f"bnb_4bit_quant_type={short(kind)} in {source} is not supported: {advice}")
    storage = str(quantization.get("bnb_4bit_quant_storage") or "uint8").removeprefix("torch.")
    if storage not in STORAGES:
        raise ValueError(
            f"bnb_4bit_quant_storage={short(storage)} in {source} is not supported, expected one of {some(STORAGES, 6)}"
        )
    return True


def unknown_keys(config):
    """The keys of a bitsandbytes quantization_config that are not in BNB_KEYS, as "quantization_config.KEY"."""
    return [f"quantization_config.{key}" for key in config.get("quantization_config") or {} if key not in BNB_KEYS]
