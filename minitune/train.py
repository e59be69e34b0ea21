"""The training loop: LoRA or QLoRA on one device, from a TrainConfig to a run folder.

Read fine_tune() from top to bottom: prepare, (batch, forward, backward, clip, step, log, evaluate, save), finish. No
callbacks."""

import itertools
import json
import math
import os
import shlex
import statistics
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict

import torch

from minitune import checkpoint, data, hub, screen
from minitune.adapters import lora, peft_files
from minitune.config import TrainConfig, is_out_of_memory
from minitune.data import dataset
from minitune.decoding.options import GenerateConfig
from minitune.device import DTYPES, choose_device, choose_dtype, environment, peak_bytes, reset_peak
from minitune.files import expand, to_json, write_json, write_whole
from minitune.generate import generate
from minitune.interrupts import StopSignal
from minitune.models.layers import chunked_cross_entropy
from minitune.runs.folder import (
    Curve,
    Progress,
    append_line,
    draw_curves,
    file_sha256,
    hold,
    keep_lines,
    last_step,
    load_state,
    model_fingerprint,
    random_state,
    read_progress,
    read_steps,
    save_state,
    sync_lines,
)
from minitune.screen import short, some
from minitune.tokenizer import load_tokenizer

CURVES_SECONDS = 30  # between two drawings of curves.png in a run, where that costs below 2 % of its time


def train(config: TrainConfig, say=screen.say):
    """Fine-tune as `config` says, going on from the state in the run folder where there is one. say: prints one line.

    Returns the run folder's Path. Raises ValueError on bad options or files (before weights load where that can be
    known, and with no run folder left behind), FloatingPointError on a loss that is not finite, jumps or does not move:
    the last good state is kept, and KeyboardInterrupt after Ctrl-C or SIGTERM: the state is saved."""
    run = run_of(config)
    with hold(run), out_of_memory_explained(config), Pulse(say) as pulse:
        return fine_tune(config, run, say, pulse)


def run_of(config):
    """The run folder: --run, or runs/MODEL-lora or runs/MODEL-qlora."""
    name = expand(config.model).absolute().name
    return expand(config.run or f"runs/{name}-{'lora' if config.quantize == 'none' else 'qlora'}")


