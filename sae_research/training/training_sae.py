"""One SAE in training: its recipe and optimiser, how it starts, and one step of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_research.config.params import Train
from sae_research.runtime.files import fingerprint
from sae_research.training.buffer import StreamBatch
from sae_research.training.recipes import RECIPES, Recipe, StepOutput


class CurveRow(NamedTuple):
    """One row of `training_curve.tsv`."""

    step: int
    tokens: int
    loss: float
    """Mean over the steps since the last row."""
    l0: float
    """On this step's batch, as is the next."""
    variance_explained: float


@dataclass
class TrainingSAE:
    """One SAE in training: its recipe, its optimiser and its curve so far."""

    name: str
    recipe: Recipe
    optimiser: torch.optim.Adam
    loss_sum: Tensor
    """Of the steps since the last row of the curve."""
    bad_step: Tensor
    """First step whose loss was not finite, 0 while there is none."""
    hook: str = ""
    """Whose batches it gets: a hook, or `READ -> WRITTEN` (`Train.place_of`)."""
    step: int = 0
    tokens: int = 0
    """Trained on so far."""
    curve: list[CurveRow] = field(default_factory=list)

    @property
    def fraction_silent(self) -> float:
        """Fraction of latents that did not fire in the last `dead_fraction` of the run."""
        since = self.recipe.last_fired_F.max() - self.recipe.train_config.dead_fraction
        return float((self.recipe.last_fired_F < since).float().mean())

    # --- checkpoints ---

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """(plain values, tensors) from which `restore` goes on exactly here."""
        values = {
            "step": self.step,
            "tokens": self.tokens,
            "curve": [list(row) for row in self.curve],
            "recipe": self.recipe.extra_state(),
        }
        tensors = {f"recipe/{key}": tensor for key, tensor in self.recipe.state_dict().items()}
        tensors |= {"loss_sum": self.loss_sum, "generator": self.recipe.generator.get_state()}
        for key, parameter in self.recipe.named_parameters():
            tensors |= {f"adam/{key}/{moment}": tensor for moment, tensor in self.optimiser.state[parameter].items()}
        return values, tensors

    def restore(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.step, self.tokens = values["step"], values["tokens"]
        self.curve = [CurveRow(*row) for row in values["curve"]]
        self.recipe.load_state_dict(
            {key.removeprefix("recipe/"): tensor for key, tensor in tensors.items() if key.startswith("recipe/")}
        )
        self.recipe.load_extra_state(values["recipe"])
        self.recipe.generator.set_state(tensors["generator"])
        self.loss_sum.copy_(tensors["loss_sum"])
        for key, parameter in self.recipe.named_parameters():
            prefix = f"adam/{key}/"
            for name, tensor in tensors.items():
                if name.startswith(prefix):
                    self.optimiser.state[parameter][name.removeprefix(prefix)] = tensor.to(parameter.device, copy=True)


def new_training_sae(name: str, train: Train, d_in: int, device: torch.device | str = "cpu") -> TrainingSAE:
    """An SAE and its optimiser; call `start` or `TrainingSAE.restore` next."""
    config = train.saes[name]
    recipe = RECIPES[config.recipe](d_in, config, train).to(device)
    recipe.generator = torch.Generator()
    optimiser = adam([{"params": list(recipe.parameters()), "lr": config.learning_rate}], recipe)
    zero = torch.zeros((), device=device)
    return TrainingSAE(name, recipe, optimiser, zero.clone(), zero.clone().long(), train.place_of(name))


def adam(groups: list[dict[str, Any]], recipe: Recipe) -> torch.optim.Adam:
    """The optimiser of SAEs of a recipe; `groups` hold parameters, and `betas` that are not `recipe`'s."""
    # fused: one pass over parameters and moments; 7 times faster than foreach on CPU
    return torch.optim.Adam(groups, betas=recipe.betas, fused=recipe.W_dec.device.type != "mps")


def start(sae: TrainingSAE, rows_ND: Tensor, random_seed: int) -> None:
    """Initialise from normalised activations `rows_ND`.

    Its randomness comes from `random_seed` and its own name, so that other SAEs in the run change nothing.
    """
    if sae.recipe.whitening is not None:
        rows_ND = sae.recipe.whitening.fit(rows_ND)
    sae.recipe.initialise(rows_ND, torch.Generator().manual_seed(sae_seed(sae.name, random_seed)))


def sae_seed(name: str, random_seed: int) -> int:
    return int(fingerprint([random_seed, "sae", name])[:12], 16)


def train_step(sae: TrainingSAE, batch: StreamBatch) -> StepOutput:
    """Loss, gradient, and an Adam step that keeps the decoder's rows at unit norm where the recipe asks for it."""
    recipe, optimiser = sae.recipe, sae.optimiser
    if recipe.whitening is not None:
        batch = batch._replace(acts=recipe.whitening(batch.acts))
    optimiser.param_groups[0]["lr"] = recipe.learning_rate(batch.progress)
    optimiser.zero_grad(set_to_none=True)
    output = _gradients(recipe, batch)
    if recipe.unit_rows:
        recipe.project_gradient()
    if recipe.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(recipe.parameters(), recipe.clip_norm)
    optimiser.step()
    if recipe.unit_rows:
        recipe.normalise_rows()
    recipe.after_step(optimiser, batch.acts, output, batch.progress)
    sae.step += 1
    sae.tokens += len(batch.acts)
    note_losses(output.loss, sae.loss_sum, sae.bad_step, sae.step)
    return output


def note_losses(losses: Tensor, loss_sum: Tensor, bad_step: Tensor, step: int) -> None:
    """Add a step's losses, of one SAE or many, to their sums; the first step whose loss is not finite is kept."""
    loss_sum += losses
    # without branching on a value that may still be on its way from a GPU
    bad_step.masked_fill_(~torch.isfinite(losses) & (bad_step == 0), step)


def _gradients(recipe: Recipe, batch: StreamBatch) -> StepOutput:
    """Gradients of the mean loss over the parts of a batch, and what the recipe says of it, without a graph."""
    n_parts = recipe.train_config.accumulation_steps
    outputs = []
    for part_BD in batch.acts.chunk(n_parts):
        output = recipe.compute(part_BD, batch.progress)
        (output.loss if n_parts == 1 else output.loss / n_parts).backward()
        outputs.append(output._replace(loss=output.loss.detach()))
    return mean_over_parts(outputs)


def mean_over_parts(outputs: list[StepOutput]) -> StepOutput:
    """The output of a batch from those of its parts: mean loss and L0, all residuals, the latents that fired in the last."""
    if len(outputs) == 1:
        return outputs[0]
    return StepOutput(
        torch.stack([output.loss for output in outputs]).mean(),
        torch.cat([output.residual for output in outputs]),
        torch.stack([output.l0 for output in outputs]).mean(),
        outputs[-1].fired,
    )
