"""A PyTorch program that repeats one step for as long as it may and never pauses.

`matmul` multiplies matrices, `diffusion` is a denoiser's block of convolutions and
attention again and again, `train` trains a small transformer.
"""

import argparse
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import talk
import torch
from torch import Tensor, nn
from torch.nn import functional

Step = Callable[[], object]
# Steps that are handed to the GPU before the oldest has ended.
_DEPTH = 3


def _matmul(device: str, small: bool) -> Step:
    size = 128 if small else 4096
    matrices = [torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2)]

    def step() -> None:
        for _ in range(4):
            torch.matmul(matrices[0], matrices[1])

    return step


class _Block(nn.Module):
    """Two convolutions and attention over all places of a picture."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self._heads = heads
        self.norms = nn.ModuleList(nn.GroupNorm(32, channels) for _ in range(3))
        self.convolutions = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.inner = nn.Linear(channels, 3 * channels)
        self.outer = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """The picture after the block."""
        y = x
        for norm, convolution in zip(self.norms, self.convolutions, strict=False):
            y = convolution(functional.silu(norm(y)))
        x = x + y
        batch, channels, height, width = x.shape
        places = self.norms[2](x).flatten(2).transpose(1, 2)
        parts = self.inner(places).view(batch, height * width, 3, self._heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(query, key, value)
        seen = self.outer(seen.transpose(1, 2).reshape(batch, height * width, channels))
        return x + seen.transpose(1, 2).reshape(x.shape)


def _diffusion(device: str, small: bool) -> Step:
    channels, side, batch, blocks = (64, 8, 1, 1) if small else (320, 64, 8, 8)
    model = nn.Sequential(*(_Block(channels, 8) for _ in range(blocks)))
    model.to(device, torch.bfloat16).to(memory_format=torch.channels_last)
    noise = torch.randn(batch, channels, side, side, device=device, dtype=torch.bfloat16)
    picture = noise.to(memory_format=torch.channels_last)

    def step() -> None:
        with torch.no_grad():
            model(picture)

    return step


def _train(device: str, small: bool) -> Step:
    width, layers, batch, length = (64, 1, 2, 16) if small else (1024, 8, 16, 512)
    layer = nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    model = model.to(device, torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    given = torch.randn(batch, length, width, device=device, dtype=torch.bfloat16)
    wanted = torch.randn_like(given)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        functional.mse_loss(model(given), wanted).backward()
        optimizer.step()

    return step


_WORKS = {"matmul": _matmul, "diffusion": _diffusion, "train": _train}


class Loop:
    """Repeats the step while it is told to."""

    def __init__(self, step: Step, cuda: bool) -> None:
        self._step, self._cuda = step, cuda
        self._goes = threading.Event()
        self._steps = 0
        self._flying: deque[Any] = deque()

    def run(self) -> None:
        """For ever."""
        while True:
            if not self._goes.is_set():
                while self._flying:
                    self._land()
                self._goes.wait()
            self._step()
            if self._cuda:
                event = torch.cuda.Event(blocking=True)
                event.record()
                self._flying.append(event)
                if len(self._flying) == _DEPTH:
                    self._land()
            else:
                self._steps += 1

    def _land(self) -> None:
        self._flying.popleft().synchronize()
        self._steps += 1

    def handlers(self) -> dict[str, talk.Handler]:
        """What it understands."""
        return {
            **talk.turning(self._goes),
            "count": lambda _: {"ns": time.monotonic_ns(), "steps": self._steps},
        }


def main() -> None:
    """Waits for commands; nothing runs before `go`."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("work", choices=tuple(_WORKS))
    add("--device", default="cuda", help="cuda or cpu")
    add("--small", action="store_true", help="a size for trying it on a CPU")
    options = parser.parse_args()
    torch.manual_seed(1)
    cuda = options.device != "cpu"
    step = _WORKS[options.work](options.device, options.small)
    # Libraries choose and load their kernels in the first steps.
    for _ in range(3):
        step()
    if cuda:
        torch.cuda.synchronize()
    loop = Loop(step, cuda)
    talk.ready()
    talk.listen(loop.handlers())
    loop.run()


if __name__ == "__main__":
    main()
