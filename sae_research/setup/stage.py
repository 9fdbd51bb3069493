"""The stage `setup`: plan the SAEs, write them, check them, put the folder in place.

The texts and files that evaluations name are checked first: an evaluation that fails for a misspelt name after an hour of
others could have been told before them. Nothing is fetched for that, and of a file only its beginning is read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from sae_research.config.params import Params, check_sizes
from sae_research.lm import LanguageModel, load_configured
from sae_research.planning.saes import CONTROL_PREFIX, VARIANTS, control_names, variant_name
from sae_research.planning.work import sample_size
from sae_research.runtime.errors import UserError, did_you_mean
from sae_research.runtime.files import check_writable, find_local, replaced_folder, slugify, write_json
from sae_research.runtime.formatting import number, text_table
from sae_research.runtime.packaged import PREFIX
from sae_research.saes import SAEConfig, SparseAutoencoder, load_sae, save_sae, save_variant, sources
from sae_research.saes.pursuit.dictionary import check_atoms
from sae_research.saes.releases import matching_saes, saes_of
from sae_research.saes.sources import PREPARED, check_fits, check_tokenizer, fill_in
from sae_research.setup import controls, cross_layer_controls
from sae_research.setup.checks import disk_lines, preflight, preflight_contexts, time_lines
from sae_research.text.crossed_tasks import CROSSED_TASKS, HUB_TASKS, LOCAL_COLUMNS, unknown_crossed_task
from sae_research.text.local import SUFFIXES, TABLE_SUFFIXES, local_files, looks_local, read_rows
from sae_research.text.packaged import PACKAGED_TASKS, packaged_folder, packaged_version
from sae_research.text.questions import COLUMNS
from sae_research.text.tasks import SAE_BENCH_TASKS, unknown_task

LABELLED = ("text", "label")


def check_inputs(params: Params) -> None:
    """Raises `UserError` for what an enabled evaluation would not find or could not read, naming the key that says so."""
    on = params.eval_types
    if on.sparse_probing:
        _check_tasks("sparse_probing", params.sparse_probing.dataset_names)
    if on.tpp and params.tpp.dataset_names is not None:
        _check_tasks("tpp", params.tpp.dataset_names)
    if on.scr:
        for name in params.scr.dataset_names:
            if not _is_readable("scr.dataset_names", name, LOCAL_COLUMNS, {*CROSSED_TASKS, *HUB_TASKS}):
                raise UserError(f"scr.dataset_names: {unknown_crossed_task(name)}")
    if on.sparse_probing_sae_probes:
        _check_packaged(params.sparse_probing_sae_probes.dataset_names)
    if on.unlearning:
        unlearning = params.unlearning
        for key in ("forget_corpus", "retain_corpus"):
            _check_path(f"unlearning.{key}", getattr(unlearning, key), [unlearning.corpus_column], SUFFIXES)
        for key in ("forget_questions", "retain_questions"):
            for name in getattr(unlearning, key):
                _check_path(f"unlearning.{key}", name, COLUMNS, TABLE_SUFFIXES)
    if on.ravel:
        _check_path("ravel.prompts", params.ravel.prompts)
    if on.transfer and params.transfer.dataset is not None:
        _check_path("transfer.dataset", params.transfer.dataset, [params.transfer.column_name], SUFFIXES)


def _check_tasks(section: str, names: Sequence[str]) -> None:
    for name in names:
        if not _is_readable(f"{section}.dataset_names", name, LABELLED, {*PACKAGED_TASKS, *SAE_BENCH_TASKS}):
            raise UserError(f"{section}.dataset_names: {unknown_task(name)}")


def _is_readable(key: str, name: str, columns: Sequence[str], known: Collection[str]) -> bool:
    """Whether a task is known by its name or lies in a file; raises `UserError` where that cannot be read."""
    if name in known:
        return True
    return _check_path(key, name, columns, TABLE_SUFFIXES) if find_local(name) is not None else False


def _check_path(key: str, name: str, columns: Sequence[str] = (), suffixes: Sequence[str] = ()) -> bool:
    """Whether `name` is a local file or folder, and every file in it has the columns. Raises `UserError` for a path that
    leads nowhere and for files that cannot be read; what may be a name on the hub passes."""
    local = find_local(name)
    if local is None:
        if looks_local(name.partition(":")[0]):
            raise UserError(f"{key}: {name}: no such file or folder")
        return False
    try:
        for file in local_files(local, suffixes) if columns else ():
            next(read_rows(file, columns), None)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    return True


def _check_packaged(names: Sequence[str]) -> None:
    if isinstance(names, str):  # all of them
        return
    for name in names:
        if not (packaged_folder() / f"{name}.csv.zst").is_file():
            raise UserError(f"sparse_probing_sae_probes.dataset_names: sae-probes {packaged_version()} has no task {name!r}")


MANIFEST = "manifest.json"
PREFLIGHT = "preflight.json"


class Planned(NamedTuple):
    """One SAE to be: its name in tables, what of params.yaml asks for it, and how it comes to lie in a
    folder."""

    name: str
    origin: str
    write: Callable[[Path], None]
    optional: bool = False
    """Left out with a warning where it cannot be had: one of a whole release."""


class Setup:
    """What planning needs to know: parameters, model, baseline, and what had to be assumed on the way."""

    def __init__(self, params: Params, lm: LanguageModel, baseline: SparseAutoencoder) -> None:
        self.params, self.lm, self.baseline = params, lm, baseline
        self.name = params.baseline_sae.name
        self.warnings: list[str] = []
        self._sample: tuple[Tensor, Tensor] | None = None

    def sample(self) -> tuple[Tensor, Tensor]:
        """Activations that all controls are made from, as the baseline reads and writes them, computed when the first
        asks."""
        if self._sample is None:
            cfg = self.baseline.cfg
            size = sample_size(cfg.d_sae)
            self._sample = controls.sample_pairs(self.lm, cfg.hook_name, cfg.hook_out, self.params, size)
        return self._sample

    def plan(self) -> list[Planned]:
        """Everything the comparison holds, in table order. Raises `UserError` where two SAEs claim one
        name."""
        self._check_dictionary(self.name, self.baseline)
        cfg = self.baseline.cfg
        check_sizes(self.params, min(cfg.d_in, cfg.d_out), cfg.d_sae // layers_of(cfg), cfg.is_transcoder)
        planned = [
            Planned(self.name, "baseline_sae", self._write_baseline),
            *self._variants(self.name),
            *self._comparisons(),
            *(item for name in self.params.sae_variants.dictionaries for item in self._variants(name)),
            *self._controls(),
        ]
        taken: dict[str, str] = {}
        for item in planned:
            if item.name in taken:
                raise UserError(f"two SAEs would be called {item.name}: {taken[item.name]} and {item.origin}; rename one")
            taken[item.name] = item.origin
        compared = [item.name for item in self._comparisons()]
        unknown = [name for name in self.params.sae_variants.dictionaries if name not in compared]
        if unknown:
            known = did_you_mean(unknown[0], compared) if compared else "; comparison_saes names none"
            raise UserError(
                "sae_variants.dictionaries: not among the compared SAEs (the baseline's is always read): "
                f"{', '.join(unknown)}{known}"
            )
        return planned

    # --- baseline and what is made of it ---

    def _write_baseline(self, folder: Path) -> None:
        save_sae(self.baseline, folder)

    def _variants(self, base: str) -> Iterator[Planned]:
        """Every encoder over one SAE's dictionary."""
        variants = self.params.sae_variants
        enabled = [label for label in VARIANTS if getattr(variants, label).enabled]
        if base == self.name and enabled and self.baseline.cfg.is_transcoder:
            self.warnings.append(
                f"no variants ({', '.join(enabled)}): the decoder of {self.name} is no dictionary of what it reads"
            )
            return
        for label, cls in VARIANTS.items():
            section = getattr(variants, label)
            sizes: list[int] = getattr(section, f"{cls.size_name}_values") if section.enabled else []
            further = {
                name: getattr(section, name) for name, default in cls.defaults.items() if getattr(section, name) != default
            }
            if variants.normalise != "note":
                further["normalise"] = variants.normalise
            for size in sizes:
                key = f"sae_variants.{label}.{cls.size_name}_values"
                yield Planned(
                    variant_name(base, label, size),
                    f"{key} ({size}) of {base}",
                    self._variant_writer(base, cls.form, label, {cls.size_name: size} | further),
                )

    def _check_dictionary(self, name: str, sae: SparseAutoencoder) -> None:
        """What pursuit had to assume of an SAE's atoms becomes a warning. Raises `UserError` where params.yaml would rather
        have them refused, or sizes are larger than the dictionary."""
        variants = self.params.sae_variants
        if any(getattr(variants, label).enabled for label in VARIANTS) and not sae.cfg.is_transcoder:
            notes = check_atoms(sae.W_dec, variants.normalise).notes
            lines = (f"{name}, as a dictionary for pursuit: {note}" for note in notes)
            self.warnings += [line for line in lines if line not in self.warnings]

    def _variant_writer(self, base: str, form: str, architecture: str, options: dict[str, Any]) -> Callable[[Path], None]:
        def write(folder: Path) -> None:
            source = folder.parent / base
            cfg = self.baseline.cfg if base == self.name else self._dictionary(source).cfg
            cfg = cfg.replace(
                form=form,
                architecture=architecture,
                role="variant",
                base=base,
                options=options,
                apply_b_dec_to_input=True,
                provenance={"source": "variant"},
            )
            save_variant(cfg, options, folder, source)

        return write

    def _dictionary(self, source: Path) -> SparseAutoencoder:
        """A compared SAE as pursuit's dictionary. Raises `UserError` where it is none, or too small."""
        sae = load_sae(source)
        if sae.cfg.is_crosscoder or sae.cfg.is_transcoder:
            raise UserError(
                f"sae_variants.dictionaries: the decoder of {source.name} is no dictionary of the activations it reads"
            )
        check_sizes(self.params, sae.cfg.d_in, sae.cfg.d_sae, name=source.name)
        self._check_dictionary(source.name, sae)
        return sae

    def _controls(self) -> Iterator[Planned]:
        for name, kind, size in control_names(self.params.controls):
            if self.baseline.cfg.is_cross_layer and kind not in cross_layer_controls.KINDS:
                self.warnings.append(f"no control {name}: a cross-layer transcoder has none of its kind")
                continue
            yield Planned(name, f"controls.names ({kind}, {size})", self._control_writer(kind, size))
        if self.baseline.cfg.is_transcoder and self.params.controls.names:
            kinds = ["linear_map", *([] if self.baseline.W_skip is None else ["skip"])]
            for kind in kinds:
                yield Planned(CONTROL_PREFIX + kind, f"the control {kind} of a transcoder", self._control_writer(kind, 0))

    def _control_writer(self, kind: str, size: int) -> Callable[[Path], None]:
        def write(folder: Path) -> None:
            x, y = self.sample()
            cfg, skip = self.baseline.cfg, self.baseline.W_skip
            if cfg.is_cross_layer:
                save_sae(cross_layer_controls.make_cross_layer_control(kind, size, x, y, cfg, self.params, skip), folder)
                return
            written = y if cfg.is_transcoder else None
            save_sae(controls.make_control(kind, size, x, cfg, self.params, written, skip), folder)

        return write

    # --- SAEs beside it ---

    def _comparisons(self) -> Iterator[Planned]:
        """Names are known before anything is read: a clash must not wait for downloads."""
        chosen = self.params.comparison_saes
        for name in self._trained_names():
            yield self._compared(slugify(name), f"trained_saes/{name}", f"trained:{name}")
        for name in chosen.packaged:
            yield self._compared(slugify(name), f"the packaged {name}", f"{PREFIX}{name}")
        for path, name in sources.folder_names(chosen.folders).items():
            yield self._compared(name, f"the folder {path}", path)
        for place in chosen.python:
            yield self._compared(
                sources.python_name(place),
                f"the class {place}",
                f"python:{place}",
                base=self.name,
            )
        if chosen.sae_regex_pattern is not None and chosen.sae_block_pattern is not None:
            for item in matching_saes(chosen.sae_regex_pattern, chosen.sae_block_pattern):
                yield self._compared(
                    slugify(f"{item.release}_{item.sae_id}"),
                    f"SAELens {item.release} / {item.sae_id}",
                    f"sae_lens:{item.release}:{item.sae_id}",
                )
        if chosen.release is not None:
            block = self.params.baseline_sae
            for item in saes_of(chosen.release, chosen.match, "comparison_saes.match"):
                if (block.source, block.release, block.sae_id) != ("sae_lens", item.release, item.sae_id):
                    where = f"sae_lens:{item.release}:{item.sae_id}"
                    yield self._compared(slugify(f"{item.release}_{item.sae_id}"), where, where)._replace(optional=True)

    def write(self, planned: list[Planned], folder: Path) -> list[str]:
        """Write all into a folder; names of those that are there. Raises `UserError` where none of a whole release can be
        had."""
        written, left_out = [], []
        for item in planned:
            try:
                item.write(folder / item.name)
                written.append(item.name)
            except UserError as error:
                if not item.optional:
                    raise
                self.warnings.append(f"{item.name} is left out: {error}")
                left_out.append(error)
        if left_out and len(left_out) == sum(item.optional for item in planned):
            release = self.params.comparison_saes.release
            raise UserError(
                f"comparison_saes.release: none of the {len(left_out)} dictionaries of {release} could be had; the first: "
                f"{left_out[0]}"
            )
        return written

    def _trained_names(self) -> list[str]:
        names = self.params.comparison_saes.trained
        if names != ["all"]:
            return names
        used = self.name if self.params.baseline_sae.source == "trained" else None
        return [name for name in sources.trained_names() if name != used]

    def _compared(self, name: str, origin: str, wanted: str | Path, base: str | None = None) -> Planned:
        def write(folder: Path) -> None:
            sae = sources.open_sae(wanted, baseline=self.baseline)
            self.admit(name, sae)
            sae.cfg = sae.cfg.replace(role="comparison", base=base)
            save_sae(sae, folder)

        return Planned(name, origin, write)

    def admit(self, name: str, sae: SparseAutoencoder) -> None:
        """Complete an SAE's configuration and check it against the model."""
        assumed = fill_in(sae, self.lm.name, self.baseline.cfg.hook_name)
        self.warnings += [f"{name}: {line}" for line in assumed]
        check_fits(name, sae, self.lm, self.params.model.same_as)