def fine_tune(config, run, say, pulse):
    """train() inside the run folder that this process holds."""
    device = choose_device(config.device)
    dtype, reason = choose_dtype(config.dtype, device)
    if config.dtype == config.recipe({"model": config.model}).get("dtype"):
        reason = f"set by the {config.model} recipe"
    state_file = run / "last" / "state.safetensors"

    # config, tokenizer and rows first: gigabytes of weights come when everything else is known to fit
    if config.model not in hub.EMBEDDED and not os.path.exists(expand(config.model)):
        check_rows(config)
    folder = hub.resolve(config.model, config.revision, weights=False).absolute()  # ./mistral is no short name
    checkpoint.check_trainable(folder)
    tokenizer = load_tokenizer(folder)
    train_set, test_set = data.load_for(config, tokenizer)
    say(f"{config.model} on {device}, {str(dtype).removeprefix('torch.')} ({reason})")
    say(train_set.describe())
    say(test_set.describe() if test_set.examples else "no held-out rows: no held-out loss, and no best step")
    plan = StepPlan(config, train_set)
    check_plan(config, plan, test_set)
    targets = config.lora_targets or checkpoint.default_targets(folder)
    check_fit(folder, targets, [example.ids for part in (train_set, test_set) for example in part.examples])
    folder = hub.resolve(config.model, config.revision).absolute()

    facts = {
        "compute dtype": str(dtype).removeprefix("torch."),
        "model files (sha256)": model_fingerprint(folder),
        "training rows (sha256)": train_set.fingerprint,
        "held-out rows (sha256)": test_set.fingerprint,
    }
    progress = starting_point(config, state_file, plan, facts)
    lost = last_step(run / "metrics.jsonl") - progress.step if config.resume == "auto" else 0
    say_outdated(run, progress, plan, say)
    pulse.line = "loading the model"
    model = checkpoint.load_model(folder, dtype, device, config.quantize, say=say)
    names = lora.inject(
        model, config.lora_rank, config.lora_alpha, config.lora_dropout, targets, config.use_rslora, config.seed
    )
    model.model.recompute = config.checkpointing
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    size = AdapterSize(model, trained)
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
        nonlocal saved
        problem = size.blown_up() if weights_are_finite() else "made weights that are not finite"
        if problem:
            raise FloatingPointError(
                f"step {progress.step} {problem}; {run / 'last'} is left as last saved. "
                f"Lower --learning-rate (now {config.learning_rate:g})"
            )
        for file in ("metrics.jsonl", "samples.jsonl"):
            progress.logged[file] = sync_lines(run / file, *progress.logged.get(file, (0, 0)))
        if not (run / "config.json").exists():
            write_config(run, config)
        save_adapter("last")
        save_state(state_file, progress, trained, optimizer, scaler, random or random_state(device))
        saved = time.monotonic()

    def draw():
        nonlocal drawn, drawing_seconds
        started = time.monotonic()
        draw_curves(curve.records(), run / "curves.png")
        drawn = time.monotonic()
        drawing_seconds = drawn - started

    saved = drawn = time.monotonic()
    drawing_seconds, curve, place = 0.0, Curve(), place_of(run)
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
        for file in ("metrics.jsonl", "samples.jsonl"):
            read_steps(run / file)
            keep_lines(run / file, *progress.logged.get(file, (0, 0)), progress.step)
        load_state(state_file, trained, optimizer, scaler)
        curve = Curve(read_steps(run / "metrics.jsonl"))
        write_config(run, config)
        say(f"going on from step {progress.step} of {plan.total} in {run}" + lost_steps(lost, progress.step))
    else:
        if lost > 0:
            say(f"starting again at step 0: {run} was stopped at step {lost} before anything was saved")
        start_run(run, config, device, train_set.fingerprint)
        pulse.line = "step 0: reading the held-out rows"
        if (loss := evaluate()) is not None:
            append_line(run / "metrics.jsonl", {"step": 0, "eval_loss": loss})
            curve.add({"step": 0, "eval_loss": loss})
            say(f"step 0: held-out loss {loss:.4f}")

    stop = StopSignal()
    stopped_early = lambda: config.patience is not None and progress.evaluations_since_best >= config.patience
    bar = screen.progress(plan.total, "step", initial=progress.step)
    first, begun = progress.step, time.monotonic()
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
            blown, is_dead = size.blown_up(), False
            if blown:
                problem = f"the step before {blown}"
            elif not (problem := broken(loss, grad_norm, progress.recent_losses, config.spike_factor, scaler)):
                is_dead = config.spike_factor > 0 and does_not_move(loss, progress, size)
                problem = is_dead and (
                    f"the loss stays at {loss:.4f} whatever is trained, and the adapter has grown to {size.growth():.0f} "
                    "times its start: the model is dead (--spike-factor 0 goes on)"
                )
            if problem:
                kept = "No step was done before it"
                if step and (blown or is_dead or not weights_are_finite()):
                    kept = f"The steps before broke the weights; {run / 'last'} is left as last saved"
                elif step:
                    save(random)
                    kept = f"The state before this step is in {run / 'last'}"
                draw()
                where = first_nonfinite(model, batches) if not math.isfinite(loss) else None
                rows = some([r for b in batches for r in b.rows], 16)
                look = f". Its rows (counted from 0 in the file): {rows}" if not (blown or is_dead) else ""
                raise FloatingPointError(
                    f"step {step + 1}: {problem}{f', first in the output of {where}' if where else ''}{look}. {kept}. "
                    f"{'Look at these rows, or start' if look else 'Start'} again (--resume never) with a lower "
                    f"--learning-rate (now {config.learning_rate:g})"
                )
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            progress.step += 1
            progress.tokens += step_tokens
            progress.recent_losses = [*progress.recent_losses, loss][-16:]
            progress.first_loss = loss if progress.first_loss is None else progress.first_loss
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
            left = (time.monotonic() - begun) / (progress.step - first) * (plan.total - progress.step)
            pulse.line = (
                f"step {progress.step}/{plan.total}: loss {loss:.4f}, {record['tokens_per_s']:,.0f} tokens/s, "
                f"{duration(left)} left"
            )
            check_place(run, place)
            is_last = progress.step == plan.total
            stopping = stop.requested  # read once: a signal after this line waits for the next step
            if progress.step % plan.eval_every == 0 or is_last:
                record |= {} if (held_out := evaluate()) is None else {"eval_loss": held_out}
                say(
                    f"step {progress.step}/{plan.total}: loss {loss:.4f}"
                    + (f", held-out loss {held_out:.4f}" if held_out is not None else "")
                )
            if progress.step % config.log_every == 0 or "eval_loss" in record or is_last:
                append_line(run / "metrics.jsonl", record)
                curve.add(record)
            is_due = time.monotonic() - saved > config.save_minutes * 60
            if progress.step % plan.save_every == 0 or is_due or is_last or stopping or stopped_early():
                save()
            if stopping or time.monotonic() - drawn > max(CURVES_SECONDS, 50 * drawing_seconds):
                draw()
            if stopping and not is_last:
                raise KeyboardInterrupt(
                    f"after step {progress.step} of {plan.total}; the state is in {run / 'last'}. Go on with: "
                    f"python scripts/train.py --config {shlex.quote(str(run / 'config.json'))}"
                )

        pulse.line = "writing the adapter"
        if not state_file.exists():  # somebody removed it: a run that ends has a state
            save()
        finish(run, config, progress, trained, save_adapter, say)
        draw()
        say_next(run, test_set, config, say)
    return run


