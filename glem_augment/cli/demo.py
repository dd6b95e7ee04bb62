"""`glem demo`: what the library does, in four parts, on one HTML page."""

from __future__ import annotations

import argparse
import base64
import io
import time
from collections.abc import Callable, Sequence
from functools import partial
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from glem_augment import __version__
from glem_augment.cli import common

if TYPE_CHECKING:
    from torch import Tensor

    from glem_augment.cli.demo_parts import Part
    from glem_augment.evaluation.preview import Section

DESCRIPTION = """\
Show what the library does, with what is inside the package: move photographs, draw a synthetic data set, train small
networks on samples alone and on real images, and measure the bundled flow. DIR gets index.html, one page with all
pictures and numbers, and also the pictures, report.json and the synthetic images. Needs no network and no GPU; it
takes about a minute.
"""
EXAMPLES = """\
  glem demo
  glem demo --photos my-photos/ --out my-demo
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.describe(parser, DESCRIPTION, EXAMPLES)
    parser.add_argument("--out", type=common.out_folder, default="demo-out", metavar="DIR", help="(default: demo-out)")
    photos = "a folder of photographs to move, nested in any way (default: three that ship)"
    parser.add_argument("--photos", default="bundled:photographs", metavar="DATA", help=photos)
    parser.add_argument("--quick", action="store_true", help="a smoke test of seconds: few images, numbers mean little")


def run(args: argparse.Namespace) -> None:
    """Write index.html, report.json, synthetic/ and a picture of each part, and print what was found."""
    import torch

    from glem_augment.cli import demo_parts
    from glem_augment.evaluation.preview import compose
    from glem_augment.io import atomic_write, save_png, write_json

    # The networks are small. Beside other busy processes a second thread would make them slower by far.
    torch.set_num_threads(1)
    began, say = time.monotonic(), partial(print, flush=True)
    size, out, progress = demo_parts.QUICK if args.quick else demo_parts.Size(), args.out, not args.quiet
    say("glem demo: four parts, about a minute" if not args.quick else "glem demo, quick: the numbers mean little")
    makers: dict[str, Callable[[], tuple[Part, dict[str, Any]]]] = {
        "photographs": lambda: demo_parts.photographs(args.photos, size, progress),
        "synthetic": lambda: demo_parts.synthetic(out, size, progress),
        "classifiers": lambda: demo_parts.classifiers(size, progress),
        "flow": lambda: demo_parts.measured_flow(size, progress),
    }
    parts: list[Part] = []
    report: dict[str, Any] = {"quick": args.quick, "size": vars(size)}
    for name, make in makers.items():
        part, report[name] = make()
        parts.append(part)
        say(f"{len(parts)}. {part.title}: {' '.join(part.found)}")
        if part.section is not None:
            save_png(compose(part.title, "", [part.section]), out / f"{name}.png")
    report |= {"seconds": round(time.monotonic() - began, 1), "cpu_seconds": round(time.process_time(), 1)}
    write_json(out / "report.json", common.finite(report))
    with atomic_write(out / "index.html", "w") as file:
        file.write(page(parts, report))
    say(f"Done in {report['seconds']:.0f} s. Open {out / 'index.html'} in a browser.")


# ---- the page --------------------------------------------------------------------------------------------------------


def page(parts: Sequence[Part], report: dict[str, Any]) -> str:
    """One HTML file that loads nothing: demo.html with these parts."""
    template = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    return template.substitute(
        quick="<p class=found>A quick run: the numbers mean little.</p>" if report["quick"] else "",
        parts="".join(shown(number, part) for number, part in enumerate(parts, 1)),
        version=__version__,
        seconds=f"{report['seconds']:.0f}",
        cpu_seconds=f"{report['cpu_seconds']:.0f}",
    )


def shown(number: int, part: Part) -> str:
    """The HTML of a part."""
    lines = [f"<section><h2><span>{number}</span>{escape(part.title)}</h2>", f"<p>{escape(part.text)}</p>"]
    lines += [f"<pre>{escape(part.code)}</pre>"]
    if part.section is not None:
        lines.append(picture(part.section))
    if part.table:
        head, *rows = part.table
        lines.append('<table class="numbers">' + row("th", head) + "".join(row("td", each) for each in rows))
        lines.append("</table>")
    lines.append(f'<p class="found">{"<br>".join(escape(text) for text in part.found)}</p></section>')
    return "\n".join(lines)


def row(tag: str, texts: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(text)}</{tag}>" for text in texts) + "</tr>"


def picture(section: Section) -> str:
    """The cells of a section as a table of images, so that its labels are text that stays legible on a small screen."""
    columns, small = list(section.columns), max(section.cells.shape[-2:]) <= 64
    rows = []
    for number, images in enumerate(section.cells):
        label = section.rows[number] if section.rows else ""
        names = [f"{label} {columns[i] if columns else i + 1}".strip() for i in range(len(images))]
        cells = (
            f'<td data-label="{escape(name)}"><img alt="{escape(name)}" src="{data_uri(image, small)}"></td>'
            for name, image in zip(names, images, strict=True)
        )
        head = f"<th>{escape(label)}</th>" if section.rows else ""
        rows.append(f"<tr>{head}{''.join(cells)}</tr>")
    head = f"<thead>{row('th', columns)}</thead>" if columns else ""
    return f'<table class="cells {"small" if small else "large"}">{head}<tbody>{"".join(rows)}</tbody></table>'


def data_uri(image: Tensor, lossless: bool) -> str:
    """An image, uint8 [C,H,W], as PNG or JPEG inside an address."""
    from torchvision.transforms.functional import to_pil_image

    file, kind = io.BytesIO(), "png" if lossless else "jpeg"
    to_pil_image(image).save(file, kind, quality=92)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
