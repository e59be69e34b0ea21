"""A replayed decoding step has the bits of the step that would have run, and a step that cannot be replayed whole is not."""

import gc

import pytest
import torch
from minitune_kernels import measured, ops, ops_cpu, ops_torch, replay
from minitune_kernels.replay import RECORDED, Graph, Repeated, Tape
from small import FAMILIES, draw, sizes
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from minitune.adapters import lora
from minitune.decoding.options import GenerateConfig
from minitune.generate import decode as decode_prompts
from minitune.models import build, cache, layers
from minitune.quant import NF4Linear

SIZES = sizes(vocab_size=61, hidden_size=128, intermediate_size=192, max_position_embeddings=512)
PROMPTS = [[5, 9, 3, 7, 7, 1, 30, 12, 44], [4], [8, 8, 2, 50]]
DECODINGS = {
    "greedy": {},
    "samples": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3},
    "guesses": {"lookup": 3},
}

pytestmark = pytest.mark.skipif(
    not ops_cpu.runs_here(None) or not ops_cpu.multiplies(torch.bfloat16), reason="no C compiler, or no AVX-512 bf16"
)


@pytest.fixture(autouse=True)
def few_rows_in_c(monkeypatch):
    """C multiplies few rows here, however fast torch was measured to be: only its products are recorded."""
    monkeypatch.setattr(measured, "max_rows", lambda *kind: 128)


def model_of(family, dtype=torch.bfloat16, quantized=None, has_lora=False):
    """A random model whose likeliest token leads clearly. quantized: None, "nf4" or "nf4-dq"."""
    torch.manual_seed(0)
    model = draw(build({"model_type": family, **SIZES, **FAMILIES[family]}).to(dtype).eval(), 0.2)
    if quantized:
        for name, layer in list(model.model.named_modules()):
            if isinstance(layer, torch.nn.Linear):
                weight, bias = layer.weight.data, layer.bias
                lora.put(model.model, name, NF4Linear.from_weight(weight, bias, dtype, quantized == "nf4-dq"))
    if has_lora:
        lora.inject(model, 4, 8)
        for layer in lora.lora_layers(model).values():
            torch.nn.init.normal_(layer.lora_B.weight)
    return model


class Replays:
    """Collects the tapes that are made, and counts their replays."""

    def __init__(self, monkeypatch):
        self.tapes, self.steps = [], 0
        monkeypatch.setattr(replay, "Tape", self.make)

    def make(self, modules):
        tape = Tape(modules)
        own = tape.replay

        def replay_and_count():
            self.steps += 1
            return own()

        tape.replay = replay_and_count
        self.tapes.append(tape)
        return tape


@pytest.fixture
def replays(monkeypatch):
    return Replays(monkeypatch)


def answers(model, kind, new=20, eos=(11, 17)):
    prompts = PROMPTS[:1] if kind == "guesses" else PROMPTS
    options = {"lookup": 0, **DECODINGS[kind]}
    found, _ = decode_prompts(model, prompts, GenerateConfig(max_new_tokens=new, eos_ids=eos, **options))
    return [(answer.ids, answer.logprobs, answer.ended_by) for answer in found]


def with_a_hook(model, kind, **options):
    """(answers, calls of the hook) of a model with a hook, which has to run at every step: no tapes are used."""
    calls = []
    handle = model.model.layers[-1].register_forward_hook(lambda *call: calls.append(1))
    found = answers(model, kind, **options)
    handle.remove()
    return found, len(calls)


