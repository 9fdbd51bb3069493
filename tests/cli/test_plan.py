"""`sae-research plan`: what it counts, what fits, and how near a real run comes."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode
from transformers import Gemma2Config, LlamaConfig, LlamaForCausalLM, PretrainedConfig

from sae_research.cli import plan
from sae_research.config.params import Params
from sae_research.evals.core import evaluate
from sae_research.lm import load_language_model
from sae_research.lm.shape import listed_shape, model_config, model_shape, shape_by_name
from sae_research.planning.costs import PlannedCosts, all_left, evaluation_seconds
from sae_research.planning.devices import device_by_name, known_devices, measured_device
from sae_research.planning.plan import COUNTING, make_plan
from sae_research.planning.resources import HEADROOM, evaluation_memory, training_memory, what_fits
from sae_research.planning.saes import described, planned_saes, trained_sae
from sae_research.planning.work import phases
from sae_research.runtime.errors import UserError
from sae_research.saes import SAEConfig, form_class
from tests.helpers.tiny_model import make_tiny_model

ROOT = Path(__file__).parents[2]
HOOK = "blocks.1.hook_resid_post"
FACTOR = 3.0
"""A core evaluation's CPU time and the computed one differ by no more."""


@pytest.fixture(scope="module")
def middling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama large enough that its products take longer than starting them."""
    return make_tiny_model(tmp_path_factory.mktemp("middling") / "model", d_model=256, n_layers=4)


@pytest.fixture
def project(in_project: Path, middling: Path) -> Params:
    """params.yaml for a model of which there is no more than config.json."""
    (in_project / "bare").mkdir()
    shutil.copyfile(middling / "config.json", in_project / "bare/config.json")
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values["model"] |= {"name": str(in_project / "bare"), "device": "cpu"}
    values["train"]["hook_name"], values["baseline_sae"]["hook_layer"] = HOOK, 1
    (in_project / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return plan.read_with([])[0]


def test_products_are_those_that_torch_counts(middling: Path) -> None:
    config = model_config(str(middling))
    shape, tokens = model_shape("m", config), torch.zeros(4, 64, dtype=torch.long, device="meta")
    assert shape.prefix_flops("blocks.3.hook_resid_pre", 64) == 3 * shape.layer_flops(64)
    assert shape.prefix_flops(HOOK, 64) + shape.above_flops(HOOK, 64) == pytest.approx(
        4 * shape.layer_flops(64) + 2 * shape.d_model * shape.vocab_size
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    with FlopCounterMode(display=False) as counter:
        model(tokens)
    whole = shape.prefix_flops(HOOK, 64) + shape.above_flops(HOOK, 64)
    assert whole == pytest.approx(counter.get_total_flops() / tokens.numel(), rel=0.05)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_a_plan_needs_no_weights(project: Params, capsys: pytest.CaptureFixture[str]) -> None:
    before = Path("params.yaml").read_bytes()
    text = plan.planned(*plan.read_with(["eval_types.scr=true", "train.tokens=1000000"]), "H200", 2)
    rows = {line.split()[0]: line for line in text.splitlines() if line}
    assert {"train", "setup", "core", "sparse_probing", "scr", "all"} <= set(rows)
    assert "2 SAEs on 1,000,000 tokens" in rows["train"] and "cannot be foretold" in rows["ground_truth"]
    assert "on 2 x H200" in text and "assumed" in text and "how sure:" in text
    assert Path("params.yaml").read_bytes() == before


def test_mistakes_are_one_line(project: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no device 'H20'"):
        device_by_name("H20")
    with pytest.raises(UserError, match=r"unknown key core_eval\.batch_size"):
        plan.read_with(["+core_eval.batch_size=3"])
    with pytest.raises(UserError, match=r"a plus sign adds it: -S \+train\.saes\.topk\.lr_schedule=cosine"):
        plan.read_with(["train.saes.topk.lr_schedule=cosine"])
    with pytest.raises(UserError, match=r"no parameter train\.saes\.topk\.schedule"):
        plan.read_with(["train.saes.topk.schedule=cosine"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="cannot load 'nobody/nothing'") as found:
        model_config("nobody/nothing")
    assert "\n" not in str(found.value)
    with pytest.raises(UserError, match="no such folder"):
        model_config("./nothing")


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("gemma-2-2b", Gemma2Config(num_attention_heads=8)),
        ("meta-llama/Llama-3.1-8B", LlamaConfig(intermediate_size=14336, num_key_value_heads=8, vocab_size=128256)),
    ],
)
def test_a_model_that_needs_access_is_planned_without_it(
    name: str, config: PretrainedConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    listed, none = shape_by_name(name)
    built = model_shape(name, config)
    assert none is None and listed == built._replace(
        parameters=listed.parameters, layer_matrices=listed.layer_matrices, vocab_size=listed.vocab_size
    )
    assert listed.layer_matrices == pytest.approx(built.layer_matrices, rel=0.01)
    assert listed_shape("nobody/nothing") is None and listed_shape("gpt2") is None
    with pytest.raises(UserError, match="cannot load 'nobody/nothing'"):
        shape_by_name("nobody/nothing")


def test_the_devices_are_whole() -> None:
    for device in known_devices().values():
        assert device.memory > 1e9 and device.bandwidth > 1e11 and device.float32 > 1e12 and device.source
        assert device.bfloat16 is None or device.bfloat16 > device.float32
    assert device_by_name("h200") == known_devices()["H200"]


def test_more_of_everything_costs_more(project: Params) -> None:
    shape, saes = model_shape("m", model_config(project.model.name)), planned_saes(project, 256)

    def total(params: Params, devices: int = 1) -> float:
        made = make_plan(params, shape, planned_saes(params, 256), device_by_name("L4"), devices)
        return sum(row.seconds for row in made.rows)

    twice = plan.read_with(["train.tokens=480000", "core_eval.n_eval_reconstruction_batches=4"])[0]
    assert total(twice) > total(project) > total(project, devices=2) > 0
    assert [sae.name for sae in saes[:2]] == ["standard", "standard_ihtp_k1"] and len(saes) == 17


def test_a_transcoder_has_controls_of_its_kind_and_no_variants(project: Params) -> None:
    hooks = {"hook_name": "blocks.1.mlp.hook_in", "hook_out": "blocks.1.hook_mlp_out"}
    one = {"recipe": "top_k", "d_sae": 64, "k": 4, **hooks}
    changes = {"train": {"saes": {"one": one}}, "baseline_sae": {"source": "trained", "name": "one", "hook_layer": 1}}
    params = Params.model_validate(project.model_dump() | changes | {"comparison_saes": {"trained": ["all"]}})
    planned = planned_saes(params, 256)
    assert [sae.name for sae in planned if not sae.name.startswith("control_")] == ["one"]
    assert planned[0].written == hooks["hook_out"] and planned[-1].name == "control_linear_map"
    assert planned[0] == trained_sae("one", params.train.saes["one"], hooks["hook_name"], 256)


def test_a_crosscoder_is_as_wide_as_its_hooks_together(project: Params) -> None:
    hooks = ["blocks.1.hook_resid_post", "blocks.2.hook_resid_post"]
    one = {"recipe": "batch_top_k", "d_sae": 64, "k": 4, "learning_rate": 0.003}
    found, core = {}, {}
    for entry in ({**one, "hook_names": hooks}, {**one, "hook_name": hooks[1]}):
        saes = {"standard": {"recipe": "standard", "d_sae": 64, "l1_coefficient": 0.1}, "one": entry}
        changes = {"train": {"saes": saes}, "comparison_saes": {"trained": ["all"]}}
        params = Params.model_validate(project.model_dump() | changes)
        planned = {sae.name: sae for sae in planned_saes(params, 256)}["one"]
        shape = model_shape("m", model_config(params.model.name))
        rows = {row.stage: row for row in make_plan(params, shape, planned_saes(params, 256), device_by_name("L4"), 1).rows}
        found[planned.d_in] = rows["train"].flops
        several = len(planned.at.read) > 1
        assert planned.hook == hooks[1] and several == ("hook_names" in entry)
        scored = {name: int(rows[name].note.split()[0]) for name in ("core", "sparse_probing")}
        assert scored["core"] - scored["sparse_probing"] == several, "probing takes no crosscoders"
        core[several] = rows["core"].flops
    assert set(found) == {256, 512} and found[512] > found[256] and core[True] > core[False]


def test_a_cross_layer_transcoder_is_as_wide_as_its_layers_together(project: Params) -> None:
    read, written = ([f"blocks.{layer}.{kind}" for layer in (1, 2)] for kind in ("mlp.hook_in", "hook_mlp_out"))
    one = {"recipe": "cross_layer", "d_sae": 64, "sparsity_coefficient": 1.0, "hook_names": read, "hook_outs": written}
    changes = {"train": {"saes": {"one": one}}, "baseline_sae": {"source": "trained", "name": "one", "hook_layer": 1}}
    params = Params.model_validate(project.model_dump() | changes | {"comparison_saes": {"trained": ["all"]}})
    planned = planned_saes(params, 256)
    names = [sae.name for sae in planned if "pca" in sae.name or not sae.name.startswith("control_")]
    assert names == ["one"] and planned[-1].name == "control_linear_map"
    assert planned[0].d_in == 512 and planned[0].written == " + ".join(written)
    shape = model_shape("m", model_config(params.model.name))
    rows = {row.stage: row for row in make_plan(params, shape, planned, device_by_name("L4"), 1).rows}
    assert rows["train"].flops > 0 and rows["core"].seconds > 0
    assert params.train.saes["one"].n_weights(512) == 64 * 256 + 3 * 32 * 256


def test_what_fits_does_fit(project: Params) -> None:
    """The parameter that a plan names, set as it says, makes the stage fit."""
    shape, saes = model_shape("m", model_config(project.model.name)), planned_saes(project, 256)
    crowded = plan.read_with(["core_eval.batch_size_prompts=512", "sae_variants.ihtp.enabled=false"])[0]
    needs = evaluation_memory("core", shape, crowded, saes)
    memory = sum(need.nbytes for need in needs) * 0.75
    mend = what_fits(needs, memory)
    key, _, value = mend.partition(": ")
    assert key == "core_eval.batch_size_prompts"
    mended = plan.read_with([f"{key}={value.split()[0]}"])[0]
    assert sum(need.nbytes for need in evaluation_memory("core", shape, mended, saes)) <= HEADROOM * memory
    buffered = plan.read_with(["train.buffer_tokens=10000000"])[0]
    needs = training_memory(shape, buffered, saes[:1])
    assert what_fits(needs, sum(need.nbytes for need in needs) * 0.5).startswith("train.buffer_tokens: ")
    assert what_fits(needs, sum(need.nbytes for need in needs) * 2) == ""
    assert "no one parameter" in what_fits(needs, 1e6)


def test_what_is_in_place_is_not_counted(project: Params) -> None:
    values: Any = plan.read_with([])[1]
    assert not any(plan.in_place(values).values())
    locked = {
        "train": {"params": {"params.yaml": {"train": values["train"]}}, "outs": [{"path": "trained_saes"}]},
        "setup": {"params": {"params.yaml": {"controls": values["controls"]}}, "outs": [{"path": "downloaded_saes"}]},
        "core_eval": {"params": {"params.yaml": {"core_eval": values["core_eval"]}}, "outs": [{"path": "eval_results"}]},
    }
    Path("dvc.lock").write_text(yaml.safe_dump({"stages": locked}))
    assert not plan.in_place(values)["train"]  # its output is not there
    for name in ("trained_saes", "downloaded_saes", "eval_results"):
        Path(name).mkdir()
    assert {name for name, there in plan.in_place(values).items() if there} == {"train", "setup", "core"}
    assert "in place" in plan.planned(*plan.read_with([]), "L4", 1)
    changed = plan.read_with(["controls.names=[pca]"])[1]
    assert {name for name, there in plan.in_place(changed).items() if there} == {"train"}


def test_a_real_run_takes_about_as_long(middling: Path, in_project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAE_RESEARCH_NO_CACHE", "1")
    params = Params.model_validate(
        {
            "model": {"name": str(middling), "device": "cpu"},
            "text": {"context_size": 64},
            "activation_caching": {"enabled": False},
            "core_eval": {
                "batch_size_prompts": 16,
                "n_eval_reconstruction_batches": 2,
                "n_eval_sparsity_variance_batches": 3,
            },
        }
    )
    once = {"n_eval_reconstruction_batches": 1, "n_eval_sparsity_variance_batches": 1}
    little = params.model_copy(update={"core_eval": params.core_eval.model_copy(update=once)})
    lm = load_language_model(str(middling), "cpu")
    rows = torch.nn.functional.normalize(torch.randn(1024, 256, generator=torch.Generator().manual_seed(0)), dim=1)
    cfg = SAEConfig("topk", 256, 1024, str(middling), HOOK, options={"k": 16})
    tensors = {"W_enc": rows.T.contiguous(), "W_dec": rows, "b_enc": torch.zeros(1024), "b_dec": torch.zeros(256)}
    saes = {name: form_class("topk")(cfg, **tensors, k=16) for name in ("a", "b")}
    tokens = torch.randint(lm.vocab_size, (5 * 16, 64), generator=torch.Generator().manual_seed(1))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        list(evaluate({"a": saes["a"]}, lm, little, tokens=tokens))  # imports, compiles
        device = measured_device(torch.device("cpu"), False, time.process_time)
        began = time.process_time()
        assert len(list(evaluate(saes, lm, params, tokens=tokens))) == 2
        spent = time.process_time() - began
    finally:
        torch.set_num_threads(threads)
    planned = [described(name, sae.info()) for name, sae in saes.items()]
    stage = phases("core", params) or []
    shape = model_shape("m", model_config(str(middling)))
    left = all_left(stage, list(saes))
    # the tokens are given: no text is read, which is what `measured` would add
    computed = evaluation_seconds(stage, left, PlannedCosts(shape, HOOK, params, device, planned, measured=False)).on(1)
    print(f"took {spent:.2f} s, computed {computed:.2f} s")
    assert 1 / FACTOR < spent / computed < FACTOR
    assert evaluation_seconds(stage, left, PlannedCosts(shape, HOOK, params, COUNTING, planned, measured=False)).on(1) > 1e9
