"""The command line from end to end, on tiny data."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch._utils import ExceptionWrapper
from torchvision.datasets import ImageFolder

from glem_augment import GLEM, GLEMAugment, open_data
from glem_augment.cli import COMMANDS, build_parser, main
from glem_augment.cli.common import note_licence
from glem_augment.errors import BadImageError
from glem_augment.hub.cards import model_card
from glem_augment.model.files import CHECKPOINT, CONFIG, WEIGHTS
from glem_augment.parts import kinds
from glem_augment.training.checkpoint import has_checkpoint, load_checkpoint

TINY = ["--flow", "depth=[1,1]", "--flow", "width=[8,8]", "--threads", "1", "--sample-every", "0"]
Output = Callable[[], tuple[str, str]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flow of one epoch on three classes of 8x8 RGB images; the images lie beside it."""
    root = tmp_path_factory.mktemp("cli")
    write_images(root / "images", ("bird", "cat", "dog"), (8, 8), 6)
    assert main(["train", str(root / "images"), "--out", str(root / "run"), "--epochs", "2", *TINY]) == 0
    return root / "run"


@pytest.fixture
def output(capsys: pytest.CaptureFixture[str]) -> Output:
    return capsys.readouterr


def write_images(folder: Path, names: tuple[str, ...], size: tuple[int, int], count: int, mode: str = "RGB") -> None:
    """`count` random images (height, width) per class."""
    rng = np.random.default_rng(0)
    for index, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 80, (*size, 3), dtype=np.uint8)
            pixels[..., index % 3] += 150
            Image.fromarray(pixels).convert(mode).save(folder / name / f"{i}.png")


def images_of(run: Path) -> str:
    return str(run.parent / "images")


def fails(argv: list[str], output: Output, *words: str) -> str:
    """The command ends with code 2, and its last line on stderr is an error that holds the words."""
    output()
    try:
        assert main(argv) == 2
    except SystemExit as end:  # argparse's, after a line of usage
        assert end.code == 2
    out, err = output()
    last = err.splitlines()[-1]
    assert last.startswith("glem") and ": error: " in last and "Traceback" not in err and out == "", err
    for word in words:
        assert word in last, last
    return last


# ---- the commands on good input ------------------------------------------------------------------------------------


def test_train_writes_a_model_and_says_what_it_trains(image_folder: Path, tmp_path: Path, output: Output) -> None:
    run = tmp_path / "run"
    argv = ["train", str(image_folder), "--out", str(run), "--epochs", "1", "--seed", "3", "--augment", "paper"]
    assert main([*argv, *TINY, "--schedule", "cosine", "--modes-rank", "2"]) == 0
    out, _ = output()
    assert "12 images, 3x8x8, 3 classes (bird, cat, dog)" in out and "saved" in out
    model = GLEM.from_pretrained(run)
    config = model.config.training["config"]
    assert config["seed"] == 3 and config["schedule"] == "cosine" and config["beta"] == 0.3
    assert config["augment"] == ["flip", "crop", "rotate", "jitter"]
    assert config["flow_options"] == {"depth": [1, 1], "width": [8, 8]}
    assert model.modes is not None and model.modes.rank == 2


def test_a_config_file_and_flags_that_override_it(image_folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "settings.yaml"
    # YAML takes 1e-2 for text.
    config.write_text(
        "lr: 1e-2\nepochs: 7\nobjective: hybrid\naugment: flip\nbeta: 5e-1\n"
        "flow_options: {depth: [2, 2], width: [8, 8]}\nsample_every: 0\n"
    )
    argv = ["train", str(image_folder), "--out", str(tmp_path / "run"), "--config", str(config)]
    assert main([*argv, "--epochs", "1", "--flow", "depth=[1,1]", "--threads", "1"]) == 0
    used = GLEM.from_pretrained(tmp_path / "run").config.training["config"]
    assert (used["lr"], used["epochs"], used["objective"], used["augment"]) == (0.01, 1, "hybrid", ["flip"])
    assert used["flow_options"] == {"depth": [1, 1], "width": [8, 8]}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command: str, output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = output()[0]
    examples = text.split("examples:\n")[1].split("\n\n")[0].splitlines()
    assert sum(line.startswith(f"  glem {command}") for line in examples) >= 1
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "{}")  # tables in files are read at once
    for line in examples:
        words = shlex.split(line, comments=True)[1:]
        assert callable(build_parser(words).parse_args(words).run)
    assert "Exit codes: 0 " in text.split("examples:\n")[1]


