"""The explorer: a local web page of samples, moves, lines and measurements. Gradio is imported when it is opened."""

from __future__ import annotations

import html
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from glem_augment import GLEMError
from glem_augment.apps.explorer import LONGEST, Explorer
from glem_augment.evaluation import calibration_error, visible

POLICIES = ("mixup", "noise", "adversarial")
MOST_BYTES = "20mb"  # of an upload
MODES = 8  # that have a slider
SURPRISES = 12  # images of the lowest likelihood that are shown
SHOWN = 256  # pixels to which small images are enlarged
STRENGTH, FIRST = 0.25, 3  # at the start: most moves are kept, and the move along the first mode is visible
LIKELIEST = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#b279a2")  # colours of the likeliest classes along a line
BUSY = threading.Lock()  # held while the page computes
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


@contextmanager
def opened_gradio() -> Iterator[Any]:
    """The module gradio, imported for a page without traces. Uploads and pictures lie in a temporary folder.

    Raises:
        GLEMError: Gradio is not installed.
    """
    # Read when Gradio is imported: no search for newer versions, no history.
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_RUN_HISTORY="False")
    with TemporaryDirectory(prefix="glem-explore-") as folder:
        os.environ.update(GRADIO_TEMP_DIR=folder, MPLCONFIGDIR=folder)
        try:
            import gradio
        except ImportError:
            raise GLEMError("glem explore needs Gradio: pip install 'glem-augment[explore]'") from None
        yield gradio


def serve(gr: Any, explorer: Explorer, real: bool, say: Callable[[str], object]) -> None:
    """Serve the page until Ctrl-C.

    Args:
        gr: from `opened_gradio`. real: whether the explorer has real images. say: is given the address in a sentence.
    """
    page = build_page(gr, explorer, real)
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # no web fonts
    served: dict[str, Any] = {"share": False, "max_file_size": MOST_BYTES, "ssr_mode": False, "quiet": True}
    # Gradio serves 127.0.0.1 alone, unless GRADIO_SERVER_NAME says otherwise.
    _, url, _ = page.launch(theme=theme, css=CSS, footer_links=[], prevent_thread_lock=True, **served)
    say(f"glem explore is at {url} (Ctrl-C ends it)")
    page.block_thread()
    with BUSY:  # Python aborts if a thread still computes when it ends
        pass


def build_page(gr: Any, explorer: Explorer, real: bool) -> Any:
    """The page as a `gradio.Blocks`. A model without modes has no tab for moves; without real images, none for data."""
    model, images = explorer.model, f"images of `{explorer.data.name}`" if real else "of its samples"
    with gr.Blocks(title="glem explore", analytics_enabled=False, delete_cache=(600, 600)) as page:
        gr.Markdown(f"# Explore a model\n\n`{model!r}`, and {len(explorer.data)} {images}")
        with gr.Tab("Samples"), gr.Row():
            inputs = sample_controls(gr, explorer)
            with pictures(gr):
                sheet = picture(gr, "Samples")
            redraw(gr, page, explorer.sample_sheet, inputs, [sheet], "samples")
        if model.modes is not None:
            with gr.Tab("Move"), gr.Row():
                move_tab(gr, page, explorer, min(MODES, model.modes.rank))
        with gr.Tab("Between"), gr.Row():
            between_tab(gr, page, explorer)
        if real:
            with gr.Tab("Data"):
                data_tab(gr, explorer)
    return page.queue(default_concurrency_limit=1, max_size=64)


# ---- tabs ------------------------------------------------------------------------------------------------------------


