"""`fibkv calibrate`: moments of queries, keys and values, what each layer's coding costs, and codecs to choose.

Deterministic, and resumable: after every step what is known lies in ``FILE.partial``, which another run of the same
model, texts and settings takes up.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from fibkv.allocation import KLT_BITS, KLT_RUNGS
from fibkv.attention_errors import AttentionErrors
from fibkv.calibration import LayerStatistics, klt_parameters
from fibkv.calibration_file import (
    Calibration,
    CalibrationInfo,
    LayerChoice,
    Recommendation,
    Sensitivity,
    klt_of,
    named_tensors,
    spaces_of,
    statistics_of,
    tensors_digest,
)
from fibkv.choices import NAMES_BY_BITS, parameters_of
from fibkv.codecs import codec_for
from fibkv.contract import Contract, Count
from fibkv.digest import digest, digest_bytes
from fibkv.errors import ContractError
from fibkv.evaluate import TEXT_DOMAIN, observed_errors
from fibkv.files import write_bytes
from fibkv.hf import Cache
from fibkv.hf_attention import attention
from fibkv.hf_model import model_digest
from fibkv.hf_observe import Observation, observable_layers, observe
from fibkv.ladder import Choice
from fibkv.progress import ProgressCallback, StepCounter
from fibkv.prompts import spread_windows
from fibkv.quality import CausalLM, cached_logits, dense_logits, score_tokens
from fibkv.shape import Role
from fibkv.space import KeySpace
from fibkv.threads import torch_threads
from fibkv.trials import SpaceKind, SpaceTrial, best_space

RUNGS: tuple[tuple[str, str], ...] = tuple(NAMES_BY_BITS[bits] for bits in (2, 3, 4))
"""Codecs of keys and values that are tried, from the fewest bits."""
HALVES: tuple[tuple[str, str], ...] = tuple(NAMES_BY_BITS[bits] for bits in (2.5, 3.5))
"""Pairs of the same codecs between them."""
SPACES: tuple[SpaceKind, ...] = ("plain", "mean", "balanced")
ROLES: tuple[Role, ...] = ("key", "value")


class CalibrateSettings(Contract):
    """How much is read and measured.

    Attributes:
        num_windows: windows of each text that moments are gathered from.
        window_tokens: tokens of a window.
        trial_windows: windows that KL is measured on, spread over all of them.
        chunk_tokens: tokens per forward pass of these measurements.
        num_queries: per head and window, of errors of attention.
        bits: average of counted bits that the recommendation may take.
        num_threads: CPU threads of torch.
    """

    num_windows: Count = 16
    window_tokens: Count = 512
    trial_windows: Count = 4
    chunk_tokens: Count = 128
    num_queries: Count = 64
    bits: float = 3.5
    num_threads: Count = 1


def run_calibrate(
    model: CausalLM,
    tokenizer: Any,
    texts: Sequence[str],
    path: Path,
    *,
    settings: CalibrateSettings,
    progress: ProgressCallback,
) -> Calibration:
    """Calibrates a model on texts and writes the file.

    Args:
        model: a causal language model of transformers whose caches hold keys and values.
        tokenizer: its tokenizer.
        texts: like what the model will read; not what it is evaluated on.
        path: of the file; ``path.partial`` beside it while the run lasts.
        settings: how much to do.
        progress: told before each step.

    Raises:
        ContractError: a text is too short, or fewer bits are asked for than the smallest codec takes.
        ModelError: the model cannot be observed.
    """
    layers = observable_layers(model)
    windows = [
        window
        for text in texts
        for window in spread_windows(
            tokenizer, text, num_windows=settings.num_windows, window_tokens=settings.window_tokens
        )
    ]
    kinds = len(RUNGS) * (len(SPACES) + 2 * len(layers)) + len(KLT_RUNGS) * (1 + len(layers))
    steps = len(windows) + kinds + len(HALVES) + 1
    source = digest_bytes(TEXT_DOMAIN, *(f"{len(text)}\0{text}".encode() for text in texts))
    identity = digest("fibkv_calibration_run_v1", [model_digest(model.config), source, settings.to_json()])
    with torch_threads(settings.num_threads):
        run = _Run(model, windows, settings, _Partial(path.with_name(f"{path.name}.partial"), identity))
        calibration = run.calibration(layers, source, StepCounter(progress, steps))
    calibration.save(path)
    run.partial.path.unlink(missing_ok=True)
    return calibration


class _Partial:
    """What a run knows so far: sums over the windows read, and figures by the name of the measurement."""

    def __init__(self, path: Path, identity: str) -> None:
        self.path = path
        self._identity = identity
        self.windows = 0
        self.sums: dict[str, Tensor] = {}
        self.figures: dict[str, Any] = {}
        if path.exists():
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("identity") == identity:
                    self.sums = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
                    state = json.loads(metadata["state"])
                    self.windows, self.figures = state["windows"], state["figures"]

    def keep(self) -> None:
        """Writes it all."""
        state = json.dumps({"windows": self.windows, "figures": self.figures})
        write_bytes(self.path, save(self.sums, {"identity": self._identity, "state": state}))


class _Run:
    """The measurements of one run."""

    def __init__(
        self, model: CausalLM, windows: Sequence[Tensor], settings: CalibrateSettings, partial: _Partial
    ) -> None:
        self.partial = partial
        self._model = model
        self._windows = windows
        self._settings = settings
        self._trial = windows[:: max(1, len(windows) // settings.trial_windows)][: settings.trial_windows]
        self._spaces: Mapping[tuple[int, SpaceKind], KeySpace] = {}
        self._statistics: Mapping[int, LayerStatistics] = {}
        self._seen: list[Observation] = []

    def calibration(self, layers: Sequence[int], source: str, step: StepCounter) -> Calibration:
        """Everything, in order."""
        self._statistics = statistics = self._gather(step)
        self._spaces = spaces_of(statistics)
        tried: list[tuple[tuple[str, str], SpaceKind]] = [(rung, kind) for rung in RUNGS for kind in SPACES]
        tried += [(rung, "klt") for rung in self._klt_rungs()]
        trials = [
            SpaceTrial(profile=rung[0], space=kind, kl=self._kl(step, f"space {rung[0]} {kind}", rung, kind))
            for rung, kind in tried
        ]
        names = [rung[0] for rung, _ in tried]
        best = {keys: best_space(trials, keys) for keys in names}
        sensitivities = [
            self._sensitivity(step, statistics[layer], layer, role, rung[ROLES.index(role)], best[rung[0]])
            for layer in layers
            for role in ROLES
            for rung in (*RUNGS, *(self._klt_rungs() if role == "key" else ()))
        ]
        recommendation = self._recommend(step, sensitivities, trials, best)
        tensors = named_tensors(statistics)
        info = CalibrationInfo(
            model_digest=model_digest(self._model.config),
            source_digest=source,
            tokens=statistics[layers[0]].tokens,
            spaces=tuple(trials),
            sensitivities=tuple(sensitivities),
            recommendation=recommendation,
            tensors_digest=tensors_digest(tensors),
        )
        return Calibration(info, statistics)

    def _gather(self, step: StepCounter) -> dict[int, LayerStatistics]:
        for index, ids in enumerate(self._windows):
            step(f"moments: window {index + 1}")
            if index < self.partial.windows:
                continue
            for one in observe(self._model, ids):
                for name, total in _sums(one).items():
                    key = f"{one.layer}.{name}"
                    self.partial.sums[key] = self.partial.sums.get(key, torch.zeros_like(total)) + total
            self.partial.windows = index + 1
            self.partial.keep()
        tokens = sum(len(ids) for ids in self._windows)
        means = {name: total / tokens for name, total in self.partial.sums.items()}
        return statistics_of(means, tokens)

    def _kl(
        self,
        step: StepCounter,
        name: str,
        default: tuple[str, str],
        kind: SpaceKind = "plain",
        chosen: Mapping[int, tuple[str, str]] | None = None,
        spaces: Mapping[int, KeySpace] | None = None,
    ) -> float:
        """Mean KL on the trial windows with a codec for all layers, and others for those in ``chosen``."""
        step(f"KL: {name}")
        if name not in self.partial.figures:
            if spaces is None:
                spaces = {layer: space for (layer, of), space in self._spaces.items() if of == kind}
            kl = []
            for ids in self._trial:
                cache = self._cache(default, chosen or {}, spaces)
                with attention(self._model):
                    logits = cached_logits(self._model, ids, cache, chunk_tokens=self._settings.chunk_tokens)
                kl.append(score_tokens(dense_logits(self._model, ids), logits, ids).kl)
            self.partial.figures[name] = torch.cat(kl).mean().item()
            self.partial.keep()
        return float(self.partial.figures[name])

    def _klt_rungs(self) -> tuple[tuple[str, str], ...]:
        """None where a layer's coordinates do not make pairs."""
        return KLT_RUNGS if all((layer, "klt") in self._spaces for layer in self._statistics) else ()

    def _codec(self, layer: int, name: str) -> Choice:
        """What a name stands for in a layer."""
        return klt_parameters(klt_of(self._statistics[layer]), KLT_BITS[name]) if name in KLT_BITS else name

    def _cache(
        self, default: tuple[str, str], chosen: Mapping[int, tuple[str, str]], spaces: Mapping[int, KeySpace]
    ) -> Cache:
        """A cache with a codec for all layers, and others for those in ``chosen``."""
        if default[0] in KLT_BITS:  # of every layer its own
            chosen = {**dict.fromkeys(self._statistics, default), **chosen}
            default = ("raw", default[1])
        profiles = {layer: (self._codec(layer, keys), values) for layer, (keys, values) in chosen.items()}
        return Cache(self._model, profile=default, layer_profiles=profiles, key_spaces=spaces, read_through=True)

    def _sensitivity(
        self, step: StepCounter, statistics: LayerStatistics, layer: int, role: Role, rung: str, kind: SpaceKind
    ) -> Sensitivity:
        """One role of one layer in a codec, all else raw."""
        pair = (rung, "raw") if role == "key" else ("raw", rung)
        space = self._spaces[layer, kind] if role == "key" and kind != "plain" else None
        spaces = {} if space is None else {layer: space}
        mean = statistics.key_mean if role == "key" else statistics.value_mean
        return Sensitivity(
            layer=layer,
            role=role,
            profile=rung,
            bits=page_bits(self._codec(layer, rung), mean.shape[-1]),
            kl=self._kl(step, f"layer {layer} {role} {rung}", ("raw", "raw"), chosen={layer: pair}, spaces=spaces),
            heads=self._head_errors(layer, pair, spaces),
        )

    def _head_errors(
        self, layer: int, pair: tuple[str, str], spaces: Mapping[int, KeySpace]
    ) -> tuple[AttentionErrors, ...]:
        self._seen = self._seen or observe(self._model, self._trial[0])
        seen = next(one for one in self._seen if one.layer == layer)
        # Layers are filled in turn: one that is looked at alone has a cache of its own.
        cache = self._cache(("raw", "raw"), {layer: pair}, spaces)
        return observed_errors(seen, cache, self._settings.num_queries)

    def _recommend(
        self,
        step: StepCounter,
        sensitivities: Sequence[Sensitivity],
        trials: Sequence[SpaceTrial],
        best: Mapping[str, SpaceKind],
    ) -> Recommendation:
        """The greedy choice, measured, and compared with the best single codec: the better one is recommended."""
        target = self._settings.bits
        chosen = allocate_rungs(sensitivities, target)
        kl = self._kl(step, "recommended", RUNGS[-1], chosen=chosen, spaces=self._spaces_for(chosen, best))
        layers = list(chosen)
        measured = {(trial.profile, trial.space): trial.kl for trial in trials}
        singles = {rung: measured[rung[0], best[rung[0]]] for rung in (*RUNGS, *self._klt_rungs())}
        for rung in HALVES:
            spaces = self._spaces_for(dict.fromkeys(layers, rung), best)
            singles[rung] = self._kl(step, f"{rung[0]} and {rung[1]}", rung, spaces=spaces)
        fitting = [rung for rung in singles if _average(sensitivities, dict.fromkeys(layers, rung)) <= target]
        single = min(fitting, key=lambda rung: singles[rung])
        uniform_kl = singles[single]
        if uniform_kl < kl:
            chosen, kl = dict.fromkeys(layers, single), uniform_kl
        return Recommendation(
            target_bits=target,
            bits=_average(sensitivities, chosen),
            kl=kl,
            uniform_kl=uniform_kl,
            layers=tuple(LayerChoice(layer=layer, keys=k, values=v) for layer, (k, v) in chosen.items()),
        )

    def _spaces_for(self, chosen: Mapping[int, tuple[str, str]], best: Mapping[str, SpaceKind]) -> dict[int, KeySpace]:
        kinds = {layer: best[keys] for layer, (keys, _) in chosen.items()}
        return {layer: self._spaces[layer, kind] for layer, kind in kinds.items() if kind != "plain"}