@pytest.mark.parametrize("kind", DECODINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_decoding_with_tapes_is_the_one_without_bit_by_bit(family, kind, replays):
    model = model_of(family)
    expected, calls = with_a_hook(model, kind)
    assert not replays.steps and calls > 10
    replays.tapes.clear()
    assert answers(model, kind) == expected
    assert replays.steps > 5 and all(tape.fault is None for tape in replays.tapes)


@pytest.mark.parametrize("has_lora", [False, True])
@pytest.mark.parametrize("quantized", [None, "nf4", "nf4-dq"])
@pytest.mark.parametrize("family", FAMILIES)
def test_4_bit_weights_and_adapters_are_replayed_too(family, quantized, has_lora, replays):
    model = model_of(family, quantized=quantized, has_lora=has_lora)
    expected, _ = with_a_hook(model, "beams")
    replays.tapes.clear()
    assert answers(model, "beams") == expected
    assert replays.steps and all(tape.fault is None for tape in replays.tapes)


def test_fp32_is_replayed_too(replays):
    model = model_of("llama", torch.float32)
    expected, _ = with_a_hook(model, "greedy")
    assert answers(model, "greedy") == expected and replays.steps


def test_a_cache_that_grows_is_recorded_again(replays, monkeypatch):
    monkeypatch.setattr(cache, "FIRST_CAPACITY", 4)
    model = model_of("llama")
    for kind in ("greedy", "beams"):
        expected, _ = with_a_hook(model, kind, new=30, eos=())
        before = len(replays.tapes)
        assert answers(model, kind, new=30, eos=()) == expected
        assert len(replays.tapes) - before == 4  # with room for 4, 8, 16 and 32 tokens


def test_a_tape_replays_with_any_number_of_threads(replays):
    model, threads = model_of("llama"), torch.get_num_threads()
    expected, _ = with_a_hook(model, "beams")
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            before = replays.steps
            assert answers(model, "beams") == expected and replays.steps > before
    finally:
        torch.set_num_threads(threads)


CHANGES = {
    "a function of torch": lambda x: torch.relu(x),
    "a method that computes": lambda x: x.abs(),
    "an operator": lambda x: x * 2,
    "a sum with a number": lambda x: x + 1,
    "a view that has to copy": lambda x: x.transpose(0, 2).reshape(-1).view(x.shape[::-1]).transpose(0, 2).contiguous(),
    "a choice by value": lambda x: x if x.sum().item() > 0 else -x,
    "an index": lambda x: x[..., [1, 0, *range(2, x.shape[-1])]],
    "a change in place": lambda x: x.clone().mul_(0.5),
    "an operator by its name": lambda x: torch.ops.aten.relu(x),
    "a function with a gradient of its own": lambda x: ops_torch.swiglu(x, x),
    "numpy": lambda x: torch.from_numpy(x.float().numpy() * 2).to(x.dtype),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_block_with_an_operation_that_no_tape_repeats_is_never_replayed(name, replays, monkeypatch):
    model = model_of("llama")
    own = ops.swiglu
    monkeypatch.setattr(ops, "swiglu", lambda gate, up: CHANGES[name](own(gate, up)))
    expected, _ = with_a_hook(model, "greedy")
    assert answers(model, "greedy") == expected
    assert replays.steps == 0 and all(tape.fault for tape in replays.tapes if tape.runs >= RECORDED)


def streamed(model, at, change, new=24):
    """A greedy answer, with change(model) called in the middle of it."""
    seen = []

    def on_token(token):
        seen.append(token)
        if len(seen) == at:
            change(model)

    config = GenerateConfig(max_new_tokens=new, eos_ids=(), lookup=0)
    (answer,), _ = decode_prompts(model, PROMPTS[:1], config, on_token=on_token)
    return answer.ids, answer.logprobs


def give_other_memory(model):
    for parameter in model.model.layers.parameters():
        parameter.data = -parameter.data
    gc.collect()


def give_other_weights(model):
    layer = model.model.layers[0].mlp.down_proj.base_layer
    layer.weight = torch.nn.Parameter(-layer.weight.data)


def switch_off(model):
    for name, layer in lora.lora_layers(model).items():
        lora.put(model, name, layer.base_layer)


def scale_adapters(model):
    for layer in lora.lora_layers(model).values():
        layer.scaling *= 3


def turn_by_a_hook(model):
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: -out)


@pytest.mark.parametrize("change", [give_other_memory, give_other_weights, switch_off, scale_adapters, turn_by_a_hook])
def test_a_model_that_is_changed_between_two_steps_is_not_replayed_any_more(change, replays):
    expected, found = (model_of("llama", has_lora=True) for _ in range(2))
    for block in expected.model.layers:
        block.register_forward_pre_hook(lambda *call: None)  # no tapes
    expected = streamed(expected, 9, change)
    assert not replays.steps
    assert streamed(found, 9, change) == expected and replays.steps == 9 - RECORDED  # the last replay was not used


def test_a_module_that_keeps_what_it_saw_sees_every_step(replays, monkeypatch):
    model = model_of("llama")
    mlp = model.model.layers[0].mlp
    mlp.calls, mlp.seen, own = 0, [], mlp.forward

    def forward(x):
        mlp.calls += 1
        mlp.seen.append(x)
        return own(x)

    monkeypatch.setattr(mlp, "forward", forward)
    answers(model, "greedy", new=20, eos=())
    assert mlp.calls == len(mlp.seen) == 20


def test_tables_that_are_views_of_a_buffer_are_not_written(monkeypatch):
    """A replay writes into its inputs: they are copies."""
    model = model_of("llama")
    whole = model.config.rope.tables(torch.arange(100)[None], torch.bfloat16)
    before = [table.clone() for table in whole]
    expected = streamed(model, 0, None)

    def tables(self, positions, dtype, documents=None):
        first, T = int(positions[0, 0]), positions.shape[1]
        return tuple(table[:, :, first : first + T] for table in whole)

    monkeypatch.setattr(layers.Rope, "tables", tables)
    assert streamed(model, 0, None) == expected
    assert all(torch.equal(*pair) for pair in zip(whole, before, strict=True))


def test_dropout_in_place_is_no_view():
    tape = Tape()
    with torch.no_grad():
        tape.record(lambda x: ops_cpu.add(F.dropout(x, 0.5, training=True, inplace=True), x), torch.ones(2, 64))
    assert tape.fault == "torch's dropout()"


def test_a_changed_block_of_known_operations_is_replayed(replays, monkeypatch):
    model = model_of("llama")
    own = ops.swiglu
    monkeypatch.setattr(ops, "swiglu", lambda gate, up: own(up, gate) + gate)
    expected, _ = with_a_hook(model, "greedy")
    assert answers(model, "greedy") == expected and replays.steps


def test_a_tape_repeats_what_it_recorded_with_other_numbers():
    generator = torch.Generator().manual_seed(0)
    x, y, weight = (torch.randn(shape, generator=generator).bfloat16() for shape in ((3, 64), (3, 64), (96, 64)))

    def function(x):
        return ops_cpu.linear(ops_cpu.rms_norm(x + x, weight[0], 1e-5), weight)

    with torch.no_grad():
        expected = function(x), function(y)
        tape = Tape()
        assert torch.equal(tape.record(function, x.clone()), expected[0]) and tape.fault is None
        for _ in range(3):
            for given, result in zip((y, x), expected[::-1], strict=True):
                tape.inputs[0].copy_(given)
                assert torch.equal(tape.replay(), result)
        del tape
        gc.collect()


def test_a_step_that_fails_while_it_is_recorded_leaves_no_tape_running():
    x = torch.ones(2, 64)
    with torch.no_grad():
        with pytest.raises(ZeroDivisionError):
            Tape().record(lambda x: ops_cpu.add(x, x) + 1 / 0, x)
        other = Tape()
        other.record(lambda x: ops_cpu.add(x, x), x.clone())
        other.inputs[0].mul_(3)
        assert torch.equal(other.replay(), 6 * x)


def test_a_tape_that_an_interrupt_left_open_is_closed_when_it_goes():
    x, tape = torch.ones(2, 64), Tape()
    ops_cpu.library()[0].record(tape.address)
    del tape
    with torch.no_grad():
        for _ in range(100):
            ops_cpu.add(x, x)  # on an open tape this would write into freed memory
        other = Tape()
        other.record(lambda x: ops_cpu.add(x, x), x.clone())
        assert torch.equal(other.replay(), 2 * x)


def test_an_operation_that_watch_cannot_see_is_found_by_the_step_that_is_replayed_and_computed():
    """Compiled code calls torch without TorchFunctionMode."""
    hidden = torch.zeros(64)

    def function(x):
        hidden.data_ptr()
        with torch._C.DisableTorchFunction():
            hidden.copy_(x[0] * 2)
        return ops_cpu.add(x, hidden)

    tape, results = Tape(), []
    with torch.no_grad():
        for step in range(RECORDED + 3):
            x = torch.full((2, 64), float(step))
            results.append(torch.equal(tape.run(function, x.clone()), 3 * x))
    assert all(results) and tape.fault == "a replay differs from the computed step"


class Traced(Repeated):
    """Stands for a CUDA graph on a CPU: torch's operations, with the memory and the Python numbers of the recorded step."""

    made = []

    def record(self, function, *inputs):
        self.inputs = inputs
        with torch.no_grad():
            self.graph = make_fx(function, tracing_mode="real")(*inputs)
        self.made.append(self)
        return self.replay()

    def replay(self):
        with torch.no_grad():
            return self.graph(*self.inputs)


@pytest.mark.parametrize("kind", DECODINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_that_a_cuda_graph_would_freeze_changes_between_steps(family, kind, monkeypatch):
    """Slots, masks and positions are tensors, so a recording of one step is right for all others."""
    monkeypatch.setenv("MINITUNE_KERNELS", "torch")
    model = model_of(family, torch.float32)
    expected = answers(model, kind, new=40)
    monkeypatch.setattr(replay, "recorder", lambda x, form: Traced)
    Traced.made.clear()
    found = answers(model, kind, new=40)
    assert [answer[0] for answer in found] == [answer[0] for answer in expected]
    assert any(graph.runs > RECORDED + 2 for graph in Traced.made) and all(graph.fault is None for graph in Traced.made)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("quantized", [None, "nf4"])
@pytest.mark.parametrize("kind", DECODINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_decoding_with_cuda_graphs_is_the_one_without(family, kind, quantized, monkeypatch):
    graphs = []
    monkeypatch.setattr(replay, "Graph", lambda blocks: graphs.append(Graph(blocks)) or graphs[-1])
    model = model_of(family, torch.bfloat16, quantized).cuda()
    expected, _ = with_a_hook(model, kind)
    graphs.clear()
    assert answers(model, kind) == expected
    assert any(graph.runs > RECORDED + 1 for graph in graphs) and all(graph.fault is None for graph in graphs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norm_and_sums_are_torchs(dtype):
    generator = torch.Generator().manual_seed(0)
    step = {torch.float32: 2**-20, torch.bfloat16: 2**-7}[dtype]
    for shape in ((1, 1, 2560), (3, 2, 100), (40, 33), (7,)):
        x, y = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        weight, bias = (torch.randn(shape[-1], generator=generator).to(dtype) for _ in range(2))
        with torch.no_grad():
            torch.testing.assert_close(
                ops_cpu.layer_norm(x, weight, bias, 1e-5),
                F.layer_norm(x, shape[-1:], weight, bias, 1e-5),
                rtol=step,
                atol=4 * step,
            )
            assert torch.equal(ops_cpu.add(x, y), x + y) and torch.equal(ops_cpu.add(x, bias), x + bias)