def test_fit_makes_a_model_of_pixels(trained: Path, tmp_path: Path, output: Output) -> None:
    write_images(tmp_path / "photos", ("cat", "dog"), (20, 12), 4)
    argv = ["fit", str(tmp_path / "photos"), "--rank", "2", "--out"]
    output()
    assert main([*argv, str(tmp_path / "a"), "--image-size", "16"]) == 0
    assert json.loads(output()[0])["classes"] == ["cat", "dog"]
    model = GLEM.from_pretrained(tmp_path / "a")
    assert model.image_shape == (3, 16, 16) and model.config.flow["preset"] == "identity"
    assert main([*argv, str(tmp_path / "b")]) == 0
    assert GLEM.from_pretrained(tmp_path / "b").image_shape == (3, 20, 12)
    other = ["fit", images_of(trained), "--flow", str(trained), "--image-size", "16", "--out", str(tmp_path / "c")]
    fails(other, output, "image_size", "flow")
    wrong = ["fit", str(tmp_path / "no images"), "--out", str(tmp_path / "d")]  # said before images are read
    fails([*wrong, "--flow", str(trained), "--autoencoder", "taef2"], output, "--autoencoder", "not allowed with")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    fails([*argv, str(tmp_path / "full")], output, "holds notes.txt: give a new folder")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"device 'cuda' can't be used here .*: give cpu"):
            GLEM.from_pretrained(tmp_path / "a", device="cuda")


def test_eval_prints_one_json_object(trained: Path, output: Output) -> None:
    argv = ["eval", str(trained), images_of(trained)]
    output()
    assert main(argv) == 0
    out, err = output()
    result = json.loads(out)
    assert "may have been trained on these images" in err
    fails([*argv, "--split", "val"], output, "has no splits")
    assert result["n"] == 18 and result["split"] is None and result["bits"] == 8
    assert 0 <= result["accuracy"] <= result["top5"] == 1.0
    assert result["model"] == str(trained)
    assert result["bits_per_dim_marginal"] > 0 and np.isfinite(result["bits_per_dim"])
    assert result["round_trip"]["images"] == 18 and result["round_trip"]["within_half_step"] == 1.0

    model = GLEM.from_pretrained(trained)
    data = open_data(images_of(trained))
    right = (model.predict(data.tensor()) == torch.from_numpy(data.targets)).float().mean()
    assert result["accuracy"] == pytest.approx(float(right))


def test_eval_options(trained: Path, tmp_path: Path, output: Output) -> None:
    # A part of the classes, with names of their own that YAML takes for other things; another size; grey.
    write_images(tmp_path / "other", ("010", "no"), (20, 12), 3, mode="L")
    (tmp_path / "map.yaml").write_text("010: cat\nno: dog\n")
    argv = ["eval", str(trained), str(tmp_path / "other"), "--class-map", str(tmp_path / "map.yaml")]
    output()
    assert main([*argv, "--limit", "4", "--round-trip", "0"]) == 0
    result = json.loads(output()[0])
    assert result["n"] == 4 and 0 <= result["ece"] <= 1 and result["round_trip"] is None
    fails(argv[:3], output, "010", "bird", "class_map")


