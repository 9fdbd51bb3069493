"""Same-shaped SAEs of one hook as one: each product of a step is a batched product, each other operation one for all.

An SAE of a few thousand latents keeps a GPU busy for some ten microseconds an operation, about what it takes to launch
one; eight of them in turn take eight times as long as they need to. A `Stack` maps the recipe's `forward` over its SAEs
(`torch.func.vmap`), whose tensors become slices of shared ones. The SAEs notice nothing: checkpoints, exports and
schedules go on reading and writing their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from sae_research.config.params import Train
from sae_research.config.recipes import SAERecipe
from sae_research.runtime.files import fingerprint
from sae_research.training.buffer import StreamBatch
from sae_research.training.recipes import Recipe, StepOutput
from sae_research.training.recipes.base import project_rows, unit_rows
from sae_research.training.training_sae import TrainingSAE, adam, mean_over_parts, note_losses

MAPPED = {"l1_coefficient", "l0_coefficient", "k", "target_l0", "sparsity_coefficient", "aux_coefficient"}
"""Settings that `forward` reads and that may differ inside a stack: it is given one number an SAE."""
OWN = {
    "seed",
    "learning_rate",
    "init",
    "init_norm",
    "betas",
    "lr_schedule",
    "min_lr_factor",
    "inference",
    "resample_every",
    "resample_window",
    "initial_beta",
    "final_beta",
    "beta_annealing",
    "initial_threshold",
}
"""Settings that may differ because `forward` does not read them. All others are the same throughout a stack."""
LARGEST = 2**27
"""Entries of a stack's pre-activations [M, B, F], half a gigabyte in float32, of which a step holds several. What is
larger fills a GPU by itself."""


STACKED_ON = ("cuda",)
"""Devices on which SAEs of one kind step together; on a CPU they are no faster so."""


def in_stacks(saes: Iterable[TrainingSAE], train: Train) -> list[list[TrainingSAE]]:
    """The SAEs that step together, in order: stacks of one kind on CUDA, single ones otherwise."""
    groups: dict[str, list[list[TrainingSAE]]] = {}
    for sae in saes:
        recipe = sae.recipe
        wanted = recipe.stackable and recipe.whitening is None and recipe.W_dec.device.type in STACKED_ON
        key = _kind(sae) if wanted else f"alone {sae.name}"
        entries = train.batch_size // train.accumulation_steps * recipe.config.d_sae
        same = groups.setdefault(key, [[]])
        if (len(same[-1]) + 1) * entries > LARGEST and same[-1]:
            same.append([])
        same[-1].append(sae)
    return [group for same in groups.values() for group in same]


def _kind(sae: TrainingSAE) -> str:
    """What SAEs of a stack have in common."""
    config = sae.recipe.config
    return fingerprint([sae.hook, str(sae.recipe.W_dec.device), config.model_dump(exclude=MAPPED | OWN)])


class Stack:
    """Members of one kind. From construction on, their tensors are slices of the stack's."""

    def __init__(self, saes: Sequence[TrainingSAE]) -> None:
        self.saes = list(saes)
        self.hook = self.saes[0].hook
        self.recipes = [sae.recipe for sae in saes]
        self.first = self.recipes[0]
        # built with the largest k, whose place in a token's order the others' are cut from
        example: Recipe = max(self.recipes, key=lambda recipe: getattr(recipe.config, "k", 0))
        with torch.device("meta"):
            self.template = type(example)(example.W_dec.shape[1], example.config, example.train_config)
        self.template.in_stack = True
        self.config = example.config
        self.settings = _differing([recipe.config for recipe in self.recipes], self.first.W_dec)
        rates: dict[tuple[Any, ...], list[Recipe]] = {}
        for recipe in self.recipes:
            config = recipe.config
            key = config.learning_rate, config.schedule, config.min_lr_factor, recipe.betas
            rates.setdefault(key, []).append(recipe)
        self.alike = list(rates.values())
        """Recipes of one learning rate, schedule and pair of betas, a group of the optimiser each."""
        self.optimiser = adam(
            [
                {"params": [parameter for recipe in alike for parameter in recipe.parameters()], "betas": alike[0].betas}
                for alike in self.alike
            ],
            self.first,
        )
        self.parameters = {
            name: self._shared([recipe.get_parameter(name) for recipe in self.recipes])
            for name, _ in self.first.named_parameters()
        }
        names = self.first.state_dict().keys() - self.parameters.keys()
        self.buffers = {name: self._shared([recipe.get_buffer(name) for recipe in self.recipes]) for name in sorted(names)}
        self.loss_sum = self._shared([sae.loss_sum for sae in saes])
        self.bad_step = self._shared([sae.bad_step for sae in saes])
        for sae in saes:  # of a run that goes on
            for parameter in sae.recipe.parameters():
                if parameter in sae.optimiser.state:
                    self.optimiser.state[parameter] = sae.optimiser.state[parameter]

    @staticmethod
    def _shared(tensors: Sequence[Tensor]) -> Tensor:
        """The tensors joined along a new first dimension; each becomes a slice of it."""
        whole = torch.stack([tensor.detach() for tensor in tensors])
        for tensor, part in zip(tensors, whole, strict=True):
            tensor.data = part
        return whole

    def step(self, batch: StreamBatch) -> list[StepOutput]:
        """What `training_sae.train_step` does, for all SAEs; outputs in their order."""
        gradients, outputs = self._gradients(batch)
        if self.first.unit_rows:
            project_rows(gradients["W_dec"], self.parameters["W_dec"])
        if self.first.clip_norm is not None:
            _clip(gradients, self.first.clip_norm)
        self._adam(gradients, batch.progress)
        if self.first.unit_rows:
            unit_rows(self.parameters["W_dec"])
        for sae, output in zip(self.saes, outputs, strict=True):
            sae.recipe.after_step(sae.optimiser, batch.acts, output, batch.progress)
            sae.step += 1
            sae.tokens += len(batch.acts)
        note_losses(torch.stack([output.loss for output in outputs]), self.loss_sum, self.bad_step, self.saes[0].step)
        return outputs

    @torch.no_grad()
    def _gradients(self, batch: StreamBatch) -> tuple[dict[str, Tensor], list[StepOutput]]:
        parts = batch.acts.chunk(self.first.train_config.accumulation_steps)
        total: dict[str, Tensor] = {}
        outputs: list[list[StepOutput]] = [[] for _ in self.saes]
        for part_BD in parts:
            for recipe in self.recipes:
                recipe.prepare(batch.progress)
            gradients, found = self._part(part_BD, batch.progress)
            for name, gradient in gradients.items():
                gradient = gradient if len(parts) == 1 else gradient / len(parts)
                total[name] = total[name].add_(gradient) if name in total else gradient
            for recipe, output, own in zip(self.recipes, found, outputs, strict=True):
                recipe.track(output, batch.progress)
                own.append(output)
        return total, [mean_over_parts(own) for own in outputs]

    def _part(self, x_BD: Tensor, progress: float) -> tuple[dict[str, Tensor], list[StepOutput]]:
        self.template.plain_state = self.first.plain_state
        draws = [recipe.draw_noise(len(x_BD)) for recipe in self.recipes]
        noise = None if draws[0] is None else torch.stack(draws)  # type: ignore[arg-type]  # ty: ignore[invalid-argument-type]
        in_dims = (0, 0, 0, 0, None if noise is None else 0, None, None)
        gradients, found = vmap(grad(self._one, has_aux=True), in_dims=in_dims)(
            self.parameters, self.buffers, self.settings, self.first.shared_inputs(self.recipes), noise, x_BD, progress
        )
        return gradients, [StepOutput(**{key: value[m] for key, value in found.items()}) for m in range(len(self.recipes))]

    def _one(
        self,
        parameters: dict[str, Tensor],
        buffers: dict[str, Tensor],
        settings: dict[str, Tensor],
        inputs: dict[str, Tensor],
        noise: Tensor | None,
        x_BD: Tensor,
        progress: float,
    ) -> tuple[Tensor, dict[str, Any]]:
        """The recipe on one SAE's tensors; mapped over all."""
        self.template.config = self.config.model_copy(update=settings)
        self.template.take_inputs(inputs)
        output = functional_call(self.template, (parameters, buffers), (x_BD, progress, noise))
        return output.loss, {key: value for key, value in output._asdict().items() if value is not None}

    def _adam(self, gradients: dict[str, Tensor], progress: float) -> None:
        for m, recipe in enumerate(self.recipes):
            for name, parameter in recipe.named_parameters():
                parameter.grad = gradients[name][m]
        for group, alike in zip(self.optimiser.param_groups, self.alike, strict=True):
            group["lr"] = alike[0].learning_rate(progress)
        self.optimiser.step()
        for sae in self.saes:
            for parameter in sae.recipe.parameters():
                parameter.grad = None
                sae.optimiser.state[parameter] = self.optimiser.state[parameter]


def _differing(configs: Sequence[SAERecipe], like: Tensor) -> dict[str, Tensor]:
    """Each setting that is not the same for all, as a tensor [M]."""
    values = {key: [getattr(config, key) for config in configs] for key in sorted(MAPPED) if hasattr(configs[0], key)}
    return {
        key: torch.tensor(column, device=like.device, dtype=None if isinstance(column[0], int) else like.dtype)
        for key, column in values.items()
        if len(set(column)) > 1
    }


def _clip(gradients: dict[str, Tensor], largest: float) -> None:
    """`torch.nn.utils.clip_grad_norm_` for each SAE by itself."""
    squares = [gradient.reshape(len(gradient), -1).square().sum(1) for gradient in gradients.values()]
    factor_M = (largest / (torch.stack(squares).sum(0).sqrt() + 1e-6)).clamp_max(1.0)
    for gradient in gradients.values():
        gradient.mul_(factor_M.view(-1, *[1] * (gradient.dim() - 1)))
