"""Response normalisation across maps on a CPU: parts that fit the cache, in buffers that are kept.

A window over neighbouring maps is a shift by a constant distance in memory, whichever way the maps lie: the pixels of a map
apart in the default format, one value apart in channels-last. So a part is written once into a buffer with room for the
windows' ends between its runs of maps, and from there on all is plain vectors; what is computed in the gaps is never read.
Buffers are kept because the pages of a fresh one cost several times what is then computed in it.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

MOST_KEPT = 16                  # kinds of runs, a few megabytes each; a network has two
_kept = threading.local()      # two threads may each train a network


def runs_of(x: Tensor) -> Tensor:
    """A dense (N, C, ...) as (runs, C, distance of neighbouring maps); images are whole numbers of runs."""
    if x.is_contiguous():
        return x.flatten(2) if x.ndim > 2 else x.unsqueeze(2)
    return x.movedim(1, -1).flatten(0, -2).unsqueeze(2)


def dense(x: Tensor) -> Tensor:
    """`x` where `runs_of` takes it as it is, in the default format or channels-last; otherwise a copy that it takes."""
    return x if x.is_contiguous() or x.movedim(1, -1).is_contiguous() else x.contiguous()


def laid_out_like(x: Tensor, other: Tensor) -> Tensor:
    """`x` with the runs of the dense `other`."""
    return x.contiguous() if other.is_contiguous() else x.movedim(1, -1).contiguous().movedim(-1, 1)


class Window:
    """The norm y = x d^-beta, d = k + alpha * sum of x^2 over `size` maps, for runs (runs, `maps`, `distance`) in `dtype`."""

    def __init__(self, maps: int, distance: int, dtype: torch.dtype, size: int, k: float, alpha: float, beta: float) -> None:
        with torch.inference_mode(False):
            self.share = torch.tensor(k / size, dtype=dtype)      # of k in every term, so that the sum of a window is d
        self.maps, self.distance, self.dtype, self.size, self.alpha, self.beta = maps, distance, dtype, size, alpha, beta
        self.pitch = maps + size - 1
        self.runs = 0

    def reserve(self, runs: int) -> None:
        """Makes room. The gaps of `squares` and `products` are set here once, and never written again."""
        if runs <= self.runs:
            return
        self.runs = runs
        with torch.inference_mode(False):      # what is made in inference could not be written to in training
            self.squares = self.share.repeat(runs * self.pitch * self.distance)
            self.products = torch.zeros_like(self.squares)
            self.a, self.b, self.c = (torch.empty_like(self.squares) for _ in range(3))
            self.wide = [self.squares.new_empty(runs, self.maps, self.distance) for _ in range(3)]

    def forward(self, x: Tensor, y: Tensor) -> None:
        """x (runs, maps, distance) -> y, of the same shape; both of `dtype` or narrower. There is a run at least."""
        self.reserve(len(x))
        x, out = self._widened(x, 0), self._room_for(y)
        self._denominator(x)
        torch.div(x, self._results(self._power(self.a, self.b), len(x)), out=out)
        if out is not y:
            y.copy_(out)

    def backward(self, x: Tensor, gradient: Tensor, dx: Tensor) -> None:
        """gradient -> dx = g d^-beta - 2 alpha beta x sum over the window of g x d^-(beta + 1)."""
        runs = len(x)
        self.reserve(runs)
        x, gradient, out = self._widened(x, 0), self._widened(gradient, 1), self._room_for(dx)
        self._denominator(x)
        inverse = torch.reciprocal(self._power(self.a, self.b), out=self.c)    # d^-beta
        further = torch.div(inverse, self.a, out=self.a)
        products = self._terms(self.products, runs)
        torch.mul(gradient, x, out=products).mul_(self._results(further, runs))
        self._sum(self.products, self.b, self.a, runs)
        torch.mul(gradient, self._results(inverse, runs), out=out).addcmul_(x, self._results(self.a, runs), value=-2 * self.alpha * self.beta)
        if out is not dx:
            dx.copy_(out)

    def _widened(self, x: Tensor, number: int) -> Tensor:
        """Half precision would overflow in x^2."""
        return x if x.dtype == self.dtype else self.wide[number][:len(x)].copy_(x)

    def _room_for(self, result: Tensor) -> Tensor:
        return result if result.dtype == self.dtype else self.wide[2][:len(result)]

    def _denominator(self, x: Tensor) -> None:
        """d into `a`."""
        torch.addcmul(self.share, x, x, value=self.alpha, out=self._terms(self.squares, len(x)))
        self._sum(self.squares, self.b, self.a, len(x))

    def _power(self, d: Tensor, target: Tensor) -> Tensor:
        """d^beta into `target`; 0.75 is a root of a root times a root, many times as fast as a power."""
        if self.beta != 0.75:
            return torch.pow(d, self.beta, out=target)
        root = torch.sqrt(d, out=self.c)
        return torch.sqrt(root, out=target).mul_(root)

    def _sum(self, terms: Tensor, spare: Tensor, target: Tensor, runs: int) -> None:
        """target[i] = terms[i] + terms[i + distance] + ..., `size` of them."""
        step, length = self.distance, (runs * self.pitch - self.size + 1) * self.distance
        target = target[:length]
        if self.size == 5:                                                     # five terms in three additions
            pairs = torch.add(terms[:length + 2 * step], terms[step:length + 3 * step], out=spare[:length + 2 * step])
            torch.add(pairs[:length], pairs[2 * step:], out=target).add_(terms[4 * step:4 * step + length])
            return
        target.copy_(terms[:length])
        for shift in range(step, self.size * step, step):
            target += terms[shift:shift + length]

    def _terms(self, buffer: Tensor, runs: int) -> Tensor:
        """Where the terms of a run stand: behind half a window's gap."""
        whole = buffer[:runs * self.pitch * self.distance].view(runs, self.pitch, self.distance)
        return whole[:, self.size // 2:self.size // 2 + self.maps]

    def _results(self, buffer: Tensor, runs: int) -> Tensor:
        """Where the sums of the windows around the maps of a run stand."""
        return buffer[:runs * self.pitch * self.distance].view(runs, self.pitch, self.distance)[:, :self.maps]


def window(x: Tensor, size: int, k: float, alpha: float, beta: float) -> Window:
    """This thread's buffers for runs like `x`."""
    dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    key = (x.shape[1], x.shape[2], dtype, size, k, alpha, beta)
    kept = _kept.__dict__
    if key not in kept:
        if len(kept) >= MOST_KEPT:
            kept.clear()
        kept[key] = Window(*key)
    return kept[key]
