"""Cross-entropy losses. loss_base.py says how a loss is called and what holds for all."""

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt

from loss_base import EPSILON, loss


@loss
def CrossentropyND(px):
    """mean(ce), torch's cross-entropy image by image. The safe first choice: a gradient everywhere,
    but small objects hardly count. Also named CE and, for CLASSES=1 alone, BCE."""
    return px.mean(px.ce)


CE, BCE = loss(CrossentropyND.formula, 'CE'), loss(CrossentropyND.formula, 'BCE')


@loss
def TopKLoss(px, k=10):
    """Mean ce of the k % worst pixels of each image (rounded down, at least one): where most pixels
    are easy. Pixels that tie for the last places share them. Wu et al. 2016 (arXiv 1605.06885)."""
    places = (px.count.double() * k / 100).long().clamp_min(1)[:, None]
    ce = px.ce.detach().masked_fill(~px.keep, -1)
    most = max(1, int(ce.shape[1] * k / 100))  # known without asking the device
    last = ce.topk(most).values.gather(1, places - 1)
    above, tied = ce > last, ce == last
    share = (places - above.sum(1, keepdim=True)) / tied.sum(1, keepdim=True)
    return px.mean(px.ce, above + tied * share.to(ce))


@loss
def WeightedCrossEntropyLoss(px, weights=None):
    """sum(w_y ce) / sum(w_y), torch's weighted mean image by image; weights: a number per class
    ([background, foreground] for CLASSES=1), None = all 1. For classes of known, unequal frequency.
    Ronneberger et al. 2015 (arXiv 1505.04597)."""
    w = px.log_p.new_tensor(weights or [1] * px.log_p.shape[1])
    return px.mean(px.ce, w[px.target])


@loss
def WeightedCrossEntropyLossV2(px):
    """sum(w_y ce) / sum(w_y), w = (P - sum(p)) / sum(p) of the image's own prediction: for classes
    of unknown frequency. Sudre et al. 2017 (arXiv 1707.03237); they divide by P, which has no
    bound, and leave the background of CLASSES=1 at 1. The gradient includes that of w."""
    own, rest = ((v * px.keep[:, None]).sum(2).clamp_min(1e-6) for v in (px.p, 1 - px.p))
    return px.mean(px.ce, (rest / own).gather(1, px.target))


@loss
def DisPenalizedCE(px):
    """mean((1 + phi) ce), phi falling from 1 at the boundary of a region to 0 deepest inside: for
    sharp outlines. Ignored pixels are no boundary; a mask of one label has none. phi is made on
    the CPU, some 0.3 s for 1280x1918. Caliva et al. 2019 (arXiv 1908.03679)."""
    phis = np.zeros(px.size)
    masks, keeps = (v.reshape(px.size).cpu().numpy() for v in (px.target, px.keep))
    for phi, mask, keep in zip(phis, masks, keeps):
        labels = np.unique(mask[keep])
        for label in labels if len(labels) > 1 else ():
            region = (mask == label) & keep
            depth = distance_transform_edt(region | ~keep)[region]
            phi[region] = (depth.max() - depth) / np.ptp(depth) if np.ptp(depth) else 1
    return px.mean((1 + torch.from_numpy(phis).flatten(1).to(px.ce)) * px.ce)


@loss
def FocalLoss(px, gamma=2.0, alpha=None):
    """mean((1 - p_y)^gamma ce), times alpha in the foreground and 1 - alpha outside if given: for few
    hard among many easy pixels. Lin et al. 2017 (arXiv 1708.02002). smp's is the same on one image
    of CLASSES=1; for more it takes sigmoids, and with ignored pixels it pools the batch."""
    focus = (-torch.expm1(-px.ce)).clamp_min(EPSILON) ** gamma
    if alpha is not None:
        focus = focus * torch.where(px.target > 0, alpha, 1 - alpha).to(focus)
    return px.mean(focus * px.ce)
