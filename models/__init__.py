"""The methods that the command lines train and test: one module each, and one line of `METHODS`.

Start with cyclic_unet.py and mmccd.py, the two methods of the paper (Liang et al. 2023). masked_diffusion.py and
masks.py hold MMCCD's forward translator and its bands, cycle.py the cyclic error. The other methods are baselines.
"""

from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .method import Method


class Entry(NamedTuple):
    """The part of a method's description that command lines and tables need before torch is imported.

    Attributes:
        key: the method's name in metrics.json; its module in this package has the same name.
        title: its name in tables and figures.
        one_way: title of the one-way score of a translator; empty for a method that reconstructs its input.
        backward: `--model_name` of the backward translator, if that is not the method itself.
    """

    key: str
    title: str
    one_way: str = ""
    backward: str = ""

    @property
    def translates(self) -> bool:
        """Whether the method translates to another modality, so that two translators make a cycle."""
        return bool(self.one_way)


# By --model_name.
METHODS = {
    "unet": Entry("cyclic_unet", "Cyclic UNet", one_way="UNet, one way"),
    "diffusion": Entry("mmccd", "MMCCD", one_way="masked diffusion, one way", backward="unet"),
    "histogram": Entry("cyclic_histogram", "histogram cycle", one_way="histogram, one way"),
    "autoencoder": Entry("autoencoder", "autoencoder"),
    "dae": Entry("dae", "denoising autoencoder"),
    "ddpm": Entry("ddpm", "AnoDDPM"),
}


def load_method(model_name: str) -> "Method":
    """Import a method's module, and torch with it; return its description."""
    return import_module(f"{__name__}.{METHODS[model_name].key}").METHOD


def method_help() -> str:
    """Return the help of `--model_name`."""
    kinds = {True: "", False: ", which reconstructs its input"}
    return "; ".join(f"{name}: {entry.title}{kinds[entry.translates]}" for name, entry in METHODS.items())


def titles() -> dict[str, str]:
    """Return the titles of all methods and one-way scores by their names in metrics.json."""
    one_way = {f"one_way_{name}": entry.one_way for name, entry in METHODS.items() if entry.translates}
    return {entry.key: entry.title for entry in METHODS.values()} | one_way
