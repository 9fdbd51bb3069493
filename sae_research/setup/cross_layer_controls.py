"""Controls of a cross-layer transcoder, layer by layer: what linear maps and untrained rows make of one layer's input for
that layer's output alone. None writes later layers.

- `linear_map`: for each layer the map that least squares fits, as a skip without latents.
- `skip`: the cross-layer transcoder's own skip, right on average.
- `random`, `data_rows`: for each layer untrained unit rows, of which a token gets the `size` of largest activation; each
  stands for what the map from their own reconstructions to what is written makes of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_research.config.params import Params
from sae_research.saes import SAEConfig
from sae_research.saes.cross_layer import CrossLayerTranscoder
from sae_research.setup.controls import control_config, data_rows, linear_map, random_rows

KINDS = ("linear_map", "skip", "random", "data_rows")


def make_cross_layer_control(
    kind: str, size: int, x_TD: Tensor, y_TO: Tensor, base: SAEConfig, params: Params, skip: Tensor | None = None
) -> CrossLayerTranscoder:
    """One control of `KINDS` for the baseline's hooks, model and, of rows, width. size: active rows a token and layer.

    x_TD, y_TO: what is read and written, hooks side by side, as `controls.sample_pairs` gives them; skip: the baseline's own
    `W_skip`.
    """
    n = len(base.hook_names)
    width = base.d_sae // n if kind in ("random", "data_rows") else 1
    made = []
    for layer, (x, y) in enumerate(zip(x_TD.chunk(n, dim=1), y_TO.chunk(n, dim=1), strict=True)):
        if kind in ("random", "data_rows"):
            made.append(_rows(kind, size, x, y, width, params.random_seed + layer))
        else:
            own = None if skip is None else skip.chunk(n)[layer].double().T
            map_DO = linear_map(x, y) if kind == "linear_map" or own is None else own
            made.append(_skip_alone(map_DO, x, y))
    d_out = y_TO.shape[1] // n
    silent = [torch.zeros(width, d_out)] * n
    tensors = {
        "W_enc": torch.cat([one["W_enc"] for one in made], dim=1),
        "b_enc": torch.cat([one["b_enc"] for one in made]),
        "threshold": torch.zeros(n * width),
        "W_dec": torch.cat([rows for m in range(n) for rows in (*silent[:m], made[m]["W_dec"])]),
        "b_dec": torch.cat([one["b_dec"] for one in made]),
        **({"W_skip": torch.cat([one["W_skip"] for one in made])} if "W_skip" in made[0] else {}),
    }
    options = {"k": size} if kind in ("random", "data_rows") else {}
    cfg = control_config(kind, base, params, len(x_TD)).replace(
        form=CrossLayerTranscoder.form, d_sae=n * width, options=options
    )
    return CrossLayerTranscoder.from_tensors(cfg, {name: tensor.contiguous() for name, tensor in tensors.items()})


def _skip_alone(map_DO: Tensor, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """A linear map right on average, and one latent that never fires."""
    mean_D, mean_O = (values.double().mean(dim=0) for values in (x, y))
    return {
        "W_enc": torch.zeros(x.shape[1], 1),
        "b_enc": torch.zeros(1),
        "W_dec": torch.zeros(1, y.shape[1]),
        "b_dec": (mean_O - mean_D @ map_DO).float(),
        "W_skip": map_DO.T.float(),
    }


def _rows(kind: str, size: int, x: Tensor, y: Tensor, width: int, seed: int) -> dict[str, Tensor]:
    mean_D, mean_O = (values.double().mean(dim=0) for values in (x, y))
    rows_FD = random_rows(width, x.shape[1], seed) if kind == "random" else data_rows(x, mean_D.float(), width, seed)
    b_enc = -(rows_FD.double() @ mean_D).float()
    z = torch.relu(x @ rows_FD.T + b_enc)
    values, indices = z.topk(size, dim=1)
    read_TD = torch.zeros_like(z).scatter_(1, indices, values) @ rows_FD
    map_DO = linear_map(read_TD, y)
    return {
        "W_enc": rows_FD.T,
        "b_enc": b_enc,
        "W_dec": (rows_FD.double() @ map_DO).float(),
        "b_dec": (mean_O - read_TD.double().mean(dim=0) @ map_DO).float(),
    }
