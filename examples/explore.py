"""A local web page to explore a model: samples, moves along the modes, lines between images, surprising images.

    pip install "glem-augment[explore]"
    python examples/explore.py                                        # a bundled model and its images
    python examples/explore.py runs/photos photos/ --split val
    python examples/explore.py org/model                              # samples in place of images

The command prints the page's address; Ctrl-C ends it. Nothing is loaded from the network, and other machines reach the
page only if you set GRADIO_SERVER_NAME. All images are shown in the model's size.
"""

from __future__ import annotations

import argparse
import html
import os
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

from glem_augment import GLEM, GLEMAugment, GLEMError, Mixup, Noise, Policy, SyntheticDataset, open_data

BUNDLED = "bundled:fashion-mnist"
MODES, FIRST = 8, 3  # modes that have a slider; the first one starts at 3 standard deviations, so that a move is seen
SIDE = 256  # pixels to which small images are enlarged
SURPRISES, STEPS = 12, 9  # images of the lowest likelihood that are shown, and images of a line
# Labels stand above their pictures. On a telephone, pictures come before controls. Captions are not cut.
CSS = """\
.image-frame {padding-top: 1.7rem}
@media (max-width: 700px) {.pictures {order: -1}}
.grid-wrap {padding-top: 2rem !important; max-height: none !important}
.grid-container {grid-template: none / repeat(auto-fill, minmax(9rem, 1fr)) !important; grid-auto-rows: auto !important}
.grid-container .thumbnail-item {height: auto !important; aspect-ratio: auto !important}
.grid-container img {aspect-ratio: 1; object-fit: contain !important}
.caption-label {position: static !important; max-width: none !important; white-space: normal !important}
.caption-label {overflow-wrap: anywhere; border: none !important}
"""


class Sliders(Policy):
    """Moves an image by these coefficients of the top modes, in standard deviations."""

    def __init__(self, values: Sequence[float]) -> None:
        self.values = [float(value) for value in values]

    def draw(self, selected: Any, generator: torch.Generator) -> dict[str, Tensor]:
        return {}

    def move(self, batch: Any) -> Tensor:
        return batch.z + batch.basis().along(batch.z.new_tensor(self.values).expand(len(batch.z), -1))


