"""The training loop: LoRA or QLoRA on one device, from a TrainConfig to a run folder.

Read fine_tune() from top to bottom: prepare, (batch, forward, backward, clip, step, log, evaluate, save), finish. No
callbacks."""

import json
import math
import os
import shlex
import signal
import statistics
import time
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from minitune import checkpoint, data, hub, lora
from minitune.config import TrainConfig
from minitune.device import DTYPES, choose_device, choose_dtype, environment, peak_bytes, reset_peak
from minitune.files import to_json, write_json, write_whole
from minitune.generate import GenerateConfig, generate
from minitune.models.layers import chunked_cross_entropy
from minitune.run_folder import (
    Progress,
    append_line,
    draw_curves,
    file_sha256,
    hold,
    keep_steps,
    load_state,
    model_fingerprint,
    random_state,
    read_lines,
    read_progress,
    save_state,
)
from minitune.tokenizer import load_tokenizer

CURVES_SECONDS = 20  # between two drawings of curves.png in a run: each takes 0.4 s


def train(config: TrainConfig, say=print):
    """Fine-tune as `config` says, going on from the state in the run folder where there is one. say: prints one line.

    Returns the run folder's Path. Raises ValueError on bad options or files (before weights load where that can be
    known, and with no run folder left behind), FloatingPointError on a loss that is not finite or jumps: the last good
    state is kept, and KeyboardInterrupt after Ctrl-C or SIGTERM: the state is saved."""
    name = Path(config.model).expanduser().absolute().name
    run = Path(config.run or f"runs/{name}-{'lora' if config.quantize == 'none' else 'qlora'}")
    with hold(run), out_of_memory_explained(config):
        return fine_tune(config, run, say)


