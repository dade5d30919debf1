"""Few coefficients that do on real inputs what a weight change does, rather than those that are largest.

A layer's inputs `x` do not fill their space evenly. With their second moment `S = E[g g^T]`, `g = C_in x`, and the
spectrum `D` of the change, a sparse `F` misses of the layer's output

    E |(D - F) g|^2 = trace((D - F) S (D - F)^T)

which is least squares for each row of `F`. The places are found greedily, as in orthogonal matching pursuit (Pati et
al., 1993), a share of the budget at a time: the residual `R = (D - F) S` says by how much each coefficient would lower
the error, `R_rc^2 / S_cc`; then the values at all places so far are solved for anew.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 10  # in which the places are found; more gain little
_RIDGE = 1e-6  # of the mean of the diagonal, so that directions the inputs never take stay solvable


def fit_spectrum(change: Tensor, moment: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Places and values of `n` coefficients that miss little of `D g` on inputs of the second moment `S`.

    Args:
        change: the spectrum `D [d_out, d_in]`.
        moment: `S [d_in, d_in]`, symmetric and not negative; of the inputs' cosine transforms.
        n: how many, at most `d_out * d_in`.

    Returns:
        Flat places in ascending order, int64 `[n]`, and values, float32 `[n]`.
    """
    d_out, d_in = change.shape
    diagonal = moment.diagonal()
    ridge = _RIDGE * float(diagonal.mean()) or 1.0
    size = diagonal + ridge
    target = change.to(moment.dtype) @ moment
    fitted = torch.zeros_like(target)
    chosen = torch.zeros(d_out * d_in, dtype=torch.bool)
    for k in range(ROUNDS):
        more = n * (k + 1) // ROUNDS - n * k // ROUNDS
        if more:
            gain = ((target - fitted @ moment) ** 2 / size).reshape(-1)
            gain[chosen] = -1.0
            chosen[torch.topk(gain, more).indices] = True
            fitted = _solve(target, moment, chosen.view(d_out, d_in), ridge)
    places = torch.nonzero(chosen).reshape(-1)
    return places, fitted.reshape(-1)[places].float()


def _solve(target: Tensor, moment: Tensor, chosen: Tensor, ridge: float) -> Tensor:
    """Row by row the values at `chosen` that solve `F S = target` there; rows of one count are solved together."""
    fitted = torch.zeros_like(target)
    counts = chosen.sum(dim=1)
    for count in sorted(set(counts.tolist())):
        if not count:
            continue
        rows = torch.nonzero(counts == count).reshape(-1)
        cols = torch.nonzero(chosen[rows])[:, 1].view(len(rows), count)
        step = max(1, (1 << 24) // (count * count))
        for at in range(0, len(rows), step):
            row, col = rows[at : at + step, None], cols[at : at + step]
            system = moment[col[:, :, None], col[:, None, :]]
            system.diagonal(dim1=1, dim2=2).add_(ridge)
            fitted[row, col] = torch.linalg.solve(system, target[row, col])
    return fitted