class Explorer:
    """What the page shows of a model and of images uint8 [N, C, H, W] in its size, with labels and names."""

    def __init__(self, model: GLEM, x: Tensor, y: Tensor, names: Sequence[str]) -> None:
        self.model, self.x, self.y, self.names = model, x, y, names
        self.unit, self.divisor = model.likelihood[1:]

    def samples(self, cls: int, temperature: float, source: Any, seed: int) -> Image.Image:
        """The first 32 samples that `glem generate` draws of a class."""
        drawn = SyntheticDataset(self.model, {self.model.classes[int(cls)]: 32}, temperature, int(seed), source=source)
        return sheet(drawn.images(range(32)), 8)

    def picked(self, index: int, upload: Image.Image | None) -> tuple[Tensor, int]:
        """An uploaded image and its class by the model, or image `index` of the data and its class."""
        if upload is None:
            return self.x[int(index)], int(self.y[int(index)])
        channels, *size = self.model.image_shape
        image = v2.functional.pil_to_tensor(upload.convert("L" if channels == 1 else "RGB"))
        image = v2.functional.resize(image, size, antialias=True)
        return image, int(self.model.predict(image[None])[0])

    def move(
        self, index: int, upload: Image.Image | None, cls: int, how: str, strength: float, seed: int, *sliders: float
    ) -> tuple[Any, ...]:
        """The image, the moved image, their difference, a sentence, and the posteriors before and after."""
        image, own = self.picked(index, upload)
        y = torch.tensor([own if cls < 0 else cls])
        policies: dict[str, Policy] = {"mixup": Mixup(), "noise": Noise(strength), "sliders": Sliders(sliders)}
        modes = len(sliders) if how == "sliders" else None
        aug = GLEMAugment(
            self.model, policies[how], 1.0, modes, class_map=range(self.model.num_classes), seed=int(seed)
        )
        moved = aug(image[None], y)[0][0]
        both, names = torch.stack([image, moved]), self.model.classes
        change = moved.float() - image.float()
        before, after = (-self.model.log_prob(both, y.expand(2)) / self.divisor).tolist()
        fate = "rejected: the image stays as it is" if aug.stats["rejected"] else "used"
        text = (
            f"A move along the modes of {names[int(y)]}, **{fate}**. {self.unit.capitalize()} given that class: "
            f"{before:.3f} before, {after:.3f} after. The largest change of a pixel is {float(change.abs().max()):.0f}."
        )
        grey = (127.5 + 127.5 * change / change.abs().max().clamp_min(1)).round().to(torch.uint8)
        bars = [dict(zip(names, row, strict=True)) for row in self.model.posterior(both).tolist()]
        return *map(shown, (image, moved, grey)), text, *bars

    def between(self, first: int, second: int) -> tuple[Image.Image, str]:
        """The straight line in latent space between two images, and its likeliest classes."""
        ends = [self.x[int(index)][None] for index in (first, second)]
        line = self.model.interpolate(*ends, STEPS)[0]
        line = (255 * line).round().to(torch.uint8) if line.is_floating_point() else line
        confidence, best = self.model.posterior(line).max(1)
        found = zip(best.tolist(), confidence.tolist(), strict=True)
        return sheet(line, STEPS), " → ".join(f"{self.model.classes[k]} ({100 * p:.0f} %)" for k, p in found)

    def measure(self) -> tuple[str, list[Any], list[Any]]:
        """Numbers, the least likely images, and the images whose label is least likely."""
        posterior, own = [], []
        for part, labels in tqdm(list(zip(self.x.split(64), self.y.split(64), strict=True)), desc="measuring"):
            posterior.append(self.model.posterior(part))
            own.append(-self.model.log_prob(part, labels) / self.divisor)
        values, found = torch.cat(own), torch.cat(posterior)
        best, label = found.argmax(1), found.gather(1, self.y[:, None])[:, 0]
        text = f"{float(values.mean()):.3f} {self.unit} given the class"
        text += f", accuracy {100 * float((best == self.y).double().mean()):.2f} %" if found.shape[1] > 1 else ""
        names, y = self.model.classes, self.y.tolist()
        odd = values.argsort(descending=True)[:SURPRISES].tolist(), label.argsort()[:SURPRISES].tolist()
        first = [(shown(self.x[i]), f"{names[y[i]]}, {values[i]:.2f} {self.unit}, {self.names[i]}") for i in odd[0]]
        second = [(shown(self.x[i]), f"{names[y[i]]}? {names[best[i]]}, {self.names[i]}") for i in odd[1]]
        return text, first, second


