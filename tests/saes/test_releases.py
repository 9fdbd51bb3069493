"""SAELens' directory: every entry is recognised; where its loaders can be run on files made here, they judge ours."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from torch import Tensor

from sae_research.runtime.errors import UserError
from sae_research.saes import SparseAutoencoder, save_sae
from sae_research.saes.formats import checkpoints, gemma_scope
from sae_research.saes.formats.dictionary_learning import export_dictionary_learning
from sae_research.saes.releases import (
    Plan,
    ReleasedSAE,
    find_released,
    from_release,
    licence_of,
    plan_of,
    plan_of_file,
    release_directory,
    released_saes,
    shown_licence,
)
from sae_research.saes.sources import same_model
from tests.helpers.hub_server import hub_env, serve_hub
from tests.helpers.random_saes import D_IN, D_SAE, make_sae, random_activations
from tests.saes.test_formats import sparsify_folder

loaders = pytest.importorskip("sae_lens.loading.pretrained_sae_loaders")
CLT = "mntss-gemma-2-2b-2.5m-clt-as-per-layer"


def test_every_entry_is_recognised() -> None:
    """All releases of the list, without a hub: files and a reader, or a reason."""
    plans = {(entry.release, entry.sae_id): plan_of(entry) for entry in released_saes()}
    assert len(plans) == sum(len(value["saes"]) for value in release_directory().values())
    refused = {key: plan.reason for key, plan in plans.items() if plan.read is None}
    assert not refused
    for key, plan in plans.items():
        assert bool(plan.files) == (plan.read is not None) and all(not name.startswith("/") for name in plan.files), key
    layouts = Counter(plan.layout for plan in plans.values())
    assert set(layouts) >= {"sae_lens", "gemma_scope", "dictionary_learning", "llamascopium", "circuit_tracer"}


def test_files_of_any_repository() -> None:
    for name, files in (
        ("a/b/ae.pt", ("a/b/config.json", "a/b/ae.pt")),
        ("layers.3/sae.safetensors", ("layers.3/cfg.json", "layers.3/sae.safetensors")),
        ("W_enc_0.safetensors", ("W_enc_0.safetensors", "W_dec_0.safetensors")),
        ("a/W_enc_4.safetensors", ("a/W_enc_4.safetensors", "a/W_dec_4.safetensors")),
        ("clt/a/params_layer_4.safetensors", ("clt/a/params_layer_4.safetensors",)),
        ("Llama-3.1-8B-Instruct-SAE-l19.pth", ("Llama-3.1-8B-Instruct-SAE-l19.pth",)),
    ):
        assert plan_of_file("org/mine", name).files == files
    for repo_id, name, message in (
        ("org/mine", "weights.bin", "'weights.bin' must end with ae.pt"),
        ("org/mine", "layer_3/params.npz", "keep the repository's own names"),
    ):
        with pytest.raises(UserError, match=message):
            plan_of_file(repo_id, name)
    assert plan_of_file("google/gemma-scope-2b-pt-res", "layer_3/width_16k/average_l0_7/params.npz").files


def test_what_is_not_known_has_a_reason_to_act_on() -> None:
    entry = ReleasedSAE("new", "a", "org/new", {}, "a", "its_own_loader")
    plan = plan_of(entry)
    assert plan.read is None and "load it with sae_lens and save it" in plan.reason
    moved = released_saes()[0]._replace(layout="gemma_2", repo_id="org/gemma", path="a/b")
    assert "keep the repository's own names" in plan_of(moved).reason
    with pytest.raises(UserError, match="no such release; `analyze saes --search TEXT` lists them"):
        from_release("gpt3-large", "a")
    with pytest.raises(UserError, match=r"has no such id; it has blocks\.0\.hook_resid_pre, .*\.\.\."):
        from_release("gpt2-small-res-jb", "blocks.99.hook_resid_pre")


@pytest.mark.parametrize("layout", ["gemma_2", "gemma_2_transcoder", "goodfire", "deepseek_r1", "qwen_scope"])
def test_names_say_what_sae_lens_says(layout: str) -> None:
    """Model and hooks of every entry whose files do not say them, against SAELens' own reading of the names."""
    get = loaders.NAMED_PRETRAINED_SAE_CONFIG_GETTERS[layout]
    entries = [entry for entry in released_saes() if entry.layout == layout]
    assert entries
    for entry in entries:
        theirs = get(entry.repo_id, entry.path, "cpu", False, None)
        names = [entry.repo_id, *entry.path.split("/")]
        if layout.startswith("gemma"):
            place = gemma_scope.place_of(names, "")
            model, hook, written = place.model_name, place.hook_name, place.hook_out
        else:
            found = checkpoints.place_of(names, "")
            model, hook, written = found.model_name, f"blocks.{found.layer}.hook_resid_post", ""
            assert found.k == theirs.get("activation_fn_kwargs", {}).get("k")
        assert same_model(model, theirs["model_name"]) and written == theirs.get("hook_name_out", "")
        assert hook == ("blocks.0.hook_resid_pre" if theirs["hook_name"] == "hook_embed" else theirs["hook_name"])


