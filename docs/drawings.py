"""Draw the figures of the modality cycle, the masked diffusion and the standardised score from a slice of the demo.

make demo && python docs/drawings.py
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, for `python docs/drawings.py`

from utils.cli import ArgumentParser, run


def main() -> None:
    args = parse_args()

    import numpy as np
    import torch
    from ml_collections import ConfigDict

    from datasets.brats2021 import BraTS2021Dataset
    from evaluation.results import ERROR_MAPS, read_maps
    from evaluation.window import to_grey
    from models import load_method
    from models.cycle import modality_cycle
    from models.masks import Band
    from scoring.chain import newest_ema
    from scoring.scorer import load_weights
    from utils.experiment import read_record
    from utils.storage import Folder

    def load(model_name: str, direction: str):
        checkpoint = newest_ema(Folder(args.logdir), f"{model_name}_{direction}_phantom_t2_flair")
        config = ConfigDict(read_record(checkpoint.parent)["config"])
        network = load_method(model_name).create_network(config.score_model)
        load_weights(network, checkpoint)
        return network.eval(), config

    backward, config = load("unet", "backward")
    dataset = BraTS2021Dataset(config.data.data_dir, "test", ["flair", "seg", "brainmask"], config.data.image_size)
    example = dataset[args.slice]
    image, brain = example["flair"][None], example["brainmask"][None]

    margin = config.data.image_size // 10  # px of background cropped on all sides
    crop = np.s_[margin:-margin, margin:-margin]

    def grey(picture: torch.Tensor) -> np.ndarray:
        return to_grey(picture[0, 0].numpy()[crop])

    def errors(score: torch.Tensor, where: torch.Tensor) -> np.ndarray:
        return np.where(where[0, 0], score[0, 0], 0)[crop].T

    cycle = modality_cycle(image, load("unet", "forward")[0], backward, batch_size=1)
    top = float(cycle.error[brain].quantile(0.99))
    draw_cycle(
        args.output_dir / "cycle.png",
        [grey(image), grey(cycle.translation), grey(cycle.reconstruction)],
        errors(cycle.error, brain),
        example["seg"][0].numpy()[crop].T,
        top,
    )

    network, config = load("diffusion", "forward")
    translator = load_method("diffusion").create_translator(network, config)
    rows = example["seg"][0].nonzero()[:, 0].float()
    band = Band("horizontal", int(rows.mean()) - config.score_model.mask.width // 2)
    hidden = translator.mask([band])
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        translation = translator.sample(image, [band])
        reconstruction = backward(translation)
    draw_masked_diffusion(
        args.output_dir / "masked_diffusion.png",
        [grey(torch.where(hidden, noise, image)), grey(noise), grey(translation), grey(reconstruction)],
        errors((image - reconstruction).square(), brain & hidden),
        top,
    )

    names = [f"{kind}_phantom_t2_flair" for kind in ("diffusion_forward", "unet_backward")]
    run, maps = read_maps(args.logdir / "results" / f"{'__'.join(names)}__fast" / ERROR_MAPS)
    draw_standardised(
        args.output_dir / "standardised.png",
        {key: value[args.slice][crop].T for key, value in maps["test"][0].items() if value.ndim == 3},
        run["usual_error"],
    )


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description="Draw the method and the standardised score, after `make demo`.")
    parser.add_argument("--slice", type=int, default=9, help="number of the test slice to draw")
    parser.add_argument("--output_dir", type=Path, default=Path("docs"), help="folder for the drawings")
    parser.add_argument("--logdir", type=Path, default=Path("experiments"), help="folder of the demo's experiments")
    return parser.parse_args()


class Canvas:
    """A white figure for slices, boxes and arrows; coordinates are in slice widths."""

    def __init__(self, width: float, height: float):
        from matplotlib.figure import Figure

        self.size = (width, height)
        self.figure = Figure(figsize=(1.5 * width, 1.5 * height))
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(0, height), aspect="equal")
        self.axes.set_axis_off()

    def picture(self, x: float, y: float, image, label: str, **colours) -> None:
        """Draw an image centred at (x, y), with a label above it; `colours` are keyword arguments of `imshow`."""
        self.axes.imshow(image, extent=(x - 0.5, x + 0.5, y - 0.5, y + 0.5), **colours)
        self.axes.text(x, y + 0.56, label, ha="center", va="bottom", fontsize=10)

    def outline(self, x: float, y: float, mask) -> None:
        """Outline a mask [H, W] on the image centred at (x, y)."""
        height, width = mask.shape
        columns = [x - 0.5 + (i + 0.5) / width for i in range(width)]
        rows = [y + 0.5 - (i + 0.5) / height for i in range(height)]
        self.axes.contour(columns, rows, mask, levels=[0.5], colors="#56b4e9", linewidths=1.4)

    def box(self, x: float, y: float, text: str) -> None:
        """Draw a rounded box with a network's name, centred at (x, y)."""
        style = {"boxstyle": "round,pad=0.5", "facecolor": "#dceaf5", "edgecolor": "#0072b2"}
        self.axes.text(x, y, text, ha="center", va="center", fontsize=9.5, bbox=style)

    def arrow(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        self.axes.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "-|>", "color": "0.25", "lw": 1.4})

    def text(self, x: float, y: float, text: str) -> None:
        self.axes.text(x, y, text, ha="center", va="center", fontsize=9.5, color="0.25")

    def save(self, path: Path) -> None:
        # imshow has changed the limits
        self.axes.set(xlim=(0, self.size[0]), ylim=(0, self.size[1]))
        self.figure.savefig(path, dpi=120)
        print(f"drew {path}")