def shown(image: Tensor) -> Image.Image:
    """An image uint8 [C, H, W] in a size that people can see."""
    image = image[:3] if len(image) >= 3 else image[:1]
    picture = to_pil_image(image.cpu())
    factor = max(1, SIDE // max(picture.size))
    return picture.resize((factor * picture.width, factor * picture.height), Image.Resampling.NEAREST)


def sheet(images: Tensor, columns: int) -> Image.Image:
    """Images uint8 [n, C, H, W] in rows."""
    rows = [torch.cat([*part], 2) for part in images.cpu().split(columns)]
    return shown(torch.cat(rows, 1)).resize((96 * columns, 96 * len(rows)), Image.Resampling.NEAREST)


# ---- the page --------------------------------------------------------------------------------------------------------


def build_page(gr: Any, explorer: Explorer, real: bool) -> Any:
    """The page as a `gradio.Blocks`. A model without modes has no tab for moves; without real images, none for data."""
    model, images = explorer.model, "images" if real else "of its samples"
    with gr.Blocks(title="Explore a model", analytics_enabled=False, delete_cache=(600, 600)) as page:
        gr.Markdown(f"# Explore a model\n\n`{model!r}`, and {len(explorer.x)} {images}")
        with gr.Tab("Samples"), gr.Row():
            samples_tab(gr, page, explorer)
        if model.modes is not None:
            with gr.Tab("Move"), gr.Row():
                move_tab(gr, page, explorer, min(MODES, model.modes.rank))
        with gr.Tab("Between"), gr.Row():
            between_tab(gr, page, explorer)
        if real:
            with gr.Tab("Data"):
                data_tab(gr, explorer)
    return page.queue(max_size=64)


def samples_tab(gr: Any, page: Any, explorer: Explorer) -> None:
    sources = ["gaussian"] if explorer.model.modes is None else ["rfcm", "gaussian"]
    with gr.Column(scale=1):
        inputs = [
            gr.Dropdown([(name, i) for i, name in enumerate(explorer.model.classes)], value=0, label="Class"),
            gr.Slider(0, 1.5, 0.9, step=0.05, label="Temperature", info="factor on the standard deviation"),
            gr.Radio(sources, value=sources[0], label="Source", info="rfcm: mean and covariance of real latents"),
            gr.Number(0, label="Seed", minimum=0, precision=0),
        ]
    with gr.Column(scale=2, elem_classes="pictures"):
        redraw(gr, page, explorer.samples, inputs, [picture(gr, "Samples")])


def move_tab(gr: Any, page: Any, explorer: Explorer, modes: int) -> None:
    names = explorer.model.classes
    with gr.Column(scale=1):
        choices = [("class of the image; of a file, the likeliest", -1), *((name, i) for i, name in enumerate(names))]
        inputs = [
            gr.Slider(0, len(explorer.x) - 1, 0, step=1, label="Number of the image"),
            gr.Image(type="pil", label="A file instead", height=170, sources=["upload"]),
            gr.Dropdown(choices, value=-1, label="Class along whose modes it moves"),
            gr.Radio(["sliders", "noise", "mixup"], value="sliders", label="Policy: how the move is chosen"),
            gr.Slider(0, 2, 0.5, step=0.05, label="Strength of the noise"),
            gr.Number(0, label="Seed", minimum=0, precision=0),
        ]
        for i in range(modes):
            inputs.append(gr.Slider(-3, 3, 0 if i else FIRST, step=0.1, label=f"Mode {i + 1}, in standard deviations"))
    with gr.Column(scale=2, elem_classes="pictures"):
        with gr.Row():
            outputs = [picture(gr, label) for label in ("Original", "Moved", "Difference (grey: none)")]
        outputs.append(gr.Markdown())
        with gr.Row(visible=len(names) > 1):
            outputs += [gr.Label(label=f"Posterior {when}", num_top_classes=5) for when in ("before", "after")]
    redraw(gr, page, explorer.move, inputs, outputs)


def between_tab(gr: Any, page: Any, explorer: Explorer) -> None:
    last = len(explorer.x) - 1
    with gr.Column(scale=1):
        inputs = [
            gr.Slider(0, last, i, step=1, label=label) for i, label in ((0, "First image"), (last, "Second image"))
        ]
    with gr.Column(scale=2, elem_classes="pictures"):
        outputs = [picture(gr, "A straight line in latent space"), gr.Markdown(label="Likeliest classes")]
    redraw(gr, page, explorer.between, inputs, outputs)


def data_tab(gr: Any, explorer: Explorer) -> None:
    bar = gr.Progress(track_tqdm=True)

    def measure(progress: Any = bar) -> Any:
        return explorer.measure()

    button = gr.Button(f"Measure the model on {len(explorer.x)} images", variant="primary")
    outputs = [gr.Markdown()]
    for title, there in (
        ("The least likely images", True),
        ("The least likely labels", explorer.model.num_classes > 1),
    ):
        outputs.append(gr.Gallery(label=title, visible=there, height="auto", interactive=False, buttons=["download"]))
    button.click(reporting(gr, measure), None, outputs, concurrency_id="model", concurrency_limit=1)


def picture(gr: Any, label: str) -> Any:
    buttons = ["download", "fullscreen"]  # without "share", which sends the picture to the Hub
    return gr.Image(label=label, alt_text=label, buttons=buttons, format="png", type="pil", interactive=False)


def reporting(gr: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function; its errors become one sentence on the page."""

    @wraps(function)
    def call(*values: Any, **more: Any) -> Any:
        try:
            return function(*values, **more)
        except (GLEMError, ValueError, TypeError, OSError) as error:
            raise gr.Error(html.escape(" ".join(str(error).split()), quote=False), print_exception=False) from None

    return call


def redraw(gr: Any, page: Any, function: Callable[..., Any], inputs: list[Any], outputs: list[Any]) -> None:
    """Draw the outputs when the page opens, under a sign of work, and when an input changes, without flicker.

    Of quick changes only the last one is drawn.
    """
    settings = {"concurrency_id": "model", "concurrency_limit": 1, "trigger_mode": "always_last"}
    call = reporting(gr, function)
    gr.on([page.load], call, inputs, outputs, show_progress="full", api_name=False, **settings)
    changes = [control.change for control in inputs]
    gr.on(changes, call, inputs, outputs, show_progress="minimal", api_name=function.__name__, **settings)


def serve(model: GLEM, explorer: Explorer, real: bool) -> None:
    """Serve the page until Ctrl-C. Uploads and pictures lie in a temporary folder."""
    # Read when Gradio is imported: no search for newer versions, no history.
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_RUN_HISTORY="False")
    with TemporaryDirectory(prefix="glem-explore-") as folder:
        os.environ.update(GRADIO_TEMP_DIR=folder, MPLCONFIGDIR=folder)
        try:
            import gradio as gr
        except ImportError:
            raise SystemExit("this example needs Gradio: pip install 'glem-augment[explore]'") from None
        page = build_page(gr, explorer, real)
        theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # no web fonts
        served: dict[str, Any] = {"share": False, "max_file_size": "20mb", "ssr_mode": False, "quiet": True}
        _, url, _ = page.launch(theme=theme, css=CSS, footer_links=[], prevent_thread_lock=True, **served)
        print(f"the page is at {url} (Ctrl-C ends it)", flush=True)
        page.block_thread()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=BUNDLED, help="a folder, a bundled model, or org/name on the Hub")
    parser.add_argument("data", nargs="?", help="labelled images, see glem_augment.open_data (default: samples)")
    parser.add_argument("--split", default="test", help="of the images (%(default)s)")
    parser.add_argument("--limit", type=int, default=1000, help="images of the page, evenly spaced (%(default)s)")
    args = parser.parse_args()
    model, place = GLEM.from_pretrained(args.model), args.data or (BUNDLED if args.model == BUNDLED else None)
    if place is None:
        drawn = SyntheticDataset(model, max(1, min(args.limit, 64) // model.num_classes))
        x, y, names = drawn.images(range(len(drawn))).cpu(), torch.as_tensor(drawn.targets), ["sample"] * len(drawn)
    else:
        data = open_data(place, args.split, model.image_shape[1:], model.image_shape[0])
        rows = torch.arange(min(args.limit, len(data))) * len(data) // min(args.limit, len(data))
        label = [model.classes.index(name) if name in model.classes else -1 for name in data.classes]
        if min(label) < 0:
            raise SystemExit(f"{place} has classes that {args.model} lacks: {data.classes[label.index(-1)]}")
        x, y = data.subset(rows.numpy()).tensor(), torch.tensor(label)[torch.as_tensor(data.targets)[rows]]
        names = ["/".join(Path(data.where(row)).parts[-2:]) for row in rows.tolist()]
    serve(model, Explorer(model, x, y, names), place is not None)


if __name__ == "__main__":
    try:
        main()
    except GLEMError as error:
        raise SystemExit(str(error)) from None
