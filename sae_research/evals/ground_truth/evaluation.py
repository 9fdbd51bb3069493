"""The stage `ground_truth_eval`: every recipe and pursuit encoder on synthetic activations with known features.

Each seed makes one world of features. Recipes are trained on it by the project's own trainer, which steps all seeds' SAEs
side by side: a seed takes the place of a hook, and only the stream of activations differs. Pursuit encoders run over the
dictionaries that `ground_truth.pursuit.over` names. `measures` defines the metrics, and how well each follows the truth.
Trained SAEs are kept under a key of everything that shaped them. Writes `eval_results/ground_truth/results.json`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from sae_research.config.ground_truth import GridPoint, GroundTruth
from sae_research.config.params import Params
from sae_research.config.training import Train
from sae_research.evals.ground_truth import data, measures
from sae_research.evals.ground_truth.data import World
from sae_research.evals.ground_truth.measures import Truth
from sae_research.lm import pick_device
from sae_research.planning.saes import VARIANTS
from sae_research.runtime.cache import ResultCache, cache_dir, caches_readable, new_entry, prune, usable
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import fingerprint, slugify, write_json
from sae_research.runtime.stages import StageFolder, stage_folder
from sae_research.saes import SAEConfig, SparseAutoencoder, encode_each, load_sae, save_sae
from sae_research.saes.registry import code_fingerprint
from sae_research.saes.sources import matching_folders, open_sae, python_name
from sae_research.training.buffer import StreamBatch
from sae_research.training.checkpoints import PROGRESS_FILE, ProgressFile
from sae_research.training.loop import StopSignals, Trainer
from sae_research.training.training_sae import new_training_sae, start

CHUNK = 8192
"""Samples of a world drawn at a time."""


class Planned(NamedTuple):
    """One SAE to train: a point of the grid in the world of a seed."""

    seed: int
    point: GridPoint

    @property
    def hook(self) -> str:
        return hook_of(self.seed)

    @property
    def name(self) -> str:
        return f"{self.hook}_{self.point.name}"


def hook_of(seed: int) -> str:
    return f"seed_{seed}"


class SyntheticStream:
    """A `training.stream.Stream` of worlds, one under each hook: fresh samples, never the same twice."""

    def __init__(self, worlds: Mapping[str, World], samples: int, batch_size: int) -> None:
        self.worlds, self.batch_size = worlds, batch_size
        self.steps = samples // batch_size
        self.n_tokens, self.next_chunk, self.served = self.steps * batch_size, 0, 0
        self.chunk = max(batch_size, CHUNK // batch_size * batch_size)
        self.scale: dict[str, float] = {}
        self.waiting: dict[str, Tensor] = {}
        self.device = next(iter(worlds.values())).device

    @property
    def reads_ahead(self) -> bool:
        """No: worlds draw from torch's own generator, one after the other."""
        return False

    @property
    def n_chunks(self) -> int:
        return -(-self.n_tokens // self.chunk)

    @property
    def fraction(self) -> float:
        return self.served / self.steps

    @property
    def expected_rows(self) -> float:
        return self.n_tokens

    def calibrate(self) -> dict[str, Tensor]:
        """Measure the factor of normalisation of every world; returns normalised rows [n, d_in] to start SAEs from."""
        rows = {hook: world.activations(self.chunk, "start") for hook, world in self.worlds.items()}
        self.scale = {hook: float(x_ND.square().sum(1).mean()) ** -0.5 for hook, x_ND in rows.items()}
        return {hook: x_ND * self.scale[hook] for hook, x_ND in rows.items()}

    def read(self, chunk: int) -> dict[str, Tensor]:
        n = min(self.chunk, self.n_tokens - chunk * self.chunk)
        return {hook: world.activations(n, "train", chunk) for hook, world in self.worlds.items()}

    def feed(self, acts: dict[str, Tensor]) -> None:
        self.waiting = {hook: x_ND * self.scale[hook] for hook, x_ND in acts.items()}
        self.next_chunk += 1

    def finish(self) -> None:
        self.next_chunk = self.n_chunks + 1

    def rounds(self) -> Iterator[dict[str, StreamBatch]]:
        waiting, self.waiting = self.waiting, {}
        if not waiting:
            return
        for parts in zip(*(x_ND.split(self.batch_size) for x_ND in waiting.values()), strict=True):
            progress = (self.served + 0.5) / self.steps
            self.served += 1
            yield {hook: StreamBatch(x_BD, progress) for hook, x_BD in zip(waiting, parts, strict=True)}


def train_all(
    planned: Sequence[Planned], worlds: Mapping[int, World], settings: GroundTruth, seed: int
) -> dict[Planned, SparseAutoencoder]:
    """Every planned SAE, in its world's own units, from the cache where it was trained before."""
    keys = {item: _training_key(item, worlds[item.seed], settings, seed) for item in planned}
    folder = cache_dir("ground_truth")
    device = next(iter(worlds.values())).device
    found = {
        item: load_sae(folder / keys[item]).to(device)
        for item in planned
        if caches_readable() and usable(folder / keys[item])
    }
    missing = [item for item in planned if item not in found]
    for item, sae in (_train(missing, worlds, settings, seed, folder) if missing else {}).items():
        with new_entry(folder / keys[item]) as entry:
            save_sae(sae, entry)
        found[item] = sae.to(device)
    return {item: found[item] for item in planned}


def _training_key(item: Planned, world: World, settings: GroundTruth, seed: int) -> str:
    return fingerprint(
        {
            "sae": item.point.settings.model_dump(),
            "name": item.name,
            "world": world.fingerprint,
            "seed": seed,
            "samples": settings.samples,
            "batch_size": settings.batch_size,
            "code": code_fingerprint(__name__),
        }
    )[:40]


def _train(
    planned: Sequence[Planned], worlds: Mapping[int, World], settings: GroundTruth, seed: int, folder: Path
) -> dict[Planned, SparseAutoencoder]:
    saes = {item.name: item.point.settings.model_copy(update={"hook_name": item.hook}) for item in planned}
    train = Train(tokens=settings.samples, batch_size=settings.batch_size, checkpoint_seconds=None, saes=saes)  # ty: ignore[invalid-argument-type]
    here = {hook_of(number): world for number, world in worlds.items() if hook_of(number) in train.hooks}
    stream = SyntheticStream(here, settings.samples, settings.batch_size)
    rows = stream.calibrate()
    members = [new_training_sae(name, train, rows[train.hook_of(name)].shape[1], stream.device) for name in saes]
    for member in members:
        start(member, rows[member.hook], seed)
    progress = ProgressFile(folder / PROGRESS_FILE, str(stream.device))
    Trainer(stream, members, train, progress, StopSignals(), lambda: None).run()
    progress.end("finished")
    by_name = {member.name: member for member in members}
    return {
        item: by_name[item.name].recipe.export(stream.scale[item.hook], _config(item, rows[item.hook].shape[1]))
        for item in planned
    }


def _config(item: Planned, d_in: int) -> SAEConfig:
    config: dict[str, Any] = item.point.settings.model_dump(exclude_none=True, exclude={"hook_name"})
    return SAEConfig(
        form="",
        d_in=d_in,
        d_sae=item.point.settings.d_sae,
        model_name="synthetic",
        architecture=item.point.settings.recipe,
        provenance={"source": "ground_truth", "seed": item.seed, "hyper_parameters": config},
    )


FOLDER = Path("eval_results/ground_truth")
RESULTS_FILE = "results.json"
OWN = "own encoder"


class Entry(NamedTuple):
    """One row to measure: an encoder over a dictionary in one seed's world."""

    method: str
    """What its sparsities share, e.g. `batch_top_k` or `mpsae over trained`."""
    dictionary: str
    encoder: str
    sparsity: str
    seed: int
    sae: SparseAutoencoder


def run_stage(params: Params) -> None:
    """The stage. Raises `UserError` in one line for a setting from which nothing can be measured."""
    with stage_folder(FOLDER, params.eval_types.ground_truth) as stage:
        if stage is not None:
            write_json(stage.folder / RESULTS_FILE, evaluate(params, stage))


def evaluate(params: Params, stage: StageFolder | None = None) -> dict[str, Any]:
    """{setting, generator, rows, follow, notes}, all plain and the same for the same parameters."""
    settings = params.ground_truth
    points = settings.grid(params.train.saes)
    if not points:
        raise UserError("ground_truth.recipes: nothing to train; give it an entry")
    device = pick_device(params.train.device or params.model.device)
    worlds = make_worlds(settings, params.random_seed, device)
    truths = {
        seed: Truth(world, world.sample(settings.test_samples, "test"), settings.sequence_length)
        for seed, world in worlds.items()
    }
    for seed, world in worlds.items():
        data.need_firing(world, truths[seed].samples)
    planned = [Planned(seed, point) for seed in worlds for point in points]
    trained = train_all(planned, worlds, settings, params.random_seed)
    prune_cache(params)
    rows = list(_rows(settings, trained, truths, params.random_seed))
    generator = [data.statistics(worlds[seed], truths[seed].samples) for seed in worlds]
    near = sum(values["l0"] for values in generator) / len(generator)
    scopes = {"all": [row for row in rows if row["dictionary"] != "truth"]}  # nobody has that one
    scopes["trained_dictionaries"] = [row for row in rows if row["dictionary"] == "trained"]
    scopes["trained"] = [row for row in scopes["trained_dictionaries"] if row["encoder"] == OWN]
    result = {
        "setting": {
            **settings.data.whole(),
            "name": settings.data.setting,
            "samples": settings.samples,
            "test_samples": settings.test_samples,
            "n_seeds": settings.n_seeds,
        },
        "generator": generator,
        "rows": rows,
        "notes": notes(settings, points, generator),
        "follow": {scope: measures.follow(chosen_rows, near, params.random_seed) for scope, chosen_rows in scopes.items()},
    }
    if stage is not None:
        stage.notes |= {"setting": settings.data.setting, "seeds": settings.n_seeds, "rows": len(rows)}
    return result


def make_worlds(settings: GroundTruth, seed: int, device: torch.device | str = "cpu") -> dict[int, World]:
    """seed number -> its world. With `data.world_seed` they differ only in the samples drawn."""
    values = settings.data.whole()
    own = values["world_seed"]
    return {
        number: World(
            values,
            int(fingerprint([seed, "world", number])[:7], 16) if own is None else own,
            device,
            number if own is not None else 0,
        )
        for number in range(settings.n_seeds)
    }


def notes(settings: GroundTruth, points: list[GridPoint], generator: list[dict[str, Any]]) -> list[str]:
    """What a reader must know before any metric, a line each."""
    found = []
    if settings.n_seeds == 1:
        found.append("one seed: no figure has an interval, and no difference can be told from noise")
    single = sorted({p.recipe for p in points if sum(q.recipe == p.recipe for q in points) == 1})
    if single:
        found.append(f"one sparsity alone: {', '.join(single)}; such a recipe is compared at its own L0 or not at all")
    silent = max(values["rarely_fired"] for values in generator)
    if silent:
        found.append(
            f"up to {silent} of {generator[0]['features']} features fire on fewer than {data.MIN_FIRINGS} test "
            "samples and are left out of means over features"
        )
    narrow = sorted({p.name for p in points if p.settings.d_sae < generator[0]["features"]})
    if narrow:
        found.append(
            f"fewer latents than true features ({', '.join(narrow)}): what has no latent counts 0 in precision, "
            "recall and F1; MCC is over as many pairs as there are latents"
        )
    if any(settings.pursuit.ihtp_sizes) and "ihtp" in settings.pursuit.encoders:
        found.append(
            "samples of a sequence are drawn independently here: IHTP shares a support between tokens that have "
            "nothing in common, which text gives it more of"
        )
    return found


# --- rows --------------------------------------------------------------------------------------


def _rows(
    settings: GroundTruth, trained: Mapping[Planned, SparseAutoencoder], truths: Mapping[int, Truth], seed: int
) -> Iterator[dict[str, Any]]:
    cache = ResultCache("ground_truth")
    with tqdm(total=len(truths), desc="measure", unit="seed", dynamic_ncols=True) as bar:
        for number, truth in truths.items():
            own = {item.point: sae for item, sae in trained.items() if item.seed == number}
            entries = [
                *_trained_entries(own, number),
                *_given(settings, own, truth, number),
                *_pursuits(settings, own, truth, number, seed),
            ]
            yield from _measured(entries, truth, cache)
            bar.update()


def _measured(entries: list[Entry], truth: Truth, cache: ResultCache) -> Iterator[dict[str, Any]]:
    keys = [_key(entry.sae, truth) for entry in entries]
    found = {key: cache.get(key) for key in keys}
    missing = {str(i): entry.sae for i, entry in enumerate(entries) if found[keys[i]] is None}
    x: Tensor = truth.samples.x.view(-1, truth.sequence_length, truth.samples.x.shape[1])
    for name, z in encode_each(missing, x, None):
        sae = entries[int(name)].sae
        figures = measures.measure(sae, z, truth)
        found[keys[int(name)]] = {"metrics": figures, "flags": measures.flags(sae, figures, truth)}
        cache.put(keys[int(name)], found[keys[int(name)]])
    for entry, key in zip(entries, keys, strict=True):
        yield {**{name: getattr(entry, name) for name in Entry._fields if name != "sae"}, **found[key]}  # ty: ignore[invalid-argument-type]


def _key(sae: SparseAutoencoder, truth: Truth) -> str:
    return fingerprint(
        {
            "sae": sae.weights_fingerprint(),
            "world": truth.world.fingerprint,
            "n": truth.n,
            "sequence": truth.sequence_length,
            "code": code_fingerprint(__name__, classes=[type(sae)]),
        }
    )[:40]


def _trained_entries(own: Mapping[GridPoint, SparseAutoencoder], number: int) -> Iterator[Entry]:
    for point, sae in own.items():
        yield Entry(point.recipe, "trained", OWN, point.sparsity, number, sae)


def _pursuits(
    settings: GroundTruth, own: Mapping[GridPoint, SparseAutoencoder], truth: Truth, number: int, seed: int
) -> Iterator[Entry]:
    """Every pursuit encoder over every dictionary asked for."""
    asked, base = settings.pursuit, chosen(settings, own)
    world = truth.world
    sources = {
        "truth": lambda: (world.features, world.bias),
        "trained": lambda: (base.W_dec, base.b_dec),
        "untrained": lambda: untrained_rows(world, base.cfg.d_sae, seed),
    }
    for dictionary in asked.over:
        W_dec, b_dec = sources[dictionary]()
        for encoder in asked.encoders:
            cls = VARIANTS[encoder]
            for size in asked.ihtp_sizes if encoder == "ihtp" else asked.sizes:
                if size > len(W_dec):
                    raise UserError(f"ground_truth.pursuit.sizes: {size} exceeds the {len(W_dec)} atoms of {dictionary}")
                cfg = SAEConfig(
                    cls.form,
                    W_dec.shape[1],
                    len(W_dec),
                    model_name="synthetic",
                    architecture=encoder,
                    options={cls.size_name: size},
                )
                yield Entry(
                    f"{encoder} over {dictionary}",
                    dictionary,
                    encoder,
                    f"{cls.size_name} {size}",
                    number,
                    cls(W_dec, b_dec, size, cfg),
                )


def chosen(settings: GroundTruth, own: Mapping[GridPoint, SparseAutoencoder]) -> SparseAutoencoder:
    """The SAE whose decoder is `trained` to pursuit encoders and classes of one's own."""
    recipe = settings.pursuit.trained or next(iter(own)).recipe
    found = next((sae for point, sae in own.items() if point.recipe == recipe), None)
    if found is None:
        raise UserError(
            f"ground_truth.pursuit.trained: no recipe {recipe!r}; known: "
            f"{', '.join(dict.fromkeys(point.recipe for point in own))}"
        )
    return found


def untrained_rows(world: World, d_sae: int, seed: int) -> tuple[Tensor, Tensor]:
    """(unit rows [d_sae, d_in], mean [d_in]): activations less their mean, scaled to unit length."""
    x = world.activations(max(4 * d_sae, 8192), "untrained", seed)
    mean = x.mean(0)
    return torch.nn.functional.normalize(x[:d_sae] - mean, dim=1), mean


def _given(settings: GroundTruth, own: Mapping[GridPoint, SparseAutoencoder], truth: Truth, number: int) -> Iterator[Entry]:
    """Classes of the user's own over the trained decoder, and SAEs in folders."""
    for place in settings.python:
        sae = open_sae(f"python:{place}", baseline=chosen(settings, own))
        yield Entry(python_name(place), "trained", place, "", number, sae)
    for pattern in settings.folders:
        for path in matching_folders(pattern):
            sae, d_in = open_sae(path).to(truth.world.device), truth.samples.x.shape[1]
            if sae.cfg.d_in != d_in:
                raise UserError(
                    f"ground_truth.folders: {path} reads {sae.cfg.d_in} dimensions, the synthetic activations "
                    f"have {d_in} (ground_truth.data.hidden_dim)"
                )
            yield Entry(slugify(path.resolve().name), "given", OWN, "", number, sae)


def prune_cache(params: Params) -> None:
    from sae_research.runtime.cache import cache_dir

    prune(cache_dir("ground_truth"), params.activation_caching.max_gb)


def save_worlds(params: Params, folder: Path) -> None:
    """Each seed's world as SAELens reads it (`SyntheticModel.load_from_disk`) and the untrained rows, to train on
    elsewhere."""
    for number, world in make_worlds(params.ground_truth, params.random_seed).items():
        world.model.save(folder / f"seed_{number}")
        W_dec, b_dec = untrained_rows(world, params.ground_truth.width, params.random_seed)
        cls = VARIANTS["mpsae"]
        save_sae(cls(W_dec, b_dec, 1), folder / f"seed_{number}" / "untrained_rows")


def beside(params: Params, places: list[str]) -> Params:
    """Parameters with classes (`module:Class`) and folders added to the section's own."""
    settings = params.ground_truth
    classes = [place for place in places if ":" in place and not Path(place).exists()]
    return params.model_copy(
        update={
            "ground_truth": settings.model_copy(
                update={
                    "python": [*settings.python, *classes],
                    "folders": [*settings.folders, *(place for place in places if place not in classes)],
                }
            )
        }
    )
