"""A PyTorch program whose results are the same bits every time it is not disturbed.

Each job is computed from a seed and answered with a digest of all its results.
"""

import argparse
import hashlib
import os
import time
from collections.abc import Callable
from typing import Any

# Before PyTorch is loaded: cuBLAS then uses the same workspace each time.
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"

import talk  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional  # noqa: E402


class Jobs:
    """The jobs; `scale` multiplies how much each does."""

    def __init__(self, device: str, small: bool) -> None:
        self._device, self._cuda = device, device != "cpu"
        self._size = 64 if small else 4096
        self._width = 32 if small else 1024

    def matmul(self, scale: int) -> list[Tensor]:
        """A chain of products, each of the one before."""
        torch.manual_seed(11)
        size = self._size
        x = torch.randn(size, size, device=self._device, dtype=torch.bfloat16)
        weight = torch.randn(size, size, device=self._device, dtype=torch.bfloat16) * 2 * size**-0.5
        # With this factor the chain is chaotic: no difference is forgotten.
        for _ in range(scale):
            x = torch.tanh(x @ weight)
        return [x]

    def graph(self, scale: int) -> list[Tensor]:
        """Replays of one CUDA graph that works on its own result."""
        torch.manual_seed(12)
        size = self._size // 2
        x = torch.randn(size, size, device=self._device, dtype=torch.bfloat16)
        weight = torch.randn(size, size, device=self._device, dtype=torch.bfloat16) * size**-0.5
        start = x.clone()

        def step() -> None:
            for _ in range(8):
                x.copy_(functional.layer_norm(functional.gelu(x @ weight), (size,)))

        replay: Callable[[], None] = self._captured(step) if self._cuda else step
        x.copy_(start)
        for _ in range(scale):
            replay()
        return [x]

    def _captured(self, step: Callable[[], None]) -> Callable[[], None]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        replay: Callable[[], None] = graph.replay
        return replay

    def train(self, scale: int) -> list[Tensor]:
        """Training of a small network: every weight, and the losses."""
        torch.manual_seed(13)
        width = self._width
        layers: list[nn.Module] = []
        for _ in range(6):
            layers += [nn.Linear(width, width), nn.LayerNorm(width), nn.GELU()]
        model = nn.Sequential(*layers).to(self._device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        given = torch.randn(4096 if self._cuda else 64, width, device=self._device)
        wanted = torch.sin(3 * given)
        losses = []
        for _ in range(scale):
            optimizer.zero_grad(set_to_none=True)
            loss = functional.mse_loss(model(given), wanted)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return [torch.stack(losses), *(parameter.detach() for parameter in model.parameters())]

    def run(self, words: list[str]) -> dict[str, Any]:
        """A job by its name and scale: the digest of its results, and the seconds it took."""
        began = time.monotonic()
        jobs = {"matmul": self.matmul, "graph": self.graph, "train": self.train}
        tensors = jobs[words[0]](int(words[1]))
        digest = hashlib.sha256()
        values = 0
        for tensor in tensors:
            values += tensor.numel()
            digest.update(tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes())
        finite = all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
        took = time.monotonic() - began
        return {"digest": digest.hexdigest(), "values": values, "finite": finite, "took_s": took}


def main() -> None:
    """Waits for commands."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--small", action="store_true", help="a size for trying it on a CPU")
    options = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    jobs = Jobs(options.device, options.small)
    for name in ("matmul", "graph", "train"):
        jobs.run([name, "2"])
    talk.ready()
    talk.answer({"run": jobs.run})


if __name__ == "__main__":
    main()
