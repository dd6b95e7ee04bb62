"""GLEM: a flow, a Gaussian per class, and what follows from the two."""

from __future__ import annotations

import copy
import math
import numbers
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from glem_augment.checks import check_whole
from glem_augment.data.classes import match_classes
from glem_augment.errors import ClassMismatchError, DataError
from glem_augment.flows import Bijection, build_flow, resolve_preset
from glem_augment.hub import files as hub
from glem_augment.latent.gaussians import ClassGaussians
from glem_augment.latent.modes import ClassModes, fit_class_modes
from glem_augment.model.config import GLEMConfig
from glem_augment.model.flow_model import FlowModel
from glem_augment.model.weights import check_round_trip, load_model

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

    from glem_augment.data.dataset import ImageData


DEFAULT_MODES = 64


class GLEM(FlowModel):
    """Class-conditional normalizing flow (Enescu & Sahbi, ACCV 2024).

    ``p(x | y) = N(f(x); mu_y, Sigma_y) |det df/dx|`` (Eq. 2). Densities are over pixel *levels*, bins of width 1 of
    which there are 2^bits, so that bits/dim = -log_prob / (d ln 2).

    Build one with ``GLEM.create`` (untrained) or ``GLEM.from_pretrained``; fit it with ``glem_augment.training``.
    Images are [B,C,H,W], uint8 or float in [0,1]; float input is taken as it is, not rounded.
    """

    def __init__(
        self, config: GLEMConfig, flow: Bijection, gaussians: ClassGaussians, modes: ClassModes | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.flow = flow
        self.gaussians = gaussians
        self.modes = None if modes is None else modes.to(gaussians.mu.dtype)
        self.origin: str | None = None
        self.origin_file: Path | None = None

    # ---- construction ------------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        preset: str,
        image_shape: tuple[int, int, int],
        classes: Sequence[str],
        class_ids: Sequence[str] | None = None,
        bits: int = 8,
        psi: tuple[float, float, float] | None = (0.5, 0.2, 0.05),
        **overrides: Any,
    ) -> GLEM:
        """An untrained model.

        Args:
            preset: name of a flow size, see ``flows.PRESETS``.
            image_shape: (C, H, W).
            classes: names in index order; ``class_ids`` the folder names or WordNet ids, by default the names.
            bits: top bits of each channel that are modelled; 8 for augmentation, the paper reports 5.
            psi: (a, b, c) of the variances, None for plain variances.
            overrides: numbers of the preset to change.

        Raises:
            ValueError: anything that does not describe a model.
        """
        config = GLEMConfig(
            flow=resolve_preset(preset, image_shape, **overrides),
            bits=bits,
            psi=psi,
            class_ids=[str(c) for c in (class_ids if class_ids is not None else classes)],
            class_names=[str(c) for c in classes],
        )
        return cls._build(config)

    @classmethod
    def _build(cls, config: GLEMConfig) -> GLEM:
        dim = math.prod(config.image_shape)
        classes = len(config.class_ids)
        modes = None if config.modes_rank is None else ClassModes.empty(classes, config.modes_rank, dim)
        return cls(config, build_flow(config.flow), ClassGaussians(classes, dim, config.psi), modes)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        device: str | torch.device = "cpu",
        *,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        check: bool = False,
    ) -> GLEM:
        """Load a saved model for inference.

        Args:
            name: a folder with ``model.safetensors`` and ``config.json``; ``bundled:<name>``; or ``org/name`` or
                ``org/name@revision`` on the Hugging Face Hub, where ``hf-hub:`` before the name passes over a folder
                that is called the same.
            device: where to put it.
            cache_dir: where downloads are kept; by default the Hub client's cache (``HF_HOME``).
            token: for private and gated repositories; None: the stored one, if any. False: none.
            revision: branch, tag or commit hash, in place of ``@revision``.
            check: send a few images through the flow and back, and refuse a flow that does not return them; takes
                a moment. Names, shapes, types and finite values are always checked.

        Returns:
            The model in eval mode, without gradients; ``origin`` is ``org/name@commit`` if it came from the Hub.

        Raises:
            ModelFileError: missing, truncated, inconsistent or hostile files; nothing is half-loaded. Its subclass
                ``hub.HubError``: no network, no such repository or revision, no access, a damaged download.
        """
        found = hub.find(name, cache_dir=cache_dir, token=token, revision=revision)
        weights = found.folder / hub.WEIGHTS
        model = load_model(weights, hub.read_config(found.folder), cls._build)
        model.origin, model.origin_file = found.origin, weights
        model = model.to(device).eval().requires_grad_(False)
        if check:
            check_round_trip(model, weights)
        return model

    def save(self, folder: str | Path) -> None:
        """Write ``model.safetensors`` and ``config.json`` to ``folder``, atomically; OSError names the path."""
        self.config.modes_rank = None if self.modes is None else self.modes.rank
        hub.write_model(folder, self.config, self.state_dict())

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        license: str | None = None,  # noqa: A002  (the Hub's word)
        license_name: str | None = None,
        license_link: str | None = None,
        datasets: Sequence[str] = (),
        metrics: Sequence[Any] = (),
        samples: bool = True,
    ) -> CommitInfo:
        """Upload weights, config, a model card and a picture of samples to the Hugging Face Hub, in one commit.

        Args:
            repo_id: ``org/name``; made where there is none.
            commit_message: by default one that names the library.
            private: of a new repository; an existing one of the other kind is refused.
            token: with write access; by default the stored one.
            revision: branch to commit to, made where there is none; by default ``main``.
            create_pr: open a pull request in place of committing.
            license, license_name, license_link: of the training images, which passes on to what the model draws; an
                identifier of the Hub. Left out of the card, with a warning, where it is not given.
            datasets: identifiers of the training data on the Hub.
            metrics: results of ``glem eval``, as tables or JSON files.
            samples: draw the picture of samples.

        Returns:
            huggingface_hub's ``CommitInfo``; ``from_pretrained(repo_id, revision=info.oid)`` loads these very weights.

        Raises:
            hub.HubError: no network, no permission, ...; nothing has been committed then.
            ValueError, FileNotFoundError: a licence or metrics that can't be used.
        """
        from glem_augment.hub.cards import CardFacts
        from glem_augment.hub.push import push_model

        _, commit = push_model(
            self,
            repo_id,
            facts=CardFacts(license, license_name, license_link, datasets, metrics),
            commit_message=commit_message,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            samples=samples,
        )
        return commit

    # ---- facts -------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.gaussians.mu.device

    @property
    def dtype(self) -> torch.dtype:
        return self.gaussians.mu.dtype

    def __repr__(self) -> str:
        c, h, w = self.image_shape
        parameters = sum(p.numel() for p in self.flow.parameters())
        modes = "no modes" if self.modes is None else f"{self.modes.rank} modes per class"
        return (
            f"GLEM({self.config.flow.get('preset', 'flow')}, {c}x{h}x{w} at {self.bits} bits, "
            f"{self.num_classes} classes, {parameters / 1e6:.2f} M flow parameters, {modes})"
        )

    # ---- densities and classification --------------------------------------------------------------------------

    def _noise(self, generator: torch.Generator | None) -> torch.Generator:
        """Likelihoods dequantise; with a fixed seed by default, so that the same image gives the same number."""
        return generator if generator is not None else torch.Generator().manual_seed(0)

    def log_prob_per_class(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """log p(x | y) of every class: [B, K] nats per image (Eq. 2)."""
        z, logdet = self.encode(x, self._noise(generator))
        return self.gaussians.log_prob(z) + logdet[:, None]

    def log_prob(self, x: Tensor, y: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """log p(x | y), or log p(x) under a uniform prior over classes when ``y`` is None: [B] nats per image."""
        z, logdet = self.encode(x, self._noise(generator))
        if y is None:
            return torch.logsumexp(self.gaussians.log_prob(z), 1) - math.log(self.num_classes) + logdet
        return self.gaussians.log_prob_of(z, self._check_labels(y, x.shape[0])) + logdet

    def bits_per_dim(self, x: Tensor, y: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """-log_prob / (d ln 2): [B]."""
        return -self.log_prob(x, y, generator) / (self.dim * math.log(2))

    def posterior_from_latents(self, z: Tensor, prior: Tensor | None = None) -> Tensor:
        """p(y | z): [B, K]. ``prior`` [K] >= 0, uniform by default; it need not sum to one."""
        scores = self.gaussians.log_prob(z)
        if prior is not None:
            prior = torch.as_tensor(prior, dtype=scores.dtype, device=scores.device)
            if prior.shape != (self.num_classes,) or not bool((prior >= 0).all()) or not bool(prior.sum() > 0):
                raise ValueError(f"prior must be {self.num_classes} numbers >= 0 that are not all zero, got {prior}")
            scores = scores + prior.log()
        return torch.softmax(scores, 1)

    def posterior(self, x: Tensor, prior: Tensor | None = None) -> Tensor:
        """p(y | x) of the generative classifier: [B, K]. Deterministic (middle of the bin)."""
        return self.posterior_from_latents(self.encode(x)[0], prior)

    def predict(self, x: Tensor) -> Tensor:
        """argmax_y log N(f(x); mu_y, Sigma_y): int64 [B]."""
        return self.gaussians.log_prob(self.encode(x)[0]).argmax(1)

    # ---- generation --------------------------------------------------------------------------------------------

    def _check_labels(self, y: Tensor, batch: int | None = None) -> Tensor:
        y = torch.as_tensor(y)
        if y.ndim != 1 or y.is_floating_point() or (batch is not None and y.shape[0] != batch):
            want = "[B]" if batch is None else f"[{batch}]"
            raise ValueError(f"labels must be whole numbers of shape {want}, got {y.dtype} {list(y.shape)}")
        if y.device.type == "cpu" and y.numel() and not (0 <= int(y.min()) and int(y.max()) < self.num_classes):
            raise ClassMismatchError(
                f"unknown class: labels run from {int(y.min())} to {int(y.max())}, the flow has classes 0 to "
                f"{self.num_classes - 1} ({', '.join(self.classes[:5])}{', ...' if self.num_classes > 5 else ''})"
            )
        return y.to(self.device, torch.int64)

    def sample_latents(
        self,
        y: Tensor,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        source: str = "gaussian",
    ) -> Tensor:
        """Latents of the wanted classes: [B, d].

        Args:
            y: int64 [B].
            temperature: >= 0, multiplies the standard deviation.
            generator: CPU generator.
            source: "gaussian" (the learned class Gaussian) or "rfcm" (mean and covariance re-estimated from the
                training latents; needs ``fit_modes``).

        Raises:
            ValueError: a negative temperature, another source, or "rfcm" without modes. ClassMismatchError: a label
            that the model has no class for.
        """
        y = self._check_labels(y)
        if source == "gaussian":
            return self.gaussians.sample(y, temperature, generator)
        if source == "rfcm":
            if self.modes is None:
                raise ValueError("source='rfcm' needs class modes; call model.fit_modes(data) first")
            return self.modes.sample(y, temperature, generator)
        raise ValueError(f"source must be 'gaussian' or 'rfcm', got {source!r}")

    @torch.no_grad()
    def sample(
        self,
        y: Tensor,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        source: str = "gaussian",
    ) -> Tensor:
        """Images of the wanted classes: [B,C,H,W] float in [0,1]; arguments as in ``sample_latents``."""
        return self.decode(self.sample_latents(y, temperature, generator, source))

    @torch.no_grad()
    def interpolate(self, x1: Tensor, x2: Tensor, steps: int = 8) -> Tensor:
        """Straight lines in latent space from x1 to x2, both ends included.

        Args:
            x1, x2: [B,C,H,W] images.
            steps: >= 2 images per line.

        Returns:
            [B, steps, C, H, W] float in [0,1].
        """
        if steps < 2:
            raise ValueError(f"steps must be at least 2 to hold both ends, got {steps}")
        if x1.shape != x2.shape:
            raise ValueError(f"x1 and x2 must have the same shape, got {list(x1.shape)} and {list(x2.shape)}")
        z1, z2 = self.encode(x1)[0], self.encode(x2)[0]
        weight = torch.linspace(0, 1, steps, device=z1.device, dtype=z1.dtype)[:, None]
        lines = z1[:, None] * (1 - weight) + z2[:, None] * weight
        return self.decode(lines.flatten(0, 1)).unflatten(0, (x1.shape[0], steps))

    # ---- modes and checks --------------------------------------------------------------------------------------

    @torch.no_grad()
    def fit_modes(
        self,
        data: ImageData | tuple[Tensor, Tensor],
        rank: int = 64,
        max_per_class: int | None = None,
        class_map: dict[str, str] | str | None = None,
        seed: int = 0,
    ) -> ClassModes:
        """Re-estimate each class's mean and principal modes from the latents of ``data`` (RFCM); stored and saved
        with the model.

        Args:
            data: an ``ImageData`` (see ``open_data``), or a pair (images [N,C,H,W] uint8, labels int64 [N]).
            rank: k modes per class; what they leave over is kept as a variance per dimension.
            max_per_class: use at most this many images of a class (the first ones), at least 1.
            class_map: how the data's classes map to the flow's, see ``match_classes``.
            seed: of the dequantisation noise.

        Raises:
            DataError: a class of the flow without at least two images, or images of another shape. TypeError: ``data``
            is neither. ValueError: rank or max_per_class below 1.
        """
        from glem_augment.data.dataset import ImageData
        from glem_augment.latent.adapt import class_latents

        if max_per_class is not None:
            check_whole("max_per_class", max_per_class, 1)
        if isinstance(data, tuple):
            data = ImageData.from_tensors(data[0], data[1], self.classes, self.class_ids)
        if not isinstance(data, ImageData):
            raise TypeError(
                f"fit_modes takes an ImageData (glem_augment.open_data) or (images, labels), got {type(data).__name__}"
            )
        if tuple(data.image_shape) != self.image_shape:
            raise DataError(f"{data.name} has images of {data.image_shape}, the flow takes {self.image_shape}")
        flow_index = match_classes(self.class_ids, self.classes, data.class_ids, data.classes, class_map)
        targets = flow_index[data.targets]
        rows = [np.flatnonzero(targets == index)[:max_per_class] for index in range(self.num_classes)]
        latents = class_latents(self, data, rows, seed)
        self.modes = fit_class_modes(latents, self.num_classes, rank, self.dim).to(self.device, self.dtype)
        self.config.modes_rank = self.modes.rank
        return self.modes

    def adapt(
        self,
        data: ImageData | tuple[Tensor, Tensor] | str | os.PathLike[str],
        *,
        classes: Sequence[str] | None = None,
        split: str = "train",
        rank: int = 64,
        shrinkage: float = 10.0,
        max_per_class: int | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> GLEM:
        """A model with this flow for other images and classes, in closed form: one pass over ``data``, no training.

        Every class of the data gets the mean of its latents, their variances shrunk towards the pooled ones (see
        ``glem_augment.latent.adapt``), and its principal modes. The flow's weights stay as they are, and so does this
        model.

        Args:
            data: an ``ImageData`` in the flow's shape; a pair (images [N,C,H,W] uint8, labels int64 [N]); or what
                ``open_data`` opens by name, which is then resized and converted to the flow's size and channels.
            classes: names, in place of the data's (of a pair: "0", "1", ...).
            split: of data given by name.
            rank: k modes per class.
            shrinkage: of the variances, in images: a class of that many is half its own, half pooled.
            max_per_class: use at most this many images of a class (the first ones); it holds their latents in memory.
            seed: of the dequantisation noise.
            progress: show a bar on stderr.

        Returns:
            A new GLEM in eval mode. ``config.training["adapted_from"]`` has the SHA-256 of this model's weights and its
            record. ``psi`` is this model's where its range holds all variances, otherwise a wider one.

        Raises:
            DataError: images of another shape, a class without images, no class with two, latents off any scale.
            TypeError, ValueError: arguments that make no sense.
        """
        from glem_augment.latent.adapt import adapt

        return adapt(
            self,
            data,
            classes=classes,
            split=split,
            rank=rank,
            shrinkage=shrinkage,
            max_per_class=max_per_class,
            seed=seed,
            progress=progress,
        )


def as_model(model: GLEM | str | os.PathLike[str]) -> GLEM:
    """``model`` itself, or the one that ``GLEM.from_pretrained`` finds under that name: a folder, ``bundled:NAME``, or
    ``org/name[@revision]`` on the Hub.

    Raises:
        TypeError: neither. ModelFileError: see ``GLEM.from_pretrained``.
    """
    if isinstance(model, GLEM):
        return model
    if isinstance(model, str):
        return GLEM.from_pretrained(model)
    if isinstance(model, os.PathLike):
        return GLEM.from_pretrained(Path(model))
    raise TypeError(f"model must be a GLEM or the name of one, got {type(model).__name__}")


def on_device(model: GLEM, device: torch.device | str | None) -> GLEM:
    """``model`` where it is there already, or ``device`` is None; else a copy there."""
    if device is None:
        return model
    device = torch.device(device)
    if device == model.device or (device.type == "cpu" == model.device.type):
        return model
    if device == torch.device("cuda") and model.device == torch.device("cuda", torch.cuda.current_device()):
        return model
    return copy.deepcopy(model).to(device)


def check_modes(model: GLEM, modes: int) -> ClassModes:
    """The model's modes; ValueError if it has none, or fewer than `modes`."""
    fitted = model.modes
    if fitted is None:
        raise ValueError("model.modes is missing: fit the modes first with model.fit_modes(data)")
    if isinstance(modes, bool) or not isinstance(modes, numbers.Integral) or not 1 <= modes <= fitted.rank:
        raise ValueError(
            f"modes must be an int from 1 to {fitted.rank}, the modes stored with the model; got {modes!r} "
            "(for more: model.fit_modes(data, rank=...))"
        )
    return fitted


def default_modes(model: GLEM) -> int:
    """How many modes to use where the user does not say: 64, or as many as there are."""
    return DEFAULT_MODES if model.modes is None else min(DEFAULT_MODES, model.modes.rank)