def fine_tune(config, run, say):
    """train() inside the run folder that this process holds."""
    device = choose_device(config.device)
    dtype, reason = choose_dtype(config.dtype, device)
    folder = hub.resolve(config.model, config.revision).absolute()  # a folder ./mistral is not the short name mistral
    checkpoint.check_trainable(folder)
    state_file = run / "last" / "state.safetensors"
    tokenizer = load_tokenizer(folder)
    train_set, test_set = data.load_for(config, tokenizer)
    say(f"{config.model} on {device}, {str(dtype).removeprefix('torch.')} ({reason})")
    say(train_set.describe())
    say(test_set.describe() if test_set.examples else "no held-out rows: no held-out loss, and no best step")
    if config.patience and not test_set.examples:
        raise ValueError("patience needs held-out rows, and there are none; set test_size or test_data")

    plan = StepPlan(config, train_set)
    facts = {
        "compute dtype": str(dtype).removeprefix("torch."),
        "model files (sha256)": model_fingerprint(folder),
        "training rows (sha256)": train_set.fingerprint,
        "held-out rows (sha256)": test_set.fingerprint,
    }
    progress = starting_point(config, state_file, plan, facts)

    targets = config.lora_targets or checkpoint.default_targets(folder)
    check_fit(folder, targets, [example.ids for part in (train_set, test_set) for example in part.examples], say)
    model = checkpoint.load_model(folder, dtype, device, config.quantize, say=say)
    names = lora.inject(
        model, config.lora_rank, config.lora_alpha, config.lora_dropout, targets, config.use_rslora, config.seed
    )
    model.model.recompute = config.checkpointing
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    say(
        f"LoRA on {len(names)} linear layers ({', '.join(dict.fromkeys(n.rsplit('.', 1)[-1] for n in names))}): "
        f"{sum(p.numel() for p in trained.values()) / 1e6:.2f} M trained parameters"
    )
    optimizer = make_optimizer(trained, config)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    facts_of_adapter = {  # what generate and chat need to compute as this run did
        "template": train_set.row_format,
        "special_text": config.special_text,
        "base_model": config.model,
        "revision": config.revision,
        "dtype": next(name for name, each in DTYPES.items() if each == dtype),
        "quantize": config.quantize,
    }

    def save_adapter(name):
        checkpoint.save_adapter(
            model,
            run / name,
            base_model=hub.MODELS.get(config.model, config.model),
            revision=config.revision,
            extra=facts_of_adapter,
            trained=name == "adapter",  # while a scaler looks for its scale, last/ may still be the base
        )

    def weights_are_finite():
        return all(p.isfinite().all() for p in trained.values())

    def save(random=None):
        if not weights_are_finite():
            raise FloatingPointError(
                f"step {progress.step} made weights that are not finite; {run / 'last'} is left as last saved. "
                f"Lower --learning-rate (now {config.learning_rate:g})"
            )
        save_adapter("last")
        save_state(state_file, progress, trained, optimizer, scaler, random or random_state(device))

    context = model.config.max_position_embeddings

    def evaluate():
        """The held-out loss and sample answers, both recorded; a new best is kept. Returns the loss, or None without
        rows."""
        samples = sample_answers(
            model,
            tokenizer,
            [e for e in (test_set if test_set.examples else train_set).examples if 0 < e.prompt_length < context][
                : config.samples
            ],
            config.sample_tokens,
        )
        if samples:
            how = {"do_sample": False, "num_beams": 1, "max_new_tokens": config.sample_tokens}
            append_line(run / "samples.jsonl", {"step": progress.step, "decoding": how, "samples": samples})
        if not test_set.examples:
            return None
        loss = held_out_loss(model, test_set.examples, config.batch_size, tokenizer.pad_id)
        if progress.best_loss is None or loss < progress.best_loss:
            progress.best_loss, progress.best_step, progress.evaluations_since_best = loss, progress.step, 0
            if progress.step:
                save_adapter("best")
                progress.best_sha256 = file_sha256(run / "best" / "adapter_model.safetensors")
        else:
            progress.evaluations_since_best += 1
        return loss

    torch.manual_seed(config.seed)  # the dropout's
    write_held_out(run, test_set)
    if progress.step:
        load_state(state_file, trained, optimizer, scaler)
        for file in ("metrics.jsonl", "samples.jsonl"):
            keep_steps(run / file, progress.step)
        write_config(run, config)
        say(f"going on from step {progress.step} of {plan.total} in {run}")
    else:
        start_run(run, config, device, train_set.fingerprint)
        if (loss := evaluate()) is not None:
            append_line(run / "metrics.jsonl", {"step": 0, "eval_loss": loss})
            say(f"step 0: held-out loss {loss:.4f}")

    stop, drawn = StopSignal(), time.monotonic()
    stopped_early = lambda: config.patience is not None and progress.evaluations_since_best >= config.patience
    bar = tqdm(total=plan.total, initial=progress.step, unit="step", disable=None, dynamic_ncols=True)
    reset_peak(device)
    with stop, bar:
        while progress.step < plan.total and not stopped_early():
            started = time.perf_counter()
            step = progress.step  # counts the steps done
            random = random_state(device)
            batches = plan.batches(step, train_set, tokenizer.pad_id)
            rate = learning_rate(step, plan.total, config)
            for group in optimizer.param_groups:
                group["lr"] = rate

            # forward and backward: one sum over the supervised tokens of the whole step, so that the number of
            # micro-batches changes nothing
            model.train()
            supervised = sum(batch.supervised for batch in batches)
            step_tokens = sum(sum(batch.documents[: len(batch.rows)]) for batch in batches)  # padding is none of them
            total = torch.zeros((), device=device)
            for batch in batches:
                loss = batch_loss(model, batch)
                scaler.scale(loss / supervised).backward()
                total += loss.detach()
            if step == 0:
                check_gradients(trained)

            # clip and step, unless the numbers are broken: the one wait for the device in a step
            scaler.unscale_(optimizer)
            clip = config.max_grad_norm or math.inf
            grad_norm = torch.nn.utils.clip_grad_norm_(trained.values(), clip).item()
            loss = total.item() / supervised
            if problem := broken(loss, grad_norm, progress.recent_losses, config.spike_factor, scaler):
                kept = "No step was done before it"
                if step and weights_are_finite():
                    save(random)
                    kept = f"The state before this step is in {run / 'last'}"
                elif step:
                    kept = f"The step before broke the weights; {run / 'last'} is left as last saved"
                draw_curves(read_lines(run / "metrics.jsonl"), run / "curves.png")
                where = first_nonfinite(model, batches) if not math.isfinite(loss) else None
                raise FloatingPointError(
                    f"step {step + 1}: {problem}{f', first in the output of {where}' if where else ''}. Its rows (counted "
                    f"from 0 in the file): {', '.join(str(r) for b in batches for r in b.rows)}. {kept}. "
                    f"Look at these rows, or start again (--resume never) with a lower --learning-rate "
                    f"(now {config.learning_rate:g})"
                )
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            progress.step += 1
            progress.tokens += step_tokens
            progress.recent_losses = [*progress.recent_losses, loss][-16:]
            seconds = time.perf_counter() - started

            # log, evaluate, save
            record = {
                "step": progress.step,
                "epoch": round(progress.step / plan.steps_per_epoch, 4),
                "loss": loss,
                "lr": rate,
                "grad_norm": grad_norm,
                "tokens": progress.tokens,
                "supervised_tokens": supervised,
                "examples": sum(len(batch.rows) for batch in batches),
                "seconds": seconds,
                "tokens_per_s": round(step_tokens / seconds, 1),
                "peak_bytes": peak_bytes(device),
            }
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", tokens_per_s=f"{record['tokens_per_s']:.0f}", refresh=False)
            is_last = progress.step == plan.total
            stopping = stop.requested  # read once: a signal after this line waits for the next step
            if progress.step % plan.eval_every == 0 or is_last:
                record |= {} if (held_out := evaluate()) is None else {"eval_loss": held_out}
                bar.clear()
                say(
                    f"step {progress.step}/{plan.total}: loss {loss:.4f}"
                    + (f", held-out loss {held_out:.4f}" if held_out is not None else "")
                )
            if progress.step % config.log_every == 0 or "eval_loss" in record or is_last:
                append_line(run / "metrics.jsonl", record)
            if progress.step % plan.save_every == 0 or is_last or stopping or stopped_early():
                save()
                if stopping or time.monotonic() - drawn > CURVES_SECONDS:
                    draw_curves(read_lines(run / "metrics.jsonl"), run / "curves.png")
                    drawn = time.monotonic()
            if stopping and not is_last:
                raise KeyboardInterrupt(
                    f"after step {progress.step} of {plan.total}; the state is in {run / 'last'}. Go on with: "
                    f"python scripts/train.py --config {shlex.quote(str(run / 'config.json'))}"
                )

    finish(run, config, progress, trained, save_adapter, say)
    return run