def check_rows(config):
    """Raises ValueError where the files of rows cannot be read: before anything is asked of the network."""
    for path in (config.data, config.test_data):
        if path not in (None, "alpaca", "embedded"):
            dataset.one_format(data.read_rows(path), path)


def check_plan(config, plan, test_set):
    """Says which options cannot do what they are there for in a run of this many steps. Raises ValueError where there is
    patience, but no held-out row."""
    if config.patience and not test_set.examples:
        raise ValueError("patience needs held-out rows, and there are none; set test_size or test_data")
    total, warmup = plan.total, warmup_steps(plan.total, config)
    if warmup > total:
        screen.warn(
            f"the warm-up takes {warmup:,} steps, but the run has {total:,}: its learning rate ends at "
            f"{config.learning_rate * total / warmup:.3g}, not at {config.learning_rate:g}; lower --warmup"
        )
    standard = TrainConfig(model=config.model).epochs
    if config.max_steps is not None and config.epochs != standard:
        in_epochs = max(1, math.ceil(config.epochs * plan.steps_per_epoch))
        if in_epochs != total:
            screen.warn(
                f"--max-steps {total:,} wins over --epochs {config.epochs:g}, which would be {in_epochs:,} steps; "
                "give one of them"
            )
    evaluations = math.ceil(total / plan.eval_every)
    if config.eval_every is not None and config.eval_every > total and test_set.examples:
        screen.warn(f"--eval-every {config.eval_every:,}: the run has {total:,} steps, so only the last is evaluated")
    if config.save_every is not None and config.save_every > total:
        screen.warn(
            f"--save-every {config.save_every:,}: the run has {total:,} steps, so a state is saved every "
            f"{config.save_minutes:g} minutes (--save-minutes) and at the end"
        )
    if config.patience is not None and config.patience >= evaluations:
        screen.warn(
            f"--patience {config.patience} can stop nothing: the run has {evaluations} evaluations; lower --eval-every"
        )