def _sums(one: Observation) -> dict[str, Tensor]:
    """Sums over tokens of what `LayerStatistics` has the means of, float64; queries are averaged over their group."""
    keys, values = (side[0].to(torch.float64) for side in (one.keys, one.values))
    queries = one.query[0].to(torch.float64).unflatten(0, (keys.shape[0], -1))
    return {
        "key_mean": keys.sum(1),
        "key_moment": keys.mT @ keys,
        "query_moment": (queries.mT @ queries).mean(1),
        "value_mean": values.sum(1),
        "value_moment": values.mT @ values,
    }


def page_bits(choice: Choice, head_dim: int, tokens: int = 64) -> float:
    """Counted bits per element of a page of one head in a codec: codes, norms and scales."""
    codec = codec_for(parameters_of(choice, head_dim, "f16"))
    return 8 * codec.encoded_nbytes(1, tokens) / (tokens * head_dim)


def allocate_rungs(sensitivities: Sequence[Sensitivity], target_bits: float) -> dict[int, tuple[str, str]]:
    """Codecs of keys and values by layer: from the smallest upwards, whatever lowers KL most per bit comes first.

    The KL of roles and layers is taken to add up, which holds for small ones.

    Raises:
        ContractError: the smallest codecs take more bits than the target.
    """
    ladders: dict[tuple[int, Role], list[Sensitivity]] = {}
    for one in sensitivities:
        ladders.setdefault((one.layer, one.role), []).append(one)
    rungs = {unit: sorted(ladder, key=lambda one: one.bits) for unit, ladder in ladders.items()}
    room = target_bits * len(rungs) - sum(ladder[0].bits for ladder in rungs.values())
    if room < 0:
        least = sum(ladder[0].bits for ladder in rungs.values()) / len(rungs)
        raise ContractError("CalibrateSettings.bits", f"at least {least:.3f}, the smallest codecs", target_bits)
    chosen = dict.fromkeys(rungs, 0)
    while True:
        steps = [
            ((ladder[now].kl - ladder[higher].kl) / (ladder[higher].bits - ladder[now].bits), unit, higher)
            for unit, ladder in rungs.items()
            for now in [chosen[unit]]
            for higher in range(now + 1, len(ladder))
            if ladder[higher].bits - ladder[now].bits <= room
        ]
        # Of equal gains the first unit and the smaller step.
        gain, unit, higher = max(steps, key=lambda s: s[0], default=(0.0, None, 0))
        if unit is None or gain <= 0:
            break
        room -= rungs[unit][higher].bits - rungs[unit][chosen[unit]].bits
        chosen[unit] = higher
    names = {unit: rungs[unit][index].profile for unit, index in chosen.items()}
    return {layer: (names[layer, "key"], names[layer, "value"]) for layer, role in rungs if role == "key"}


def _average(sensitivities: Sequence[Sensitivity], chosen: Mapping[int, tuple[str, str]]) -> float:
    picked = [one.bits for one in sensitivities if one.profile == chosen[one.layer][one.role == "value"]]
    return sum(picked) / len(picked)
