"""Curves to Weights & Biases while a run trains, one W&B run for each SAE. Whatever fails there, the training goes on."""

from __future__ import annotations

import importlib.util
import os
import re
import string
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_research.config.params import Params
from sae_research.config.recipes import SAERecipe
from sae_research.runtime.endpoints import keeps_secrets, one_line, secret
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import project_root
from sae_research.saes import SparseAutoencoder
from sae_research.stats.reconstruction import density_histogram
from sae_research.training.buffer import StreamBatch
from sae_research.training.loop import variance_explained
from sae_research.training.recipes import StepOutput
from sae_research.training.training_sae import TrainingSAE

KEY = "WANDB_API_KEY"
LOGGED = ("loss", "l0", "variance_explained")
INIT_SECONDS = 30
"""How long to wait for the service to answer before a run goes untracked."""


class Tracker:
    """What a training run tells Weights & Biases. Without a project every method does nothing."""

    def __init__(self, params: Params, runs: Mapping[str, Any]) -> None:
        self.params, self.runs = params, dict(runs)
        self.logged = dict.fromkeys(self.runs, 0)
        self.by_steps: set[str] = set()
        """SAEs whose rows come from `log_steps`, not from their curves."""
        self.histogram_at = dict.fromkeys(self.runs, 0)

    def log_steps(self, outputs: Sequence[tuple[TrainingSAE, StepOutput, StreamBatch]]) -> None:
        """Every `tracking.log_every` steps a row of that step alone. A Trainer's `at_outputs`."""
        every = self.params.tracking.log_every
        if every is None or not self.runs:
            return
        for sae, output, batch in outputs:
            self.by_steps.add(sae.name)
            if sae.name in self.runs and sae.step % every == 0:
                row = {
                    "train/loss": float(output.loss),
                    "train/l0": float(output.l0),
                    "train/variance_explained": variance_explained(sae, output, batch),
                    "train/learning_rate": sae.recipe.learning_rate(batch.progress),
                    "tokens": sae.tokens,
                }
                self._try("logging", sae.name, lambda run, row=row, step=sae.step: run.log(row, step=step))

    def histogram_is_due(self, sae: TrainingSAE) -> bool:
        """Whether another `tracking.histogram_every` steps have passed."""
        every = self.params.tracking.histogram_every
        if every is None or sae.name not in self.runs or sae.step // every <= self.histogram_at[sae.name] // every:
            return False
        self.histogram_at[sae.name] = sae.step
        return True

    def histogram(self, name: str, density_F: Tensor, step: int) -> None:
        """Log how many latents fire on which fraction of tokens [d_sae], by its decimal logarithm."""
        self._log_histogram(name, "train", density_histogram(density_F), step)

    def _log_histogram(self, name: str, stage: str, histogram: Mapping[str, Any], step: int | None = None) -> None:
        def act(run: Any) -> None:
            import wandb

            bars = wandb.Histogram(np_histogram=(histogram["counts"], histogram["log10_edges"]))
            run.log({f"{stage}/log10_density": bars, f"{stage}/dead_latents": histogram["dead"]}, step=step)

        self._try("a histogram", name, act)

    def checkpoint(self, name: str, folder: Path, alias: str) -> None:
        """Send an SAE's folder as a version of the artifact `sae-<name>`, where `tracking.checkpoints` asks for it."""
        if not self.params.tracking.checkpoints or name not in self.runs:
            return

        def act(run: Any) -> None:
            import wandb

            artifact = wandb.Artifact(f"sae-{re.sub('[^a-zA-Z0-9_.-]', '_', name)}", type="model")
            for path in sorted(folder.iterdir()):
                if path.is_file():  # earlier checkpoints lie in folders, and are versions of their own
                    artifact.add_file(str(path), path.name)
            run.log_artifact(artifact, aliases=[alias])

        self._try("a checkpoint", name, act)

    def update(self, saes: Sequence[TrainingSAE]) -> None:
        """Log the rows of every curve that are new since the last call; nearly free where there are none."""
        for sae in saes:
            if sae.name in self.runs and sae.name not in self.by_steps and len(sae.curve) > self.logged[sae.name]:
                new = sae.curve[self.logged[sae.name] :]
                self.logged[sae.name] = len(sae.curve)
                self._try(
                    "logging",
                    sae.name,
                    lambda run, rows=new: [
                        run.log(
                            {**{f"train/{key}": getattr(row, key) for key in LOGGED}, "tokens": row.tokens}, step=row.step
                        )
                        for row in rows
                    ],
                )

    def finish(self, results: Mapping[str, Mapping[str, Any]], findings: Mapping[str, Sequence[str]]) -> None:
        """Held-out metrics and what was diagnosed as each run's summary, and the end of the runs."""
        for name in list(self.runs):
            figures = {
                f"eval/{key}": value
                for key, value in results.get(name, {}).items()
                if isinstance(value, int | float) and not isinstance(value, bool)
            }
            summary = {**figures, "diagnose": list(findings.get(name, []))}
            self._try("the summary", name, lambda run, values=summary: run.summary.update(values))
            if self.params.tracking.histogram_every is not None and name in self.runs and name in results:
                self._log_histogram(name, "eval", results[name]["density_histogram"])
        self.close(0)

    def close(self, exit_code: int) -> None:
        """End all runs; `exit_code` other than 0 marks them as failed."""
        for name in list(self.runs):
            self._try("the end", name, lambda run: run.finish(exit_code=exit_code))
            self.runs.pop(name, None)

    def _try(self, what: str, name: str, act: Any) -> None:
        """Do one thing with one run; a failure costs that run's tracking, and a line."""
        try:
            act(self.runs[name])
        except Exception as error:  # noqa: BLE001  (another library's trouble must never cost a training)
            _say(f"{name} is no longer tracked: {what} failed", error)
            self.runs.pop(name, None)


