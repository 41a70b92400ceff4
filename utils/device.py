"""Where a run computes."""

import torch

from .cli import UserError


def pick_device(gpu_id: str) -> torch.device:
    """The device that `--gpu_id` names; the CPU, said in one line, where there is no CUDA device.

    Raises:
        UserError: neither `cpu` nor the number of a device that is there.
    """
    if gpu_id == "cpu":
        return torch.device("cpu")
    if not gpu_id.isdigit():
        raise UserError(f"--gpu_id {gpu_id!r} is neither a number nor cpu")
    if not torch.cuda.is_available():
        print("no CUDA device found: running on the CPU")
        return torch.device("cpu")
    if int(gpu_id) >= torch.cuda.device_count():
        raise UserError(
            f"--gpu_id {gpu_id} is not there: the devices are 0 … {torch.cuda.device_count() - 1}"
        )
    return torch.device("cuda", int(gpu_id))
