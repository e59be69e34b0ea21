"""The training loop: LoRA or QLoRA, from a TrainConfig to a run folder. fine_tune() is the loop, without callbacks; Training
has the parts around it.

Not here: rows and learning rate of a step (plan.py), the loss (loss.py), checks of a step (health.py), files (runs/)."""

import inspect
import math
import os
import shlex
import time
from dataclasses import asdict

import torch
from minitune_kernels import ops

from minitune import checkpoint, data, distributed, hub, screen
from minitune.adapters import lora, peft_files
from minitune.config import TrainConfig, is_out_of_memory
from minitune.data import dataset
from minitune.decoding.options import GenerateConfig
from minitune.device import DTYPES, choose_device, choose_dtype, peak_bytes, reset_peak
from minitune.files import expand
from minitune.generate import generate
from minitune.health import AdapterSize, broken, check_gradients, does_not_move
from minitune.interrupts import StopSignal
from minitune.loss import batch_loss, first_nonfinite, held_out_loss
from minitune.model_folder import ModelFolder
from minitune.plan import StepPlan, check_plan, learning_rate
from minitune.pulse import Pulse, duration
from minitune.runs.answers import FORMULAS
from minitune.runs.curves import Curve, draw_curves
from minitune.runs.folder import (
    append_line,
    check_place,
    file_sha256,
    free_name,
    hold,
    keep_lines,
    last_step,
    place_of,
    read_steps,
    start_run,
    sync_lines,
    write_config,
    write_held_out,
)
from minitune.runs.state import Progress, load_state, random_state, read_progress, save_state
from minitune.screen import short, some

CURVES_SECONDS = (
    30  # shortest time between two drawings of curves.png; longer if drawing would take over 2 % of the run
)


def train(config: TrainConfig, say=screen.say):
    """Fine-tune with the options of `config`. Resumes if the run folder has a saved state. say: prints one line.

    Returns the run folder's Path.
    Raises ValueError on bad options or files, if possible before weights load and before the run folder is created;
    FloatingPointError if the loss is not finite, jumps or stays constant (the last good state is kept); KeyboardInterrupt
    after Ctrl-C or SIGTERM (the state is saved)."""
    run = run_of(config)
    with hold(run), out_of_memory_explained(config), Pulse(say) as pulse:
        return fine_tune(config, run, say, pulse)


def run_of(config):
    """The run folder as a Path: --run, else runs/MODEL-lora or runs/MODEL-qlora."""
    name = expand(config.model).absolute().name
    return expand(config.run or f"runs/{name}-{'lora' if config.quantize == 'none' else 'qlora'}")


def fine_tune(config, run, say, pulse):
    """The body of train(). `run` is the run folder, locked by this process; `pulse` is an open Pulse.

    Prepare; then batches, forward, backward, clip, step, log, evaluate, save, until the last step; then finish. Each rank has
    its own micro-batches, and rank 0 writes the files."""
    job = Training(config, run, say, pulse)
    job.begin()
    model, plan, progress, optimizer, scaler = job.model, job.plan, job.progress, job.optimizer, job.scaler
    is_first_rank = distributed.rank() == 0
    with StopSignal() as stop, job.bar:
        while progress.step < plan.total and not job.stopped_early():
            started, random = time.perf_counter(), random_state(job.device)
            batches = plan.batches(progress.step, job.train_set, job.tokenizer.pad_id)
            rate = learning_rate(progress.step, plan.total, config)
            for group in optimizer.param_groups:
                group["lr"] = rate

            # forward and backward: the summed loss is divided by the supervised tokens of the whole step, so the result does
            # not depend on the number of micro-batches or ranks
            model.train()
            supervised = distributed.total(sum(batch.supervised for batch in batches))
            summed = torch.zeros((), device=job.device)
            for batch in batches:
                loss = batch_loss(model, batch)
                scaler.scale(loss / supervised).backward()
                summed += loss.detach()
            if progress.step == 0:
                check_gradients(job.trained)
            distributed.add_up([p.grad for p in job.trained.values()])

            # clip and step, unless check_step() refuses; the .item() calls are the only waits for the device in a step
            scaler.unscale_(optimizer)
            clip = config.max_grad_norm or math.inf
            grad_norm = torch.nn.utils.clip_grad_norm_(job.trained.values(), clip).item()
            loss = distributed.total(summed.item()) / supervised
            job.check_step(loss, grad_norm, batches, random)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            record = job.count_step(loss, rate, grad_norm, batches, supervised, time.perf_counter() - started)

            # log, evaluate, save
            check_place(run, job.place)
            stopping = stop.requested  # read once: a signal after this line takes effect in the next step
            if is_first_rank:
                job.log(record)
                if plan.saves_after(progress.step) or job.save_is_due() or stopping or job.stopped_early():
                    job.save()
                if stopping or job.drawing_is_due():
                    job.draw()
            if stopping and progress.step < plan.total:
                raise KeyboardInterrupt(
                    f"after step {progress.step} of {plan.total}; the state is in {run / 'last'}. Resume with: "
                    f"python scripts/train.py --config {shlex.quote(str(run / 'config.json'))}"
                )
        job.finish()
    return run


