"""SAE files of every library, changed at random: one line of `UserError`, or the SAE that was saved, never another.

Configurations lose keys, gain keys, and get values of every kind; weights are cut, emptied, renamed, transposed, cast and
flipped. A folder that still opens must give the latents and the reconstruction of the one it was made from, unless the
change is another SAE by right: those that `means_something_else` names.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml

from sae_research.runtime.errors import UserError
from sae_research.saes import save_sae
from sae_research.saes.formats.dictionary_learning import export_dictionary_learning
from sae_research.saes.layouts import open_place
from tests.helpers.mutations import changed_mapping
from tests.helpers.random_saes import D_IN, D_SAE, make_sae, random_activations
from tests.saes import test_cross_layer_formats as cross_layer
from tests.saes import test_crosscoder_formats as crosscoders
from tests.saes.test_formats import gemma_scope_2_folder, llamascopium_folder, sparsify_folder

KEYS = [
    "threshold",
    "k",
    "activation_fn",
    "activation_fn_str",
    "noise",
    "scaling_factor",
    "finetuning_scaling_factor",
    "skip",
    "post_encoder_bias",
    "hook_head_index",
    "d_out",
    "normalize_activations",
]
HARMS = ["cut", "empty", "head", "folder", "missing", "rename", "extra", "cast", "transpose", "nan", "drop", "size"]
X = random_activations()
Folder = Callable[[Path], None]
Originals = dict[str, tuple[Path, tuple[torch.Tensor, ...]]]


def sae_lens(architecture: str, **config: Any) -> Folder:
    def write(folder: Path) -> None:
        sae = make_sae(architecture)
        values = {
            "architecture": architecture,
            "d_in": D_IN,
            "d_sae": D_SAE,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": True,
            "normalize_activations": "none",
            "reshape_activations": "none",
            **config,
            "metadata": {
                "sae_lens_version": "6.54.12",
                "model_name": "tiny",
                "hook_name": "blocks.1.hook_resid_post",
                "hook_head_index": None,
                "prepend_bos": True,
                "context_size": 16,
            },
        }
        folder.mkdir(parents=True)
        (folder / "cfg.json").write_text(json.dumps(values))
        safetensors.torch.save_file(
            {name: tensor.contiguous() for name, tensor in sae.tensors().items()}, folder / "sae_weights.safetensors"
        )

    return write


def flat(folder: Path) -> None:
    sae_lens("standard")(folder)
    (folder / "cfg.json").write_text(
        json.dumps(
            {
                "model_name": "tiny",
                "hook_point": "blocks.1.hook_resid_post",
                "hook_point_layer": 1,
                "d_in": D_IN,
                "d_sae": D_SAE,
                "dtype": "torch.float32",
                "activation_fn_str": "relu",
                "context_size": 16,
                "l1_coefficient": 1e-3,
            }
        )
    )


def pursuit(folder: Path) -> None:
    sae_lens("matching_pursuit", max_iterations=4, residual_threshold=0.1, stop_on_duplicate_support=True)(folder)


def interpretability(folder: Path) -> None:
    g = torch.Generator().manual_seed(2)
    state = {
        "encoder.0.weight": torch.randn(D_SAE, D_IN, generator=g),
        "encoder.0.bias": torch.randn(D_SAE, generator=g),
        "decoder.weight": torch.randn(D_IN, D_SAE, generator=g),
        "decoder.bias": torch.randn(D_IN, generator=g),
    }
    folder.mkdir(parents=True)
    torch.save({f"blocks-1-hook_resid_pre.{name}": tensor for name, tensor in state.items()}, folder / "samples_10.pt")
    (folder / "final_config.yaml").write_text(
        yaml.safe_dump(
            {
                "seed": 1,
                "tlens_model_name": "tiny",
                "data": {"context_length": 16},
                "saes": {"sae_type": "relu", "sae_positions": ["blocks.1.hook_resid_pre"]},
            }
        )
    )


FOLDERS: dict[str, Folder] = {
    **{f"sae_lens_{architecture}": sae_lens(architecture) for architecture in ("standard", "gated", "jumprelu")},
    "sae_lens_topk": sae_lens("topk", k=5, rescale_acts_by_decoder_norm=False),
    "sae_lens_flat": flat,
    "sae_lens_pursuit": pursuit,
    "sae_interpretability": interpretability,
    "dl_standard": lambda folder: export_dictionary_learning(make_sae("standard"), folder),
    "dl_topk": lambda folder: export_dictionary_learning(make_sae("topk"), folder),
    "dl_gated": lambda folder: export_dictionary_learning(make_sae("gated"), folder),
    **{
        f"own_{form}": lambda folder, form=form: save_sae(make_sae(form), folder)
        for form in ("standard", "topk", "jumprelu", "matching_pursuit", "cross_layer")
    },
    "sparsify": sparsify_folder,
    "llamascopium": llamascopium_folder,
    "gemma_scope_2": gemma_scope_2_folder,
    "llamascopium_crosscoder": crosscoders.llamascopium_folder,
    "dl_crosscoder": lambda folder: crosscoders.dictionary_learning_folder(folder, "SAE", 3, hook_names=crosscoders.HOOKS),
    "gemma_scope_2_crosscoder": crosscoders.gemma_scope_folder,
    "circuit_tracer_cross_layer": lambda folder: cross_layer.circuit_tracer_folder(folder, cross_layer.weights(), True),
    "gemma_scope_2_cross_layer": lambda folder: cross_layer.gemma_scope_folder(folder.parents[2], cross_layer.weights()),
    "llamascopium_cross_layer": lambda folder: cross_layer.llamascopium_folder(folder, cross_layer.weights()),
}
PLACES = {
    "sparsify": "layers.1",
    "gemma_scope_2": "gemma-scope-2-1b-it/transcoder/layer_4_width_16k_l0_big_affine",
    "gemma_scope_2_crosscoder": crosscoders.GEMMA,
    "gemma_scope_2_cross_layer": "gemma-scope-2-1b-pt/clt/width_16k_l0_medium",
}
"""Names of folders from which a reader takes what no file says."""


def read(folder: Path) -> tuple[torch.Tensor, ...]:
    (sae,) = open_place(folder).values()
    x = X.repeat(1, 1, sae.cfg.d_in // D_IN)
    z = sae.encode(x)
    return z, sae.reconstruct(x, z=z), torch.tensor(sae.cfg.hook_layer)


def mutate_config(path: Path, rng: random.Random) -> str:
    kind = rng.choice(["replace", "replace", "replace", "delete", "add", "cut", "twice", "bytes"])
    changed, change = changed_mapping(yaml.safe_load(path.read_text()), rng, kind, KEYS)
    text = yaml.safe_dump(changed) if path.suffix == ".yaml" else json.dumps(changed)
    if kind == "cut":
        text = text[: rng.randrange(len(text))]
    elif kind == "twice" and path.suffix == ".json":
        text = text[:-1] + ', "d_sae": 7, "d_sae": 8}'
    data = bytearray(text.encode())
    if kind == "bytes" and data:
        data[rng.randrange(len(data))] = rng.randrange(256)
    path.write_bytes(bytes(data))
    return change


def mutate_weights(path: Path, rng: random.Random) -> str:
    data = path.read_bytes()
    kind = rng.choice(HARMS)
    if kind in ("cut", "empty"):
        path.write_bytes(data[: rng.randrange(len(data)) if kind == "cut" else 0])
    elif kind == "head":
        changed = bytearray(data)
        # a safetensors file that another library wrote carries no checksum: only its head is held against anything
        reach = len(data) if path.suffix == ".pt" else 8 + int.from_bytes(data[:8], "little")
        changed[rng.randrange(reach)] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(changed))
    elif kind in ("folder", "missing"):
        path.unlink()
        if kind == "folder":
            path.mkdir()
    else:
        archive = path.suffix == ".pt"
        state = torch.load(path) if archive else safetensors.torch.load_file(path)
        name = rng.choice(sorted(state))
        tensor = state.pop(name)
        if kind == "rename":
            state[name + "_x"] = tensor
        elif kind == "extra":
            others = {"threshold", "log_threshold", "scaling_factor", "mask"} - {name, *state}
            state |= {name: tensor, rng.choice(sorted(others)): torch.zeros(D_SAE)}
        elif kind != "drop":
            state[name] = {
                "cast": lambda: tensor.to(rng.choice([torch.int64, torch.bool, torch.complex64])),
                "transpose": lambda: (
                    tensor.T.contiguous() if tensor.dim() == 2 and tensor.shape[0] != tensor.shape[1] else tensor[None]
                ),  # a square one says nothing
                "nan": lambda: torch.full(tensor.shape, rng.choice([torch.nan, torch.inf])),
                "size": lambda: torch.cat([tensor, tensor]) if tensor.dim() else tensor.expand(3).clone(),
            }[kind]()
        torch.save(state, path) if archive else safetensors.torch.save_file(state, path)
    return kind


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Originals:
    root = tmp_path_factory.mktemp("originals")
    places = {name: root / name / PLACES.get(name, "a") for name in FOLDERS}
    for name, write in FOLDERS.items():
        write(places[name])
    return {name: (place, read(place)) for name, place in places.items()}


def means_something_else(change: str) -> bool:
    """Changes that state another SAE without contradicting anything in the folder."""
    return any(
        part in change
        for part in (
            "apply_b_dec_to_input = ",
            "hook_name = ",
            "hook_point = ",
            "sae_positions = ",
            "k = 1",
            "k = 3",
            "delete k",
            "rescale_acts_by_decoder_norm = ",
            "max_iterations",
            "residual_threshold",
            "stop_on_duplicate",
            "bytes",
            "architecture = ",
            "normalize_activations = ",
            "delete metadata.hook_name",
            "delete hook_point",
            "top_k = ",
            "transcode = ",  # an SAE of the same module, by right
            "activation = ",
            "signed = ",
            "act_fn = ",
            "sparsity_include_decoder_norm",
            "norm_activation = ",
        )
    )


def campaign(originals: Originals, folder: Path, count: int, seed: int) -> dict[str, int]:
    rng, seen = random.Random(seed), {"refused": 0, "same": 0, "other by right": 0}
    for number in range(count):
        name = sorted(FOLDERS)[number % len(FOLDERS)]
        original, expected = originals[name]
        shutil.rmtree(folder, ignore_errors=True)
        place = folder / PLACES.get(name, "a")
        shutil.copytree(original, place)
        files = sorted(path for path in place.iterdir() if path.name != "eval_results.json")
        path = rng.choice([path for path in files for _ in range(1 if path.suffix in (".pt", ".safetensors") else 2)])
        is_config = path.suffix in (".json", ".yaml")
        change = (mutate_config if is_config else mutate_weights)(path, rng)
        try:
            found = read(place)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 900, (name, change, str(error))
            seen["refused"] += 1
            continue
        if all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)):
            seen["same"] += 1
        else:
            stated_once = any(key in change for key in ("apply_b_dec_to_input", "hook_name")) or not name.startswith("own_")
            assert is_config and means_something_else(change) and stated_once, (name, path.name, change)
            seen["other by right"] += 1
    return seen


@pytest.mark.parametrize("count", [150, pytest.param(3000, marks=pytest.mark.slow)])
def test_no_change_passes_for_the_original(originals: Originals, count: int, tmp_path: Path) -> None:
    seen = campaign(originals, tmp_path / "folder", count, seed=count)
    assert seen["refused"] > count / 3 and seen["same"] > count / 50, seen
    print(seen)
