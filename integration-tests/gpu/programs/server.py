"""A PyTorch program like a server of a language model.

A decoder of 1.2 billion parameters in bfloat16. Requests arrive at random (Poisson,
from a seed) and are served one after the other: a prompt of 256 tokens at once, then
tokens one by one, each a replay of one CUDA graph.
"""

import argparse
import random
import time
from dataclasses import dataclass
from typing import Any

import talk
import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of a request."""

    layers: int
    width: int
    inner: int
    heads: int
    words: int
    prompt: int
    tokens: int

    @property
    def longest(self) -> int:
        """Places in the cache."""
        return self.prompt + self.tokens

    @property
    def parameters(self) -> int:
        """How many the model has."""
        return self.layers * (4 * self.width**2 + 3 * self.width * self.inner) + self.words * self.width


_LARGE = Shape(layers=22, width=2048, inner=5632, heads=16, words=32_000, prompt=256, tokens=48)
_SMALL = Shape(layers=2, width=128, inner=256, heads=4, words=500, prompt=16, tokens=6)


class Model:
    """Weights, the cache of one request, and one step of decoding over it."""

    def __init__(self, shape: Shape, device: str) -> None:
        self.shape, self._device = shape, device
        width, inner = shape.width, shape.inner
        self._embedding = self._weight(shape.words, width)
        self._layers = [
            {
                "before": torch.ones(width, device=device, dtype=torch.bfloat16),
                "attention": self._weight(3 * width, width),
                "output": self._weight(width, width),
                "between": torch.ones(width, device=device, dtype=torch.bfloat16),
                "up": self._weight(2 * inner, width),
                "down": self._weight(width, inner),
            }
            for _ in range(shape.layers)
        ]
        size = (shape.layers, 2, 1, shape.heads, shape.longest, width // shape.heads)
        self._cache = torch.zeros(size, device=device, dtype=torch.bfloat16)
        self._places = torch.arange(shape.longest, device=device)
        self.token = torch.zeros(1, device=device, dtype=torch.long)
        self.place = torch.zeros(1, device=device, dtype=torch.long)

    def _weight(self, rows: int, columns: int) -> Tensor:
        made = torch.randn(rows, columns, device=self._device, dtype=torch.bfloat16)
        return made.mul_(columns**-0.5)

    def _pass(self, words: Tensor, places: Tensor, mask: Tensor) -> Tensor:
        """These words at these places, over what the cache holds; the last one's scores."""
        shape = self.shape
        count, size = words.shape[0], shape.width // shape.heads
        x = functional.embedding(words, self._embedding)
        for layer, cache in zip(self._layers, self._cache, strict=True):
            y = functional.rms_norm(x, (shape.width,), layer["before"])
            parts = functional.linear(y, layer["attention"]).view(count, 3, 1, shape.heads, size)
            query, key, value = parts.permute(1, 2, 3, 0, 4)
            cache[0].index_copy_(2, places, key)
            cache[1].index_copy_(2, places, value)
            seen = functional.scaled_dot_product_attention(query, cache[0], cache[1], attn_mask=mask)
            x = x + functional.linear(seen.permute(2, 0, 1, 3).reshape(count, -1), layer["output"])
            y = functional.rms_norm(x, (shape.width,), layer["between"])
            gate, up = functional.linear(y, layer["up"]).chunk(2, dim=-1)
            x = x + functional.linear(functional.silu(gate) * up, layer["down"])
        last = functional.rms_norm(x[-1:], (shape.width,))
        return functional.linear(last, self._embedding)

    def read(self, prompt: Tensor) -> None:
        """The prompt; the first token is in `token`."""
        places = self._places[: prompt.shape[0]]
        mask = self._places[None, :] <= places[:, None]
        self.token.copy_(self._pass(prompt, places, mask).argmax(-1))
        self.place.fill_(prompt.shape[0])

    def step(self) -> None:
        """The next token from the one before."""
        mask = self._places[None, :] <= self.place[:, None]
        self.token.copy_(self._pass(self.token, self.place, mask).argmax(-1))
        self.place.add_(1)


class Server:
    """Serves requests and notes when each token was there."""

    def __init__(self, model: Model, cuda: bool) -> None:
        self._model, self._cuda = model, cuda
        generator = torch.Generator().manual_seed(1)
        words = torch.randint(model.shape.words, (model.shape.prompt,), generator=generator)
        self._prompt = words.to(model.token.device)
        for _ in range(3):
            model.read(self._prompt)
            model.step()
        self._decode = self._captured() if cuda else model.step

    def _captured(self) -> Any:
        """A step as one graph."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._model.step()
        torch.cuda.current_stream().wait_stream(side)
        self._model.read(self._prompt)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._model.step()
        return graph.replay

    def _now(self) -> float:
        """When all that was handed to the GPU is done, seconds."""
        if self._cuda:
            torch.cuda.synchronize()
        return time.monotonic()

    def _request(self) -> list[float]:
        """When each of its tokens was there."""
        self._model.read(self._prompt)
        times = [self._now()]
        for _ in range(self._model.shape.tokens - 1):
            self._decode()
            times.append(self._now())
        return times

    def run(self, words: list[str]) -> dict[str, Any]:
        """Requests for so many seconds, so many a second, from a seed; milliseconds from
        a request's arrival to its first token, and from each token to the next."""
        seconds, rate, seed = float(words[0]), float(words[1]), int(words[2])
        rng = random.Random(seed)
        first, next_, served = [], [], 0
        began = time.monotonic()
        arrival = began + rng.expovariate(rate)
        while arrival < began + seconds and time.monotonic() < began + seconds:
            time.sleep(max(arrival - time.monotonic(), 0))
            times = self._request()
            served += 1
            first.append((times[0] - arrival) * 1e3)
            next_ += [(b - a) * 1e3 for a, b in zip(times, times[1:], strict=False)]
            arrival += rng.expovariate(rate)
        return {"ttft_ms": first, "tpot_ms": next_, "served": served, "took_s": time.monotonic() - began}


def main() -> None:
    """Waits for commands."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--small", action="store_true", help="a size for trying it on a CPU")
    options = parser.parse_args()
    torch.manual_seed(1)
    torch.set_grad_enabled(False)
    model = Model(_SMALL if options.small else _LARGE, options.device)
    server = Server(model, options.device != "cpu")
    # A request from end to end before the first that counts.
    server.run(["0.3", "10", "1"])
    talk.ready(parameters=model.shape.parameters)
    talk.answer({"run": server.run})


if __name__ == "__main__":
    main()