def check_fit(folder, targets, rows):
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
        screen.warn(
            f"the longest row has {longest} tokens, but the model was made for "
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
    # model and rows may have moved, and "auto" may mean another dtype here: what they are is in `facts`
    free = {"run", "resume", "log_every", "eval_every", "save_every", "save_minutes", "patience", "keep", "samples"}
    free |= {"sample_tokens", "device", "dtype", "max_steps", "epochs", "model", "revision", "data", "test_data"}
    stored = progress.config
    now = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(config).items()}
    changed = [
        f"{key} {short(stored.get(key))} -> {short(now[key])}"
        for key in now
        if key not in free and stored.get(key) != now[key]
    ]
    other = {name for name in facts if facts[name] != progress.facts.get(name)}
    if "compute dtype" in other:
        changed.append(f"compute dtype {progress.facts.get('compute dtype')} -> {facts['compute dtype']}")
    other_parts = []
    if "model files (sha256)" in other:
        other_parts.append(f"another model ({short(stored['model'])})")
    if other & {"training rows (sha256)", "held-out rows (sha256)"}:
        source = stored["data"] or ("embedded" if stored["model"] in hub.EMBEDDED else "alpaca")
        other_parts.append(f"other data ({short(source)})")
    old_plan_total = progress.config["max_steps"] or max(1, math.ceil(progress.config["epochs"] * plan.steps_per_epoch))
    if not other_parts and any(
        learning_rate(s, old_plan_total, config) != learning_rate(s, plan.total, config) for s in range(progress.step)
    ):
        changed.append(f"steps {old_plan_total} -> {plan.total}, which changes the learning rate of steps already done")
    if not other_parts and progress.step > plan.total:
        changed.append(f"steps {old_plan_total} -> {plan.total}, but {progress.step} are done")
    if changed or other_parts:
        run = state_file.parents[1]
        on = f" on {' and '.join(other_parts)}" if other_parts else ""
        settings = f" with other settings: {some(changed)}" if changed else ""
        raise ValueError(
            f"{run} already holds a run{on}{' and' * bool(on and settings)}{settings}. Use --run {free_name(run)}, or "
            "--resume never to overwrite it."
        )
    progress.config = asdict(config)
    return progress


def free_name(run):
    """A run folder beside `run` that does not exist."""
    return next(path for i in itertools.count(2) if not (path := run.with_name(f"{run.name}-{i}")).exists())


def lost_steps(count, step):
    """What a resume does again, in words, nothing where nothing was lost."""
    return (
        f"; {count} step{'s' * (count != 1)} after step {step} were lost: not saved before the stop"
        if count > 0
        else ""
    )


def say_outdated(run, progress, plan, say):
    """Says what was made from the adapter that this training replaces. Nothing of it is removed: people's grades are in
    it, and every file has the fingerprint of its adapter."""
    made = [name for name in ("evaluation.json", "generations", "report.html", "export") if (run / name).exists()]
    if (run / "sweep").is_dir() and not any((run / "sweep").glob("*/last")):  # else its points are runs of their own
        made.append("sweep")
    if made and progress.step < plan.total:
        say(
            f"{some(made)} in {run} will be out of date: made from the adapter that this training replaces. They stay; "
            f"afterwards, python scripts/evaluate.py --run {shlex.quote(str(run))} --resume never makes them anew"
        )


def place_of(run):
    """What a folder is, whatever its name: None where there is none."""
    try:
        found = os.stat(run)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def check_place(run, place):
    """Raises OSError where the run folder is not the one that this training began in."""
    if place_of(run) != place:
        raise OSError(
            f"the run folder {run} was removed or replaced while this training ran, so its state is lost; start again, "
            "and leave the folder where it is"
        )


