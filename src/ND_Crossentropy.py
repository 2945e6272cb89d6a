"""Cross-entropy losses. loss_base.py explains how they are called, and the symbols."""

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt

from loss_base import EPSILON, loss


@loss
def CrossentropyND(pixels):
    """Cross-entropy, the safe first choice. Small objects hardly count. Also named CE and BCE.
    Formula: mean(ce)"""
    return pixels.mean(pixels.ce)


CE, BCE = loss(CrossentropyND.formula, 'CE'), loss(CrossentropyND.formula, 'BCE')


@loss
def TopKLoss(pixels, k=10):
    """Cross-entropy of the k % worst pixels of each image. Take it if most pixels are easy.
    Formula: mean(ce) over the worst pixels, at least one. Pixels that tie for last share a place.
    Reference: Wu et al. 2016, arXiv 1605.06885"""
    places = (pixels.count.double() * k / 100).long().clamp_min(1)[:, None]
    ce = pixels.ce.detach().masked_fill(~pixels.valid, -1)
    most = max(1, int(ce.shape[1] * k / 100))  # at least `places`, without waiting for the GPU
    last = ce.topk(most).values.gather(1, places - 1)
    above, tied = ce > last, ce == last
    share = (places - above.sum(1, keepdim=True)) / tied.sum(1, keepdim=True)
    return pixels.mean(pixels.ce, above + tied * share.to(ce))


@loss
def WeightedCrossEntropyLoss(pixels, weights=None):
    """Cross-entropy with weights per class. Take it for classes of known, unequal frequency.
    Formula: sum(w_y ce) / sum(w_y). CLASSES=1 takes two weights: [background, foreground].
    Reference: Ronneberger et al. 2015, arXiv 1505.04597"""
    w = pixels.log_p.new_tensor(weights or [1] * pixels.log_p.shape[1])
    return pixels.mean(pixels.ce, w[pixels.target])


@loss
def WeightedCrossEntropyLossV2(pixels):
    """Cross-entropy weighted by the prediction. Take it for classes of unknown frequency.
    Formula: sum(w_y ce) / sum(w_y), w = sum(1 - p) / sum(p). The gradient includes that of w.
    Reference: Sudre et al. 2017, arXiv 1707.03237 (divides by P; background weight 1 if binary)"""
    valid = pixels.valid[:, None]
    own = (pixels.p * valid).sum(2).clamp_min(1e-6)
    rest = ((1 - pixels.p) * valid).sum(2).clamp_min(1e-6)
    return pixels.mean(pixels.ce, (rest / own).gather(1, pixels.target))


@loss
def DisPenalizedCE(pixels):
    """Cross-entropy with more weight near outlines. Slow: 0.3 s per 1280x1918 mask, on the CPU.
    Formula: mean((1 + phi) ce), phi falls from 1 at a region's edge to 0 at its deepest pixel.
    Reference: Caliva et al. 2019, arXiv 1908.03679"""
    phis = np.zeros(pixels.mask_shape)
    masks, valids = (v.reshape(phis.shape).cpu().numpy() for v in (pixels.target, pixels.valid))
    for phi, mask, valid in zip(phis, masks, valids):
        labels = np.unique(mask[valid])
        for label in labels if len(labels) > 1 else ():  # a mask of one label has no edge
            region = (mask == label) & valid
            depth = distance_transform_edt(region | ~valid)[region]  # ignored pixels are no edge
            phi[region] = (depth.max() - depth) / np.ptp(depth) if np.ptp(depth) else 1
    return pixels.mean((1 + torch.from_numpy(phis).flatten(1).to(pixels.ce)) * pixels.ce)


@loss
def FocalLoss(pixels, gamma=2.0, alpha=None):
    """Cross-entropy with less weight on easy pixels. Take it for few hard among many easy pixels.
    Formula: mean((1 - p_y)^gamma ce); times alpha in the foreground, 1 - alpha outside, if given
    Reference: Lin et al. 2017, arXiv 1708.02002"""
    focus = (-torch.expm1(-pixels.ce)).clamp_min(EPSILON) ** gamma
    if alpha is not None:
        focus = focus * torch.where(pixels.target > 0, alpha, 1 - alpha).to(focus)
    return pixels.mean(focus * pixels.ce)