def test_names_of_gemma_scope_2_say_what_sae_lens_says() -> None:
    for entry in (entry for entry in released_saes() if entry.layout == "gemma_3"):
        theirs = loaders._infer_gemma_3_raw_cfg_dict(entry.repo_id, entry.path)
        place = gemma_scope.place_of([entry.repo_id, *entry.path.split("/")], "")
        skip = theirs.get("affine_connection", False)
        assert gemma_scope.checked(theirs | {"model_name": place.model_name}, place, skip, Path("x")) == place
        assert same_model(place.model_name, entry.model_name)


# --- SAELens' loaders on files made here -----------------------------------------------------


def drawn(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(2)
    return {name: torch.randn(*shape, generator=g) / 2 for name, shape in shapes.items()}


def matrices() -> dict[str, Tensor]:
    return drawn(W_enc=(D_IN, D_SAE), b_enc=(D_SAE,), W_dec=(D_SAE, D_IN), b_dec=(D_IN,))


def linear(infix: str = "") -> dict[str, Tensor]:
    t = matrices()
    weights = {f"encoder{infix}.weight": t["W_enc"].T, f"decoder{infix}.weight": t["W_dec"].T}
    return weights | {f"encoder{infix}.bias": t["b_enc"], f"decoder{infix}.bias": t["b_dec"]}


def put(path: Path, values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(values))
    elif path.suffix == ".yaml":
        path.write_text(yaml.safe_dump(values))
    elif path.suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in values.items()})
    elif path.suffix == ".safetensors":
        safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in values.items()}, path)
    else:
        torch.save({name: tensor.contiguous() for name, tensor in values.items()}, path)


def write_gemma(root: Path, entry: ReleasedSAE) -> None:
    put(root / entry.path / "params.npz", matrices() | {"threshold": drawn(t=(D_SAE,))["t"].abs()})


def write_gemma_2(root: Path, entry: ReleasedSAE) -> None:
    spelt = {name.replace("W_", "w_"): tensor for name, tensor in matrices().items()}
    skip = drawn(affine_skip_connection=(D_IN, D_IN)) if "affine" in entry.path else {}
    put(root / entry.path / "params.safetensors", spelt | {"threshold": drawn(t=(D_SAE,))["t"].abs()} | skip)


def write_llama_scope(root: Path, entry: ReleasedSAE) -> None:
    hyperparams = {
        "d_model": D_IN,
        "d_sae": D_SAE,
        "expansion_factor": D_SAE / D_IN,
        "jump_relu_threshold": 0.3,
        "act_fn": "jumprelu",
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": D_IN**0.5 / entry.factor, "out": D_IN**0.5 / entry.factor},
        "hook_point_in": "blocks.3.hook_resid_post",
        "hook_point_out": "blocks.3.hook_resid_post",
    }
    put(root / entry.path / "hyperparams.json", hyperparams)
    put(root / entry.path / "checkpoints/final.safetensors", linear())


def write_distilled(root: Path, entry: ReleasedSAE) -> None:
    config = {
        "d_model": D_IN,
        "expansion_factor": 3,
        "act_fn": "jumprelu",
        "sparsity_include_decoder_norm": False,
        "hook_point_in": "blocks.0.hook_resid_post",
        "hook_point_out": "blocks.0.hook_resid_post",
    }
    t = drawn(W_enc=(D_IN, 36), b_enc=(36,), W_dec=(36, D_IN), b_dec=(D_IN,), log=(36,))
    put(root / entry.path / "config.json", config)
    theirs = {"encoder.weight": t["W_enc"].T, "encoder.bias": t["b_enc"], "decoder.weight": t["W_dec"].T}
    theirs |= {"decoder.bias": t["b_dec"], "log_jumprelu_threshold": t["log"] - 1}
    put(root / entry.path / "sae_weights.safetensors", theirs)