def duration(seconds):
    """A time that is left, in words of one or two units."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


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
        for name, tensor in peft_files.read_adapter_tensors(run / "best").items():
            trained[name.removeprefix("base_model.model.")].data.copy_(tensor)
    save_adapter("adapter")
    kept = (
        f"step {progress.best_step}, held-out loss {progress.best_loss:.4f}"
        if best and progress.best_step
        else f"step {progress.step}"
    )
    say(f"done: {progress.step} steps, {progress.tokens:,} tokens. {run / 'adapter'} holds {kept}")


def say_next(run, test_set, config, say):
    """Where the results are, and in the last line what to do with them."""
    say(f"curves: {run / 'curves.png'}" + (f"; sample answers: {run / 'samples.jsonl'}" if config.samples else ""))
    score = f"python scripts/evaluate.py --run {shlex.quote(str(run))}"
    ask = f'python scripts/generate.py --adapter {shlex.quote(str(run / "adapter"))} --prompt "..."'
    can_score = test_set.examples and test_set.row_format != "text"
    say(f"next: {score}, or {ask}" if can_score else f"next: {ask}")


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
    warmup = warmup_steps(total, config)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return config.learning_rate * shape[config.schedule]


def warmup_steps(total, config):
    return math.ceil(config.warmup * total) if config.warmup < 1 else int(config.warmup)


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
    ends = tuple(i for i in tokenizer.eos_ids if i < model.config.vocab_size)
    answers = generate(model, prompts, GenerateConfig(max_new_tokens, eos_ids=ends))
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


class AdapterSize:
    """How large an adapter has become, from the norms of its tensors: numbers that a huge learning rate leaves finite, but
    that no model works with."""

    LARGEST = 1e4  # mean change of one weight; a model's weights are near 0.02, and adapters change them by less

    def __init__(self, model, trained):
        self.tensors, place = [p.detach() for p in trained.values()], {name: i for i, name in enumerate(trained)}
        self.pairs = [
            (
                name,
                place[f"{name}.lora_A.weight"],
                place[f"{name}.lora_B.weight"],
                layer.scaling / math.sqrt(layer.lora_A.weight.shape[1] * layer.lora_B.weight.shape[0]),
            )
            for name, layer in lora.lora_layers(model).items()
        ]
        self.start = math.hypot(*self.norms())

    def norms(self):
        return torch.stack(torch._foreach_norm(self.tensors)).tolist()

    def growth(self):
        """The norm of all tensors, over that of the start."""
        return math.hypot(*self.norms()) / self.start

    def blown_up(self):
        """What happened to an adapter that cannot work any more, in words; None for a sound one."""
        norms = self.norms()
        changes = {name: norms[a] * norms[b] * scale for name, a, b, scale in self.pairs}
        name = next((name for name, change in changes.items() if not change <= self.LARGEST), None)  # nan is not either
        if name is None:
            return None
        return (
            f"blew the adapter up: it changes the weights of {name} by about {changes[name]:.0e} each, while a model's own "
            "are near 0.02"
        )


def does_not_move(loss, progress, size):
    """Whether a model is dead: five losses in a row are equal and as high as at the start, although the adapter has
    grown. A tiny rate, a skipped step or rows that are learnt make no dead model."""
    recent = [*progress.recent_losses[-4:], loss]
    is_flat = len(recent) == 5 and max(recent) - min(recent) <= 1e-6 * max(recent)
    return is_flat and min(recent) > max(1e-3, 0.9 * progress.first_loss) and size.growth() > 2


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


class Pulse:
    """While open, says `line` every 30 s where the output is no terminal with a progress bar: a log file shows that a
    run goes on, also within a step or an evaluation of many minutes."""

    SECONDS = 30

    def __init__(self, say):
        self.say, self.line, self.ended = say, "preparing", threading.Event()
        is_terminal = all(stream is not None and stream.isatty() for stream in (sys.stdout, sys.stderr))
        self.thread = None if is_terminal else threading.Thread(target=self.beat, daemon=True)

    def beat(self):
        while not self.ended.wait(self.SECONDS):
            with suppress(OSError):  # a full disk: the run itself will say it
                self.say(self.line)

    def __enter__(self):
        if self.thread is not None:
            self.thread.start()
        return self

    def __exit__(self, *error):
        self.ended.set()


class out_of_memory_explained:
    """Turns running out of memory, of a GPU or of the machine, into an error that names the knobs."""

    def __init__(self, config):
        self.config = config

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if not is_out_of_memory(error):
            return
        place = "GPU memory" if isinstance(error, torch.OutOfMemoryError) else "memory"
        c = self.config
        checkpointing = "" if c.checkpointing else "turn on --checkpointing, "
        raise MemoryError(
            f"out of {place} with --batch-size {c.batch_size}, --max-length {c.max_length}, --quantize {c.quantize}: "
            f"{checkpointing}halve --batch-size and double --accumulation, shorten --max-length, or use --quantize nf4"
        ) from error