class Training:
    """One run: its model, rows, optimizer and progress, and the parts of fine_tune() around a step."""

    def __init__(self, config, run, say, pulse):
        """Load everything that a step needs. Options, tokenizer and rows are checked first, weights are loaded last.

        Arguments as in fine_tune(). Raises ValueError as train() does."""
        self.config, self.run, self.say, self.pulse = config, run, say, pulse
        self.state_file = run / "last" / "state.safetensors"
        self.device = choose_device(config.device)
        self.dtype, reason = choose_dtype(self.dtype_name(), self.device, "training")
        if config.dtype == "auto" and self.dtype_name() != "auto":
            reason = "as in the run so far"
        if config.dtype == config.recipe({"model": config.model}).get("dtype"):
            reason = f"set by the {config.model} recipe"
        if config.model not in hub.EMBEDDED and not os.path.exists(expand(config.model)):
            check_rows(config)
        folder = ModelFolder.open(config.model, config.revision, weights=False)
        folder.check_trainable()
        self.tokenizer = folder.tokenizer
        self.train_set, self.test_set = data.load_for(config, self.tokenizer)
        say(f"{config.model} on {self.device}, {str(self.dtype).removeprefix('torch.')} ({reason})")
        say(self.train_set.describe())
        none = "no held-out rows, so there is no held-out loss and no best step"
        say(self.test_set.describe() if self.test_set.examples else none)
        self.plan = StepPlan(config, self.train_set)
        check_plan(config, self.plan, self.test_set)
        targets = config.lora_targets or folder.default_targets()
        rows = [example.ids for part in (self.train_set, self.test_set) for example in part.examples]
        check_fit(folder, targets, rows)
        folder = folder.with_weights()
        self.progress = starting_point(config, self.state_file, self.plan, self.facts(folder))
        self.lost = last_step(run / "metrics.jsonl") - self.progress.step if config.resume == "auto" else 0
        say_outdated(run, self.progress, self.plan, say)
        self.load(folder, targets)
        self.saved = self.drawn = time.monotonic()
        self.drawing_seconds, self.curve, self.place = 0.0, Curve(), place_of(run)

    def dtype_name(self):
        """--dtype; for auto, the dtype of the run that is resumed, else auto."""
        if (
            self.config.dtype != "auto"
            or self.config.resume != "auto"
            or (stored := read_progress(self.state_file)) is None
        ):
            return self.config.dtype
        kept = stored.facts.get("compute dtype")
        return next((name for name, dtype in DTYPES.items() if str(dtype) == f"torch.{kept}"), "auto")

    def facts(self, folder):
        """{name: value} of what must be equal when a run is resumed, beside the options. folder: a ModelFolder."""
        return {
            "compute dtype": str(self.dtype).removeprefix("torch."),
            "model files (sha256)": folder.fingerprint,
            "training rows (sha256)": self.train_set.fingerprint,
            "held-out rows (sha256)": self.test_set.fingerprint,
            FORMULAS: ops.formulas_fingerprint(),
        }

    def load(self, folder, targets):
        """Load the model, add LoRA layers, and make the optimizer. folder: a ModelFolder; targets: see lora.match_targets."""
        config, self.pulse.line = self.config, "loading the model"
        self.model = checkpoint.load_model(folder, self.dtype, self.device, config.quantize, say=self.say)
        names = lora.inject(
            self.model,
            config.lora_rank,
            config.lora_alpha,
            config.lora_dropout,
            targets,
            config.use_rslora,
            config.seed,
        )
        self.model.model.recompute = config.checkpointing
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.size = AdapterSize(self.model, self.trained)
        self.say(
            f"LoRA on {len(names)} linear layers ({', '.join(dict.fromkeys(n.rsplit('.', 1)[-1] for n in names))}): "
            f"{sum(p.numel() for p in self.trained.values()) / 1e6:.2f} M trained parameters"
        )
        self.optimizer = make_optimizer(self.trained, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def begin(self):
        """Restore the state of the stopped run; or start at step 0 and record the held-out loss of the base."""
        config, run, progress = self.config, self.run, self.progress
        torch.manual_seed(config.seed)  # for dropout
        write_held_out(run, self.test_set)
        if progress.step:
            for file in ("metrics.jsonl", "samples.jsonl"):
                read_steps(run / file)
                keep_lines(run / file, *progress.logged.get(file, (0, 0)), progress.step)
            load_state(self.state_file, self.trained, self.optimizer, self.scaler)
            self.curve = Curve(read_steps(run / "metrics.jsonl"))
            write_config(run, config)
            self.say(
                f"resuming from step {progress.step} of {self.plan.total} in {run}"
                + lost_steps(self.lost, progress.step)
            )
        else:
            if self.lost > 0:
                self.say(f"starting again at step 0: {run} stopped at step {self.lost}, before a state was saved")
            start_run(run, config, self.device, self.train_set.fingerprint)
            self.pulse.line = "step 0: reading the held-out rows"
            if (loss := self.evaluate()) is not None:
                append_line(run / "metrics.jsonl", {"step": 0, "eval_loss": loss})
                self.curve.add({"step": 0, "eval_loss": loss})
                self.say(f"step 0: held-out loss {loss:.4f}")
        self.bar = screen.progress(self.plan.total, "step", initial=progress.step)
        self.first, self.begun = progress.step, time.monotonic()
        reset_peak(self.device)

    # --- a step -----------------------------------------------------------------------------------------------------

    def check_step(self, loss, grad_norm, batches, random):
        """Raises FloatingPointError if this step must not be taken, or if the step before broke the weights. The last good
        state is kept.

        loss: mean over the supervised tokens. batches: the micro-batches of the step. random: random_state() at its start."""
        config, step, last = self.config, self.progress.step, self.run / "last"
        blown, is_dead = self.size.blown_up(), False
        if blown:
            problem = f"the step before {blown}"
        elif not (problem := broken(loss, grad_norm, self.progress.recent_losses, config.spike_factor, self.scaler)):
            is_dead = config.spike_factor > 0 and does_not_move(loss, self.progress, self.size)
            if not is_dead:
                return
            problem = (
                f"the loss stays at {loss:.4f} although the adapter has grown to {self.size.growth():.0f} times its initial "
                "norm: the model no longer learns (--spike-factor 0 turns this check off)"
            )
        kept = "No step was done before it"
        if step and (blown or is_dead or not self.weights_are_finite()):
            kept = f"The steps before broke the weights; {last} still holds the last saved state"
        elif step:
            self.save(random)
            kept = f"The state before this step is in {last}"
        self.draw()
        where = first_nonfinite(self.model, batches) if not math.isfinite(loss) else None
        rows = some([r for b in batches for r in b.rows], 16)
        look = "" if blown or is_dead else f". Its rows (counted from 0 in the file): {rows}"
        raise FloatingPointError(
            f"step {step + 1}: {problem}{f', first in the output of {where}' if where else ''}{look}. {kept}. "
            f"{'Look at these rows, or start' if look else 'Start'} again (--resume never) with a lower "
            f"--learning-rate (now {config.learning_rate:g})"
        )

    def count_step(self, loss, rate, grad_norm, batches, supervised, seconds):
        """Add a completed step to the progress and show it. Returns its record for metrics.jsonl, a dict.

        loss: mean over the supervised tokens. rate: learning rate. supervised: supervised tokens. seconds: time of the step."""
        progress, total = self.progress, self.plan.total
        tokens = sum(sum(batch.documents[: len(batch.rows)]) for batch in batches)  # without padding
        progress.step += 1
        progress.tokens += tokens
        progress.recent_losses = [*progress.recent_losses, loss][-16:]
        progress.first_loss = loss if progress.first_loss is None else progress.first_loss
        speed = round(tokens / seconds, 1)
        self.bar.update()
        self.bar.set_postfix(loss=f"{loss:.3f}", tokens_per_s=f"{speed:.0f}", refresh=False)
        left = (time.monotonic() - self.begun) / (progress.step - self.first) * (total - progress.step)
        self.pulse.line = f"step {progress.step}/{total}: loss {loss:.4f}, {speed:,.0f} tokens/s, {duration(left)} left"
        return {
            "step": progress.step,
            "epoch": round(progress.step / self.plan.steps_per_epoch, 4),
            "loss": loss,
            "lr": rate,
            "grad_norm": grad_norm,
            "tokens": progress.tokens,
            "supervised_tokens": supervised,
            "examples": sum(len(batch.rows) for batch in batches),
            "seconds": seconds,
            "tokens_per_s": speed,
            "peak_bytes": peak_bytes(self.device),
        }

    def log(self, record):
        """Evaluate if this step is due for it, and write its record to metrics.jsonl if that is due."""
        step, total = record["step"], self.plan.total
        if self.plan.evaluates_after(step):
            record |= {} if (held_out := self.evaluate()) is None else {"eval_loss": held_out}
            self.say(
                f"step {step}/{total}: loss {record['loss']:.4f}"
                + (f", held-out loss {held_out:.4f}" if held_out is not None else "")
            )
        if step % self.config.log_every == 0 or "eval_loss" in record or step == total:
            append_line(self.run / "metrics.jsonl", record)
            self.curve.add(record)

    def evaluate(self):
        """Compute the held-out loss, record sample answers, and save a new best adapter. Returns the loss, or None without
        held-out rows."""
        config, progress, context = self.config, self.progress, self.model.config.max_position_embeddings
        rows = (self.test_set if self.test_set.examples else self.train_set).examples
        asked = [e for e in rows if 0 < e.prompt_length < context][: config.samples]
        if samples := sample_answers(self.model, self.tokenizer, asked, config.sample_tokens):
            how = {"do_sample": False, "num_beams": 1, "max_new_tokens": config.sample_tokens}
            append_line(self.run / "samples.jsonl", {"step": progress.step, "decoding": how, "samples": samples})
        if not self.test_set.examples:
            return None
        loss = held_out_loss(self.model, self.test_set.examples, config.batch_size, self.tokenizer.pad_id)
        if progress.best_loss is None or loss < progress.best_loss:
            progress.best_loss, progress.best_step, progress.evaluations_since_best = loss, progress.step, 0
            if progress.step:
                self.save_adapter("best")
                progress.best_sha256 = file_sha256(self.run / "best" / "adapter_model.safetensors")
        else:
            progress.evaluations_since_best += 1
        return loss

    def stopped_early(self):
        """Whether the held-out loss has not fallen for --patience evaluations."""
        patience = self.config.patience
        return patience is not None and self.progress.evaluations_since_best >= patience

    # --- files ------------------------------------------------------------------------------------------------------

    def save_is_due(self):
        return time.monotonic() - self.saved > self.config.save_minutes * 60

    def save(self, random=None):
        """Write last/, the state for a resume. random: random_state() for the next step, or None for the current one.

        Raises FloatingPointError and does not change last/ if the weights are broken."""
        run, progress = self.run, self.progress
        problem = self.size.blown_up() if self.weights_are_finite() else "made weights that are not finite"
        if problem:
            raise FloatingPointError(
                f"step {progress.step} {problem}; {run / 'last'} still holds the last saved state. "
                f"Lower --learning-rate (now {self.config.learning_rate:g})"
            )
        for file in ("metrics.jsonl", "samples.jsonl"):
            progress.logged[file] = sync_lines(run / file, *progress.logged.get(file, (0, 0)))
        if not (run / "config.json").exists():
            write_config(run, self.config)
        self.save_adapter("last")
        random = random or random_state(self.device)
        save_state(self.state_file, progress, self.trained, self.optimizer, self.scaler, random)
        self.saved = time.monotonic()

    def save_adapter(self, name):
        """Write the adapter to the folder `name` of the run, with the facts that generate and chat need to compute as this run
        did."""
        config = self.config
        peft_files.save_adapter(
            self.model,
            self.run / name,
            base_model=hub.MODELS.get(config.model, config.model),
            revision=config.revision,
            extra={
                "template": self.train_set.row_format,
                "special_text": config.special_text,
                "base_model": config.model,
                "revision": config.revision,
                "dtype": next(name for name, each in DTYPES.items() if each == self.dtype),
                "quantize": config.quantize,
            },
            trained=name == "adapter",  # last/ may still equal the base while the scaler skips steps
        )

    def weights_are_finite(self):
        return all(p.isfinite().all() for p in self.trained.values())

    def drawing_is_due(self):
        return time.monotonic() - self.drawn > max(CURVES_SECONDS, 50 * self.drawing_seconds)

    def draw(self):
        """Write curves.png."""
        started = time.monotonic()
        draw_curves(self.curve.records(), self.run / "curves.png")
        self.drawn = time.monotonic()
        self.drawing_seconds = self.drawn - started

    def finish(self):
        """Write adapter/, from the best held-out step or the last step, and say what to do with it."""
        run, config, progress, best = self.run, self.config, self.progress, self.run / "best"
        self.pulse.line = "writing the adapter"
        if not self.state_file.exists():  # removed while the run was going on
            self.save()
        is_best = config.keep == "best" and progress.best_step is not None
        if is_best and progress.best_step and file_sha256(best / "adapter_model.safetensors") != progress.best_sha256:
            self.say(
                f"{best} was changed and no longer holds the best step, {progress.best_step}; adapter/ holds the last step"
            )
            is_best = False
        if is_best and progress.best_step == 0:
            self.say(
                "no step had a lower held-out loss than the base model, so adapter/ holds the last step; try another "
                "--learning-rate"
            )
        if is_best and 0 < progress.best_step < progress.step:
            for name, tensor in peft_files.read_adapter_tensors(best).items():
                self.trained[name.removeprefix("base_model.model.")].data.copy_(tensor)
        self.save_adapter("adapter")
        kept = (
            f"step {progress.best_step}, held-out loss {progress.best_loss:.4f}"
            if is_best and progress.best_step
            else f"step {progress.step}"
        )
        self.say(f"done: {progress.step} steps, {progress.tokens:,} tokens. {run / 'adapter'} holds {kept}")
        self.draw()
        say_next(run, self.test_set, config, self.say)


def check_rows(config):
    """Raises ValueError if a file of rows cannot be read. Called before anything is downloaded."""
    for path in (config.data, config.test_data):
        if path not in (None, "alpaca", "embedded"):
            dataset.one_format(data.read_rows(path), path)


def check_fit(folder, targets, rows):
    """Raises ValueError, before weights load, if the model lacks a LoRA target or a token of the rows.

    folder: a ModelFolder. targets: see lora.match_targets. rows: lists of token ids."""
    empty = folder.empty
    lora.match_targets(empty, targets)
    highest, longest = max(map(max, rows)), max(map(len, rows))
    if highest >= empty.config.vocab_size:
        raise ValueError(
            f"the rows have token {highest}, but the model has {empty.config.vocab_size} tokens; "
            f"the tokenizer in {folder.path} belongs to another model"
        )
    if longest > empty.config.max_position_embeddings:
        screen.warn(
            f"the longest row has {longest} tokens, but the model was made for "
            f"{empty.config.max_position_embeddings}; --max-length shortens the rows"
        )


def starting_point(config, state_file, plan, facts):
    """The Progress to start from: that of the state file, or a new one.

    plan: the StepPlan. facts: see Training.facts(). Raises ValueError if the run in the folder has other options or facts than
    this one."""
    progress = read_progress(state_file) if config.resume == "auto" else None
    if progress is None:
        return Progress(config=asdict(config), facts=facts)
    # Options that may change. Model and rows may have moved, and "auto" may mean another dtype: `facts` has their content.
    free = {"run", "resume", "log_every", "eval_every", "save_every", "save_minutes", "patience", "keep", "samples"}
    free |= {"sample_tokens", "device", "dtype", "max_steps", "epochs", "model", "revision", "data", "test_data"}
    stored = progress.config
    now = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(config).items()}
    changed = [
        f"{key} {short(stored.get(key))} -> {short(now[key])}"
        for key in now
        if key not in free and stored.get(key) != now[key]
    ]
    before = {FORMULAS: facts[FORMULAS], **progress.facts}  # older states lack it
    other = {name for name in facts if facts[name] != before.get(name)}
    if FORMULAS in other:
        changed.append("the formulas in kernels/, which were edited")
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