def move_tab(gr: Any, page: Any, explorer: Explorer, modes: int) -> None:
    names, unit = explorer.model.classes, explorer.model.likelihood[1].capitalize()

    def show(number: int, file: str | None, cls: int, policy: Any, strength: float, seed: int, *sliders: float) -> Any:
        image, own = explorer.picked(number, file)
        cls = own if cls < 0 else cls
        by_hand = policy == "sliders"
        moved = explorer.move(image, cls, "noise" if by_hand else policy, strength, seed, sliders if by_hand else None)
        change = moved.image.float() - image.float()
        largest = float(change.abs().max())
        why = "its values are out of range, or the model does not give the original back"
        fate = f"**GLEMAugment rejects**: {why}" if moved.rejected else "GLEMAugment uses"
        facts = (
            f"A move along the modes of {names[cls]}, which {fate}. {unit} given that class: {moved.likelihood[0]:.3f} "
            f"before, {moved.likelihood[1]:.3f} after. The largest change of a pixel is {largest:.0f} of 255."
        )
        bars = (dict(zip(names, row, strict=True)) for row in moved.posterior.tolist())
        return *map(shown, (image, moved.image, 0.5 + 0.5 * change / max(1.0, largest))), facts, *bars

    with gr.Column(scale=1):
        inputs = image_controls(gr, explorer, "Image")
        choices = [("class of the image; of a file, the likeliest", -1), *zip(names, range(len(names)), strict=True)]
        inputs.append(gr.Dropdown(choices, value=-1, label="Class along whose modes it moves"))
        policies = [("sliders below", "sliders"), *((name, name) for name in POLICIES)]
        inputs.append(gr.Radio(policies, value="sliders", label="Policy: how the move is chosen"))
        strength = "factor on the sliders or the noise; of mixup, twice 1 - keep"
        inputs.append(gr.Slider(0, 2, STRENGTH, step=0.05, label="Strength", info=strength))
        inputs.append(gr.Number(0, label="Seed", minimum=0, precision=0))
        for i in range(modes):
            inputs.append(gr.Slider(-3, 3, 0 if i else FIRST, step=0.1, label=f"Mode {i + 1}, in standard deviations"))
    with pictures(gr):
        with gr.Row():
            outputs = [picture(gr, label) for label in ("Original", "Moved", "Difference (grey: none)")]
        outputs.append(gr.Markdown())
        with gr.Row(visible=len(names) > 1):
            outputs += [gr.Label(label=f"Posterior {when}", num_top_classes=5) for when in ("before", "after")]
    redraw(gr, page, show, inputs, outputs, "move")


def between_tab(gr: Any, page: Any, explorer: Explorer) -> None:
    names = explorer.model.classes

    def show(first: int, first_file: str | None, second: int, second_file: str | None, share: float) -> Any:
        import pandas  # which Gradio brings

        start, end = explorer.picked(first, first_file)[0], explorer.picked(second, second_file)[0]
        middle, shares, posterior = explorer.between(start, end, share)
        likeliest = posterior.amax(0).argsort(descending=True)[: len(LIKELIEST)].tolist()
        rows = [(x, float(posterior[i, k]), names[k]) for k in likeliest for i, x in enumerate(shares.tolist())]
        curve = pandas.DataFrame(rows, columns=["share", "probability", "class"])
        colours = dict(zip((names[k] for k in likeliest), LIKELIEST, strict=False))
        legend = (f'<b style="color: {c}">&#9632;</b> {html.escape(name)}' for name, c in colours.items())
        plot = gr.LinePlot(value=curve, color_map=colours)
        return *map(shown, (start, middle, end)), " &ensp; ".join(legend), plot

    with gr.Column(scale=1):
        inputs = image_controls(gr, explorer, "First image")
        inputs += image_controls(gr, explorer, "Second image", len(explorer.data) - 1)
        inputs.append(gr.Slider(0, 1, 0.5, step=0.01, label="Share of the second image"))
    with pictures(gr):
        with gr.Row():
            outputs = [picture(gr, label) for label in ("First", "Between", "Second")]
        axes = {"x": "share", "y": "probability", "color": "class", "y_lim": [0, 1]}
        with gr.Column(visible=len(names) > 1):
            outputs.append(gr.HTML())  # the plot's legend does not wrap
            outputs.append(gr.LinePlot(label="Posterior along the line", colors_in_legend=[], **axes))
    redraw(gr, page, show, inputs, outputs, "between")