def write_qwen(root: Path, entry: ReleasedSAE) -> None:
    t = matrices()
    put(root / entry.path, t | {"W_enc": t["W_enc"].T, "W_dec": t["W_dec"].T})


def write_kissane(root: Path, entry: ReleasedSAE) -> None:
    put(root / entry.path, matrices())
    config = {"act_name": "blocks.0.attn.hook_z", "act_size": D_IN, "dict_size": D_SAE}
    put(root / f"{entry.path.removesuffix('.pt')}_cfg.json", config)


def write_transcoders(root: Path, entry: ReleasedSAE) -> None:
    t = matrices()
    put(root / entry.path, t | {"W_enc": t["W_enc"].T})
    put(root / "config.yaml", {"model_name": "Qwen/Qwen3-4B"})
    put(
        root / "wandb-config.yaml",
        {k: {"value": v} for k, v in (("d_model", D_IN), ("d_feature", D_SAE), ("batch_size", 8))},
    )


def write_cross_layer(root: Path, entry: ReleasedSAE) -> None:
    """One layer, which writes its own and one later."""
    t, layer = matrices(), entry.path
    encoder = {f"W_enc_{layer}": t["W_enc"].T, f"b_enc_{layer}": t["b_enc"], f"b_dec_{layer}": t["b_dec"]}
    put(root / f"W_enc_{layer}.safetensors", encoder)
    put(root / f"W_dec_{layer}.safetensors", {f"W_dec_{layer}": torch.stack([t["W_dec"], 2 * t["W_dec"]], dim=1)})
    put(root / "config.yaml", {"model_name": "google/gemma-2-2b", "feature_input_hook": "hook_resid_mid"})


def write_temporal(root: Path, entry: ReleasedSAE) -> None:
    sae = {"exp_factor": D_SAE / D_IN, "n_heads": 2, "n_attn_layers": 1, "bottleneck_factor": 5, "sae_diff_type": "topk"}
    sae |= {"kval_topk": 4, "tied_weights": False, "scaling_factor": 0.3}
    put(root / entry.path / "conf.yaml", {"llm": {"dimin": D_IN}, "sae": sae, "data": {"dtype": "float32"}})
    t = drawn(D=(D_SAE, D_IN), E=(D_IN, D_SAE), b=(D_IN,))
    for name, out in (("k_ctx", 8), ("q_target", 8), ("v_ctx", D_SAE), ("c_proj", D_SAE)):
        part = drawn(weight=(out, D_SAE), bias=(out,))
        t |= {f"attn_layers.0.{name}.{kind}": tensor / 2 for kind, tensor in part.items()}
    put(root / entry.path / "latest_ckpt.safetensors", t)


def write_lens(root: Path, entry: ReleasedSAE) -> None:
    values = {
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "float32",
        "model_name": entry.model_name,
        "hook_point": entry.sae_id,
        "hook_point_layer": int(entry.sae_id.split(".")[1]),
        "finetuning_tokens": 5,
        "what_a_trainer_wrote": 3,
    }
    put(root / entry.path / "cfg.json", values)
    put(root / entry.path / "sae_weights.safetensors", matrices())


def write_dictionary_learning(root: Path, entry: ReleasedSAE) -> None:
    sae = make_sae("gated", model_name=entry.model_name, hook_name=entry.sae_id.partition("__")[0])
    export_dictionary_learning(sae, root / entry.path)


CASES: list[tuple[str, str, Callable[[Path, ReleasedSAE], None]]] = [
    ("gpt2-small-res-jb", "blocks.0.hook_resid_pre", write_lens),
    ("mistral-7b-res-wg", "blocks.8.hook_resid_pre", write_lens),
    ("sae_bench_pythia70m_sweep_gated_ctx128_0730", "blocks.3.hook_resid_post__trainer_0", write_dictionary_learning),
    ("gemma-scope-2b-pt-mlp-canonical", "layer_0/width_16k/canonical", write_gemma),
    ("gemma-scope-2b-pt-transcoders", "layer_0/width_16k/average_l0_76", write_gemma),
    ("gemma-scope-2-1b-pt-res", "layer_13_width_16k_l0_big", write_gemma_2),
    ("gemma-scope-2-270m-pt-transcoders", "transcoder/layer_15_width_262k_l0_big_affine", write_gemma_2),
    ("llama_scope_lxr_8x", "l3r_8x", write_llama_scope),
    ("llama_scope_r1_distill", "l0r_800m_slimpajama", write_distilled),
    ("goodfire-llama-3.1-8b-instruct", "layer_19", lambda root, entry: put(root / entry.path, linear("_linear"))),
    (
        "deepseek-r1-distill-llama-8b-qresearch",
        "blocks.19.hook_resid_post",
        lambda root, entry: put(root / entry.path, linear()),
    ),
    ("qwen-scope-3-1.7b-base-w32k-l50", "layer0", write_qwen),
    ("gpt2-small-hook-z-kk", "blocks.0.hook_z", write_kissane),
    ("mwhanna-qwen3-4b-transcoders", "layer_2", write_transcoders),
    ("temporal-sae-gemma-2-2b", "blocks.12.hook_resid_post", write_temporal),
]