GREY = {"cmap": "gray", "vmin": 0, "vmax": 1}


def draw_cycle(path: Path, pictures: list, error, truth, top: float) -> None:
    """Draw A → B → A and the squared error of A; `top` is the highest error of the colour scale."""
    canvas = Canvas(7.85, 1.55)
    places = [0.7, 2.85, 5.0, 7.15]
    labels = ["A: FLAIR, with a tumour", "B: T2, translated", "A again", "(A − A again)²"]
    for x, picture, label in zip(places, [*pictures, error], labels, strict=True):
        colours = GREY if picture is not error else {"cmap": "inferno", "vmin": 0, "vmax": top}
        canvas.picture(x, 0.6, picture, label, **colours)
    canvas.outline(places[0], 0.6, truth)
    names = ["forward\nUNet, A → B", "backward\nUNet, B → A", "squared\ndifference"]
    for left, right, name in zip(places, places[1:], names, strict=False):
        canvas.arrow((left + 0.52, 0.6), (right - 0.52, 0.6))
        canvas.box((left + right) / 2, 0.6, name)
    canvas.save(path)


def draw_masked_diffusion(path: Path, pictures: list, error, top: float) -> None:
    """Draw MMCCD for one band: a diffusion conditioned on the masked A generates B; only the band's error counts."""
    condition, noise, translation, reconstruction = pictures
    canvas = Canvas(8.55, 3.15)
    canvas.picture(0.7, 2.2, condition, "condition: A, a band\nreplaced by noise", **GREY)
    canvas.picture(0.7, 0.6, noise, "x_T: pure noise", **GREY)
    canvas.arrow((1.22, 2.2), (1.75, 1.75))
    canvas.arrow((1.22, 0.6), (1.75, 1.05))
    canvas.arrow((2.0, 1.4), (2.83, 1.4))
    canvas.box(2.0, 1.4, "conditional\ndenoising UNet,\nstep by step:\nx_t → x_0")
    canvas.picture(3.35, 1.4, translation, "B, imagined\nunder the band", **GREY)
    canvas.arrow((3.87, 1.4), (5.08, 1.4))
    canvas.box(4.45, 1.4, "backward\nUNet, B → A")
    canvas.picture(5.6, 1.4, reconstruction, "A again", **GREY)
    canvas.arrow((6.12, 1.4), (7.48, 1.4))
    canvas.box(6.77, 1.4, "squared\ndifference\nunder the band")
    canvas.picture(8.0, 1.4, error, "error of this band", cmap="inferno", vmin=0, vmax=top)
    canvas.text(
        5.6, 0.4, "repeated for every band, over the whole slice in both directions;\n"
        "a pixel's score is the mean over the bands that hid it"
    )  # fmt: skip
    canvas.save(path)


def draw_standardised(path: Path, maps: dict, error_floor: float) -> None:
    """Draw the steps from a slice's error maps [W, H] to the standardised score; errors are on a square-root scale."""
    from matplotlib.colors import PowerNorm

    from evaluation.window import WINDOW

    grey = {"cmap": "gray", "vmin": WINDOW[0], "vmax": WINDOW[1]}
    error = (maps["image"] - maps["reconstruction"]) ** 2
    brain = maps["brainmask"]
    pictures = {
        "A": (maps["image"], grey),
        "m: mean of its draws": (maps["reconstruction"], grey),
        "√v: their deviation": (maps["variance"] ** 0.5, {"cmap": "inferno", "vmin": 0}),
        "(A − m)²": (error, None),
        "(A − m)² / (v + c)": (error / (maps["variance"] + error_floor), None),
    }
    canvas = Canvas(5.7, 1.45)
    for i, (label, (picture, colours)) in enumerate(pictures.items()):
        if colours is None:
            picture = picture * brain
            highest = sorted(picture[brain])[int(0.99 * brain.sum())]
            colours = {"cmap": "inferno", "norm": PowerNorm(0.5, vmin=0, vmax=highest)}
        x = 0.65 + 1.1 * i
        canvas.picture(x, 0.58, picture, label, **colours)
        canvas.outline(x, 0.58, maps["truth"])
    canvas.save(path)


if __name__ == "__main__":
    run(main)