DENSITY_TOKENS, DENSITY_PART = 4_096, 512
"""Tokens that a histogram is measured on while training, and how many are encoded at a time."""


@torch.no_grad()
def density_on(sae: SparseAutoencoder, rows_ND: Tensor) -> Tensor:
    """The fraction of rows [n, d_in] in the model's units that each latent fires on [d_sae], on the CPU."""
    sae = sae.to(rows_ND.device)
    fired_F = torch.zeros(sae.cfg.d_sae, device=rows_ND.device)
    for part_ND in rows_ND.split(DENSITY_PART):
        fired_F += (sae.encode(part_ND[None]) != 0).sum((0, 1))
    return (fired_F / max(1, len(rows_ND))).cpu()


@contextmanager
def tracked(params: Params) -> Generator[Tracker]:
    """A tracker for the SAEs of `params`; an error or signal inside marks its runs as failed.

    Raises `UserError` before anything is trained when a project is named and wandb or its key is missing, or the name's
    template is wrong. A service that cannot be reached costs the tracking only.
    """
    tracking = params.tracking
    if tracking.project is None:
        yield Tracker(params, {})
        return
    names = {sae: run_name(tracking.name, sae, config, params) for sae, config in params.train.saes.items()}
    if importlib.util.find_spec("wandb") is None:
        raise UserError(
            "tracking.project is set but wandb is not installed: `uv pip install -e '.[wandb]'`, or tracking.project: null"
        )
    tracker = Tracker(params, _start(params, names))
    try:
        yield tracker
    except BaseException:
        tracker.close(1)
        raise


def run_name(template: str, sae: str, config: SAERecipe, params: Params) -> str:
    """`{recipe}_lr_{learning_rate}` filled in. Raises `UserError` naming what may stand in braces."""
    values = {
        **config.model_dump(),
        "sae": sae,
        "model": params.model.name,
        "hook": params.train.hook_of(sae),
        "seed": params.random_seed if config.seed is None else config.seed,
        "tokens": params.train.tokens,
    }
    known = {key for other in params.train.saes.values() for key in other.model_dump()} | set(values)
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
        unknown = [field for field in fields if field not in known]
        if unknown:
            raise UserError(f"tracking.name: unknown {{{unknown[0]}}}; known: {', '.join(sorted(known))}")
        return template.format(**{key: values.get(key, "") for key in known})
    except (ValueError, IndexError) as error:
        raise UserError(f"tracking.name: {template!r} is no template ({error})") from None


def _start(params: Params, names: Mapping[str, str]) -> dict[str, Any]:
    """W&B runs by SAE; none where the first cannot be made, since the others would fail alike."""
    key = secret(KEY)
    runs: dict[str, Any] = {}
    tracking = params.tracking
    mode = os.environ.get("WANDB_MODE") or tracking.mode
    if key and mode == "online" and not keeps_secrets(os.environ.get("WANDB_BASE_URL") or "https://"):
        raise UserError(
            f"WANDB_BASE_URL is plain http to another machine, and {KEY} would travel there in the clear: use https"
        )
    try:
        import wandb

        # without a key the client would ask at the terminal, and wait
        if mode == "online" and key is None and not wandb.login(prompt=False):
            raise UserError(
                f"tracking.project is set but there is no key: set {KEY} in the environment or in .env, or "
                "tracking.mode: offline"
            )
        settings = wandb.Settings(
            init_timeout=INIT_SECONDS,
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            x_disable_stats=True,
            api_key=key,
        )
        for sae, config in params.train.saes.items():
            runs[sae] = wandb.init(
                project=tracking.project,
                entity=tracking.entity or secret("WANDB_ENTITY"),
                name=names[sae],
                tags=tracking.tags,
                dir=str(project_root()),
                settings=settings,
                reinit="create_new",
                mode=mode,  # ty: ignore[invalid-argument-type]
                config={
                    "sae": sae,
                    "model_name": params.model.name,
                    "hook_name": params.train.hook_of(sae),
                    "text": params.text.dataset,
                    "random_seed": params.random_seed,
                    **config.model_dump(),
                    "train": params.train.model_dump(exclude={"saes"}),
                },
            )
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001  (no service, no key, no disk: the training does not need any of them)
        _say("Weights & Biases cannot be used, the training goes on without it", error, key)
        for run in runs.values():
            run.finish(exit_code=1)
        return {}
    return runs


def _say(what: str, error: Exception, key: str | None = None) -> None:
    reason = one_line(str(error), key, secret(KEY))
    print(f"warning: {what} ({type(error).__name__}: {reason})", file=sys.stderr, flush=True)