def small(entry: ReleasedSAE, monkeypatch: pytest.MonkeyPatch) -> tuple[ReleasedSAE, Plan]:
    """The entry with a k that fits so few latents, and its plan."""
    if entry.layout == "qwen_scope":
        entry = entry._replace(repo_id="Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_5")
        monkeypatch.setitem(release_directory()[entry.release], "repo_id", entry.repo_id)
    return entry, plan_of(entry)


def as_sae_lens_loads(root: Path, entry: ReleasedSAE, monkeypatch: pytest.MonkeyPatch) -> Any:
    """SAELens' object, made by its own loader from these files."""
    import sae_lens
    from huggingface_hub.errors import EntryNotFoundError

    def local(repo_id: str, filename: str, subfolder: str | None = None, **_: Any) -> str:
        path = root / (subfolder or "") / filename
        if not path.is_file():
            raise EntryNotFoundError(filename)
        return str(path)

    def shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
        return {name: list(tensor.shape) for name, tensor in safetensors.torch.load_file(root / filename).items()}

    monkeypatch.setattr(loaders, "hf_hub_download", local)
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", shapes)
    loader = loaders.NAMED_PRETRAINED_SAE_LOADERS[entry.layout or "sae_lens"]
    overrides = {**entry.overrides, "dtype": "float32"}
    if entry.layout not in ("llama_scope_r1_distill", "temporal"):
        overrides |= {"d_in": D_IN, "d_sae": D_SAE}
    if entry.layout == "gemma_2_transcoder":
        overrides["d_out"] = D_IN
    values, state, _ = loader(entry.repo_id, entry.path, "cpu", False, overrides)
    values = loaders.handle_config_defaulting(values)
    cls = sae_lens.SAE.get_sae_class_for_architecture(values["architecture"])
    sae = cls(sae_lens.SAE.get_sae_config_class_for_architecture(values["architecture"]).from_dict(values))
    if values["architecture"] != "temporal" and values.get("reshape_activations") == "hook_z":
        sae.turn_off_forward_pass_hook_z_reshaping()
    sae.process_state_dict_for_loading(state)
    sae.load_state_dict(state)
    if values.get("normalize_activations") == "expected_average_only_in":
        sae.fold_activation_norm_scaling_factor(entry.factor)
    return sae


@pytest.mark.parametrize(("release", "sae_id", "write"), CASES, ids=[case[0] for case in CASES])
@torch.no_grad()
def test_sae_lens_loads_the_same(
    release: str, sae_id: str, write: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry, plan = small(find_released(release, sae_id), monkeypatch)
    write(tmp_path, entry)
    assert plan.read is not None and all((tmp_path / name).is_file() for name in plan.files)
    ours, x = plan.read(tmp_path), 3 * random_activations()
    if ours.cfg.center_input:  # SAELens leaves that to the way its user loads the model
        x = x - x.mean(-1, keepdim=True)
    theirs = as_sae_lens_loads(tmp_path, entry, monkeypatch)
    torch.testing.assert_close(ours.reconstruct(x), theirs(x), atol=1e-4, rtol=1e-4)
    fires = theirs.encode(x) != 0
    assert torch.equal(ours.encode(x)[..., : fires.shape[-1]] != 0, fires) and fires.any() and not fires.all()
    about = theirs.cfg.metadata
    assert same_model(ours.cfg.model_name, entry.model_name)
    if about.context_size and entry.layout not in ("mwhanna_transcoder", "llama_scope_r1_distill"):
        assert ours.cfg.context_size == about.context_size
    if entry.layout != "gemma_3":  # SAELens calls `hook_mlp_in` what the norm puts out
        assert (ours.cfg.hook_name, ours.cfg.hook_out) == (about.hook_name, about.hook_name_out or about.hook_name)


# --- fetching --------------------------------------------------------------------------------

FETCH = """
import json, sys
from sae_research.runtime.errors import UserError
from sae_research.saes.sources import open_sae
for wanted in json.loads(sys.argv[1]):
    try:
        sae = open_sae(wanted)
        print(json.dumps([sae.cfg.hooks, sae.cfg.provenance], sort_keys=True))
    except UserError as error:
        print("refused:", error)
"""


def fetch(url: str, home: Path, *wanted: str) -> tuple[list[str], str]:
    """(a line for each, what was said beside them)."""
    done = subprocess.run(
        [sys.executable, "-c", FETCH, json.dumps(wanted)],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)} | hub_env(url, home),
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines(), done.stderr