def lost_steps(count, step):
    """The end of the message of a resume: how many steps are done again, or nothing."""
    return (
        f"; {count} step{'s' * (count != 1)} after step {step} were lost: not saved before the stop"
        if count > 0
        else ""
    )


def say_outdated(run, progress, plan, say):
    """Name the results of the adapter that this training replaces. They are not removed: they may hold human ratings, and every
    file has the fingerprint of its adapter."""
    made = [name for name in ("evaluation.json", "generations", "report.html", "export") if (run / name).exists()]
    # A sweep over training options is not affected: each of its points is a run of its own.
    if (run / "sweep").is_dir() and not any((run / "sweep").glob("*/last")):
        made.append("sweep")
    if made and progress.step < plan.total:
        say(
            f"{some(made)} in {run} will be out of date, because this training replaces the adapter. They are kept; after the "
            f"training, make them again with python scripts/evaluate.py --run {shlex.quote(str(run))} --resume never"
        )


def say_next(run, test_set, config, say):
    """Say where the results are, and in the last line what to do with them."""
    say(f"curves: {run / 'curves.png'}" + (f"; sample answers: {run / 'samples.jsonl'}" if config.samples else ""))
    score = f"python scripts/evaluate.py --run {shlex.quote(str(run))}"
    ask = f'python scripts/generate.py --adapter {shlex.quote(str(run / "adapter"))} --prompt "..."'
    can_score = test_set.examples and test_set.row_format != "text"
    say(f"next: {score}, or {ask}" if can_score else f"next: {ask}")