def data_tab(gr: Any, explorer: Explorer) -> None:
    names, data, bar = explorer.model.classes, explorer.data, gr.Progress(track_tqdm=True)
    unit = explorer.model.likelihood[1]

    def measure(progress: Any = bar) -> Any:
        posterior, bits, y = explorer.measured
        (confidence, best), own = posterior.max(1), posterior.gather(1, y[:, None])[:, 0]
        right = best == y
        facts = f"{float(bits.mean()):.3f} {unit} given the class"
        if len(names) > 1:
            facts += f", accuracy {100 * float(right.double().mean()):.2f} %, expected calibration error "
            facts += f"{calibration_error(confidence, right):.4f}"
        unlikely, odd = (order[:SURPRISES].tolist() for order in (bits.argsort(descending=True), own.argsort()))
        first = [entry(i, f"{names[y[i]]}, {bits[i]:.2f} {unit}") for i in unlikely]
        second = [entry(i, f"{names[y[i]]}? {names[best[i]]}, {100 * confidence[i]:.0f} %") for i in odd]
        return facts, first, second

    def entry(row: int, text: str) -> tuple[Image.Image, str]:
        return shown(explorer.shown[row][0]), f"{text}, {'/'.join(Path(data.where(row)).parts[-2:])}"

    button = gr.Button(f"Measure the model on {len(data)} images", variant="primary")
    outputs = [gr.Markdown()]
    for title, there in (("The least likely images", True), ("The least likely labels", len(names) > 1)):
        settings = {"height": "auto", "interactive": False, "format": "png", "buttons": ["download"]}
        outputs.append(gr.Gallery(label=title, visible=there, **settings))
    button.click(reporting(gr, measure), None, outputs, api_name="measure")
    gr.Markdown("## Are samples copies of real images?")
    with gr.Row():
        inputs = sample_controls(gr, explorer)
        with pictures(gr):
            compare = gr.Button("Find the real images nearest to samples")
            outputs = [picture(gr, "Samples and the real images nearest to them"), gr.Markdown()]
    compare.click(reporting(gr, explorer.neighbours), inputs, outputs, api_name="neighbours")


# ---- pieces ----------------------------------------------------------------------------------------------------------


def sample_controls(gr: Any, explorer: Explorer) -> list[Any]:
    sources = ["gaussian"] if explorer.model.modes is None else ["rfcm", "gaussian"]
    with gr.Column(scale=1):
        return [
            gr.Dropdown([(name, i) for i, name in enumerate(explorer.model.classes)], value=0, label="Class"),
            gr.Slider(0, 1.5, 0.9, step=0.05, label="Temperature", info="factor on the standard deviation"),
            gr.Radio(sources, value=sources[0], label="Source", info="rfcm: mean and covariance of real latents"),
            gr.Number(0, label="Seed", minimum=0, precision=0),
        ]


def image_controls(gr: Any, explorer: Explorer, name: str, value: int = 0) -> list[Any]:
    return [
        gr.Slider(0, len(explorer.data) - 1, value, step=1, label=f"{name}: number in the data"),
        gr.File(label=f"{name}: a file instead, {MOST_BYTES} at most", file_types=["image"], height=170),
    ]


def pictures(gr: Any) -> Any:
    return gr.Column(scale=2, elem_classes="pictures")


def picture(gr: Any, label: str) -> Any:
    buttons = ["download", "fullscreen"]  # without "share", which sends the picture to the Hub
    settings = {"format": "png", "type": "pil", "interactive": False, "min_width": 100}
    return gr.Image(label=label, alt_text=label, buttons=buttons, **settings)


def shown(image: Tensor) -> Image.Image:
    """An image [C, H, W], uint8 or float in [0, 1], in a size that people can see."""
    return to_pil_image(visible(image[None], SHOWN, LONGEST)[0])


def reporting(gr: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function; its errors become one sentence on the page."""

    @wraps(function)
    def call(*values: Any) -> Any:
        try:
            with BUSY:
                return function(*values)
        except (GLEMError, ValueError, TypeError, OSError) as error:
            raise gr.Error(html.escape(" ".join(str(error).split()), quote=False), print_exception=False) from None

    return call


def redraw(gr: Any, page: Any, function: Callable[..., Any], inputs: list[Any], outputs: list[Any], name: str) -> None:
    """Draw the outputs when the page opens and when an input changes. Of quick changes only the last is drawn."""
    triggers = [page.load, *(control.change for control in inputs)]
    settings = {"show_progress": "hidden", "trigger_mode": "always_last", "api_name": name}
    gr.on(triggers, reporting(gr, function), inputs, outputs, **settings)