def test_generate_is_reproducible_and_can_be_limited_to_classes(trained: Path, tmp_path: Path, output: Output) -> None:
    base = ["generate", str(trained), "--per-class", "3", "--seed", "5"]
    output()
    assert main([*base, "--out", str(tmp_path / "all")]) == 0
    summary = json.loads(output()[0])
    assert summary["images"] == 9 and summary["per_class"] == {"bird": 3, "cat": 3, "dog": 3} and summary["seed"] == 5
    assert main([*base, "--out", str(tmp_path / "some"), "--per-class", "dog=3, bird=3"]) == 0
    assert json.loads(output()[0])["per_class"] == {"bird": 3, "dog": 3}
    files = {p.relative_to(tmp_path / "some") for p in (tmp_path / "some").rglob("*.png")}
    assert len(files) == 6 and not (tmp_path / "some" / "cat").exists()
    for file in files:
        assert (tmp_path / "some" / file).read_bytes() == (tmp_path / "all" / file).read_bytes()
    other = [*base, "--out", str(tmp_path / "all"), "--source", "gaussian"]
    fails(other, output, "source rfcm (not gaussian)")
    output()
    assert main(["info", str(tmp_path / "all"), "--json"]) == 0
    assert json.loads(output()[0])["settings"]["seed"] == 5


def test_an_unusual_licence_is_told(output: Output) -> None:
    for licence in (None, "mit", "cc-by-nc-4.0", "mitt"):
        note_licence(licence)
    assert output()[1].startswith("glem: 'mitt' is no usual licence")


def generated(argv: list[str], output: Output) -> dict[str, Any]:
    """What `glem generate` prints."""
    output()
    assert main(["generate", *argv]) == 0
    return json.loads(output()[0])


def pixels_of(folder: Path) -> list[tuple[str, bytes]]:
    """Class and pixels of every image of an ImageFolder, in its order."""
    data = ImageFolder(str(folder))
    return [(data.classes[label], image.tobytes()) for image, label in data]


def test_generate_counts_by_class(
    trained: Path, tmp_path: Path, output: Output, caplog: pytest.LogCaptureFixture
) -> None:
    base = [str(trained), "--seed", "5", "--per-class"]
    summary = generated([*base, "dog=2, bird=1", "--out", str(tmp_path / "a")], output)
    assert summary["per_class"] == {"bird": 1, "dog": 2} and summary["images"] == 3
    # torchvision refuses a class without images: there must be no folder for it.
    assert [name for name, _ in pixels_of(tmp_path / "a")] == ["bird", "dog", "dog"]
    (tmp_path / "counts.yaml").write_text("dog: 2\nbird: 1\ncat: 0\n")
    generated([*base, str(tmp_path / "counts.yaml"), "--out", str(tmp_path / "b")], output)
    assert pixels_of(tmp_path / "a") == pixels_of(tmp_path / "b")

    # Real images of another size and other names; one class of the flow is not among them.
    write_images(tmp_path / "real", ("felix", "hond"), (20, 12), 4)
    for i in range(3):
        (tmp_path / "real" / "hond" / f"{i}.png").unlink()
    (tmp_path / "map.json").write_text('{"felix": "cat", "hond": "dog"}')
    argv = [*base, "balance", "--real", str(tmp_path / "real"), "--class-map", str(tmp_path / "map.json")]
    summary = generated([*argv, "--out", str(tmp_path / "c")], output)
    assert summary["per_class"] == {"dog": 3}
    assert f"{tmp_path / 'c'} has no folder for 1 of 2 classes" in caplog.text and "classes.json" in caplog.text
    assert json.loads((tmp_path / "c" / "classes.json").read_text()) == {"cat": 0, "dog": 1}