def run_setup(params: Params, output: Path = PREPARED) -> dict[str, Any]:
    """Write every SAE of the comparison, `manifest.json` and `preflight.json` into `output`; returns the
    manifest.

    All or nothing: an error leaves what was there before. Raises `UserError` for whatever in params.yaml, the
    SAEs or the model would make the evaluations fail or mislead.
    """
    check_inputs(params)
    baseline = sources.open_sae(sources.reference_of(params.baseline_sae))
    lm = load_configured(params.model)
    check_tokenizer(lm)
    setup = Setup(params, lm, baseline)
    setup.warnings += [
        f"{setup.name}: {line}"
        for line in fill_in(baseline, lm.name, f"blocks.{params.baseline_sae.hook_layer}.hook_resid_post")
    ]
    if baseline.cfg.is_crosscoder or baseline.cfg.is_part:
        raise UserError(
            f"baseline_sae: {setup.name} is a {baseline.cfg.kind} ({baseline.cfg.hooks}): controls and variants are made of "
            "a baseline of one hook; compare it in comparison_saes"
        )
    _check_layer(params, baseline)
    check_fits(setup.name, baseline, lm, params.model.same_as)
    baseline.cfg = baseline.cfg.replace(role="baseline", base=None)
    planned = setup.plan()
    check_writable(output, [item.name for item in planned], "SAE names")
    contexts = preflight_contexts(lm, params)  # what the end needs is looked at first
    with replaced_folder(output) as folder:
        saes = {name: load_sae(folder / name, str(lm.device)) for name in setup.write(planned, folder)}
        result = preflight(saes, setup.name, lm, params, contexts)
        warnings = setup.warnings + result.warnings
        manifest = make_manifest(saes)
        write_json(folder / MANIFEST, manifest)
        write_json(folder / PREFLIGHT, {**result.report, "warnings": warnings})
    print(sae_table(manifest, result.report["saes"]))
    for line in warnings:
        print(f"warning: {line}")
    for line in (
        *time_lines(params, lm, saes, result.seconds_per_token),
        *disk_lines(params, lm, saes, baseline.cfg.d_sae),
    ):
        print(line, flush=True)
    return manifest