def check_fit(folder, targets, rows, say):
    """Raises ValueError, before weights load, where a checkpoint lacks a LoRA target or a token of the rows."""
    empty, _ = checkpoint.build_empty(folder)
    lora.match_targets(empty, targets)
    highest, longest = max(map(max, rows)), max(map(len, rows))
    if highest >= empty.config.vocab_size:
        raise ValueError(
            f"the rows have token {highest}, but the model has {empty.config.vocab_size} tokens; "
            f"the tokenizer in {folder} is of another model"
        )
    if longest > empty.config.max_position_embeddings:
        say(
            f"warning: the longest row has {longest} tokens, but the model was made for "
            f"{empty.config.max_position_embeddings}; --max-length shortens the rows"
        )


class StepPlan:
    """Which rows make up which step: a function of the seed and the step alone, so that a resume finds its place."""

    def __init__(self, config, train_set):
        self.config = config
        self.lengths = [len(example.ids) for example in train_set.examples]
        self.micro_batches = math.ceil(len(self.lengths) / config.batch_size)  # in an epoch
        self.steps_per_epoch = math.ceil(self.micro_batches / config.accumulation)
        self.total = config.max_steps or max(1, math.ceil(config.epochs * self.steps_per_epoch))
        self.eval_every = config.eval_every or max(1, math.ceil(self.total / 10))
        self.save_every = config.save_every or self.eval_every
        self.epoch, self.order = None, None

    def batches(self, step, train_set, pad_id):
        """The micro-batches of the step after `step` steps."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = data.order(
                self.lengths, self.config.batch_size, self.config.seed, epoch, self.config.group_by_length
            )
        groups = self.order[place * self.config.accumulation : (place + 1) * self.config.accumulation]
        return [data.collate([train_set.examples[i] for i in group], pad_id) for group in groups]


def starting_point(config, state_file, plan, facts):
    """The Progress to go on from: a new one, or that of the state file.

    facts: {what: value}, compared beyond the options. Raises ValueError where the run in the folder is not the one that
    `config` describes."""
    progress = read_progress(state_file) if config.resume == "auto" else None
    if progress is None:
        return Progress(config=asdict(config), facts=facts)
    free = {
        "run",
        "resume",
        "log_every",
        "eval_every",
        "save_every",
        "patience",
        "keep",
        "samples",
        "sample_tokens",
        "device",
        "dtype",
        "max_steps",
        "epochs",
        "model",
        "revision",
        "data",
        "test_data",
    }  # model and rows may have moved, and "auto" may mean another dtype here: what they are is in `facts`
    stored = {**progress.config, **progress.facts}
    now = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(config).items()} | facts
    changed = [
        f"{key} {stored.get(key)!r} -> {now[key]!r}" for key in now if key not in free and stored.get(key) != now[key]
    ]
    old_plan_total = progress.config["max_steps"] or max(1, math.ceil(progress.config["epochs"] * plan.steps_per_epoch))
    if any(
        learning_rate(s, old_plan_total, config) != learning_rate(s, plan.total, config) for s in range(progress.step)
    ):
        changed.append(f"steps {old_plan_total} -> {plan.total}, which changes the learning rate of steps already done")
    if progress.step > plan.total:
        changed.append(f"steps {old_plan_total} -> {plan.total}, but {progress.step} are done")
    if changed:
        raise ValueError(
            f"{state_file.parents[1]} holds a run with other settings: {'; '.join(changed)}. Choose another --run, "
            "or --resume never to start again and replace it"
        )
    progress.config = asdict(config)
    return progress


def start_run(run, config, device, fingerprint):
    """An empty run folder, with config.json and environment.json. What an earlier run left there is removed."""
    for name in (
        "last/state.safetensors",  # first: without it nobody goes on from what remains
        "metrics.jsonl",
        "samples.jsonl",
        "curves.png",
        *(
            f"{part}/{file}"
            for part in ("adapter", "best", "last")
            for file in ("adapter_model.safetensors", "adapter_config.json", "minitune.json")
        ),
    ):
        (run / name).unlink(missing_ok=True)
    write_config(run, config)
    write_json(run / "environment.json", environment(device) | {"seed": config.seed, "data_fingerprint": fingerprint})


def write_held_out(run, test_set):
    """heldout.jsonl: the held-out rows as they were read, for --prompts FILE and --references FILE."""
    if not test_set.examples:
        (run / "heldout.jsonl").unlink(missing_ok=True)
    else:
        rows = (json.loads(json.dumps(row, default=str)) for row in test_set.rows)  # Parquet has values JSON lacks
        write_whole(run / "heldout.jsonl", "".join(to_json(row) + "\n" for row in rows))


def write_config(run, config):
    """config.json. `resume` is auto in it: who gives it as --config wants to go on, not to start again."""
    write_json(run / "config.json", asdict(config) | {"run": str(run), "resume": "auto"})


def finish(run, config, progress, trained, save_adapter, say):
    """Write adapter/: the best held-out step, or the last."""
    best = config.keep == "best" and progress.best_step is not None
    if best and progress.best_step and file_sha256(run / "best" / "adapter_model.safetensors") != progress.best_sha256:
        say(f"{run / 'best'} does not hold step {progress.best_step}, the best: adapter/ holds the last step")
        best = False
    if best and progress.best_step == 0:
        say(
            "no step had a lower held-out loss than the base: adapter/ holds the last step; try another --learning-rate"
        )
    if best and 0 < progress.best_step < progress.step:
        for name, tensor in checkpoint.read_adapter_tensors(run / "best").items():
            trained[name.removeprefix("base_model.model.")].data.copy_(tensor)
    save_adapter("adapter")
    draw_curves(read_lines(run / "metrics.jsonl"), run / "curves.png")
    kept = (
        f"step {progress.best_step}, held-out loss {progress.best_loss:.4f}"
        if best and progress.best_step
        else f"step {progress.step}"
    )
    say(f"done: {progress.step} steps, {progress.tokens:,} tokens. {run / 'adapter'} holds {kept}")
    say(f"curves: {run / 'curves.png'}" + (f"; sample answers: {run / 'samples.jsonl'}" if config.samples else ""))


def make_optimizer(trained, config):
    """AdamW over {name: parameter}; weight decay on matrices only (a bias or a norm's weight has nothing to shrink)."""
    matrices = [p for p in trained.values() if p.ndim >= 2]
    vectors = [p for p in trained.values() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        fused=True,
    )


def learning_rate(step, total, config):
    """The rate of the step after `step` steps of `total`: linear warm-up, then constant, or to 0 linearly or along a
    cosine."""
    warmup = math.ceil(config.warmup * total) if config.warmup < 1 else int(config.warmup)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return config.learning_rate * shape[config.schedule]


def batch_loss(model, batch):
    """Sum of the cross-entropy over the supervised tokens of a batch. Logits are computed only where a label is."""
    device = model.model.embed_tokens.weight.device  # the head may be a LoRALinear
    hidden = model.model(batch.input_ids.to(device), documents=batch.documents)[0]  # (N, C)
    positions, next_tokens = (t.to(device) for t in batch.targets())
    return chunked_cross_entropy(hidden[positions], model.lm_head, next_tokens)


@torch.no_grad()
def held_out_loss(model, examples, batch_size, pad_id):
    """Cross-entropy per supervised token over all examples; every token weighs the same, whatever its batch."""
    model.eval()
    by_length = sorted(examples, key=lambda example: len(example.ids))
    batches = [data.collate(by_length[i : i + batch_size], pad_id) for i in range(0, len(by_length), batch_size)]
    losses = [batch_loss(model, batch).item() for batch in batches]
    if bad := [batch for batch, loss in zip(batches, losses, strict=True) if not math.isfinite(loss)]:
        where = first_nonfinite(model, bad[:1])
        raise FloatingPointError(
            f"the held-out loss is not finite{f', first in the output of {where}' if where else ''}. Its rows (counted "
            f"from 0 in the file): {', '.join(map(str, bad[0].rows))}. Check the model's weights, or use --dtype fp32"
        )
    return math.fsum(losses) / sum(batch.supervised for batch in batches)


def sample_answers(model, tokenizer, examples, max_new_tokens):
    """What the model answers (greedy) to the prompts of some examples: [{"prompt", "answer", "reference"}]."""
    model.eval()
    prompts = [example.ids[: example.prompt_length] for example in examples]
    answers = generate(model, prompts, GenerateConfig(max_new_tokens, eos_ids=tuple(tokenizer.eos_ids)))
    references = [[i for i in e.ids[e.prompt_length :] if i not in tokenizer.eos_ids] for e in examples]
    return [
        dict(zip(("prompt", "answer", "reference"), map(tokenizer.decode, texts), strict=True))
        for texts in zip(prompts, answers, references, strict=True)
    ]


def check_gradients(trained):
    """After the first backward pass: checkpointing or a detached layer can cut gradients off without a word."""
    if lost := [name for name, p in trained.items() if p.grad is None]:
        raise RuntimeError(
            f"{len(lost)} trained tensors got no gradient, such as {lost[0]}; this is a bug in the model's wiring"
        )


def broken(loss, grad_norm, recent, spike_factor, scaler):
    """Why a step must not be taken, or None. With a scaler an infinite gradient is normal: it skips the step and
    lowers its scale."""
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(grad_norm) and not (scaler.is_enabled() and scaler.get_scale() > 1):
        return f"the loss is {loss:.4f} but the gradient norm is {grad_norm}"
    if spike_factor and len(recent) == 16:
        usual, spread = statistics.median(recent), statistics.stdev(recent)  # small batches scatter: that is no spike
        if loss > spike_factor * usual and loss > usual + max(2, 6 * spread):
            return f"the loss jumped to {loss:.4f}; the median of the 16 steps before is {usual:.4f} (--spike-factor 0 goes on)"
    return None


@torch.no_grad()
def first_nonfinite(model, batches):
    """Name of the first module whose output is not finite, or None."""
    found = []

    def look(name):
        def hook(module, args, output):
            if not found and isinstance(output, torch.Tensor) and not output.isfinite().all():
                found.append(name)

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        for batch in batches:
            batch_loss(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


class StopSignal:
    """While open, the first Ctrl-C or SIGTERM only asks: the step in hand ends and is saved. The second one
    interrupts."""

    requested = False

    def __enter__(self):
        self.previous = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self.previous[number] = signal.signal(number, self.ask)
            except ValueError:  # not the main thread: whoever started it takes the signals
                break
        return self

    def ask(self, number, frame):
        if self.requested:
            raise KeyboardInterrupt("at once; the state is that of the last save")
        self.requested = True
        os.write(2, b"\nstopping after this step; once more to stop at once\n")  # print may be what was interrupted

    def __exit__(self, *error):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


class out_of_memory_explained:
    """Turns CUDA's out-of-memory error into one that names the knobs."""

    def __init__(self, config):
        self.config = config

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is not None and issubclass(kind, torch.OutOfMemoryError):
            c = self.config
            checkpointing = "" if c.checkpointing else "turn on --checkpointing, "
            raise ValueError(
                f"out of GPU memory with --batch-size {c.batch_size}, --max-length {c.max_length}, --quantize {c.quantize}: "
                f"{checkpointing}halve --batch-size and double --accumulation, shorten --max-length, or use --quantize nf4"
            ) from error
