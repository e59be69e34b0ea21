"""Random models with a tokenizer of bytes, and adapters on them: ours and those that PEFT writes."""

import json

import pytest
import torch
from safetensors.torch import save_file
from small import FAMILIES, draw, sizes, write_byte_tokenizer

from minitune.adapters import lora
from minitune.checkpoint import load_model
from minitune.models import build

IDS = torch.randint(0, 264, (2, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """{family: folder with a random model and a tokenizer of bytes}."""
    folders = {}
    for family in FAMILIES:
        folder = folders[family] = tmp_path_factory.mktemp("bases") / family
        folder.mkdir()
        raw = {"model_type": family, **sizes(bos_token_id=0, eos_token_id=0), **FAMILIES[family]}
        torch.manual_seed(0)
        (folder / "config.json").write_text(json.dumps(raw))
        save_file(draw(build(raw)).state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
        write_byte_tokenizer(folder, ["<|endoftext|>"], eos_token="<|endoftext|>")
    return folders


@pytest.fixture(scope="session")
def peft():
    reason = "compares with PEFT: pip install minitune[test]"
    pytest.importorskip("transformers", reason=reason)
    return pytest.importorskip("peft", reason=reason)


def their_base(folder, quantize="none"):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = {}
    if quantize != "none":
        pytest.importorskip("bitsandbytes", reason="the other side's 4 bit: pip install minitune[test]")
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.float32,
            bnb_4bit_use_double_quant=quantize == "nf4-dq",
        )
        options["device_map"] = "cpu"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


@torch.no_grad()
def logits(model):
    out = model(IDS)
    return out if isinstance(out, torch.Tensor) else out.logits


def adapted(folder, targets=("all-linear",), r=4, alpha=8, quantize="none", dtype=torch.float32, **options):
    """Our model with an adapter whose B is random, so that it changes the logits."""
    model = load_model(folder, quantize=quantize, dtype=dtype)
    lora.inject(model, r, alpha, targets=targets, **options)
    generator = torch.Generator().manual_seed(5)
    for layer in lora.lora_layers(model).values():
        layer.lora_B.weight.data.normal_(0, 0.1, generator=generator)
    return model


def write_theirs(peft, base, folder, seed=0, **options):
    """An adapter with random A and B that PEFT wrote, and its logits."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 8, "init_lora_weights": False, **options})
    theirs = peft.get_peft_model(base, config).eval()
    theirs.save_pretrained(folder)
    return logits(theirs)


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