@pytest.mark.slow
def test_releases_come_from_the_hub_with_their_licence(tmp_path: Path) -> None:
    """Files, optional files and the card through the real client; the cache is enough once the hub is gone."""
    released = (
        ("gemma-scope-2b-pt-transcoders", "layer_0/width_16k/average_l0_76"),
        ("mwhanna-qwen3-4b-transcoders", "layer_2"),
        (CLT, "layer_5"),
    )
    folders = {}
    for (release, sae_id), write in zip(released, (write_gemma, write_transcoders, write_cross_layer), strict=True):
        entry = find_released(release, sae_id)
        folders[entry.repo_id] = tmp_path / release
        write(folders[entry.repo_id], entry)
    card = "---\nlicense: cc-by-4.0\nlicense_name: mine\n---\n# Transcoders\n"
    (tmp_path / released[0][0] / "README.md").write_text(card)
    save_sae(make_sae("topk"), tmp_path / "mine" / "a" / "b")
    sparsify_folder(tmp_path / "mine" / "layers.3.mlp", skip=True)
    folders["org/mine"] = tmp_path / "mine"
    wanted = [
        *(f"sae_lens:{release}:{sae_id}" for release, sae_id in released),
        "sae_lens:org/mine:a/b",
        "hub:org/mine:layers.3.mlp/sae.safetensors",
        "hub:mwhanna/qwen3-4b-transcoders:layer_2.safetensors",
    ]
    requests: list[str] = []
    with serve_hub({"models": folders}, requests) as url:
        lines, said = fetch(url, tmp_path / "home", *wanted, f"sae_lens:{CLT}:layer_6", "sae_lens:org/mine:a/c")
    assert "google/gemma-scope-2b-pt-transcoders: licence cc-by-4.0 mine\n" in said
    assert "mwhanna/qwen3-4b-transcoders: no licence named; ask its authors before you pass anything on" in said
    hooks, provenance = json.loads(lines[0])
    assert hooks == "blocks.0.ln2.hook_normalized -> blocks.0.hook_mlp_out"
    assert provenance["licence"] == "cc-by-4.0 mine" and provenance["held_out"] == {"l0": 76.0}
    assert json.loads(lines[1])[0] == "blocks.2.mlp.hook_in -> blocks.2.hook_mlp_out"
    assert json.loads(lines[2])[0] == "blocks.5.hook_mlp_in -> blocks.5.hook_mlp_out + blocks.6.hook_mlp_out"
    assert "licence" not in json.loads(lines[1])[1] and json.loads(lines[3])[1]["release"] == "org/mine"
    assert json.loads(lines[4])[0] == "blocks.3.mlp.hook_in -> blocks.3.hook_mlp_out"
    assert json.loads(lines[5])[0] == json.loads(lines[1])[0]
    assert all("no such file in the repository" in line for line in lines[6:])
    again, said = fetch(url, tmp_path / "home", *wanted)
    assert again == lines[:6] and "licence cc-by-4.0 mine" in said


def test_licences_of_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import huggingface_hub

    path = tmp_path / "README.md"
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo_id, name: str(path))
    for text, licence in (
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\nlicense:\n- mit\n- other\nlicense_link: LICENSE\n---\ntext", "mit other LICENSE"),
        ("---\ntags: [a]\n---\n", ""),
        ("---\n{: broken\n---\n", ""),
        ("# no front matter\n---\nlicense: mit\n---\n", ""),
    ):
        path.write_text(text)
        assert licence_of("org/x") == licence
    path.write_text("---\nlicense: mit\n---\n")
    assert shown_licence("org/x") == "mit"
    assert capsys.readouterr() == ("", "org/x: licence mit\n")


def test_ours_in_a_repository(tmp_path: Path) -> None:
    sae: SparseAutoencoder = make_sae("ihtp")
    save_sae(sae, tmp_path / "a" / "b")
    plan = plan_of(find_released("org/mine", "a/b"))
    assert plan.read is not None and plan.read(tmp_path).cfg == sae.cfg