def test_an_interrupted_export_says_how_to_go_on(
    trained: Path, tmp_path: Path, output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["generate", str(trained), "--per-class", "4", "--out", str(tmp_path / "a b")]
    with monkeypatch.context() as patch:
        patch.setattr("glem_augment.synthetic.draws.Draws.draw", Mock(side_effect=KeyboardInterrupt))
        output()
        assert main(argv) == 130
    command = f"run: {shlex.join(['glem', *argv])}"
    assert output()[1] == f"glem: {tmp_path / 'a b'} is not complete; to finish it, {command}\n"
    fails(["eval", str(trained), str(tmp_path / "a b")], output, "did not finish", command)
    assert main(argv) == 0 and len(open_data(tmp_path / "a b")) == 12


def test_errors_of_memory_and_of_workers_are_told_in_a_line(output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Mock(side_effect=RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    monkeypatch.setattr("glem_augment.cli.info.model_facts", work)
    fails(["info", "bundled:fashion-mnist"], output, "lower --batch-size")
    try:
        raise BadImageError("2.png cannot be read as an image")
    except BadImageError:
        of_worker = ExceptionWrapper(where="in DataLoader worker process 0")  # its message has a traceback
    work.side_effect = lambda name: of_worker.reraise()
    assert fails(["info", "bundled:fashion-mnist"], output) == "glem: error: 2.png cannot be read as an image"


def test_generate_refuses_what_would_have_no_effect(trained: Path, tmp_path: Path, output: Output) -> None:
    base = ["generate", str(trained), "--out", str(tmp_path / "x"), "--per-class"]
    (tmp_path / "many.yaml").write_text("cat: many\n")
    wrong = {
        "balance": "--real", "cat=1,cat=2": "twice", "cow=2": "'cow'", "cat=0": "one image", "=2": "''", "cat=x": "'x'",
        "two": "two", "9999999999999": "at most", str(tmp_path / "none.json"): "none.json",
        str(tmp_path / "many.yaml"): "'many'",
    }  # fmt: skip
    for text, word in wrong.items():
        fails([*base, text], output, word)
    fails([*base, "2", "--class-map", "order"], output, "class_map", "real=")
    fails([*base, "balance", "--real", images_of(trained)], output, "all classes have 6 images")
    assert not (tmp_path / "x").exists()


def test_info(trained: Path, output: Output) -> None:
    output()
    assert main(["info", str(trained)]) == 0
    text = output()[0]
    assert "image_shape: [3, 8, 8]" in text and "bird, cat, dog" in text and "glow_fast" in text and "held_out" in text
    assert main(["info", str(trained), "--json"]) == 0
    facts = json.loads(output()[0])
    assert facts["image_shape"] == [3, 8, 8] and facts["num_classes"] == 3 and facts["parameters"]["flow"] > 0
    assert facts["files"]["model.safetensors"] == (trained / "model.safetensors").stat().st_size


def test_everything_on_grey_images_that_are_not_square(tmp_path: Path, output: Output) -> None:
    write_images(tmp_path / "images", ("a", "b"), (10, 18), 5, mode="L")
    data, run = str(tmp_path / "images"), str(tmp_path / "run")
    # An affine flow of one level, on images resized to 8x16, of which the top 5 bits are modelled.
    options = ["--preset", "glow_tiny", "--flow", "depth=[1]", "--flow", "width=[8]", "--flow", "blocks=[1]"]
    options += ["--image-size", "8", "16", "--bits", "5", "--epochs", "1", "--threads", "1"]
    assert main(["train", data, "--out", run, *options]) == 0
    assert GLEM.from_pretrained(run).image_shape == (1, 8, 16)
    output()
    assert main(["eval", run, data]) == 0
    assert json.loads(output()[0])["bits"] == 5
    assert main(["generate", run, "--per-class", "2", "--out", str(tmp_path / "synthetic")]) == 0
    assert Image.open(tmp_path / "synthetic" / "a" / "000000.png").size == (16, 8)
    assert main(["preview", run, "--out", str(tmp_path / "p.png")]) == 0
    alone = Image.open(tmp_path / "p.png").height
    assert main(["preview", run, data, "--out", str(tmp_path / "p.png")]) == 0
    assert Image.open(tmp_path / "p.png").height > alone
    assert Image.open(tmp_path / "p.png").width > 300


# ---- bad input: exit code 2, one line ------------------------------------------------------------------------------


def test_bad_training_input(image_folder: Path, tmp_path: Path, output: Output) -> None:
    out = ["--out", str(tmp_path / "run")]
    data = str(image_folder)
    fails(["train", data, *out, "--image-size", "10"], output, "divisible by 4", "10x10", "8x8")
    fails(["train", data, *out, "--image-size", "8", "8", "8"], output, "image_size")
    fails(["train", str(tmp_path / "missing"), *out], output, "no such data")
    fails(["train", data, *out, "--flow", "depht=[1,1]"], output, "depht")
    fails(["train", data, *out, "--device", "abacus"], output, "'abacus' can't be used here (there is no such device)")
    fails(["train", data, "--out", str(image_folder / "dog" / "0.png")], output, "0.png is a file")
    fails(["train", data, *out, "--epochs", "0"], output, "epochs must be at least 1")
    fails(["train", data, *out, "--preset", "mef_tny"], output, "'mef_tny'; did you mean mef_tiny?")
    fails(["train", data, *out, "--config", str(tmp_path / "no.yaml")], output, "no.yaml")
    texts = {
        "epoch: 3": "'epoch'",
        "epochz: 1": "did you mean epochs?",
        "- a": "a table",
        "a: [": "YAML",
        "1: 2": "'1'",
        "flow_options: 3": "flow_options",
    }
    for text, word in texts.items():
        (tmp_path / "c.yaml").write_text(text)
        fails(["train", data, *out, "--config", str(tmp_path / "c.yaml"), "--flow", "depth=[1]"], output, word)
    (image_folder / "dog" / "0.png").write_bytes(b"no image")
    fails(["train", data, *out], output, "0.png")
    assert not list(tmp_path.glob("run/*"))


def test_a_flow_of_images_without_classes_is_given_some(image_folder: Path, tmp_path: Path, output: Output) -> None:
    mixed, run, mine = tmp_path / "mixed", str(tmp_path / "run"), str(tmp_path / "mine")
    for path in image_folder.glob("*/*.png"):
        (mixed / "image").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, mixed / "image" / f"{path.parent.name}-{path.name}")
    few = ["--batch-size", "4", "--val-fraction", "0.2", "--epochs", "2", *TINY]
    assert main(["train", str(mixed), "--objective", "mle", "--out", run, "--resume", *few]) == 0
    text, notes = output()
    assert f"no checkpoint in {run}" in notes
    assert "12 images, 3x8x8, 1 classes (image)" in text and "objective  mle" in text and "accuracy" not in text
    model = GLEM.from_pretrained(run)
    assert model.classes == ["image"] and set(model.config.training["held_out"]) == {"val_images", "val_bits_per_dim"}
    assert float(model.gaussians.mu.abs().max()) > 0  # learned with the flow
    assert main(["fit", str(image_folder), "--flow", run, "--rank", "2", "--out", mine]) == 0
    data = open_data(image_folder)
    aug = GLEMAugment(GLEM.from_pretrained(mine), p=1.0)
    x, y = aug(data.tensor(), torch.from_numpy(data.targets))
    assert x.shape == (12, 3, 8, 8) and aug.model.classes == ["bird", "cat", "dog"]


def test_an_existing_run_is_not_overwritten(trained: Path, image_folder: Path, tmp_path: Path, output: Output) -> None:
    data, before = images_of(trained), (trained / CHECKPOINT).read_bytes()
    options = ["--out", str(trained), "--epochs", "2", *TINY]
    fails(["train", data, *options], output, CHECKPOINT, "--resume")
    fails(["train", data, *options, "--resume", "--seed", "5"], output, "seed: 0 then, 5 now")
    fails(["train", str(image_folder), *options, "--resume"], output, "other data")
    assert (trained / CHECKPOINT).read_bytes() == before
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / CONFIG).write_text("{}")
    fails(["train", data, "--out", str(tmp_path / "run")], output, CONFIG)


def test_damaged_models(trained: Path, tmp_path: Path, output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / CONFIG).write_bytes((trained / CONFIG).read_bytes())
    weights = (trained / WEIGHTS).read_bytes()
    (broken / WEIGHTS).write_bytes(weights[: len(weights) // 2])
    for argv in (["generate", str(broken), "--per-class", "1", "--out", str(tmp_path / "g")], ["info", str(broken)]):
        fails(argv, output, "model.safetensors", "truncated")
    assert not (tmp_path / "g").exists()
    fails(["info", str(tmp_path / "nothing")], output, "no model at")
    fails(["info", str(tmp_path / "brokn")], output, f"did you mean {broken}?")
    fails(["info", "~nobody-here/x"], output, "~nobody-here/x")
    fails(["eval", "bundled:nothing", images_of(trained)], output, "no bundled model")
    monkeypatch.setenv("GLEM_DEBUG", "1")
    assert main(["info", str(broken)]) == 2
    assert "Traceback" in output()[1]


def test_interruption_and_a_closed_pipe(
    trained: Path, tmp_path: Path, output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    # At work, and while torch is imported.
    for place in ("glem_augment.cli.info.model_facts", "glem_augment.cli.import_module"):
        with monkeypatch.context() as patch:
            patch.setattr(place, Mock(side_effect=KeyboardInterrupt))
            output()
            assert main(["info", str(trained)]) == 130
            assert output() == ("", "glem: interrupted\n")
    # A reader that has left before anything is written; a forked process need not import torch again.
    pid = os.fork()
    if not pid:
        read, write = os.pipe()
        os.close(read)
        os.dup2(write, 1)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), (tmp_path / "errors").open("w")
        with suppress(BaseException):
            code = main(["info", str(trained)])
            sys.stderr.flush()
            sys.stdout.flush()  # as Python does at its end
            os._exit(code)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 and (tmp_path / "errors").read_text() == ""


WITHOUT_TORCH = """
import sys
from glem_augment.cli import main
for argv in {}:
    try:
        code = main(argv)
    except SystemExit as end:
        code = end.code
    print(code, "torch" in sys.modules)
"""


def test_help_and_slips_are_answered_without_torch(tmp_path: Path) -> None:
    helps = [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)]
    slips = {
        "--augmnet": ["train", "x", "--out", "y", "--augmnet", "flip"],
        "'trian'": ["trian", "x"],
        "'hybird'": ["train", "x", "--objective", "hybird"],
        "are required: --out": ["train", "x"],
        "COMMAND": [],
        "--limit: invalid": ["eval", "m", "d", "--limit", "x"],
        "no.yaml": ["train", "x", "--out", "y", "--config", "no.yaml"],
    }
    code = WITHOUT_TORCH.format([*helps, *slips.values()])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    ends = [line for line in done.stdout.splitlines() if re.fullmatch(r"\d (True|False)", line)]
    assert ends == ["0 False"] * len(helps) + ["2 False"] * len(slips), done.stderr
    errors = [line for line in done.stderr.splitlines() if ": error: " in line]
    assert all(word in line for word, line in zip(slips, errors, strict=True)), errors
    assert all(f"    {name} " in done.stdout for name in COMMANDS) and "glem-augment 0" in done.stdout


EXTENSIONS = """
import torch.nn.functional as F
from glem_augment import Policy
from glem_augment.codec import Codec, register_codec, to_unit
from glem_augment.flows import Coupling, register_coupling


class Shrink(Policy):
    def draw(self, selected, generator):
        return {}

    def move(self, batch):
        return 0.5 * batch.z


@register_codec("halves-of-a-user")
class Halves(Codec):
    def __init__(self, image_shape):
        channels, height, width = image_shape
        super().__init__(image_shape, (channels, height // 2, width // 2))

    def encode(self, x, noise=None):
        return F.avg_pool2d(to_unit(x, self.dtype), 2)

    def decode(self, h):
        return F.interpolate(h, scale_factor=2)


@register_coupling("shift-of-a-user")
class Shift(Coupling):
    def __init__(self, channels, subnet):
        super().__init__(channels)
        self.net = subnet(self.n, self.n)

    def transform(self, x2, params, inverse=False):
        shift = params.transpose(0, 1)
        return (x2 - shift if inverse else x2 + shift), x2.new_zeros(x2.shape[1])
"""


def test_every_command_takes_parts_of_the_users(
    image_folder: Path, tmp_path: Path, output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(EXTENSIONS)
    (tmp_path / "broken.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    data, codec = str(image_folder), ["--autoencoder", "halves-of-a-user"]
    short = ["--flow", "coupling=shift-of-a-user", *codec, "--epochs", "1", *TINY]
    for name in ("nowhere_at_all", "broken"):
        fails(["info", "run", "--import", name], output, f"--import {name}")
    fails(["fit", data, "--out", "fit", *codec], output, "halves-of-a-user")
    fails(["train", data, "--out", "run", *short[:2], *TINY], output, "shift-of-a-user")
    for argv in (
        ["fit", data, "--out", "fit", *codec], ["train", data, "--out", "run", *short],
        ["train", data, "--init", "run", "--out", "tuned", *short], ["eval", "run", data],
        ["generate", "run", "--per-class", "2", "--out", "made"], ["info", "fit"],
        ["preview", "fit", data, "--out", "p.png"],
        ["fit", data, "--flow", "run", "--out", "again"],
    ):  # fmt: skip
        assert main([*argv, "--import", "mine"]) == 0, (argv, output())
    del kinds("policy")["shrink"]
    assert main(["preview", "fit", data, "--out", "q.png"]) == 0
    assert Image.open("p.png").height > Image.open("q.png").height  # which lacks the user's policy
    config = GLEM.from_pretrained("tuned").config
    assert (config.autoencoder["name"], config.flow["coupling"]) == ("halves-of-a-user", "shift-of-a-user")


# ---- a run killed at any instant -----------------------------------------------------------------------------------


def test_one_process_trains_in_a_folder_at_a_time_and_says_how_to_go_on(
    image_folder: Path, tmp_path: Path, output: Output
) -> None:
    run = tmp_path / "run"
    argv = ["train", str(image_folder), "--out", str(run), "--epochs", "2000", *TINY, "--batch-size", "2"]
    pipes: dict[str, Any] = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen([sys.executable, "-m", "glem_augment", *argv], **pipes)
    try:
        assert process.stdout is not None and process.stdout.readline().startswith("data ")
        while process.poll() is None and not has_checkpoint(run):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert errors.startswith("glem: stopped at step") and "--resume" in errors and len(errors.splitlines()) == 1
    assert load_checkpoint(run)["step"] > 0
    # Where nothing came of a run, no folder stays behind.
    new = ["train", str(image_folder), "--out", str(tmp_path / "new"), *TINY, "--batch-size", "2"]
    fails([*new, "--flow", "sides=3"], output, "sides")
    assert not (tmp_path / "new").exists()


def test_a_flow_that_has_learned_nothing_says_so(image_folder: Path, tmp_path: Path, output: Output) -> None:
    argv = ["train", str(image_folder), "--epochs", "1", *TINY, "--val-fraction", "0.4"]
    assert main([*argv, "--out", str(tmp_path / "run")]) == 0
    out, err = output()
    bits = re.search(r"epoch 1/1: ([0-9.]+) bits/dim, accuracy", out)[1]  # type: ignore[index]
    model = GLEM.from_pretrained(tmp_path / "run")
    pixels = model.config.training["independent_pixels"]
    assert float(bits) > pixels and f"independent numbers, {pixels:.3f}: " in err.splitlines()[-1]
    assert "this model was worse than independent numbers" in model_card(model, "a/b").text


def test_a_run_says_what_it_trains_before_the_flow_is_initialised(
    image_folder: Path, tmp_path: Path, output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = str(tmp_path / "run")
    argv = ["train", str(image_folder), "--out", run, "--epochs", "1", "--batch-size", "4", *TINY]
    with monkeypatch.context() as patch:
        patch.setattr("glem_augment.training.trainer.initialise", Mock(side_effect=KeyboardInterrupt))
        assert main(argv) == 130
    assert "12 images, 3x8x8" in output()[0]