class AdamW(torch.optim.AdamW):
    """torch's AdamW, its methods without the wrappers that keep them out of torch's compiler. The wrappers import the compiler at
    the first call, which takes 1 to 2 s in every process that trains; nothing is compiled here."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    load_state_dict = inspect.unwrap(torch.optim.AdamW.load_state_dict)
    state_dict = inspect.unwrap(torch.optim.AdamW.state_dict)
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)


def make_optimizer(trained, config):
    """AdamW for `trained`, {name: parameter}. Weight decay applies to matrices only, not to biases and weights of norms."""
    matrices = [p for p in trained.values() if p.ndim >= 2]
    vectors = [p for p in trained.values() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return AdamW(
        [g for g in groups if g["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        fused=True,
    )


def sample_answers(model, tokenizer, examples, max_new_tokens):
    """Greedy answers to the prompts of some data.Examples: [{"prompt": text, "answer": text, "reference": text}, ...]."""
    model.eval()
    prompts = [example.ids[: example.prompt_length] for example in examples]
    ends = tuple(i for i in tokenizer.eos_ids if i < model.config.vocab_size)
    answers = generate(model, prompts, GenerateConfig(max_new_tokens, eos_ids=ends))
    references = [[i for i in e.ids[e.prompt_length :] if i not in tokenizer.eos_ids] for e in examples]
    return [
        dict(zip(("prompt", "answer", "reference"), map(tokenizer.decode, texts), strict=True))
        for texts in zip(prompts, answers, references, strict=True)
    ]


class out_of_memory_explained:
    """Context that turns a lack of memory, of a GPU or of the machine, into a MemoryError that names the options to lower."""

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