def layers_of(cfg: SAEConfig) -> int:
    """Of a cross-layer transcoder the number of its layers; 1 of anything else."""
    return len(cfg.hook_names) if cfg.is_cross_layer else 1


def make_manifest(saes: dict[str, SparseAutoencoder]) -> dict[str, Any]:
    """{"order": names in table order, "saes": what readers need without loading weights, by name}."""
    return {"order": list(saes), "saes": {name: _row(sae) for name, sae in saes.items()}}


def _row(sae: SparseAutoencoder) -> dict[str, Any]:
    cfg = sae.cfg
    return {
        "form": cfg.form,
        "architecture": cfg.architecture,
        "role": cfg.role,
        "d_in": cfg.d_in,
        "d_sae": cfg.d_sae,
        **sae.options(),
        "hook_name": cfg.hook_name,
        "hook_out": cfg.hook_out,
        "model_name": cfg.model_name,
        "base": cfg.base,
        "per_token": sae.per_token,
        "causal": sae.causal,
        "signed": sae.signed,
        "weights_fingerprint": sae.weights_fingerprint(),
        "provenance": cfg.provenance,
    }


def sae_table(manifest: dict[str, Any], figures: dict[str, dict[str, Any]]) -> str:
    """The SAEs as text: name, role, form, sizes, and what the preflight saw."""
    rows = [("SAE", "role", "form", "d_sae", "k/s", "L0", "var. expl.", "hook")]
    for name in manifest["order"]:
        row, seen = manifest["saes"][name], figures[name]
        rows.append(
            (
                name,
                row["role"],
                row["form"].rpartition(":")[2],
                str(row["d_sae"]),
                str(row.get("k", row.get("s", ""))),
                number(seen["l0"]) if "l0" in seen else "fails",
                number(seen.get("variance_explained")),
                row["hook_name"] + (f" -> {row['hook_out']}" if row["hook_out"] != row["hook_name"] else ""),
            )
        )
    return text_table(rows, left=len(rows[0]))


def _check_layer(params: Params, baseline: SparseAutoencoder) -> None:
    """A baseline from outside must be of the layer that params.yaml says: a typed path is easily that of
    another."""
    settings = params.baseline_sae
    if settings.source != "trained" and baseline.cfg.hook_layer != settings.hook_layer:
        raise UserError(
            f"baseline_sae.hook_layer is {settings.hook_layer}, but the SAE reads "
            f"{baseline.cfg.hook_name}; "
            "correct the one that is wrong"
        )
